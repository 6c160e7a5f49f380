"""From a sample's final hidden states to the records that are stored of it; plain tensors in, out.

Three tiers, or the last and one of the others at once (schema.py, TeacherOutput): `topk` stores the
largest logits at vision positions and at the positions that predict the response, and the affinity
matrix; `topk+sketch` adds a PCA code of the vision states; `hidden` stores the states that enter
the LM head, and everything else follows from them. A grid stores the response once more for each
ratio of vision tokens that the teacher drops. Records lie on the CPU. ValueError where the
teacher's numbers are not finite.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis, encode_sketch
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import GridSettings, LogitsCodec, RecordKind, holds, require_cut
from teacher_cache.schema.samples import TokenSpans
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    CachedSample,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by the names that settings and specs use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """What is stored of the teacher, and how exactly.

    `hidden_...` belong to the hidden tier, all else to the top-k tiers; a `CacheSpec` leaves out
    what its tier has no use for. `top_mass` lets each position keep as few of its largest logits as
    hold that much probability, but no fewer than `top_k_floor` and no more than `top_k`. The
    `..._max_error` are promises: logits and cosines of eight bits are that close to the teacher's,
    states relative to their length; a sample that is not stops the build. `hidden_group` is the
    most channels that share an int8 scale (None: all of a token's). `grid` asks for the response
    at further ratios, `least_logits` for a floor under what a top-k record leaves out.
    """

    records: RecordKind
    top_k: int = 64
    top_mass: float | None = None
    top_k_floor: int = 8
    logits_codec: LogitsCodec = "exact"
    logits_max_error: float = 0.05
    sketch_rank: int = 128
    hidden_dtype: str = "bfloat16"
    hidden_group: int | None = 64
    hidden_max_error: float = 0.02
    affinity_dtype: str = "float16"
    affinity_max_error: float = 0.002
    grid: GridSettings | None = None
    least_logits: bool = True

    def __post_init__(self) -> None:
        known = (*DTYPES, "int8")
        for name in ("hidden_dtype", "affinity_dtype"):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name in ("logits_max_error", "hidden_max_error", "affinity_max_error"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a finite bound of at least 0"
                )
        if self.hidden_group is not None and self.hidden_group < 1:
            raise ValueError(f"hidden_group is {self.hidden_group}, expected at least 1 channel")
        if self.top_mass is not None:
            require_cut(self.top_k, self.top_mass, self.top_k_floor)


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

    `sketch` is the basis of the `topk+sketch` tier; it lies on the states' device. `owner` is a
    sample with the same settings that is the same up to its last vision token: its vision record is
    taken instead of computing it again. `grid` has, by ratio, the states that predict the response.
    """
    shown = None if owner is None else owner.output
    vision, text = states[spans.vision], states[spans.vlad_text]
    predicting = states[spans.predicting]
    hidden = top = code = affinity = response = response_grid = hidden_grid = None
    if holds(settings.records, "hidden"):
        dtype = DTYPES.get(settings.hidden_dtype, states.dtype)  # int8: of all there is (rows.py)
        hidden = HiddenRecord(
            vision=vision.to("cpu", dtype),
            text=text.to("cpu", dtype),
            predicting=predicting.to("cpu", dtype),
        )
        if shown is not None and shown.hidden is not None:
            hidden = dataclasses.replace(hidden, vision=shown.hidden.vision)
        if grid is not None:
            hidden_grid = {ratio: at.to("cpu", dtype) for ratio, at in grid.items()}
    if holds(settings.records, "topk"):
        response = _on_cpu(_top_k(predicting, head, settings))
        if grid is not None:
            response_grid = {r: _on_cpu(_top_k(at, head, settings)) for r, at in grid.items()}
        dtype = DTYPES.get(settings.affinity_dtype, torch.float32)
        affinity = AffinityRecord(cosine=cosine_affinity(text, vision).to("cpu", dtype))
        if shown is not None:
            top, code = shown.vision, shown.sketch
        else:
            top, code = _vision_record(vision, head, settings, sketch)
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


def _vision_record(
    vision: Float[Tensor, "M D"],
    head: LmHead,
    settings: RecordSettings,
    sketch: SketchBasis | None,
) -> tuple[TopKRecord, SketchRecord | None]:
    top, code = _top_k(vision, head, settings), None
    if holds(settings.records, "sketch"):
        if sketch is None:
            raise ValueError("the topk+sketch tier needs a basis; fit one first")
        here = encode_sketch(sketch, vision, top)
        code = SketchRecord(
            codes=here.codes.cpu(), scale=here.scale.cpu(), tail_shift=here.tail_shift.cpu()
        )
    return _on_cpu(top), code


def _top_k(states: Float[Tensor, "N D"], head: LmHead, settings: RecordSettings) -> TopKRecord:
    record = top_k_from_hidden(
        states, head, settings.top_k, settings.top_mass, settings.top_k_floor
    )
    return record if settings.least_logits else dataclasses.replace(record, log_least=None)


def _on_cpu(record: TopKRecord) -> TopKRecord:
    return TopKRecord(
        ids=record.ids.cpu(),
        logits=record.logits.cpu(),
        logsumexp=record.logsumexp.cpu(),
        log_tail=record.log_tail.cpu(),
        vocab_size=record.vocab_size,
        num_kept=None if record.num_kept is None else record.num_kept.cpu(),
        log_least=None if record.log_least is None else record.log_least.cpu(),
    )


def record_settings(spec: CacheSpec) -> RecordSettings:
    """The settings that a cache's records were made with."""
    known = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(RecordSettings)
        if getattr(spec, field.name) is not None
    }
    return RecordSettings(**known)
