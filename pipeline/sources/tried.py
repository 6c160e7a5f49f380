"""Chooses the samples on which a processor and its chat template are tried before all else."""

from collections.abc import Container, Iterator
from contextlib import suppress
from itertools import islice

from pipeline.sources.source import SampleSource
from teacher_cache.folder.shard_plan import spread_order
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample

NUM_TRIED = 16
"""Most samples that are tried; one success is enough."""


def positions_to_try(num_samples: int) -> list[int]:
    """Positions spread over the source, in the order in which they are tried."""
    return list(islice(spread_order(num_samples), NUM_TRIED))


def samples_to_try(source: SampleSource, without: Container[int] = ()) -> Iterator[Sample]:
    """The readable samples at these positions, except for those in `without`."""
    for index in positions_to_try(len(source)):
        if index not in without:
            with suppress(SampleError):
                yield source[index]
