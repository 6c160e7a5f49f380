"""Memory of building and of reading a cache does not grow with the number of its samples.

Each run is a process of its own, which has built and read one shard already; a thread in it
watches how much its anonymous memory grows (pages of mapped shards are the system's to drop). Six
times as many shards may take less than one shard more: of a sample there stays its key.
"""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.writer import seal_cache, write_plan, write_shard
from teacher_cache.schema.samples import make_sample
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.storage.open_store import open_store
from tests.support.strategies import make_cached, make_plan

ROWS_PER_SHARD, IMAGE_BYTES = 8, 500_000
SHARD_BYTES = ROWS_PER_SHARD * IMAGE_BYTES
STATUS = Path("/proc/self/status")


def large_sample(number: int) -> CachedSample:
    """A sample with a large image, which no two samples share."""
    cached = make_cached(number)
    image = b"\x89PNG" + number.to_bytes(4) * (IMAGE_BYTES // 4)
    return replace(cached, sample=make_sample(f"{number}", [image], cached.sample.messages))


def build(cache: Path, num_shards: int) -> None:
    """Build shard after shard, as `emkd build` does: rows exist while their shard is written."""

    def rows(shard: int) -> list[CachedSample]:
        start = shard * ROWS_PER_SHARD
        return [large_sample(number) for number in range(start, start + ROWS_PER_SHARD)]

    shards = tuple(
        tuple((row.sample.key, number) for number, row in enumerate(rows(shard)))
        for shard in range(num_shards)
    )
    store = open_store(cache)
    plan = write_plan(store, replace(make_plan([]), shards=shards))
    for shard in range(num_shards):
        write_shard(store, plan, shard, rows(shard), [], 0.0)
    seal_cache(store)


def read(cache: Path, _num_shards: int) -> None:
    """Read every part of every sample once."""
    reader = CacheReader.open(cache)
    for index in range(len(reader)):
        reader.read(index, reader.parts)


def anonymous_bytes() -> int:
    """Memory of this process that no file stands for."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_of(work: Callable[[], None]) -> int:
    """Most anonymous memory that `work` takes beyond what there was, in bytes."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_samples(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    peaks: dict[tuple[str, int], int] = {}
    for num_shards in (4, 24):
        for stage in ("build", "read"):
            command = [sys.executable, "-m", "tests.teacher_cache.folder.test_memory"]
            done = subprocess.run(
                [*command, stage, str(tmp_path / f"{num_shards}"), str(num_shards)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            peaks[stage, num_shards] = int(done.stdout)
    for stage in ("build", "read"):
        small, large = peaks[stage, 4] / 1e6, peaks[stage, 24] / 1e6
        text = f"{stage}: memory grows by {small:.1f} MB over 4 shards, {large:.1f} MB over 24"
        record_property("tried", f"{text}, of {SHARD_BYTES / 1e6:.0f} MB each")
        assert large - small < SHARD_BYTES / 1e6, text


if __name__ == "__main__":
    stage, folder, count = {"build": build, "read": read}[sys.argv[1]], sys.argv[2], sys.argv[3]
    warm = Path(folder).with_name(f"warm-{count}-{sys.argv[1]}")
    build(warm, 1)  # what is imported and allocated once
    read(warm, 1)
    sys.stdout.write(str(peak_of(lambda: stage(Path(folder), int(count)))))
