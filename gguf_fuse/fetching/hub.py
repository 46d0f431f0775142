"""Files of a hub: hf://owner/repo[@revision]/path. Tokens are those that its own tools keep.

Needs the extra `hf`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from gguf_fuse.fetching import http
from gguf_fuse.fetching.place import FetchError, Place

_ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_REPOSITORY = re.compile(r"hf:([^/@]+/[^/@]+)(?:@([^/]+))?/?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def find(address: str) -> Place:
    """Raises FetchError where there is no such file, or it may not be read."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise FetchError("an address of the hub is hf://owner/repo[@revision]/path/in/it.gguf")
    hub = _library()
    repo, revision, path = match[1], match[2], match[3]
    token = hub.get_token()
    try:
        url = hub.hf_hub_url(repo, path, revision=revision)
        facts = hub.get_hf_file_metadata(url, token=token)
    except Exception as error:
        raise FetchError(_words(hub, error)) from error
    # The very commit: whatever is pushed meanwhile, all ranges are of one file.
    fixed = hub.hf_hub_url(repo, path, revision=facts.commit_hash or revision)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    sha256 = facts.etag if facts.etag and _SHA256.fullmatch(facts.etag) else None
    found = http.find(fixed, headers, sha256)
    if facts.size is not None and found.n_bytes != facts.size:
        raise FetchError(f"has {found.n_bytes} bytes where the hub says {facts.size}")
    revision = facts.commit_hash
    return Place(address, found.n_bytes, found.version, sha256, revision, open=found.open)


def is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None


def files(name: str) -> Iterator[str]:
    """Addresses of every GGUF of a repository, in order. Raises FetchError as `find` does."""
    match = _REPOSITORY.fullmatch(name)
    assert match is not None
    hub = _library()
    repo, revision = match[1], match[2]
    at = "" if revision is None else f"@{revision}"
    try:
        for entry in hub.HfApi().list_repo_tree(repo, revision=revision, recursive=True):
            if entry.path.endswith(".gguf"):
                yield f"hf://{repo}{at}/{entry.path}"
    except Exception as error:
        raise FetchError(_words(hub, error)) from error


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise FetchError("hf:// needs the hub's library: pip install 'gguf-fuse[hf]'") from error


def _words(hub: Any, error: Exception) -> str:
    """One line; those of the library have many, and addresses with what was signed."""
    kinds = (
        ("GatedRepoError", "gated: ask for access on its page, then log in (hf auth login)"),
        ("RepositoryNotFoundError", "no such repository, or it is private: hf auth login"),
        ("RevisionNotFoundError", "no such revision"),
        ("EntryNotFoundError", "no such file in the repository"),
    )
    for name, words in kinds:
        if isinstance(error, getattr(hub.errors, name)):
            return words
    status = getattr(getattr(error, "response", None), "status_code", None)
    return (
        f"the hub says {status}" if status else f"the hub does not answer: {type(error).__name__}"
    )
