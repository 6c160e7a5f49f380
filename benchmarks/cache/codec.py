"""Measures bytes and speed of the records' layouts: plain zstd frames (A), the transforms (B).

    python -m benchmarks.cache.codec [--quick] [--json PATH]

Prints two tables: the top-k record of vision tokens over k and dtypes, beside a naive decoder that
goes token by token in plain Python (checked to give the same numbers), and every column in every
layout. Data are synthetic: a smooth field of states over 24 x 24 tokens, 24,576 of 151,936
vocabulary rows in use; neighbours share about 25 of their 64 ids ("corr"), or nearly none ("iid").
Real caches should lie between. Speed is that of one core in processor time, best of several rounds.
Dimensions: M tokens, K kept entries, D width.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import zstandard
from torch import Tensor

from benchmarks.synthetic.correlated_states import DTYPES, GRID, VOCAB_SIZE, WIDTH, columns, states
from benchmarks.synthetic.tables import print_table
from teacher_cache.codec import frames
from teacher_cache.codec.columns import encode_column
from teacher_cache.codec.frames import decode_frame, encode_frame
from teacher_cache.codec.transforms import BYTE_STREAM_SPLIT, DELTA_BY_RANK, DICTIONARY, PLAIN
from teacher_cache.records.affinity import cosine_affinity

COLUMNS = (
    *("tokens", "logits", "k", "shared", "raw", "A: plain", "B: ids + logits + normaliser"),
    *("B / A", "encode A", "encode B", "decode A", "decode B", "naive", "B / naive"),
)
GOAL_BYTES = 160
"""Per token: ids, logits and normaliser at k = 64 where logits have 16 bits (correlated data)."""


def other_columns(hidden: Tensor) -> dict[str, Tensor]:
    """Sketch codes of rank 128, float16 affinities of 64 text tokens, bfloat16 states."""
    generator = torch.Generator().manual_seed(21)
    wide = hidden @ torch.randn(WIDTH, 128, generator=generator)
    wide += 0.5 * torch.randn(wide.shape, generator=generator)
    scale = wide.abs().amax(dim=1) / 127
    text = torch.randn(64, WIDTH, generator=generator) + hidden[:64]
    return {
        "s_codes": (wide / scale[:, None]).round().to(torch.int8),
        "s_scale": scale,
        "a_cosine": cosine_affinity(text, hidden).to(torch.float16),
        "h_vision": wide.to(torch.bfloat16),
    }


def decode_naively(ids_frame: bytes, logits_frame: bytes) -> tuple[list[list[int]], list[Tensor]]:
    """Decode a record's ids and logits value by value in plain Python."""
    ids, steps = zstandard.decompress(ids_frame), zstandard.decompress(logits_frame)
    num_rows, num_kept = (int.from_bytes(ids[at : at + 4], "little") for at in (3, 7))
    total = num_rows * num_kept
    width = (len(steps) - 11) // total
    sign = 1 << (8 * width - 1)
    entries: list[int] = []
    codes = b""
    if ids[1] == DICTIONARY.code:
        count = int.from_bytes(ids[11:15], "little")
        entry = 0
        for place in range(count):
            entry += int.from_bytes(ids[15 + place : 15 + 4 * count : count], "little")
            entries.append(entry)
        codes = ids[15 + 4 * count :]
    all_ids: list[list[int]] = []
    all_logits: list[Tensor] = []
    for row in range(num_rows):
        kept: list[int] = []
        bits = bytearray()
        key = 0
        for rank in range(num_kept):
            at = row * num_kept + rank
            if entries:
                kept.append(entries[int.from_bytes(codes[at::total], "little")])
            else:
                kept.append(int.from_bytes(ids[11 + 4 * at : 15 + 4 * at], "little"))
            step = int.from_bytes(steps[11 + rank * num_rows + row :: total], "little")
            key = (key + step) % (2 * sign)
            value = key if key & sign else key ^ (sign - 1)
            bits += value.to_bytes(width, "little")
        all_ids.append(kept)
        all_logits.append(torch.frombuffer(bits, dtype=frames.DTYPES[steps[0]]))
    return all_ids, all_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the first table: bytes per token and tokens per second."""

    regime: str
    logits: str
    k: int
    shared_ids: float
    """How many ids a token has in common with the next one of its row of the grid."""
    raw_bytes: float
    plain_bytes: float
    ids_bytes: float
    logits_bytes: float
    normaliser_bytes: float
    plain_encode: float
    encode: float
    plain_decode: float
    decode: float
    naive_decode: float

    @property
    def total_bytes(self) -> float:
        """Ids, logits and normaliser in the cache's layouts."""
        return self.ids_bytes + self.logits_bytes + self.normaliser_bytes


