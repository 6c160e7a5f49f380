"""Lets one process at a time write to a folder; a process that was overtaken stops by itself.

`owner.json` names the process that came last. It needs no live processes, clocks or locks, so it
works across machines: whoever takes the folder writes a new token, and every process compares the
token before it publishes anything. Files are made in a private folder, `.attempt-<token>`.
"""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.schema.errors import FolderTakenError
from teacher_cache.storage.durable_files import write_atomic

OWNER_FILE = "owner.json"
_PRIVATE = ".attempt-"


class FolderOwner:
    """A process that has taken a folder; `require` raises once another has taken it since."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder = folder
        self.token = token

    @classmethod
    def take(cls, folder: Path) -> "FolderOwner":
        """Take the folder, and remove what overtaken processes left half-done."""
        owner = cls(folder, secrets.token_hex(8))
        named = {"token": owner.token, "host": socket.gethostname(), "process": os.getpid()}
        write_atomic(folder / OWNER_FILE, (json.dumps(named) + "\n").encode())
        for path in folder.glob(f"{_PRIVATE}*"):
            if path != owner.private:
                shutil.rmtree(path, ignore_errors=True)
        return owner

    @property
    def private(self) -> Path:
        """Where this process makes files before it publishes them."""
        return self.folder / f"{_PRIVATE}{self.token}"

    def require(self) -> None:
        """Raise FolderTakenError, which names the other process, if it has taken the folder.

        What this process has made in private is removed then.
        """
        try:
            found = json.loads((self.folder / OWNER_FILE).read_bytes())
            token, other = found["token"], f"process {found['process']} on {found['host']}"
        except (OSError, ValueError, LookupError, TypeError):
            token, other = None, f"a process that left {OWNER_FILE} unreadable"
        if token != self.token:
            self.release()  # made after the other process had cleaned up
            raise FolderTakenError(
                f"{self.folder}: {other} writes to this folder since, so this process stops; what "
                "it has published stays. Let the other end, or stop it and run this command again"
            )

    @contextmanager
    def while_owned(self) -> Generator[None]:
        """Turn an error into FolderTakenError where another process has taken the folder."""
        try:
            yield
        except Exception:
            self.require()
            raise

    def publish(self, made: Path, name: str) -> bool:
        """Rename a private folder to `name`; False, and removed, where another one has that name.

        FolderTakenError where another process has taken the folder.
        """
        self.require()
        try:
            os.rename(made, self.folder / name)
        except OSError:
            if not (self.folder / name).is_dir():
                raise
            shutil.rmtree(made, ignore_errors=True)
            return False
        return True

    def release(self) -> None:
        """Remove the private folder."""
        shutil.rmtree(self.private, ignore_errors=True)
