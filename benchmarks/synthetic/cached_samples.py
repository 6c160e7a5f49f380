"""Makes samples with synthetic teacher outputs of realistic size for all benchmarks of reading.

An image has 576 or 729 vision tokens from correlated_states.py's field of states: top-k
records over 151,936 vocabulary rows (24,576 of them in use), sketch codes of rank 128, float16
affinities of every text token, and a response of 12 to 256 tokens with top-k records of its own.
Pictures are noise, as compressed pictures are to any container. The seed decides everything.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.synthetic.correlated_states import DTYPES, VOCAB_SIZE, WIDTH, columns, states
from teacher_cache.codec.columns import Part
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, ViewGrid, make_sample
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    CachedSample,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)
from tests.support.builders import build
from tests.support.strategies import make_spec

GRIDS = (24, 27)
"""Sides of an image's grid of vision tokens: CLIP at 336 pixels, SigLIP at 384."""
SKETCH_RANK = 128
QUESTION_TOKENS, RESPONSE_TOKENS = (8, 64), (12, 256)
PARTS: frozenset[Part] = frozenset({"vision", "sketch", "affinity", "response"})
"""What EM-KD reads."""


def make_samples(
    num_samples: int,
    k: int,
    dtype: str = "bfloat16",
    picture_kb: int = 16,
    grids: Sequence[int] = GRIDS,
) -> list[CachedSample]:
    """Samples with alternating grids; logits in `dtype`, K = k."""
    return [
        _sample(number, k, dtype, picture_kb, grids[number % len(grids)])
        for number in range(num_samples)
    ]


def build_cache(
    folder: Path,
    samples: list[CachedSample],
    rows_per_shard: int,
    form: ShardFormatName = "arrow",
) -> CacheReader:
    """A sealed cache of the samples."""
    record = samples[0].output.vision
    assert record is not None
    spec = make_spec(
        "topk+sketch",
        top_k=record.ids.shape[1],
        sketch_rank=SKETCH_RANK,
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        logits_dtype=str(record.logits.dtype).removeprefix("torch."),
        affinity_dtype="float16",
    )
    starts = range(0, len(samples), rows_per_shard)
    build(folder, [samples[at : at + rows_per_shard] for at in starts], form, spec)
    return CacheReader.open(folder)


def tensors(cached: CachedSample) -> dict[str, Tensor]:
    """A sample's output as named tensors, for containers that know no records."""
    output = cached.output
    vision, response, sketch, affinity = (
        output.vision,
        output.response,
        output.sketch,
        output.affinity,
    )
    assert vision is not None
    assert response is not None
    assert sketch is not None
    assert affinity is not None
    return {
        "views": torch.tensor([[v.image, v.view, v.rows, v.cols] for v in output.views]).int(),
        "content_ids": output.content_ids,
        "content_flags": output.is_response + 2 * output.after_image.to(torch.uint8),
        "v_ids": vision.ids,
        "v_logits": vision.logits,
        "v_lse": vision.logsumexp,
        "v_tail": vision.log_tail,
        "r_ids": response.ids,
        "r_logits": response.logits,
        "r_lse": response.logsumexp,
        "r_tail": response.log_tail,
        "s_codes": sketch.codes,
        "s_scale": sketch.scale,
        "s_shift": sketch.tail_shift,
        "a_cosine": affinity.cosine,
    }


def _sample(number: int, k: int, dtype: str, picture_kb: int, grid: int) -> CachedSample:
    draw = np.random.default_rng(number)
    generator = torch.Generator().manual_seed(number)
    num_question, num_response = (
        int(np.exp(draw.uniform(*np.log(span)))) for span in (QUESTION_TOKENS, RESPONSE_TOKENS)
    )
    num_text = num_question + num_response
    vision = states(number, correlated=True, grid=grid)
    nearest = torch.randint(len(vision), (num_text,), generator=generator)
    text = torch.randn(num_text, WIDTH, generator=generator) + vision[nearest]
    picture = b"\xff\xd8\xff" + draw.bytes(1024 * picture_kb)
    messages = (
        Message(role="user", text=f"{IMAGE_PLACEHOLDER}\nQuestion {number}?"),
        Message(role="assistant", text=f"Answer {number}."),
    )
    output = TeacherOutput(
        views=(ViewGrid(image=0, view=0, rows=grid, cols=grid),),
        content_ids=torch.randint(VOCAB_SIZE, (num_text,), generator=generator),
        is_response=torch.arange(num_text) >= num_question,
        after_image=torch.ones(num_text, dtype=torch.bool),
        vision=_top_k(vision, dtype, k),
        sketch=_sketch(vision, generator),
        affinity=AffinityRecord(cosine=cosine_affinity(text, vision).to(torch.float16)),
        response=_top_k(text[num_question:], dtype, k),
    )
    return CachedSample(sample=make_sample(f"sample-{number}", [picture], messages), output=output)


def _top_k(hidden: Tensor, dtype: str, k: int) -> TopKRecord:
    made = columns(hidden, DTYPES[dtype], k)
    return TopKRecord(
        ids=made["v_ids"],
        logits=made["v_logits"],
        logsumexp=made["v_lse"],
        log_tail=made["v_tail"],
        vocab_size=VOCAB_SIZE,
    )


def _sketch(hidden: Tensor, generator: torch.Generator) -> SketchRecord:
    wide = hidden @ torch.randn(WIDTH, SKETCH_RANK, generator=generator)
    wide += 0.5 * torch.randn(wide.shape, generator=generator)
    # Principal components come in the order of their variance: here it falls as 1 / rank.
    wide /= torch.arange(1, SKETCH_RANK + 1).sqrt()
    scale = wide.abs().amax(dim=1) / 127
    return SketchRecord(
        codes=(wide / scale[:, None]).round().to(torch.int8),
        scale=scale,
        tail_shift=torch.randn(len(hidden), generator=generator),
    )
