"""The errors that callers catch; the base of all of them is EmkdError."""


class EmkdError(ValueError):
    """Something that a user gave, or that lies on a disk, cannot be used as it is."""


class DecodeError(EmkdError):
    """A file does not describe the record that was expected; names file, field and remedy."""


class CacheMismatchError(EmkdError):
    """Two descriptions that must agree do not; the message is a table of the fields."""


class IncompleteCacheError(EmkdError):
    """The cache has no seal: its build has not finished."""


class ShardCorruptError(EmkdError):
    """A stored file does not hold what its record says."""


class SampleError(EmkdError):
    """One sample cannot be used. Holds its id and the reason, so that callers can list it."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return (SampleError, (self.sample_id, self.reason))
