"""The errors that callers catch. All derive from EmkdError, which is a ValueError."""


class EmkdError(ValueError):
    """Raised when something that a user gave, or that is on a disk, cannot be used as it is."""


class DecodeError(EmkdError):
    """Raised when a file does not describe the expected record; names file, field and remedy."""


class CacheMismatchError(EmkdError):
    """Raised when two descriptions that must agree differ; the message is a table of fields."""


class IncompleteCacheError(EmkdError):
    """Raised when a cache has no seal because its build has not finished."""


class ShardCorruptError(EmkdError):
    """Raised when a stored file does not hold what its record says."""


class SampleError(EmkdError):
    """Raised when one sample cannot be used; `sample_id` and `reason` are there for lists."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return (SampleError, (self.sample_id, self.reason))
