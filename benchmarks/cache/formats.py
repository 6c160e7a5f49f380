"""Measures bytes and times of containers: ours and those of others, on the same samples.

    python -m benchmarks.cache.formats [--quick] [--json PATH]

Prints one table. Writing and reading are in processor time (all threads), the first sample in wall
and processor time; each is the least of several rounds in which the containers alternate. `first
epoch` is the first pass after opening; `again` is the second, when some peers have decompressed
copies. `random, cold` opens a dataset and reads one sample of each shard, the first not counted;
`random, warm` reads any samples after a whole epoch. Files are always in the page cache.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.cache.containers import ROWS_PER_SHARD, Container, containers, fields
from benchmarks.cache.first_sample import first_sample
from benchmarks.synthetic.cached_samples import make_samples
from benchmarks.synthetic.tables import print_table
from teacher_cache.schema.teacher_output import CachedSample

COLUMNS = (
    *("container", "KB/sample (of raw)", "write MB/s", "first epoch samples/s", "again"),
    *("random, cold ms", "random, warm ms", "first sample ms (processor)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The times of one container, one number per round; seconds per sample."""

    write: list[float] = field(default_factory=list[float])
    first_epoch: list[float] = field(default_factory=list[float])
    again: list[float] = field(default_factory=list[float])
    random_cold: list[float] = field(default_factory=list[float])
    random_warm: list[float] = field(default_factory=list[float])
    first_sample: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Wall and processor seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; None for what a container cannot do."""

    name: str
    kb_per_sample: float
    share_of_raw: float
    write_mb_s: float
    first_epoch_s: float
    again_s: float
    random_cold_ms: float | None
    random_warm_ms: float | None
    first_sample_ms: float
    first_sample_processor_ms: float

    def cells(self) -> list[str]:
        """As shown."""
        return [
            self.name,
            f"{self.kb_per_sample:.0f} ({self.share_of_raw:.2f})",
            f"{self.write_mb_s:.0f}",
            f"{self.first_epoch_s:.0f}",
            f"{self.again_s:.0f}",
            *(
                "-" if ms is None else f"{ms:.2f}"
                for ms in (self.random_cold_ms, self.random_warm_ms)
            ),
            f"{self.first_sample_ms:.1f} ({self.first_sample_processor_ms:.1f})",
        ]


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """How long a call takes by this clock."""
    start = clock()
    work()
    return clock() - start


def take(samples: object) -> None:
    """Exhaust an iterable and keep nothing."""
    for _ in samples:  # pyright: ignore[reportGeneralTypeIssues]
        pass


def measure(
    container: Container, stored: Path, fresh: Path, num_samples: int, timings: Timings
) -> None:
    """One round of reading; `stored` is the written folder, which does not change."""

    def opened_anew() -> object:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(stored, fresh)
        return container.open(fresh)

    for _ in range(3):
        timings.first_sample.append(first_sample(container, stored, fresh))
    if container.has_random_access:
        opened = opened_anew()
        firsts = range(0, num_samples, ROWS_PER_SHARD)
        one_of_each = [first + random.randrange(ROWS_PER_SHARD // 2) for first in firsts]
        random.shuffle(one_of_each)
        container.read(opened, one_of_each.pop())
        cold = seconds(lambda: [container.read(opened, index) for index in one_of_each])
        timings.random_cold.append(cold / len(one_of_each))
    opened = opened_anew()
    for times in (timings.first_epoch, timings.again):
        times.append(seconds(lambda: take(container.stream(opened, num_samples))) / num_samples)
    if container.has_random_access:
        indices = [random.randrange(num_samples) for _ in range(num_samples // 2)]
        warm = seconds(lambda: [container.read(opened, index) for index in indices])
        timings.random_warm.append(warm / len(indices))


def compare(samples: Sequence[CachedSample], chosen: Sequence[Container], rounds: int) -> list[Row]:
    """Write with every container, then read in interleaved rounds."""
    raw = sum(len(data) for sample in samples for data in fields(sample).values()) / len(samples)
    measured = {container.name: Timings() for container in chosen}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number in range(rounds):
            for container in chosen:
                stored, timings = root / container.name, measured[container.name]
                if number < 2:
                    shutil.rmtree(stored, ignore_errors=True)
                    spent = seconds(lambda c=container, s=stored: c.write(s, samples))
                    timings.write.append(spent / len(samples))
                    files = [file for file in stored.rglob("*") if file.is_file()]
                    sizes[container.name] = sum(file.stat().st_size for file in files)
                measure(container, stored, root / "fresh", len(samples), timings)
    return [_row(name, sizes[name] / len(samples), raw, times) for name, times in measured.items()]


def _row(name: str, num_bytes: float, raw: float, timings: Timings) -> Row:
    def least_ms(times: Sequence[float]) -> float | None:
        return 1e3 * min(times) if times else None

    return Row(
        name=name,
        kb_per_sample=num_bytes / 1e3,
        share_of_raw=num_bytes / raw,
        write_mb_s=raw / min(timings.write) / 1e6,
        first_epoch_s=1 / min(timings.first_epoch),
        again_s=1 / min(timings.again),
        random_cold_ms=least_ms(timings.random_cold),
        random_warm_ms=least_ms(timings.random_warm),
        first_sample_ms=1e3 * min(wall for wall, _ in timings.first_sample),
        first_sample_processor_ms=1e3 * min(processor for _, processor in timings.first_sample),
    )


def main(arguments: Sequence[str]) -> int:
    """Measure and print; peers that are not installed are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shards, one round")
    parser.add_argument("--k", type=int, default=64, help="kept entries")
    parser.add_argument("--dtype", default="bfloat16", help="of the logits")
    parser.add_argument("--picture-kb", type=int, default=16, help="size of a sample's picture")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_samples, rounds = (2 * ROWS_PER_SHARD, 1) if options.quick else (4 * ROWS_PER_SHARD, 3)
    samples = make_samples(num_samples, options.k, options.dtype, options.picture_kb)
    chosen = [container for container in containers() if container.missing is None]
    rows = compare(samples, chosen, rounds)
    print(
        f"{num_samples} samples of 576 or 729 vision tokens, k = {options.k} of {options.dtype}, "
        f"pictures of {options.picture_kb} KB, {ROWS_PER_SHARD} samples a shard\n"
    )
    print_table(COLUMNS, (row.cells() for row in rows))
    for container in containers():
        if container.missing is not None:
            print(f"left out: {container.name}, because {container.missing}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
