"""Measures the time to the first sample of a cache: ours against MDS, for two shard sizes.

    python -m benchmarks.cache.first_sample [--k 128]

A resumed run, a notebook and `emkd inspect` first open a folder and read one sample. MDS unpacks
the whole shard for it, so its time grows with the shard: `ROWS_PER_SHARD` samples as in the other
tables, then each side's default (ours 256 samples, theirs 64 MiB raw). Folders are copied before
each try and are in the page cache. Times are the least of several alternating rounds: wall time,
and processor time of all threads.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cache.containers import (
    MDS_SHARD_BYTES,
    ROWS_PER_SHARD,
    Container,
    Mds,
    Ours,
    fields,
)
from benchmarks.synthetic.cached_samples import make_samples
from benchmarks.synthetic.tables import print_table
from teacher_cache.schema.teacher_output import CachedSample

OUR_DEFAULT_ROWS = 256
COLUMNS = ("records", "container", "samples a shard", "wall ms", "processor ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSample:
    """Time from a closed folder to the first sample."""

    name: str
    shard: str
    """How much a shard holds, in words."""
    is_default: bool
    """Whether the container would have chosen that, or more than there are samples."""
    wall_ms: float
    processor_ms: float

    def cells(self, k: int) -> list[str]:
        """As shown."""
        wall, processor = f"{self.wall_ms:.1f}", f"{self.processor_ms:.1f}"
        return [f"k = {k}", self.name, self.shard, wall, processor]


def first_sample(container: Container, stored: Path, fresh: Path) -> tuple[float, float]:
    """Wall and processor seconds to open a copy of a folder and read its sample 0."""
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(stored, fresh)
    wall, processor = time.perf_counter(), time.process_time()
    container.read(container.open(fresh), 0)
    return time.perf_counter() - wall, time.process_time() - processor


def compare_first(samples: Sequence[CachedSample], rounds: int) -> list[FirstSample]:
    """Ours and MDS, in small shards and in shards of their default sizes."""
    raw = sum(len(data) for sample in samples for data in fields(sample).values())
    small, theirs = f"{ROWS_PER_SHARD}", f"{min(raw, MDS_SHARD_BYTES) >> 20} MiB raw"
    ways: list[tuple[Container, str, bool]] = [
        (Ours("arrow"), small, False),
        (Ours("arrow", OUR_DEFAULT_ROWS), f"{min(len(samples), OUR_DEFAULT_ROWS)}", True),
    ]
    if Mds().missing is None:
        ways += [(Mds(), small, False), (Mds(MDS_SHARD_BYTES), theirs, True)]
    best = [(float("inf"), float("inf"))] * len(ways)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number, (container, _, _) in enumerate(ways):
            container.write(root / str(number), samples)
        for _ in range(rounds):
            for number, (container, _, _) in enumerate(ways):
                spent = first_sample(container, root / str(number), root / "fresh")
                best[number] = (min(best[number][0], spent[0]), min(best[number][1], spent[1]))
    return [
        FirstSample(
            name=container.name,
            shard=shard,
            is_default=is_default,
            wall_ms=1e3 * wall,
            processor_ms=1e3 * processor,
        )
        for (container, shard, is_default), (wall, processor) in zip(ways, best, strict=True)
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--k", type=int, default=64, help="kept entries")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = compare_first(make_samples(4 * ROWS_PER_SHARD, options.k), rounds=8)
    print_table(COLUMNS, (each.cells(options.k) for each in found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
