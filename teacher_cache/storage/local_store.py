"""Stores files in a folder of a local or mounted disk."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.schema.regular_file import saying_who_may_read
from teacher_cache.storage import durable_files  # tests replace its functions by name
from teacher_cache.storage.durable_files import (
    create_exclusive,
    make_folder,
    private_path,
    publish,
    write_atomic,
)
from teacher_cache.storage.store import Store


class LocalStore(Store):
    """A folder of a local or mounted file system."""

    in_place = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[Path]]:
        return (LocalStore, (self.folder,))

    def absence(self) -> str | None:
        """Why the folder cannot be used; None where it exists."""
        return None if self.folder.is_dir() else "there is no such folder"

    def require_writable(self) -> None:
        """Create a private file and remove it; OSError where that fails."""
        probe = private_path(self.folder / "probe")
        make_folder(self.folder)
        try:
            durable_files.write_new(probe, b"")
        finally:
            durable_files.remove(probe)

    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none."""
        path = self.folder / name
        try:
            with saying_who_may_read(path):
                return path.read_bytes()
        except NotADirectoryError as error:  # the location is a file
            raise FileNotFoundError(f"{self.folder} is not a folder") from error

    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Bytes of a file; None where there is none."""
        path = self.folder / name
        with saying_who_may_read(path):
            return path.stat().st_size if path.is_file() else None

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since 1970."""
        return (self.folder / name).stat().st_mtime

    def names(self, folder: str) -> list[str]:
        """Names of all files, private ones too, that lie in `folder`, sorted."""
        path = self.folder / folder
        with saying_who_may_read(path):
            files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists; True for the process that created it."""
        return create_exclusive(self.folder / name, data)

    def write_atomic(self, name: str, data: bytes) -> None:
        """Write `data` to `name`; readers see the old bytes or the new."""
        write_atomic(self.folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        durable_files.remove(self.folder / name)

    @contextmanager
    def attempt(self, name: str) -> Generator[Path]:
        """A private path beside `name`; an unpublished file is removed when the block ends."""
        path = self.folder / name
        make_folder(path.parent)
        attempt = private_path(path)
        try:
            yield attempt
        finally:
            durable_files.remove(attempt)

    def publish(self, attempt: Path, name: str) -> None:
        """Rename an `attempt` to its public name, durably."""
        publish(attempt, self.folder / name)

    @contextmanager
    def fetched(self, name: str) -> Generator[Path]:
        """The file itself."""
        yield self.folder / name

    def local(self, name: str, num_bytes: int, sha256: str) -> Path:
        """The file itself, unchecked: `open_shard` and `verify` check its content."""
        return self.folder / name

    def copy_from(self, other: Store, name: str, as_name: str) -> None:
        """Publish a file of another store: a hard link where both are on one disk, else a copy.

        A link shares its bytes: a damaged disk block then damages both caches.
        """
        with other.fetched(name) as source, self.attempt(as_name) as attempt:
            try:
                durable_files.link(source, attempt)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, attempt)
            self.publish(attempt, as_name)
