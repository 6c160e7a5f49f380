"""Defines a store: a folder of named files on a disk or in an object store, each whole or absent.

A public name (a shard, a record) never holds half a file, whenever a process is killed. Of several
processes that create one name exclusively, one wins and the others learn that they lost. A killed
process leaves only private names (leading dot, random token), which readers ignore. No locks, no
clocks. Names are relative, with slashes. Several threads can use one store, and it can be sent to
other processes.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Union


class Store(ABC):
    """A folder of files by name, such as `commits/00000.json`."""

    url: str
    """Folder or URL, for messages; `open_store` opens it again."""
    in_place: ClassVar[bool]
    """Whether `local` is the file itself, so that opening it moves no bytes."""

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def where(self, name: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def absence(self) -> str | None:
        """Why the location cannot be used; None where it exists."""

    @abstractmethod
    def require_writable(self) -> None:
        """Raise OSError or ValueError now if files cannot be created, not after hours of work."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    @abstractmethod
    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Bytes of a file; None where there is none.

        `expected`: a record names the file, so a store whose objects may appear late waits for it.
        """

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was created, in seconds since 1970, by the clock of the store."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of all files, private ones too, that lie in `folder` ("" is the top), sorted."""

    @abstractmethod
    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists; True for the process that created it.

        A store whose calls may be repeated unseen (a time-out after sending) also returns True
        where the file already holds the same bytes.
        """

    @abstractmethod
    def write_atomic(self, name: str, data: bytes) -> None:
        """Write `data` to `name`; readers see the old bytes or the new."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def attempt(self, name: str) -> AbstractContextManager[Path]:
        """A private local path to write a future `name` to; removed when the block ends."""

    @abstractmethod
    def publish(self, attempt: Path, name: str) -> None:
        """Give a written `attempt` its public name: durably, whole or not at all."""

    @abstractmethod
    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the current bytes of `name`; its content is not checked."""

    @abstractmethod
    def local(self, name: str, num_bytes: int, sha256: str) -> Path:
        """A local file to map into memory: the file itself, or a checked copy that stays.

        Copies have `num_bytes` and `sha256`, or `ShardCorruptError` is raised.
        """

    @abstractmethod
    def copy_from(self, other: "Store", name: str, as_name: str) -> None:
        """Publish a file of another store here; bytes are copied only where needed."""


Location = Union[str, Path, Store]  # noqa: UP007  (a class and a string cannot be joined by |)
"""A folder, a URL such as s3://bucket/prefix, or an open store."""
