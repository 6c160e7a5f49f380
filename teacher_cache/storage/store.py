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

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Union


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
