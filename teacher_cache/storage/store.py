"""Where the files of a cache lie: on a disk or in an object store, whole or not there.

Promises: a name that readers know (a shard, a record) never holds half a file, whatever is killed
when; of several processes that create one name exclusively, one wins and the others are told so.
What a killed process leaves are private names (leading dot, random token), which nobody reads.
No locks, no clocks. Knows bytes only.

The functions work on paths of any file system with rename, hard links and fsync; `STEPS` are the
ones among them that change the disk. `Store` is a folder of named files, on such a file system
(`LocalStore`) or elsewhere (object_store.py); names are relative, with slashes. Stores may be used
from several threads and sent to other processes.
"""

import hashlib
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Union

STEPS = ("write_new", "sync_file", "sync_folder", "link", "replace", "remove", "make_one_folder")
"""Functions of this module through which every change of a disk goes, each of them one step."""


def write_new(path: Path, data: bytes) -> None:
    """Write a new file; FileExistsError where there is one."""
    with path.open("xb") as file:
        file.write(data)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    _sync(folder)


def link(path: Path, name: Path) -> None:
    """Give a file a second name; FileExistsError where that is taken."""
    os.link(path, name)


def replace(path: Path, name: Path) -> None:
    """Give a file another name, in place of what has it."""
    os.replace(path, name)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)


def make_one_folder(folder: Path) -> None:
    """Create a folder whose parent is there, unless it is there itself."""
    folder.mkdir(exist_ok=True)


def private_path(path: Path) -> Path:
    """A fresh name beside `path` that no other process uses and no reader looks at."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_durable(path: Path, data: bytes) -> None:
    """Write a new file down to the disk; FileExistsError where there is one."""
    write_new(path, data)
    sync_file(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` under `path`, replacing what is there; readers see the old bytes or the new."""
    make_folder(path.parent)
    attempt = private_path(path)
    try:
        write_durable(attempt, data)
        publish(attempt, path)
    finally:
        remove(attempt)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; True for the one process that created it.

    A hard link to a finished private file: exclusive like O_EXCL, but never half-written.
    """
    make_folder(path.parent)
    attempt = private_path(path)
    try:
        write_durable(attempt, data)
        try:
            link(attempt, path)
        except FileExistsError:
            # A network file system may repeat a call that had succeeded: then the link is ours.
            return attempt.stat().st_nlink == 2
        sync_folder(path.parent)
        return True
    finally:
        remove(attempt)


def publish(attempt: Path, path: Path) -> None:
    """Give a finished private file its public name, durably."""
    sync_file(attempt)
    replace(attempt, path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where missing, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        make_one_folder(folder)
        sync_folder(folder.parent)


def sha256_file(path: Path) -> str:
    """64 hex digits over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store(ABC):
    """A folder of files by name, such as `commits/00000.json`."""

    url: str
    """Folder or URL, for people; `open_store` opens it again."""
    in_place: ClassVar[bool]
    """Whether `local` is the file itself, so that looking into it moves no bytes."""

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def where(self, name: str) -> str:
        """A file's whole name, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def absence(self) -> str | None:
        """Why nothing can lie here, in words; None where the place itself is there."""

    @abstractmethod
    def require_writable(self) -> None:
        """Fail now rather than after hours where files cannot be created: OSError, ValueError."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    @abstractmethod
    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Bytes of a file; None where there is none.

        `expected`: a record says that it is there, so a store that may be late waits a little.
        """

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file came to be, in seconds since 1970, by the clock of the store."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of all files, private ones too, that lie in `folder` ("" is the top), sorted."""

    @abstractmethod
    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists; True for the one who created it.

        Where a call may be repeated unseen (a time-out after it was sent), True also for one who
        finds its own very bytes there.
        """

    @abstractmethod
    def write_atomic(self, name: str, data: bytes) -> None:
        """Put `data` under `name`; readers see the old bytes or the new."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def attempt(self, name: str) -> AbstractContextManager[Path]:
        """A private local path to write what may become `name`; removed with the block."""

    @abstractmethod
    def publish(self, attempt: Path, name: str) -> None:
        """Give what was written to an `attempt` its public name: durably, whole or not at all."""

    @abstractmethod
    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A local file to read with the bytes that `name` has now; its content is not checked."""

    @abstractmethod
    def local(self, name: str, num_bytes: int, sha256: str) -> Path:
        """A local file to map into memory, that stays: the file itself, or a checked copy.

        Copies have `num_bytes` and `sha256`, or `ShardCorruptError` is raised.
        """

    @abstractmethod
    def copy_from(self, other: "Store", name: str, as_name: str) -> None:
        """Publish a file of another store here; bytes move only where they must."""


Location = Union[str, Path, Store]  # noqa: UP007  (a class and a string cannot be joined by |)
"""A folder, a URL such as s3://bucket/prefix, or a store that is open already."""


class LocalStore(Store):
    """A folder of a local or mounted file system."""

    in_place = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[Path]]:
        return (LocalStore, (self.folder,))

    def absence(self) -> str | None:
        """Whether there is such a folder."""
        return None if self.folder.is_dir() else "there is no such folder"

    def require_writable(self) -> None:
        """Create a private file and remove it; OSError where that fails."""
        probe = private_path(self.folder / "probe")
        make_folder(self.folder)
        try:
            write_new(probe, b"")
        finally:
            remove(probe)

    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none."""
        try:
            return (self.folder / name).read_bytes()
        except NotADirectoryError as error:  # the store was said to be at a file
            raise FileNotFoundError(f"{self.folder} is not a folder") from error

    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since 1970."""
        return (self.folder / name).stat().st_mtime

    def names(self, folder: str) -> list[str]:
        """Names of all files, private ones too, that lie in `folder`, sorted."""
        path = self.folder / folder
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists; True for the one who created it."""
        return create_exclusive(self.folder / name, data)

    def write_atomic(self, name: str, data: bytes) -> None:
        """Put `data` under `name`; readers see the old bytes or the new."""
        write_atomic(self.folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        remove(self.folder / name)

    @contextmanager
    def attempt(self, name: str) -> Generator[Path]:
        """A private path beside `name`; what is not published is removed with the block."""
        path = self.folder / name
        make_folder(path.parent)
        attempt = private_path(path)
        try:
            yield attempt
        finally:
            remove(attempt)

    def publish(self, attempt: Path, name: str) -> None:
        """Move what was written to an `attempt` to its public name, durably."""
        publish(attempt, self.folder / name)

    @contextmanager
    def fetched(self, name: str) -> Generator[Path]:
        """The file itself."""
        yield self.folder / name

    def local(self, name: str, num_bytes: int, sha256: str) -> Path:
        """The file itself, unchecked: `open_shard` and `verify` look into it."""
        return self.folder / name

    def copy_from(self, other: Store, name: str, as_name: str) -> None:
        """Publish a file of another store: a second name where one disk has both, else a copy.

        A second name shares its bytes: a damaged disk block then damages both caches.
        """
        with other.fetched(name) as source, self.attempt(as_name) as attempt:
            try:
                link(source, attempt)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, attempt)
            self.publish(attempt, as_name)


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, which is the same from every folder, and not a path."""
    return isinstance(location, str) and "://" in location


def open_store(location: Location) -> Store:
    """The store at a folder or URL; nothing has to be there yet.

    ValueError for a URL whose library is missing, or that was squeezed through a Path.
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
