"""Reads files that somebody else named or owns, and says why one cannot be read.

What is not a regular file is refused before it is opened: opening a named pipe waits for ever, and
a device may have no end. A file without permission is named with its owner; it is not damaged.
"""

import errno
import os
import pwd
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path) -> int:
    """The bytes of a regular file, links followed; OSError for anything else, and if absent."""
    return _size(os.stat(path), path)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file; OSError for anything else, and for more than `most` bytes."""
    require_regular(path)
    # Between the two calls a pipe may take the file's place: it is not waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        num_bytes = _size(os.fstat(file.fileno()), path)
        if most is not None and num_bytes > most:
            why = f"it has {num_bytes:,} bytes, more than {most:,}"
            raise OSError(errno.EFBIG, why, str(path))
        return file.read(num_bytes)


def _size(state: os.stat_result, path: Path) -> int:
    if stat.S_ISREG(state.st_mode):
        return state.st_size
    kind = _KINDS.get(stat.S_IFMT(state.st_mode), "no file")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


@contextmanager
def saying_who_may_read(path: Path) -> Generator[None]:
    """Turn "permission denied" into an error that names file, mode, owner and remedy."""
    try:
        yield
    except PermissionError as error:
        raise PermissionError(_denial(path)) from error


def require_readable(path: Path) -> None:
    """Raise such an error unless a file can be opened; nothing is said of an absent one.

    For libraries that report a file without permission as absent or damaged.
    """
    with saying_who_may_read(path):
        if path.exists():
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _denial(path: Path) -> str:
    for place in (*reversed(path.absolute().parents), path.absolute()):
        wanted = os.R_OK if place == path.absolute() else os.X_OK
        if not os.access(place, wanted, effective_ids=True):
            break
    else:
        return f"{path}: permission denied; it is not damaged, ask for permission to read it"
    state = place.stat()
    return (
        f"{path}: permission denied; {place} belongs to {_user(state.st_uid)} and has mode "
        f"{stat.S_IMODE(state.st_mode):04o}, you are {_user(os.geteuid())}. It is not damaged: ask "
        "its owner for permission to read it"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
