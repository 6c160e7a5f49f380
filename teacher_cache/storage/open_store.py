"""Opens the store that a path or URL names."""

import re
from pathlib import Path

from teacher_cache.storage.local_store import LocalStore
from teacher_cache.storage.store import Location, Store


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def open_store(location: Location) -> Store:
    """The store at a folder or URL, which need not exist yet.

    ValueError for a URL whose library is missing, or that went through a Path.
    """
    if isinstance(location, Store):
        return location
    if is_url(location):
        scheme, _, rest = str(location).partition("://")
        if scheme in ("file", "local"):
            return LocalStore(Path(rest))
        from teacher_cache.storage.object_store import ObjectStore

        return ObjectStore(str(location))
    if re.match(r"[a-z0-9+]{2,}:/", str(location)):
        raise ValueError(f"{location}: a Path cannot hold a URL (// became /); give it as text")
    return LocalStore(Path(location))
