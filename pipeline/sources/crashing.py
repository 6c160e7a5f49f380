"""A source without the samples that crash whoever reads them or runs a teacher over them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.sources.source import SampleSource
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import RejectedSample, Sample

CRASHED = "killed its worker"
"""Reason of a sample that crashed or hung its worker."""

_UNREAD_KEY = "index-"


def source_id_at(source: SampleSource, index: int) -> str:
    """The name of a sample that cannot be read: file and position."""
    return f"{Path(source.name).name}:{index}"


def crashed_before(rejected: Iterable[RejectedSample]) -> dict[int, str]:
    """Position in the source -> source id of the samples that crashed when a plan was made."""
    return {
        int(each.key.removeprefix(_UNREAD_KEY)): each.source_id
        for each in rejected
        if each.reason == CRASHED and each.key.startswith(_UNREAD_KEY)
    }


class WithoutCrashing:
    """Another source; reading a sample in `crashing` (position -> id) is a SampleError."""

    def __init__(self, source: SampleSource, crashing: Mapping[int, str]) -> None:
        self.name = source.name
        self._source = source
        self._crashing = crashing

    @property
    def unread(self) -> Counter[str]:
        """See `SampleSource`."""
        return self._source.unread

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        if index in self._crashing:
            raise SampleError(self._crashing[index], CRASHED)
        return self._source[index]
