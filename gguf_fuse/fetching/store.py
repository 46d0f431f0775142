"""Objects of S3, Google's and Azure's stores, by obstore. Credentials are those of the environment.

Needs the extra `s3`.
"""

from __future__ import annotations

import importlib
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from gguf_fuse.fetching.address import shown
from gguf_fuse.fetching.place import Changed, FetchError, Place, Stop, fetched

# What obstore tries again by itself: 5xx, connections that are refused or break, no answer; the
# waits grow from 0.1 s to 15 s.
_RETRY = {"max_retries": 5, "retry_timeout": timedelta(minutes=3)}


def find(address: str) -> Place:
    """Raises FetchError where there is no such object, or it may not be read."""
    parts = urlsplit(address)
    key = parts.path.lstrip("/")
    if not parts.netloc or not key:
        raise FetchError(f"an address of a store is {parts.scheme}://bucket/key")
    library = _library()
    try:
        made = library.store.from_url(f"{parts.scheme}://{parts.netloc}", retry_config=_RETRY)
        facts = library.head(made, key)
    except Exception as error:
        raise FetchError(_words(error)) from error
    n_bytes, version = int(facts["size"]), facts["e_tag"]
    if not version:
        raise FetchError("the store tells no version (ETag) of it")
    return Place(
        shown(address), n_bytes, version, open=lambda: _Ranges(library, made, key, version, n_bytes)
    )


class _Ranges:
    def __init__(self, library: Any, made: Any, key: str, version: str, total: int) -> None:
        self._library, self._store, self._key = library, made, key
        self._version, self._total, self._stop = version, total, Stop()

    def read_into(self, view: memoryview, start: int) -> None:
        if not view:
            return
        self._stop.wait(0)
        stop = start + len(view)
        try:
            options = {"range": (start, stop), "if_match": self._version}
            result = self._library.get(self._store, self._key, options=options)
            facts, told, data = result.meta, result.range, memoryview(result.bytes())
        except Exception as error:
            if type(error).__name__ == "PreconditionError":
                raise Changed from error
            raise FetchError(_words(error)) from error
        if facts["e_tag"] != self._version or facts["size"] != self._total:
            raise Changed
        if tuple(told) != (start, stop) or len(data) != len(view):
            raise FetchError(f"asked for bytes {start}-{stop - 1}, got {len(data)} bytes")
        view[:] = data
        fetched.add(len(view))

    def abort(self) -> None:
        self._stop.set()


def _library() -> Any:
    try:
        importlib.import_module("obstore.store")
        return importlib.import_module("obstore")
    except ImportError as error:
        raise FetchError("stores need obstore: pip install 'gguf-fuse[s3]'") from error


def _words(error: Exception) -> str:
    """One line, without the addresses and keys that a server's answer may repeat."""
    name, status = type(error).__name__, re.search(r"status:? (\d{3})", str(error))
    code = status[1] if status else ""
    if name == "NotFoundError" or code == "404":
        return "no such object"
    if name in ("PermissionDeniedError", "UnauthenticatedError") or code in ("401", "403"):
        return "access denied: are the credentials in the environment those of its owner?"
    return f"the store says {code}" if code else f"the store does not answer ({name})"
