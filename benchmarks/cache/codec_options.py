"""Measures bytes per vision token, error and speed of each option of a cache.

    python -m benchmarks.cache.codec_options [--quick]

Prints three tables: top-k records over k, beside a packing like DistillKit's; sketches, cosines and
hidden states, on the synthetic images of benchmarks.cache.codec (V = 151,936, correlated tokens);
response records. Errors are those of decoded numbers against the teacher's; speed is that of one
core in processor time, from records to frames and back. Dimensions: see teacher_output.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import zstandard
from torch import Tensor

from benchmarks.cache.codec import seconds
from benchmarks.synthetic.correlated_states import (
    DTYPES,
    GRID,
    VOCAB_SIZE,
    WIDTH,
    made_up_logits,
    states,
)
from benchmarks.synthetic.tables import print_table
from teacher_cache.codec.columns import encode_columns, output_columns, output_from_columns
from teacher_cache.codec.frames import decode_frame
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import decode_codes, encode_sketch, fit_basis
from teacher_cache.records.top_k import top_k_from_hidden, top_k_record
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)
from tests.support.strategies import make_spec

TOP_K = (16, 32, 64, 128)
NUM_TEXT, STATE_WIDTH, OUTLIERS = 64, 896, 4
SPANS = ("views", "content_ids", "content_flags")
RESPONSE_SIDES = (4, 8, 16)
"""Responses have the square of it in tokens."""
HEADER = ("bytes / token", "largest error", "rms error", "encode", "decode")


def output_of(**parts: Any) -> TeacherOutput:
    """An image's output with these parts only."""
    num_text = len(parts["affinity"].cosine) if "affinity" in parts else 0
    return TeacherOutput(
        views=(ViewGrid(image=0, view=0, rows=GRID, cols=GRID),),
        content_ids=torch.zeros(num_text, dtype=torch.int64),
        is_response=torch.zeros(num_text, dtype=torch.bool),
        after_image=torch.ones(num_text, dtype=torch.bool),
        **parts,
    )


def answer(record: TopKRecord) -> TeacherOutput:
    """The output of a text-only sample that consists of one response."""
    num_text = len(record.ids)
    return TeacherOutput(
        views=(),
        content_ids=torch.zeros(num_text, dtype=torch.int64),
        is_response=torch.ones(num_text, dtype=torch.bool),
        after_image=torch.zeros(num_text, dtype=torch.bool),
        response=record,
    )


def measured(
    outputs: Sequence[TeacherOutput],
    spec: Any,
    errors: Callable[[int, TeacherOutput], Tensor],
    rounds: int,
) -> list[str]:
    """Bytes, largest and rms error, thousands of tokens encoded and decoded a second.

    `errors` computes the errors of the output that is read back.
    """

    def encoded() -> list[dict[str, bytes]]:
        return [encode_columns(output_columns(each, spec)) for each in outputs]

    def decoded() -> list[TeacherOutput]:
        return [
            output_from_columns({n: decode_frame(f) for n, f in row.items()}, VOCAB_SIZE)
            for row in frames
        ]

    frames = encoded()
    num_tokens = len(outputs) * GRID**2
    num_bytes = sum(len(f) for row in frames for name, f in row.items() if name not in SPANS)
    apart = torch.cat([errors(at, two).flatten() for at, two in enumerate(decoded())]).double()
    speeds = [num_tokens / seconds(work, rounds) / 1000 for work in (encoded, decoded)]
    return [
        f"{num_bytes / num_tokens:.1f}",
        f"{float(apart.abs().max()):.2g}",
        f"{float(apart.square().mean().sqrt()):.2g}",
        *(f"{speed:.0f}" for speed in speeds),
    ]


def top_k(hidden: Tensor, dtype: str, k: int, mass: float | None) -> TopKRecord:
    """Record of an image whose logits were computed in `dtype`, over the whole vocabulary."""
    logits, used = made_up_logits(hidden)
    record = top_k_record(logits.to(DTYPES[dtype]), k, mass, min(8, k))
    ids = used[record.ids.long()].to(torch.int32)
    return dataclasses.replace(record, ids=ids, vocab_size=VOCAB_SIZE)


