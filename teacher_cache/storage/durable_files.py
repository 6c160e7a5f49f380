"""Writes files on a local disk so that each is whole or absent after a crash."""

import errno
import hashlib
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

STEPS = ("write_new", "sync_file", "sync_folder", "link", "replace", "remove", "make_one_folder")
"""The functions of this module that change the disk, each in one step; tests make them fail."""


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


def full_disk(error: OSError, name: object) -> OSError:
    """The error of a full disk, with the file that did not fit."""
    assert error.errno is not None
    return OSError(
        error.errno,
        f"{os.strerror(error.errno)}: free some, or move it to a larger disk, and run the same "
        "command again; what is finished stays",
        str(name),
    )


@contextmanager
def naming_full_disk(path: Path) -> Generator[None]:
    """Name the file that did not fit on a full disk, which the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise full_disk(error, path) from error
        raise


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
    """Give a file a second name; FileExistsError where that name is taken."""
    os.link(path, name)


def replace(path: Path, name: Path) -> None:
    """Rename a file, replacing the target."""
    os.replace(path, name)


def remove(path: Path) -> None:
    """Remove a file if it exists."""
    path.unlink(missing_ok=True)


def make_one_folder(folder: Path) -> None:
    """Create a folder, unless it exists; its parent must exist."""
    folder.mkdir(exist_ok=True)


def private_path(path: Path) -> Path:
    """A new name beside `path` that no other process uses and readers ignore."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_durable(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk; FileExistsError where there is one."""
    write_new(path, data)
    sync_file(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing the file; readers see the old bytes or the new."""
    make_folder(path.parent)
    attempt = private_path(path)
    try:
        with naming_full_disk(path):
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
        with naming_full_disk(path):
            write_durable(attempt, data)
        try:
            link(attempt, path)
        except FileExistsError:
            # A network file system may repeat a call that succeeded: then the link is ours.
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
    """The SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
