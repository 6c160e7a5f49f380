"""Defines the errors that callers catch. All errors of this repository derive from EmkdError.

Errors that a user can correct (settings, files, samples) are ValueErrors too; the command line
prints them without a traceback.
"""


class EmkdError(Exception):
    """The base of every error class; not raised itself."""


class DecodeError(EmkdError, ValueError):
    """Raised when a file does not describe the expected record; names file, field and remedy."""


class CacheMismatchError(EmkdError, ValueError):
    """Raised when two descriptions that must agree differ; the message is a table of fields."""


class IncompleteCacheError(EmkdError, ValueError):
    """Raised when a cache has no seal because its build has not finished."""


class ShardCorruptError(EmkdError, ValueError):
    """Raised when a stored file does not hold what its record says."""


class SampleError(EmkdError, ValueError):
    """Raised when one sample cannot be used; `sample_id` and `reason` are there for lists."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return (SampleError, (self.sample_id, self.reason))