def in_distillkits_manner(records: Sequence[TopKRecord], num_exact: int, degree: int) -> list[str]:
    """18-bit ids, the first log-probabilities as bfloat16, a polynomial over ranks for the rest.

    The fit is by least squares in float64 over ranks from 0 to 1, which is better than the
    original's default; packed bytes are counted after zstd where that helps.
    """
    num_bytes, apart = 0, []
    for record in records:
        log_p = (record.logits.double() - record.logsumexp.double()[:, None])[:, num_exact:]
        ranks = torch.linspace(0, 1, log_p.shape[1], dtype=torch.float64)
        powers = ranks[:, None] ** torch.arange(degree + 1)
        coefficients = torch.linalg.lstsq(powers, log_p.T).solution.float()
        apart.append((powers @ coefficients.double()).T - log_p)
        first = record.logits[:, :num_exact].bfloat16().contiguous().view(torch.uint8)
        bits = record.ids[..., None] >> torch.arange(18) & 1
        octets = bits.reshape(-1, 8) << torch.arange(8)
        parts = (octets.sum(1).to(torch.uint8), first, coefficients.contiguous().view(torch.uint8))
        for part in parts:
            raw = part.numpy().tobytes()
            num_bytes += min(len(raw), len(zstandard.compress(raw, 3)))
    errors = torch.cat([each.flatten() for each in apart])
    return [
        f"{num_bytes / len(records) / GRID**2:.1f}",
        f"{float(errors.abs().max()):.2g}",
        f"{float(errors.square().mean().sqrt()):.2g}",
        "-",
        "-",
    ]


def top_k_rows(num_images: int, rounds: int, kept: Sequence[int]) -> Iterator[list[str]]:
    """The first table."""
    images = [states(seed, correlated=True) for seed in range(num_images)]
    options: list[tuple[str, str, float | None, str]] = [
        *((f"exact, {dtype}", dtype, None, "exact") for dtype in DTYPES),
        *((f"affine8, of {dtype}", dtype, None, "affine8") for dtype in ("float32", "bfloat16")),
        *((f"mass {mass}, exact, bfloat16", "bfloat16", mass, "exact") for mass in (0.9, 0.95)),
        ("mass 0.9, affine8, of float32", "float32", 0.9, "affine8"),
    ]
    for k in kept:
        for name, dtype, mass, codec in options:
            records = [top_k(image, dtype, k, mass) for image in images]
            spec = make_spec("topk", top_k=k, top_p=mass, logits_codec=codec)
            mean = sum(float(record.counts.float().mean()) for record in records) / num_images
            outputs = [output_of(vision=record) for record in records]

            def errors(at: int, two: TeacherOutput, records: Any = records) -> Tensor:
                exact, stored = records[at], two.vision
                assert stored is not None
                assert torch.equal(exact.ids, stored.ids)
                return (exact.logits.float() - stored.logits.float())[exact.kept_mask]

            yield [str(k), name, f"{mean:.1f}", *measured(outputs, spec, errors, rounds)]
        if k == 128:
            exact = [top_k(image, "float32", k, None) for image in images]
            yield [str(k), "DistillKit's manner", "128.0", *in_distillkits_manner(exact, 16, 4)]
            short = [top_k(image, "float32", 50, None) for image in images]
            yield ["50", "DistillKit's manner", "50.0", *in_distillkits_manner(short, 1, 2)]


