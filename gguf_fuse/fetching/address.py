"""Address -> Place: who is asked is decided by how the address begins."""

from __future__ import annotations

import re

from gguf_fuse.fetching.place import FetchError, Place

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_STORES = ("s3", "gs", "az")


def find(address: str) -> Place:
    """Which version lies there. Raises FetchError where there is none, or nobody can be asked."""
    match = _SCHEME.match(address)
    scheme = match[1].lower() if match else ""
    if scheme in ("http", "https"):
        from gguf_fuse.fetching import http

        return http.find(address)
    if scheme == "hf":
        from gguf_fuse.fetching import hub

        return hub.find(address)
    if scheme in _STORES:
        from gguf_fuse.fetching import store

        return store.find(address)
    known = ", ".join(f"{known}://" for known in ("https", "hf", *_STORES))
    raise FetchError(f"{scheme}:// is not known; addresses begin with {known}")


def expand(name: str) -> list[str]:
    """Of a whole repository (hf:owner/repo), the addresses of its GGUF files; any name as it is.

    Raises FetchError as `find` does.
    """
    if not name.startswith("hf:"):
        return [name]
    from gguf_fuse.fetching import hub

    return list(hub.files(name)) if hub.is_repository(name) else [name]


def shown(address: str) -> str:
    """Without what may be a secret: a password, the query of a signed address."""
    clean = re.sub(r"(://)[^/?#]*@", r"\1", address)
    return re.sub(r"[?#].*", "", clean, flags=re.DOTALL)
