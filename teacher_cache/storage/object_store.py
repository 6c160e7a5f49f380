"""Stores files in an object store: S3, Google Cloud Storage, or any other that fsspec can reach.

An object appears whole or not at all. Of several creators one wins by a conditional PUT; a store
that ignores the condition is refused before it is used. Throttling, time-outs and objects that
appear late are retried a bounded number of times, then raise an error. If an answer is lost, the
object is read again. Shards are read from local copies, named by content and checked (size,
SHA-256) when fetched and when a process finds them on disk.

Access, endpoint and region come from the settings of the library (for S3: AWS_ENDPOINT_URL, ...).
"""

import errno
import logging
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.storage.durable_files import FULL_DISK, full_disk, private_path, sha256_file
from teacher_cache.storage.store import Store

logger = logging.getLogger(__name__)

WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts; within each, the library retries a throttled call several times."""

DOWNLOADS_VARIABLE = "EMKD_DOWNLOADS"
"""Variable with the folder of local copies; default ~/.cache/emkd. It can be emptied any time."""

_EXTRAS = {"s3": "s3", "s3a": "s3"}
# Four pieces of 8 MiB in memory; the library's default is ten of 50.
_TRANSFER = {"s3": {"chunksize": 2**23, "max_concurrency": 4}}
_TRANSFER["s3a"] = _TRANSFER["s3"]

_HOPELESS = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EACCES, errno.EROFS),
}

_T = TypeVar("_T")


class ObjectStore(Store):
    """Objects under a URL; each process opens its connections at the first call."""

    in_place = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme = url.partition("://")[0]
        try:
            kind: Any = fsspec.get_filesystem_class(self._scheme)
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(self._scheme)
            remedy = f"pip install 'emkd[{extra}]'" if extra else "install the library it names"
            raise ValueError(f"{url} cannot be reached: {error}; {remedy}") from error
        if _looks_first(kind):
            raise ValueError(_cannot_create(url, "its library looks first, then writes"))
        self._root: str = kind._strip_protocol(self.url)
        self._connection: tuple[int, Any] | None = None
        self._is_exclusive = False
        self._checked: dict[Path, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        return (ObjectStore, (self.url,))

    def absence(self) -> str | None:
        """Why the bucket cannot be used; libraries also report a forbidden bucket as absent."""
        bucket = self._root.partition("/")[0]
        if self._call("looked up", "", lambda files, _: files.exists(bucket)):
            return None
        return f"there is no bucket {bucket!r}, or these credentials and this endpoint hide it"

    def require_writable(self) -> None:
        """Create a private object twice; refuse a store that accepts the second."""
        if self._is_exclusive:
            return
        probe = f".probe.{secrets.token_hex(8)}.tmp"
        try:
            self._create(probe, b"1")
            if self._create(probe, b"2"):
                raise ValueError(
                    _cannot_create(self.url, "it accepted a second object of one name")
                )
        except FileNotFoundError as error:
            why = self.absence() or "the store has no such location"
            raise ValueError(f"{self.url} cannot be written: {why}") from error
        finally:
            self.remove(probe)
        self._is_exclusive = True

    def read(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError where there is none."""
        return self._call("read", name, lambda files, path: files.cat_file(path))

    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Bytes of an object; None where there is none; if `expected`, only after all retries."""
        try:
            info = self._call(
                "looked up", name, lambda files, path: files.info(path), may_be_late=expected
            )
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def modified(self, name: str) -> float:
        """When an object was created, in seconds since 1970, by the clock of the store."""
        return self._call("looked up", name, lambda files, path: files.modified(path)).timestamp()

    def names(self, folder: str) -> list[str]:
        """Names of all objects, private ones too, that lie in `folder`, sorted."""

        def listed(files: Any, path: str) -> list[str]:
            entries = files.ls(path.rstrip("/"), detail=True)
            return [entry["name"] for entry in entries if entry["type"] == "file"]

        try:
            found = self._call("listed", folder, listed)
        except FileNotFoundError:
            return []
        return sorted(name.removeprefix(f"{self._root}/") for name in found)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create an object unless it exists; True if it holds `data` afterwards.

        ValueError for a store that ignores the condition.
        """
        self.require_writable()
        if self._create(name, data):
            return True
        # It exists: created by another process, or by a call of ours whose answer was lost.
        found = self._call("read", name, lambda files, path: files.cat_file(path), may_be_late=True)
        return found == data

    def write_atomic(self, name: str, data: bytes) -> None:
        """Write `data` to `name`; readers see the old bytes or the new."""
        self._call("written", name, lambda files, path: files.pipe_file(path, data))

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        try:
            self._call("removed", name, lambda files, path: files.rm_file(path))
        except FileNotFoundError:
            return

    @contextmanager
    def attempt(self, name: str) -> Generator[Path]:
        """A file in a private temporary folder, removed when the block ends."""
        with tempfile.TemporaryDirectory(prefix="emkd-") as folder:
            yield Path(folder) / PurePosixPath(name).name

    def publish(self, attempt: Path, name: str) -> None:
        """Upload a file in pieces; the object appears with the last piece."""
        how = _TRANSFER.get(self._scheme, {})
        self._call("uploaded", name, lambda files, path: files.put_file(str(attempt), path, **how))

    @contextmanager
    def fetched(self, name: str) -> Generator[Path]:
        """A copy of the object in a private temporary folder."""
        with self.attempt(name) as path:
            self._download(name, path, expected=False)
            yield path

    def local(self, name: str, num_bytes: int, sha256: str) -> Path:
        """A checked local copy; a bad one is fetched again once, then `ShardCorruptError`."""
        path = downloads_folder() / sha256[:2] / f"{sha256}{PurePosixPath(name).suffix}"
        if not path.is_file():
            self._fetch_intact(name, path, num_bytes, sha256)
        elif self._checked.get(path) != _state(path) and not _is_intact(path, num_bytes, sha256):
            logger.warning("%s: the copy of %s is bad, fetching it again", path, self.where(name))
            self._fetch_intact(name, path, num_bytes, sha256)
        self._checked[path] = _state(path)
        return path

    def copy_from(self, other: Store, name: str, as_name: str) -> None:
        """Publish a file of another store; within one object store the server copies it."""
        if isinstance(other, ObjectStore) and other._scheme == self._scheme:
            target = self._path(as_name)
            other._call("copied", name, lambda files, path: files.cp_file(path, target))
        elif not other.exists(name):
            raise FileNotFoundError(f"{other.where(name)} is not there")
        else:
            with other.fetched(name) as local:
                self.publish(local, as_name)

    def _fetch_intact(self, name: str, path: Path, num_bytes: int, sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        attempt = private_path(path)
        try:
            for _ in range(2):
                self._download(name, attempt, expected=True)
                if _is_intact(attempt, num_bytes, sha256):
                    os.replace(attempt, path)
                    return
            raise ShardCorruptError(
                f"{self.where(name)}: fetched {attempt.stat().st_size} bytes with SHA-256 "
                f"{sha256_file(attempt)}; {num_bytes} bytes with {sha256} were committed"
            )
        finally:
            attempt.unlink(missing_ok=True)

    def _download(self, name: str, path: Path, *, expected: bool) -> None:
        how = _TRANSFER.get(self._scheme, {})

        def fetch(files: Any, source: str) -> None:
            files.get_file(source, str(path), **how)

        self._call("fetched", name, fetch, may_be_late=expected)

    def _create(self, name: str, data: bytes) -> bool:
        def create(files: Any, path: str) -> None:
            files.pipe_file(path, data, mode="create")

        try:
            self._call("created", name, create)
        except FileExistsError:
            return False
        return True

    def _call(
        self,
        done: str,
        name: str,
        operation: Callable[[Any, str], _T],
        *,
        may_be_late: bool = False,
    ) -> _T:
        """`operation(file system, path)`, retried after failures that may pass; then OSError."""
        for wait_s in (*WAITS_S, None):
            try:
                return operation(self._files(), self._path(name))
            except _BUGS:
                raise
            except Exception as error:  # each library raises its own kinds
                if _says_exists(error):
                    raise FileExistsError(self.where(name)) from error
                if wait_s is None or not _may_pass(error, may_be_late):
                    if isinstance(error, FileNotFoundError):
                        raise FileNotFoundError(f"{self.where(name)} is not there") from error
                    said = f"{type(error).__name__}: {error}"
                    if _is_denied(error):
                        raise PermissionError(
                            f"{self.where(name)} could not be {done}, the store denies it "
                            f"({said}); check the credentials, the endpoint and what they may do"
                        ) from error
                    if isinstance(error, OSError) and error.errno in FULL_DISK:
                        raise full_disk(error, error.filename or self.where(name)) from error
                    raise OSError(
                        f"{self.where(name)} could not be {done}: {said}; run the same command "
                        "again when the store answers"
                    ) from error
                logger.info("%s: %r; trying again in %g s", self.where(name), error, wait_s)
            time.sleep(wait_s * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _files(self) -> Any:
        """The library's file system, one per process: its threads do not survive a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            files = fsspec.filesystem(
                self._scheme, skip_instance_cache=True, use_listings_cache=False
            )
            self._connection = (os.getpid(), files)
        return self._connection[1]


def downloads_folder() -> Path:
    """The folder of local copies of shards."""
    named = os.environ.get(DOWNLOADS_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "emkd"


_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ValueError, ImportError)


def _looks_first(kind: type) -> bool:
    """Whether a library inherits fsspec's creation, which looks first and then writes."""
    if issubclass(kind, AsyncFileSystem):
        return getattr(kind, "_pipe_file") is getattr(AsyncFileSystem, "_pipe_file")  # noqa: B009
    return getattr(kind, "pipe_file") is AbstractFileSystem.pipe_file  # noqa: B009


def _may_pass(error: Exception, may_be_late: bool) -> bool:
    if isinstance(error, FileNotFoundError):
        return may_be_late
    if isinstance(error, NotImplementedError) or _is_denied(error):
        return False
    return not (isinstance(error, OSError) and error.errno in _HOPELESS)


def _is_denied(error: Exception) -> bool:
    """Whether a store wants other credentials, or has none at all (HTTP 401 and 403)."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    named = "Credential" in type(error).__name__ or "Credential" in type(error.__cause__).__name__
    return isinstance(error, PermissionError) or status in (401, 403) or named


def _says_exists(error: Exception) -> bool:
    """Whether a conditional creation was refused; S3 services report this in different ways."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412")


def _is_intact(path: Path, num_bytes: int, sha256: str) -> bool:
    return path.stat().st_size == num_bytes and sha256_file(path) == sha256


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _cannot_create(url: str, found: str) -> str:
    return (
        f"{url}: this store cannot create an object only where there is none ({found}), so two "
        "builds could overwrite each other; keep the cache on a disk, or in a store with "
        "conditional writes (S3, Google Cloud Storage, MinIO)"
    )