def wide_states(seed: int, width: int, outliers: int = 0) -> Tensor:
    """[M, width] states whose energy falls by direction, with some outlier channels."""
    generator = torch.Generator().manual_seed(30)
    mix = torch.randn(WIDTH, width, generator=generator) / WIDTH**0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    noise = torch.randn(GRID**2, width, generator=torch.Generator().manual_seed(seed))
    falling = torch.arange(1, width + 1).float().rsqrt()
    wide = states(seed, correlated=True) @ mix + 3 * (noise * falling) @ turn
    wide[:, :: width // max(1, outliers)] *= 40 if outliers else 1
    return wide


def sketch_rows(num_images: int, rounds: int) -> Iterator[list[str]]:
    """Logits of a head of 8,192 rows from sketches of states of 512 channels."""
    width = 512
    weight = torch.randn(8192, width, generator=torch.Generator().manual_seed(31)) / 8
    head = LmHead(weight=weight)
    calibration = torch.cat([wide_states(seed, width) for seed in range(50, 54)])
    images = [wide_states(seed, width) for seed in range(num_images)]
    for rank in (128, 256):
        basis = fit_basis(calibration, head, rank)
        outputs = [
            output_of(sketch=encode_sketch(basis, image, top_k_from_hidden(image, head, 64)))
            for image in images
        ]
        exact = [head.logits(image) for image in images]

        def errors(at: int, two: TeacherOutput, basis: Any = basis, exact: Any = exact) -> Tensor:
            assert isinstance(two.sketch, SketchRecord)
            return decode_codes(basis, two.sketch.codes, two.sketch.scale) - exact[at]

        numbers = measured(outputs, make_spec("topk+sketch"), errors, rounds)
        spread = float(torch.cat(exact).std())
        yield [f"sketch, r = {rank}", f"logits, of spread {spread:.1f}", *numbers]


def affinity_rows(num_images: int, rounds: int) -> Iterator[list[str]]:
    """Cosines of 64 text tokens with an image's tokens."""
    generator = torch.Generator().manual_seed(32)
    cosines: list[Tensor] = []
    for seed in range(num_images):
        image = wide_states(seed, STATE_WIDTH)
        near = torch.randint(GRID**2, (NUM_TEXT,), generator=generator)
        text = image[near] + 2 * torch.randn(NUM_TEXT, STATE_WIDTH, generator=generator)
        cosines.append(cosine_affinity(text, image))

    def errors(at: int, two: TeacherOutput) -> Tensor:
        assert two.affinity is not None
        return two.affinity.cosine.float() - cosines[at]

    for dtype in ("float16", "int8"):
        outputs = [
            output_of(affinity=AffinityRecord(cosine=c.half() if dtype == "float16" else c))
            for c in cosines
        ]
        numbers = measured(outputs, make_spec("topk", affinity_dtype=dtype), errors, rounds)
        yield [f"affinity {dtype}, {NUM_TEXT} text tokens", "cosines", *numbers]


def hidden_rows(num_images: int, rounds: int) -> Iterator[list[str]]:
    """States of 896 channels, four of which are outliers."""
    images = [wide_states(seed, STATE_WIDTH, OUTLIERS) for seed in range(num_images)]
    nothing = torch.zeros(0, STATE_WIDTH)

    def errors(at: int, two: TeacherOutput) -> Tensor:
        assert two.hidden is not None
        apart = (two.hidden.vision.float() - images[at]).norm(dim=1)
        return apart / images[at].norm(dim=1)

    options = [("float32", None), ("bfloat16", None), *(("int8", g) for g in (None, 128, 64, 32))]
    for dtype, group in options:
        kept = [image.bfloat16() if dtype == "bfloat16" else image for image in images]
        outputs = [
            output_of(hidden=HiddenRecord(vision=each, text=nothing, predicting=nothing))
            for each in kept
        ]
        spec = make_spec(
            "hidden", hidden_dtype=dtype, hidden_group=group or STATE_WIDTH, hidden_size=STATE_WIDTH
        )
        name = f"hidden {dtype}" + (f", groups of {group or 'a token'}" if dtype == "int8" else "")
        yield [name, "share of a state", *measured(outputs, spec, errors, rounds)]


def response_rows(num_samples: int, kept: Sequence[int]) -> Iterator[list[str]]:
    """Bytes per response token of one record: the ordinary one, or one ratio of a grid.

    Neighbouring response tokens are unrelated here.
    """
    options = [(dtype, None) for dtype in DTYPES] + [("bfloat16", 0.95)]
    for k in kept:
        for dtype, mass in options:
            spec = make_spec("topk", top_k=k, top_p=mass)
            cells: list[str] = []
            for side in RESPONSE_SIDES:
                num_bytes = 0
                for seed in range(num_samples):
                    record = top_k(states(seed, correlated=False, grid=side), dtype, k, mass)
                    frames = encode_columns(output_columns(answer(record), spec), SPANS)
                    num_bytes += sum(len(frame) for frame in frames.values())
                cells.append(f"{num_bytes / num_samples / side**2:.1f}")
            yield [str(k), f"{dtype}{f', mass {mass}' if mass else ''}", *cells]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image, one round, k = 64 only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_images, rounds = (1, 1) if options.quick else (3, 3)
    kept = (64,) if options.quick else TOP_K
    print("Ids, logits, logsumexp, log tail; errors in logits; thousands of tokens per second\n")
    print_table(("k", "option", "kept", *HEADER), top_k_rows(num_images, rounds, kept))
    print("Sketch, cosines, hidden states\n")
    for rows in (sketch_rows, affinity_rows, hidden_rows):
        print_table(("option", "error of", *HEADER), rows(num_images, rounds))
    print("Bytes per response token of a record, by tokens of the response\n")
    lengths = (f"{side**2} tokens" for side in RESPONSE_SIDES)
    print_table(("k", "logits", *lengths), response_rows(num_images, kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
