"""Computes the pictures of a report: which teacher token each student vision token is paired with.

The matching is the one of training (`matching/matching.py`), on samples whose teacher outputs come
from a cache; by raw logits, or by probabilities if the cache holds the top-k only. Plain JSON data,
images as PNG. For each view of each image: the grid of the teacher's vision tokens with the word
that each ranks first, the student's grid with its words, and the matched pairs. Grids cover the
whole image evenly: what a processor cropped is not known.
"""

import base64
import dataclasses
import io
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.student.generation import model_inputs
from pipeline.student.token_texts import texts_with_shares
from student_train.config.objective import MatchingConfig
from student_train.matching.assignment import Assignment
from student_train.matching.matching import match_tokens
from student_train.models.forward import final_hidden, output_head
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import Signal, TopKSignal
from teacher_cache.codec.columns import Part
from teacher_cache.encoding.collate import collate
from teacher_cache.encoding.pictures import read_picture
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import PictureRule, tier_to_learn_from
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.storage.store import Location

PICTURES_FILE = "pictures.json"
_MAX_SIDE = 512
PARTS: frozenset[Part] = frozenset({"vision", "sketch", "hidden"})
"""The parts of a cached sample that matching reads, as far as the cache holds them."""


@torch.no_grad()
def draw_pictures(
    model: Any, encoder: SampleEncoder, cache: Location, num_pictures: int
) -> dict[str, Any]:
    """Match the first samples of `cache` that have images; returns the content of pictures.json.

    Raises ValueError if the student's tokenizer or views do not fit the cached teacher's.
    """
    reader = CacheReader.open(cache)
    rules = dataclasses.replace(reader.spec.text, template=None)
    encoder = SampleEncoder(
        encoder.processor, encoder.config, encoder.system_prompt, rules, reader.spec.pictures
    )
    tier = tier_to_learn_from(reader.spec.records, None)
    config = MatchingConfig(metric="prob_l1" if tier == "topk" else "raw_l1")
    assets = TeacherAssets(
        head=reader.head() if tier == "hidden" else None,
        sketch=reader.sketch_basis() if tier == "topk+sketch" else None,
    )
    parts = reader.parts & ({"hidden"} if tier == "hidden" else PARTS)
    samples: list[dict[str, Any]] = []
    for index in range(len(reader)):
        if len(samples) == num_pictures:
            break
        cached = reader.read(index, parts)
        if cached.sample.images:
            samples.append(_draw(model, encoder, cached, assets, config))
    return {"cache": reader.fingerprint, "metric": config.metric, "samples": samples}


def _draw(
    model: Any,
    encoder: SampleEncoder,
    cached: CachedSample,
    assets: TeacherAssets,
    config: MatchingConfig,
) -> dict[str, Any]:
    encoded = encoder.encode(cached.sample)
    spans = encoded.spans
    if not torch.equal(spans.content_ids, cached.output.content_ids.to(spans.content_ids)):
        raise ValueError(
            f"sample {cached.sample.source_id!r}: the model's text tokens differ from the cached "
            "teacher's; give --cache a cache of a teacher with the same tokenizer"
        )
    batch = collate([encoded], encoder.pad_token_id, side="right")
    student_ND = final_hidden(model, model_inputs(model, batch))[0, spans.vision.to(model.device)]
    logits_NV = output_head(model)(student_ND).float().cpu()
    student_ND = student_ND.float().cpu()
    signal = vision_signal(cached.output, assets)
    found = match_tokens(student_ND, logits_NV, spans.views, signal, cached.output.views, config)
    tokenizer = encoder.processor.tokenizer
    student = texts_with_shares(tokenizer, *_top_words(logits_NV[:, : signal.vocab_size]))
    teacher = texts_with_shares(tokenizer, *_teacher_words(signal))
    return {
        "key": cached.sample.key,
        "source_id": cached.sample.source_id,
        "messages": [[message.role, message.text] for message in cached.sample.messages],
        "images": [_png(image, encoder.pictures) for image in cached.sample.images],
        "views": _views(cached.output.views, spans.views, teacher, student, found),
    }


def _views(
    teacher_views: tuple[ViewGrid, ...],
    student_views: tuple[ViewGrid, ...],
    teacher: list[list[Any]],
    student: list[list[Any]],
    found: Assignment,
) -> list[dict[str, Any]]:
    """Cut words and pairs by view; tokens count from 0 inside their view."""
    views: list[dict[str, Any]] = []
    pairs = list(zip(found.student.tolist(), found.teacher.tolist(), strict=True))
    student_start = teacher_start = 0
    for ours, theirs in zip(student_views, teacher_views, strict=True):
        student_end = student_start + ours.num_tokens
        teacher_end = teacher_start + theirs.num_tokens
        views.append(
            {
                "image": theirs.image,
                "view": theirs.view,
                "teacher": _grid(theirs, teacher[teacher_start:teacher_end]),
                "student": _grid(ours, student[student_start:student_end]),
                "pairs": [
                    [i - student_start, j - teacher_start]
                    for i, j in pairs
                    if student_start <= i < student_end
                ],
            }
        )
        student_start, teacher_start = student_end, teacher_end
    return views


def _grid(view: ViewGrid, tokens: list[list[Any]]) -> dict[str, Any]:
    return {"rows": view.rows, "cols": view.cols, "tokens": tokens}


def _top_words(logits: Float[Tensor, "N V"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    best = logits.float().log_softmax(dim=1).max(dim=1)
    return best.indices, best.values.exp()


def _teacher_words(signal: Signal) -> tuple[Int[Tensor, " M"], Float[Tensor, " M"]]:
    if isinstance(signal, TopKSignal):
        return signal.record.ids[:, 0].long(), signal.kept_log_probs()[:, 0].exp()
    return _top_words(signal.dense_logits())


def _png(data: bytes, rule: PictureRule) -> str:
    """The picture that models see as base64 PNG, no side longer than 512 pixels."""
    picture = read_picture(data, rule)
    scale = min(1.0, _MAX_SIDE / max(picture.size))
    if scale < 1:
        width, height = (max(1, math.floor(side * scale)) for side in picture.size)
        picture = picture.resize((width, height))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
