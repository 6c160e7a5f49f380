"""Measures how fast a cache is read, against its limits and against other containers.

    python -m benchmarks.cache.reader [--quick] [--json PATH]

Prints the goals of reading as ratios of two times, measured alternately on the same synthetic
samples (V = 151,936; 576 or 729 vision tokens): goal, measured, verdict. Then where a sequential
read spends its time and what prefetch threads change, the time to the first sample, and what
entropy leaves to save. Times are processor time of one thread, the least of several rounds, unless
named wall time. Exit status 1 if a goal is missed; a goal whose peer is not installed is named.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import torch
import zstandard

from benchmarks.cache import entropy_bound, first_sample, loader_vs_step
from benchmarks.cache.codec import decode_naively
from benchmarks.cache.containers import ROWS_PER_SHARD, Container, LitData, Mds, Ours, ParquetZstd
from benchmarks.cache.distillkit_codec import pack, unpack
from benchmarks.cache.first_sample import FirstSample, compare_first
from benchmarks.cache.formats import Row, compare, seconds, take
from benchmarks.synthetic.cached_samples import PARTS, VOCAB_SIZE, build_cache, make_samples
from benchmarks.synthetic.tables import print_table
from student_train.data.prefetch import read_ahead
from teacher_cache.codec.frames import decode_frame, encode_frame
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.teacher_output import CachedSample

VISION_COLUMNS = ("v_ids", "v_logits", "v_lse", "v_tail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One goal: a lower or upper limit of a ratio."""

    goal: str
    wanted: float
    at_least: bool
    measured: float | None
    detail: str

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if it could not be measured."""
        if self.measured is None:
            return None
        reached = self.measured >= self.wanted
        return reached if self.at_least else self.measured <= self.wanted

    def cells(self) -> list[str]:
        """As shown."""
        sign = ">=" if self.at_least else "<="
        measured = "-" if self.measured is None else f"{self.measured:.2f}"
        verdict = {True: "met", False: "missed", None: "not measured"}[self.met]
        return [self.goal, f"{sign} {self.wanted:g}", measured, verdict, self.detail]


def least_in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least processor time of each way over several alternating rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            best[name] = min(best[name], seconds(work))
    return best


def frames_of(cache: Path) -> list[dict[str, bytes]]:
    """All frames of an Arrow cache, sample by sample; EM-KD reads all of them."""
    rows: list[dict[str, bytes]] = []
    for path in sorted((cache / "shards").iterdir()):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        names = [field.name for field in table.schema if field.type == pa.large_binary()]
        rows += table.select(names).to_pylist()
    return rows


def token_by_token(
    samples: Sequence[CachedSample], stored: Sequence[Mapping[str, bytes]], rounds: int
) -> Verdict:
    """Vision records: our frames against a loop over tokens, and the same in plain Python."""
    records = [sample.output.vision for sample in samples]
    kept = [record for record in records if record is not None]
    packed = [
        pack(record.ids, record.logits.float() - record.logsumexp[:, None], VOCAB_SIZE)
        for record in kept[:2]
    ]
    k = kept[0].ids.shape[1]
    num_tokens = sum(len(record.ids) for record in kept)
    assert torch.equal(unpack(packed[0], k, VOCAB_SIZE)[0], kept[0].ids.long())
    spent = least_in_turns(
        {
            "ours": lambda: [
                decode_frame(each[name]) for each in stored for name in VISION_COLUMNS
            ],
            "loop": lambda: [unpack(each, k, VOCAB_SIZE) for each in packed],
            "naive": lambda: decode_naively(stored[0]["v_ids"], stored[0]["v_logits"]),
        },
        rounds,
    )
    ours = num_tokens / spent["ours"]
    loop = sum(map(len, packed)) / spent["loop"]
    naive = len(kept[0].ids) / spent["naive"]
    return Verdict(
        goal=f"decoding, over token by token, k = {k}",
        wanted=100,
        at_least=True,
        measured=ours / loop,
        detail=f"{ours / 1e3:.0f}k against {loop / 1e3:.1f}k tokens/s; "
        f"our layouts in plain Python {naive / 1e3:.1f}k",
    )


def against_peers(rows: Mapping[str, Row], missing: Mapping[str, str], k: int) -> list[Verdict]:
    """Random access and bytes against other containers."""
    ours = rows["emkd Arrow"]
    verdicts: list[Verdict] = []

    def add(goal: str, wanted: float, peer: str, ratio: Callable[[Row], tuple[float, str]]) -> None:
        measured, detail = ratio(rows[peer]) if peer in rows else (None, missing.get(peer, ""))
        verdicts.append(
            Verdict(
                goal=f"{goal} {peer}, k = {k}",
                wanted=wanted,
                at_least=wanted > 1,
                measured=measured,
                detail=detail,
            )
        )

    def random_access(peer: Row) -> tuple[float, str]:
        assert ours.random_cold_ms is not None
        assert peer.random_cold_ms is not None
        return (
            peer.random_cold_ms / ours.random_cold_ms,
            f"{ours.random_cold_ms:.2f} against {peer.random_cold_ms:.2f} ms",
        )

    def num_bytes(peer: Row) -> tuple[float, str]:
        return (
            ours.kb_per_sample / peer.kb_per_sample,
            f"{ours.kb_per_sample:.0f} against {peer.kb_per_sample:.0f} KB/sample",
        )

    for peer in ("Parquet zstd, 16-row groups", "LitData zstd by batch", "LitData zstd by sample"):
        add("random access, over", 5, peer, random_access)
    add("bytes, of", 0.85, "MDS zstd", num_bytes)
    return verdicts


def first_of_defaults(found: Sequence[FirstSample], k: int) -> Verdict:
    """The first sample, each side with its default shards."""
    chosen = {each.name: each for each in found if each.is_default}
    ours, peer = chosen["emkd Arrow"], chosen.get(Mds.name)
    detail = Mds().missing or ""
    if peer is not None:
        detail = (
            f"{ours.wall_ms:.1f} against {peer.wall_ms:.1f} ms wall, "
            f"{ours.processor_ms:.1f} against {peer.processor_ms:.1f} ms processor time"
        )
    return Verdict(
        goal=f"first sample, over {Mds.name} in shards of its default size, k = {k}",
        wanted=20,
        at_least=True,
        measured=None if peer is None else peer.wall_ms / ours.wall_ms,
        detail=detail,
    )


def sequential(
    reader: CacheReader, rows: Sequence[Mapping[str, bytes]], rounds: int, k: int
) -> tuple[Verdict, list[list[str]]]:
    """All that EM-KD needs through the reader, over bare decompression of the same frames."""
    stored = [list(each.values()) for each in rows]
    plain = [[encode_frame(decode_frame(frame)) for frame in each] for each in stored]
    zstd = zstandard.ZstdDecompressor()

    def decompress(rows: Sequence[Sequence[bytes]]) -> None:
        for row in rows:
            for frame in row:
                zstd.decompress(frame)

    def decode() -> None:
        for row in stored:
            for frame in row:
                decode_frame(frame)

    ways: dict[str, Callable[[], object]] = {
        "zstd, the same frames": lambda: decompress(stored),
        "zstd, the same values as plain frames": lambda: decompress(plain),
        "decode_frame": decode,
        "CacheReader.read": lambda: [reader.read(index, PARTS) for index in range(len(reader))],
    }
    spent = least_in_turns(ways, rounds)
    least = spent["zstd, the same frames"]
    lines = [
        [f"k = {k}", name, f"{1e3 * each / len(reader):.3f}", f"{each / least:.2f}"]
        for name, each in spent.items()
    ]
    wall = {num_threads: wall_seconds(reader, num_threads, rounds) for num_threads in (0, 1, 2)}
    lines += [
        [f"k = {k}", f"wall, {threads} threads", f"{1e3 * each / len(reader):.3f}", ""]
        for threads, each in wall.items()
    ]
    verdict = Verdict(
        goal=f"sequential read, over bare zstd of the same frames, k = {k}",
        wanted=1.3,
        at_least=False,
        measured=spent["CacheReader.read"] / least,
        detail=f"{1e3 * spent['CacheReader.read'] / len(reader):.2f} against "
        f"{1e3 * least / len(reader):.2f} ms; as plain frames zstd takes "
        f"{1e3 * spent['zstd, the same values as plain frames'] / len(reader):.2f} ms",
    )
    return verdict, lines


def wall_seconds(reader: CacheReader, num_threads: int, rounds: int) -> float:
    """Wall time of one sequential pass with a number of prefetch threads."""

    def read(index: int) -> object:
        return reader.read(index, PARTS)

    def whole_pass() -> Iterator[object]:
        return read_ahead(read, iter(range(len(reader))), num_threads, 8)

    return min(seconds(lambda: take(whole_pass()), time.perf_counter) for _ in range(rounds))


def loader_feeds_the_student(quick: bool) -> Verdict:
    """The demo's student against one loader process."""
    found = loader_vs_step.measure(num_samples=64, num_steps=3 if quick else 20)
    return Verdict(
        goal="one loader process, over what the demo's student consumes",
        wanted=1.0,
        at_least=True,
        measured=found.ratio,
        detail=f"{found.loader:.0f} against {found.student:.0f} samples/s",
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and say which goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="k = 64 only, two shards, few rounds")
    parser.add_argument("--dtype", default="bfloat16", help="of the logits")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_samples, rounds = (2 * ROWS_PER_SHARD, 3) if options.quick else (4 * ROWS_PER_SHARD, 8)
    peers: list[Container] = [
        ParquetZstd(16),
        LitData("batch"),
        LitData("sample"),
        Mds(),
    ]
    missing = {peer.name: reason for peer in peers if (reason := peer.missing) is not None}
    present = [Ours("arrow"), *(peer for peer in peers if peer.name not in missing)]
    verdicts: list[Verdict] = []
    parts: list[list[str]] = []
    firsts: list[list[str]] = []
    bounds: list[list[str]] = []
    for k in (64,) if options.quick else (64, 128):
        samples = make_samples(num_samples, k, options.dtype)
        with tempfile.TemporaryDirectory() as place:
            few = samples[:ROWS_PER_SHARD]
            reader = build_cache(Path(place) / "cache", few, ROWS_PER_SHARD)
            frames = frames_of(Path(place) / "cache")
            verdicts.append(token_by_token(few, frames, rounds))
            verdict, lines = sequential(reader, frames, rounds, k)
        verdicts.append(verdict)
        parts += lines
        rows = compare(samples, present, 1 if options.quick else 3)
        verdicts += against_peers({row.name: row for row in rows}, missing, k)
        bounds += entropy_bound.lines(few, k)
        found = compare_first(samples, rounds)
        verdicts.append(first_of_defaults(found, k))
        firsts += [each.cells(k) for each in found]
    verdicts.append(loader_feeds_the_student(options.quick))
    print(f"V = {VOCAB_SIZE}, {options.dtype} logits, {num_samples} samples\n")
    print_table(
        ("goal", "wanted", "measured", "verdict", "that is"), (each.cells() for each in verdicts)
    )
    print("A sequential read of what EM-KD needs, milliseconds per sample\n")
    print_table(("records", "what", "ms/sample", "of bare zstd"), parts)
    print("From a closed folder to its first sample\n")
    print_table(first_sample.COLUMNS, firsts)
    print("Bytes, and how few they could be\n")
    print_table(entropy_bound.COLUMNS, bounds)
    if options.json:
        numbers = {"goals": [{**asdict(each), "met": each.met} for each in verdicts]}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0 if all(each.met for each in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
