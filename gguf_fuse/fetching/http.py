"""Ranges by HTTP, with the standard library: one connection for each thread, kept open.

What every answer must be, else it is none: status 206, the very range (RFC 9110, 14.4), the total
size and the version that were there at the start.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import netrc
import os
import random
import re
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from urllib.parse import SplitResult, urljoin, urlsplit

from gguf_fuse import __version__
from gguf_fuse.fetching.address import shown
from gguf_fuse.fetching.place import Changed, FetchError, Place, Stop, fetched, waits

TIMEOUT_S = 30.0  # without a byte
TRIES = 6
TRIES_TO_BEGIN = 2  # where nobody answers yet, waiting seldom helps
FIRST_WAIT_S = 0.5  # doubled with each try
LONGEST_WAIT_S = 120.0  # that a server may ask for
MOST_REDIRECTS = 8

_AGAIN = {408, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}
_LOST = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, OSError)

Headers = Mapping[str, str]


class _TryAgain(Exception):
    """A failure that may pass. wait: seconds that the server asks for."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _Unreachable(_TryAgain):
    """There is no connection."""


@dataclass(frozen=True)
class _Answer:
    """Of a request for a range: the version, the whole size, and the body, not yet read."""

    version: str
    total: int
    response: http.client.HTTPResponse


def find(url: str, headers: Headers | None = None, sha256: str | None = None) -> Place:
    """The version that lies there; headers: beyond what every request has, credentials say.

    Raises FetchError where nothing is there, or the server gives no ranges or no version.
    """
    if urlsplit(url).username is not None:
        raise FetchError("a password does not belong into an address; ~/.netrc may have it")
    make = partial(_Session, url, headers or _credentials(url))
    idle = [make()]
    answer = idle[0].ask(Stop())
    place = partial(_Ranges, make, idle, answer.version, answer.total)
    return Place(shown(url), answer.total, answer.version, sha256, open=place)


class _Ranges:
    """idle: sessions whose connections are open still, of whoever reads from this place."""

    def __init__(
        self, make: Callable[[], _Session], idle: list[_Session], version: str, total: int
    ) -> None:
        self._make, self._idle, self._version, self._total = make, idle, version, total
        self._stop, self._busy = Stop(), set[_Session]()

    def read_into(self, view: memoryview, start: int) -> None:
        if not view:
            return
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._make()
        self._busy.add(session)
        try:
            session.read_into(view, start, self._version, self._total, self._stop)
        finally:
            self._busy.discard(session)
        fetched.add(len(view))
        self._idle.append(session)

    def abort(self) -> None:
        self._stop.set()
        for session in list(self._busy):
            session.break_off()


