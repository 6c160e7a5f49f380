"""Defines the errors that callers catch. All errors of this repository derive from EmkdError.

Errors that a user can correct (settings, files, samples) are ValueErrors too; the command line
prints them without a traceback. Texts that come from data are made printable first.
"""

from collections.abc import Sequence


def printable(text: str) -> str:
    """The text with control, direction and other invisible characters as escapes (`\\x1b`).

    So a name from data cannot move the cursor, forge a line or fail to print.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe(error: BaseException) -> str:
    """What an exception says, with its type where the text alone says little."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    text, kind = str(error), type(error).__name__
    return text if text and isinstance(error, ValueError | OSError) else f"{kind}: {text}"


class EmkdError(Exception):
    """The base of every error class; not raised itself."""


class DecodeError(EmkdError, ValueError):
    """Raised when a file does not describe the expected record; names file, field and remedy."""


class CacheMismatchError(EmkdError, ValueError):
    """Raised when two descriptions that must agree differ; the message is a table of fields."""


class IncompleteCacheError(EmkdError, ValueError):
    """Raised when a cache has no seal because its build has not finished."""


class FolderTakenError(EmkdError, ValueError):
    """Raised when another process has taken the folder that this one writes to."""


class ShardCorruptError(EmkdError, ValueError):
    """Raised when a stored file does not hold what its record says."""


class SampleError(EmkdError, ValueError):
    """Raised when one sample cannot be used; `sample_id` and `reason` are there for lists.

    Both are made storable: half of a surrogate pair, which no file can hold, becomes an escape.
    """

    def __init__(self, sample_id: str, reason: str) -> None:
        sample_id, reason = _storable(sample_id), _storable(reason)
        super().__init__(f"sample {sample_id!r}: {printable(reason)}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return (SampleError, (self.sample_id, self.reason))


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def first_causes(reasons: Sequence[str], num_samples: int) -> str:
    """A sentence that counts unusable samples and quotes the first three; "" without any."""
    if not reasons:
        return ""
    return f". {len(reasons)} of {num_samples} samples cannot be used: " + "; ".join(reasons[:3])
