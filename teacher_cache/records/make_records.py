"""Makes a sample's stored records from its final hidden states.

Tier `topk` stores the largest logits at vision positions and at the positions that predict the
response, and the affinity matrix. `topk+sketch` adds a PCA code of the vision states. `hidden`
stores the states that enter the LM head, which determine all other records. A cache holds one tier,
or `hidden` and one of the others. A grid adds one response record for each ratio of vision tokens
that the teacher drops. Records lie on the CPU. ValueError where the teacher's numbers are not
finite.
"""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis, encode_sketch
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.options import RecordSettings, holds
from teacher_cache.schema.samples import TokenSpans
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    CachedSample,
    HiddenRecord,
    TeacherOutput,
    TopKRecord,
)

DTYPES_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by the names that settings and specs use."""


def make_output(
    spans: TokenSpans,
    states: Float[Tensor, "L D"],
    head: LmHead,
    settings: RecordSettings,
    sketch: SketchBasis | None = None,
    owner: CachedSample | None = None,
    grid: Mapping[float, Float[Tensor, "R D"]] | None = None,
) -> TeacherOutput:
    """Records of one sample from its final hidden states, which may lie on any device.

    `sketch` is the basis of the `topk+sketch` tier, on the states' device. `owner` is a sample with
    the same settings and equal input up to the last vision token; its vision record is used again.
    `grid` maps each ratio to the states that predict the response.
    """
    shown = None if owner is None else owner.output
    vision, text = states[spans.vision], states[spans.vlad_text]
    predicting = states[spans.predicting]
    hidden = top = code = affinity = response = response_grid = hidden_grid = None
    if holds(settings.records, "hidden"):
        # int8 is coded from full precision, in columns.py
        dtype = DTYPES_BY_NAME.get(settings.hidden_dtype, states.dtype)
        known = None if shown is None else shown.hidden
        hidden = HiddenRecord(
            vision=vision.to("cpu", dtype) if known is None else known.vision,
            text=text.to("cpu", dtype),
            predicting=predicting.to("cpu", dtype),
        )
        if grid is not None:
            hidden_grid = {ratio: at.to("cpu", dtype) for ratio, at in grid.items()}
    if holds(settings.records, "topk"):
        response = _top_k(predicting, head, settings).to("cpu")
        if grid is not None:
            response_grid = {r: _top_k(at, head, settings).to("cpu") for r, at in grid.items()}
        dtype = DTYPES_BY_NAME.get(settings.affinity_dtype, torch.float32)
        affinity = AffinityRecord(cosine=cosine_affinity(text, vision).to("cpu", dtype))
        if shown is not None:
            top, code = shown.vision, shown.sketch
        else:
            top = _top_k(vision, head, settings)
            if holds(settings.records, "sketch"):
                if sketch is None:
                    raise ValueError("the topk+sketch tier needs a basis; fit one first")
                code = encode_sketch(sketch, vision, top).to("cpu")
            top = top.to("cpu")
    return TeacherOutput(
        views=spans.views,
        content_ids=spans.content_ids,
        is_response=spans.is_response,
        after_image=spans.after_image,
        vision=top,
        sketch=code,
        affinity=affinity,
        response=response,
        hidden=hidden,
        shared_from=None if owner is None else owner.sample.key,
        response_grid=response_grid,
        hidden_grid=hidden_grid,
    )


def _top_k(states: Float[Tensor, "N D"], head: LmHead, settings: RecordSettings) -> TopKRecord:
    record = top_k_from_hidden(states, head, settings.top_k, settings.top_p, settings.min_k)
    return record if settings.least_logits else dataclasses.replace(record, log_least=None)