class _Session:
    """A connection to wherever the address led to, for one thread at a time."""

    def __init__(self, url: str, headers: Headers) -> None:
        self._first, self._headers = url, headers
        self._url = url
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, stop: Stop) -> _Answer:
        """What lies there, after the tries that are worth it."""
        found: list[_Answer] = []

        def act() -> None:
            answer = self._ask(0, 1, None)
            answer.response.read()
            found.append(answer)

        self._tried(act, lambda: 0, stop, TRIES_TO_BEGIN)
        return found[0]

    def read_into(self, view: memoryview, start: int, version: str, total: int, stop: Stop) -> None:
        """What came of a try that broke off is kept: the next one asks for the rest."""
        done = 0

        def fill() -> None:
            nonlocal done
            answer = self._ask(start + done, len(view) - done, version)
            if answer.total != total:
                raise Changed
            while done < len(view):
                stop.wait(0)
                n_bytes = answer.response.readinto(view[done:])
                if n_bytes == 0:
                    raise _TryAgain(f"broke off at byte {start + done}")
                done += n_bytes
            answer.response.read()  # its end, so that the connection can be used again

        self._tried(fill, lambda: done, stop)

    def _tried(
        self,
        act: Callable[[], None],
        progress: Callable[[], int],
        stop: Stop,
        tries_to_connect: int = TRIES,
    ) -> None:
        """Tries count from the last one that brought something."""
        left, before = TRIES, progress()
        while True:
            stop.wait(0)
            was_open = self._connection is not None
            try:
                return act()
            except FetchError:
                self.close()
                raise
            except (_TryAgain, *_LOST) as error:
                self.close()
                if was_open and not isinstance(error, _TryAgain):
                    continue  # the server closed what was idle
                if progress() > before:
                    left, before = TRIES, progress()
                left -= 1
                tries = tries_to_connect if isinstance(error, _Unreachable) else TRIES
                if TRIES - left >= tries:
                    raise FetchError(f"{_words(error)} ({TRIES - left} tries)") from error
                wait = FIRST_WAIT_S * 2 ** (TRIES - 1 - left) * random.uniform(1, 1.3)
                wait = getattr(error, "wait", None) or wait
                waits.begin(f"{shown(self._first)}: {_words(error)}", wait)
                stop.wait(wait)

    def break_off(self) -> None:
        """Called by another thread than the one that waits here: for 30 s, if need be."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS has nothing to say to it

    def close(self) -> None:
        """The next request begins where the address itself leads."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._url = None, self._first

    def _ask(self, start: int, n_bytes: int, version: str | None) -> _Answer:
        headers = {"Range": f"bytes={start}-{start + n_bytes - 1}"}
        if version is not None and version.startswith('"'):
            headers["If-Match"] = version
        elif version is not None and not version.startswith("W/"):
            headers["If-Unmodified-Since"] = version
        response = self._followed(headers)
        self._refuse(response, headers)
        return self._checked(response, start, n_bytes, version)

    def _followed(self, headers: Headers) -> http.client.HTTPResponse:
        for _ in range(MOST_REDIRECTS):
            response = self._send(headers)
            if response.status not in _REDIRECTS:
                return response
            response.read()
            self._redirect(response.headers.get("Location", ""))
        raise FetchError(f"more than {MOST_REDIRECTS} redirects")

    def _redirect(self, location: str) -> None:
        """Elsewhere, without the credentials unless it is the same host."""
        url = urljoin(self._url, location)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FetchError(f"the server leads to {shown(url)!r}, which is no address")
        if urlsplit(self._url).scheme == "https" and parts.scheme != "https":
            raise FetchError(f"the server leads from https to {shown(url)}, which is not safe")
        if _origin(parts) != _origin(urlsplit(self._url)) and self._connection is not None:
            self._connection.close()
            self._connection = None
        self._url = url

    def _send(self, headers: Headers) -> http.client.HTTPResponse:
        parts = urlsplit(self._url)
        own = self._headers if _origin(parts) == _origin(urlsplit(self._first)) else {}
        fixed = {"Accept-Encoding": "identity", "User-Agent": f"gguf-fuse/{__version__}"}
        if self._connection is None:
            self._connection = _connected(parts)
        if self._connection.sock is None:
            self._connect(self._connection)
        target = parts.path or "/"
        if parts.query:
            target += f"?{parts.query}"
        self._connection.request("GET", target, headers={**fixed, **own, **headers})
        return self._connection.getresponse()

    @staticmethod
    def _connect(connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise FetchError(_words(error)) from error
        except OSError as error:
            raise _Unreachable(_words(error)) from error

    def _refuse(self, response: http.client.HTTPResponse, headers: Headers) -> None:
        status = response.status
        if status == 412:
            raise Changed
        if status in _AGAIN:
            asked = response.headers.get("Retry-After")
            raise _TryAgain(f"the server says {status} {response.reason}", _seconds(asked))
        if status in (401, 403) and self._url != self._first:  # a signed address that has ended
            raise _TryAgain(f"{shown(self._url)} says {status} {response.reason}")
        if status in (401, 403):
            raise FetchError(f"the server says {status} {response.reason}: who may read it?")
        if status == 416:
            raise Changed if "If-Match" in headers else FetchError("it is empty")
        if status == 200:
            raise FetchError(
                "the server sends the whole file where a part was asked for: it gives no ranges; "
                "download the file"
            )
        if status != 206:
            raise FetchError(f"the server says {status} {response.reason}")

    def _checked(
        self, response: http.client.HTTPResponse, start: int, n_bytes: int, version: str | None
    ) -> _Answer:
        told = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
        last = start + n_bytes - 1
        if match is None or (int(match[1]), int(match[2])) != (start, last):
            raise FetchError(f"asked for bytes {start}-{last}, the server sent {told[:60]!r}")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(n_bytes):
            raise FetchError(f"asked for {n_bytes} bytes, the server sends {length[:20]}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise FetchError("the server sends it compressed, though it was asked not to")
        found = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if found is None:
            raise FetchError("the server tells no version (ETag) of it; download the file")
        if version is not None and found != version:
            raise Changed
        return _Answer(found, int(match[3]), response)


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port


def _connected(parts: SplitResult) -> http.client.HTTPConnection:
    """Through a proxy where the environment names one."""
    host, port = parts.hostname or "", parts.port
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is None or urllib.request.proxy_bypass(host):
        return _connection(parts.scheme, host, port)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    made = _connection(parts.scheme, through.hostname or "", through.port)
    own = through.username and b64encode(f"{through.username}:{through.password}".encode())
    made.set_tunnel(host, port, {"Proxy-Authorization": f"Basic {own.decode()}"} if own else {})
    return made


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=_tls())
    return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _credentials(url: str) -> Headers:
    """From where other tools keep them: NETRC, or ~/.netrc."""
    found = None
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or "")
    if found is None:
        return {}
    return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}


def _seconds(asked: str | None) -> float | None:
    """What Retry-After says: a number of seconds, or a date."""
    if asked is None:
        return None
    if asked.isdigit():
        return min(float(asked), LONGEST_WAIT_S)
    with contextlib.suppress(ValueError):
        date = email.utils.parsedate_to_datetime(asked).timestamp()
        return min(max(date - time.time(), 0.0), LONGEST_WAIT_S)
    return None


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return f"no answer for {TIMEOUT_S:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
