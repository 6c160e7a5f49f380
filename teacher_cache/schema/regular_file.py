"""Reads files that somebody else named; refuses what is not a regular file before opening it.

Opening a named pipe waits for ever, and a device may have no end.
"""

import errno
import os
import stat
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
