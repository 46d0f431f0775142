/* Loaded before libc (LD_PRELOAD): the n-th call of a command fails, or a signal comes with it.

   Counted are the calls below, in the order in which they happen, from `harness_arm` on. A close
   that fails has closed all the same, as Linux does it; every other one that fails did nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed, seen, fail_at, variant, sticky, signal_number, no_links, log_fd = -1;
static const char *failing;

void harness_arm(int at, int which, int sticks, int number, int without, const char *log) {
    fail_at = at, variant = which, sticky = sticks, signal_number = number, no_links = without;
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    armed = 1;
}

/* The error that this call is to fail with, or 0. */
static int step(const char *name, int fd, int first, int second) {
    char line[64];
    if (!armed) return 0;
    int saved = errno, now = __sync_add_and_fetch(&seen, 1);
    int length = snprintf(line, sizeof line, "%s %d\n", name, fd);
    syscall(SYS_write, log_fd, line, length);
    errno = saved;
    if (no_links && (!strcmp(name, "link") || !strcmp(name, "renameat2"))) return first;
    if (signal_number) {
        if (now == fail_at) syscall(SYS_kill, getpid(), signal_number);
        return 0;
    }
    if (now == fail_at) failing = name;
    if (now == fail_at || (sticky && failing == name)) return variant ? second : first;
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(type, name, as, fd, first, second, parameters, arguments)          \
    type name parameters {                                                      \
        static __typeof__(&name) real;                                          \
        int error = step(as, fd, first, second);                                \
        if (error) { errno = error; return (type)-1; }                          \
        if (!real) real = REAL(name);                                           \
        return real arguments;                                                  \
    }
#define BOTH(type, name, other, ...) CALL(type, name, __VA_ARGS__) CALL(type, other, __VA_ARGS__)

BOTH(ssize_t, pwrite, pwrite64, "pwrite", fd, ENOSPC, EIO,
     (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
BOTH(ssize_t, preadv, preadv64, "read", fd, EIO, ESTALE,
     (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at))
BOTH(ssize_t, preadv2, preadv64v2, "read", fd, EIO, ESTALE,
     (int fd, const struct iovec *parts, int n, off_t at, int flags), (fd, parts, n, at, flags))
BOTH(int, ftruncate, ftruncate64, "ftruncate", fd, EFBIG, EIO, (int fd, off_t n), (fd, n))
BOTH(int, fallocate, fallocate64, "fallocate", fd, ENOSPC, EOPNOTSUPP,
     (int fd, int mode, off_t at, off_t n), (fd, mode, at, n))
CALL(int, statvfs, "statvfs", -1, ENOSYS, EIO, (const char *path, struct statvfs *into),
     (path, into))
CALL(int, statvfs64, "statvfs", -1, ENOSYS, EIO, (const char *path, struct statvfs64 *into),
     (path, into))
CALL(int, fstatvfs, "statvfs", fd, ENOSYS, EIO, (int fd, struct statvfs *into), (fd, into))
CALL(int, fstatvfs64, "statvfs", fd, ENOSYS, EIO, (int fd, struct statvfs64 *into), (fd, into))
CALL(ssize_t, read, "read", fd, EIO, ESTALE, (int fd, void *data, size_t n), (fd, data, n))
CALL(ssize_t, write, "write", fd, ENOSPC, EIO, (int fd, const void *data, size_t n), (fd, data, n))
CALL(int, fsync, "fsync", fd, EIO, EINVAL, (int fd), (fd))
CALL(int, fchmod, "fchmod", fd, EPERM, EIO, (int fd, mode_t mode), (fd, mode))
CALL(int, rename, "rename", -1, EACCES, EIO, (const char *a, const char *b), (a, b))
CALL(int, renameat2, "renameat2", -1, EINVAL, ENOSYS,
     (int from, const char *a, int to, const char *b, unsigned int flags), (from, a, to, b, flags))
CALL(int, link, "link", -1, EPERM, EIO, (const char *a, const char *b), (a, b))
CALL(int, unlink, "unlink", -1, EACCES, EIO, (const char *path), (path))
CALL(int, sync_file_range, "sync_file_range", fd, EINVAL, EIO,
     (int fd, off_t at, off_t n, unsigned int flags), (fd, at, n, flags))

int close(int fd) {
    int error = step("close", fd, EIO, ENOSPC), result = syscall(SYS_close, fd);
    if (!error) return result;
    errno = error;
    return -1;
}

/* It returns its error. */
int posix_fadvise64(int fd, off_t at, off_t n, int advice) {
    int error = step("fadvise", fd, EINVAL, ENOSYS);
    return error ? error : syscall(SYS_fadvise64, fd, at, n, advice) ? errno : 0;
}
int posix_fadvise(int fd, off_t at, off_t n, int advice) {
    return posix_fadvise64(fd, at, n, advice);
}

static int opened(const char *path, int flags, mode_t mode) {
    int error = step("open", -1, EACCES, EMFILE);
    if (!error) return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    errno = error;
    return -1;
}
#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = va_arg(rest, mode_t);                                     \
        va_end(rest);                                                           \
        return opened(path, flags, mode);                                       \
    }
OPEN(open)
OPEN(open64)
