"""Records as named planes, and back, to the bit; which layout packs which plane best.

A plane is one tensor, stored as one frame (frames.py). Planes of a tier are fixed (`planes_of`):
every row of a cache has the same ones, empty or not. Layouts are chosen by what a plane means and
by what benchmarks/codec.py measures; frames say which one they took, so readers need no table.
"""

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from teacher_cache.frames import encode_frame
from teacher_cache.schema import (
    AffinityRecord,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
    ViewGrid,
)
from teacher_cache.settings import RecordKind
from teacher_cache.transforms import DICTIONARY, PLAIN, PLANES, RANKS, Transform

Part = Literal["vision", "sketch", "affinity", "response", "hidden"]

_IS_RESPONSE, _AFTER_IMAGE = 1, 2  # bits of the plane content_flags

_SPAN_PLANES = ("views", "content_ids", "content_flags")
PART_PLANES: dict[Part, tuple[str, ...]] = {
    "vision": ("v_ids", "v_logits", "v_lse", "v_tail"),
    "sketch": ("s_codes", "s_scale", "s_shift"),
    "affinity": ("a_cosine",),
    "response": ("r_ids", "r_logits", "r_lse", "r_tail"),
    "hidden": ("h_vision", "h_text", "h_predicting"),
}
VISION_PLANES = frozenset(
    name
    for name in (*_SPAN_PLANES, *chain.from_iterable(PART_PLANES.values()))
    if name == "views" or name.startswith(("v_", "s_", "h_vision"))
)
"""Planes of a sample's vision record: by causality they depend on nothing behind the images, so
that samples which are equal up to there may share them (vision_sharing.py)."""
TIER_PARTS: dict[RecordKind, frozenset[Part]] = {
    "topk": frozenset({"vision", "affinity", "response"}),
    "topk+sketch": frozenset({"vision", "sketch", "affinity", "response"}),
    "hidden": frozenset({"hidden"}),
    "topk+hidden": frozenset({"vision", "affinity", "response", "hidden"}),
    "topk+sketch+hidden": frozenset({"vision", "sketch", "affinity", "response", "hidden"}),
}


_TRANSFORMS: dict[str, tuple[Transform, ...]] = {
    "v_ids": (PLAIN, DICTIONARY),
    "r_ids": (PLAIN, DICTIONARY),
    "v_logits": (RANKS,),
    "r_logits": (RANKS,),
    # Bytes have one plane; codes of a sketch are nearly noise, in whatever order.
    "s_codes": (PLAIN,),
    "content_flags": (PLAIN,),
}


def encode_plane(name: str, values: Shaped[Tensor, "..."]) -> bytes:
    """The frame of a plane, in the smallest of the layouts that suit what it holds."""
    return encode_frame(values, _TRANSFORMS.get(name, (PLANES,)))


def planes_of(parts: Collection[Part]) -> frozenset[str]:
    """Names of the planes that hold these parts; the token spans are always among them."""
    return frozenset(_SPAN_PLANES).union(*(PART_PLANES[part] for part in parts))


def parts_in(output: TeacherOutput) -> frozenset[Part]:
    """The parts that an output has."""
    return frozenset(part for part in PART_PLANES if getattr(output, part) is not None)


def output_planes(output: TeacherOutput) -> dict[str, Tensor]:
    """The tensors of an output by plane name, each as the record holds it."""
    views = [[view.image, view.view, view.rows, view.cols] for view in output.views]
    flags = output.is_response * _IS_RESPONSE + output.after_image * _AFTER_IMAGE
    planes = {
        "views": torch.tensor(views, dtype=torch.int32).reshape(-1, 4),
        "content_ids": output.content_ids,
        "content_flags": flags.to(torch.uint8),
    }
    for prefix, record in (("v", output.vision), ("r", output.response)):
        if record is not None:
            planes[f"{prefix}_ids"] = record.ids
            planes[f"{prefix}_logits"] = record.logits
            planes[f"{prefix}_lse"] = record.logsumexp
            planes[f"{prefix}_tail"] = record.log_tail
    if output.sketch is not None:
        planes["s_codes"] = output.sketch.codes
        planes["s_scale"] = output.sketch.scale
        planes["s_shift"] = output.sketch.tail_shift
    if output.affinity is not None:
        planes["a_cosine"] = output.affinity.cosine
    if output.hidden is not None:
        planes["h_vision"] = output.hidden.vision
        planes["h_text"] = output.hidden.text
        planes["h_predicting"] = output.hidden.predicting
    return planes


def output_from_planes(planes: Mapping[str, Tensor], vocab_size: int) -> TeacherOutput:
    """The inverse of `output_planes`; a part none of whose planes is given is None.

    Raises KeyError where a part is given in part, ValueError where its numbers do not add up.
    """
    flags = planes["content_flags"]
    has = {part: any(name in planes for name in names) for part, names in PART_PLANES.items()}

    def top_k(prefix: str) -> TopKRecord:
        return TopKRecord(
            ids=planes[f"{prefix}_ids"],
            logits=planes[f"{prefix}_logits"],
            logsumexp=planes[f"{prefix}_lse"],
            log_tail=planes[f"{prefix}_tail"],
            vocab_size=vocab_size,
        )

    def sketch() -> SketchRecord:
        return SketchRecord(
            codes=planes["s_codes"], scale=planes["s_scale"], tail_shift=planes["s_shift"]
        )

    def hidden() -> HiddenRecord:
        return HiddenRecord(
            vision=planes["h_vision"], text=planes["h_text"], predicting=planes["h_predicting"]
        )

    return TeacherOutput(
        views=tuple(
            ViewGrid(image=image, view=view, rows=rows, cols=cols)
            for image, view, rows, cols in planes["views"].tolist()
        ),
        content_ids=planes["content_ids"],
        is_response=(flags & _IS_RESPONSE).bool(),
        after_image=(flags & _AFTER_IMAGE).bool(),
        vision=top_k("v") if has["vision"] else None,
        sketch=sketch() if has["sketch"] else None,
        affinity=AffinityRecord(cosine=planes["a_cosine"]) if has["affinity"] else None,
        response=top_k("r") if has["response"] else None,
        hidden=hidden() if has["hidden"] else None,
    )
