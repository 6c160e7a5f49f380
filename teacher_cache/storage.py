"""Files that are whole or not there: private attempts, atomic publishing, exclusive creation.

Promises: a name that readers know (a shard, a record) never holds half a file, whatever is killed
when; of several processes that create one name exclusively, one wins and the others are told so.
What a killed process leaves are private names (leading dot, random token), which nobody reads.
Works on local and mounted file systems that have rename, hard links and fsync. Knows bytes only.
"""

import hashlib
import os
import secrets
from pathlib import Path


def private_path(path: Path) -> Path:
    """A fresh name beside `path` that no other process uses and no reader looks at."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_durable(path: Path, data: bytes) -> None:
    """Write a new file down to the disk; FileExistsError where there is one."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` under `path`, replacing what is there; readers see the old bytes or the new."""
    make_folder(path.parent)
    attempt = private_path(path)
    try:
        write_durable(attempt, data)
        publish(attempt, path)
    finally:
        attempt.unlink(missing_ok=True)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; True for the one process that created it.

    A hard link to a finished private file: exclusive like O_EXCL, but never half-written.
    """
    make_folder(path.parent)
    attempt = private_path(path)
    try:
        write_durable(attempt, data)
        try:
            os.link(attempt, path)
        except FileExistsError:
            # A network file system may repeat a call that had succeeded: then the link is ours.
            return attempt.stat().st_nlink == 2
        sync_folder(path.parent)
        return True
    finally:
        attempt.unlink(missing_ok=True)


def publish(attempt: Path, path: Path) -> None:
    """Give a finished private file its public name, durably."""
    sync_file(attempt)
    os.replace(attempt, path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where missing, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """64 hex digits over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