def shared_ids(ids: Tensor) -> float:
    """Mean number of ids that neighbouring tokens have in common; ids [M, K]."""
    grid = ids.reshape(GRID, GRID, -1)
    left, right = grid[:, :-1, :, None], grid[:, 1:, None, :]
    return float((left == right).sum(dim=(2, 3)).double().mean())


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Least processor time of several rounds (other processes do not count)."""
    times: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(regime: str, dtype: str, k: int, num_images: int, rounds: int) -> Row:
    """Encode and decode the top-k records of some images."""
    images = [
        columns(states(seed, regime == "corr"), DTYPES[dtype], k) for seed in range(num_images)
    ]
    num_tokens = num_images * GRID * GRID

    def encoded(encode: Callable[[str, Tensor], bytes]) -> list[dict[str, bytes]]:
        return [{name: encode(name, values) for name, values in each.items()} for each in images]

    def plain(_name: str, values: Tensor) -> bytes:
        return encode_frame(values, [PLAIN])

    def decoded(rows: Iterable[dict[str, bytes]]) -> list[dict[str, Tensor]]:
        return [{name: decode_frame(frame) for name, frame in each.items()} for each in rows]

    frames_a, frames_b = encoded(plain), encoded(encode_column)
    assert all(
        torch.equal(values, there[name])
        for here, there in zip(images, decoded(frames_b), strict=True)
        for name, values in here.items()
    )
    first = frames_b[0]
    ids, logits = decode_naively(first["v_ids"], first["v_logits"])
    assert ids == images[0]["v_ids"].tolist()
    assert torch.equal(torch.stack(logits), images[0]["v_logits"])

    def size(rows: list[dict[str, bytes]], *names: str) -> float:
        return sum(len(each[name]) for each in rows for name in names) / num_tokens

    def speed(work: Callable[[], object]) -> float:
        return num_tokens / seconds(work, rounds)

    naive = seconds(lambda: decode_naively(first["v_ids"], first["v_logits"]), 2)
    return Row(
        regime=regime,
        logits=dtype,
        k=k,
        shared_ids=shared_ids(images[0]["v_ids"]),
        raw_bytes=sum(v.nbytes for each in images for v in each.values()) / num_tokens,
        plain_bytes=size(frames_a, *first),
        ids_bytes=size(frames_b, "v_ids"),
        logits_bytes=size(frames_b, "v_logits"),
        normaliser_bytes=size(frames_b, "v_lse", "v_tail"),
        plain_encode=speed(lambda: encoded(plain)),
        encode=speed(lambda: encoded(encode_column)),
        plain_decode=speed(lambda: decoded(frames_a)),
        decode=speed(lambda: decoded(frames_b)),
        naive_decode=GRID * GRID / naive,
    )


def by_layout(correlated: bool) -> dict[str, dict[str, float]]:
    """Bytes per vision token of every column in every layout, and in the one in use."""
    hidden = states(0, correlated)
    named = {
        "plain": PLAIN,
        "byte streams": BYTE_STREAM_SPLIT,
        "delta by rank": DELTA_BY_RANK,
        "dictionary": DICTIONARY,
    }
    every = {**columns(hidden, torch.float16, 64), **other_columns(hidden)}
    return {
        column: {
            **{name: len(encode_frame(values, [each])) / GRID**2 for name, each in named.items()},
            "taken": len(encode_column(column, values)) / GRID**2,
        }
        for column, values in every.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and say whether the goal is met; exit status 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image, one round, k = 64 only")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_images, rounds = (1, 1) if options.quick else (4, 5)
    kept = (64,) if options.quick else (16, 32, 64, 128)
    cases = [*itertools.product(["corr"], DTYPES, kept), *(("iid", each, 64) for each in DTYPES)]
    rows = [measure(*case, num_images, rounds) for case in cases]
    print(f"V = {VOCAB_SIZE}; bytes per vision token, thousands of tokens per second of one core\n")
    print_table(
        COLUMNS,
        (
            [row.regime, row.logits, str(row.k), f"{row.shared_ids:.1f}"]
            + [f"{row.raw_bytes:.0f}", f"{row.plain_bytes:.1f}"]
            + [
                f"{row.ids_bytes:.1f} + {row.logits_bytes:.1f} + {row.normaliser_bytes:.1f} "
                f"= {row.total_bytes:.1f}",
                f"{row.total_bytes / row.plain_bytes:.2f}",
            ]
            + [f"{each / 1000:.0f}" for each in (row.plain_encode, row.encode)]
            + [f"{each / 1000:.0f}" for each in (row.plain_decode, row.decode)]
            + [f"{row.naive_decode / 1000:.1f}", f"{row.decode / row.naive_decode:.0f}"]
            for row in rows
        ),
    )
    layouts = {regime: by_layout(regime == "corr") for regime in ("corr", "iid")}
    print("Every column in every layout, bytes per vision token (k = 64, float16)\n")
    print_table(
        ["tokens", "column", *layouts["corr"]["v_ids"]],
        (
            [regime, column, *(f"{each:.1f}" for each in sizes.values())]
            for regime, columns_ in layouts.items()
            for column, sizes in columns_.items()
        ),
    )
    if options.json:
        numbers = {"top_k": [asdict(row) for row in rows], "layouts": layouts}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    met = all(
        row.total_bytes <= GOAL_BYTES
        for row in rows
        if row.regime == "corr" and row.logits != "float32" and row.k == 64
    )
    print(f"Goal, {GOAL_BYTES} bytes at k = 64 of 16 bits: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
