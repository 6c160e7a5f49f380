"""Describes one cached sample for `emkd inspect --sample`: conversation, tokens, teacher outputs.

Tokens are shown as texts if the teacher's tokenizer is given (its vocabulary is compared with the
cache's), else as ids. Everything is plain data, ready for JSON.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.student.token_texts import texts_with_shares, token_texts
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.digests import vocabulary_digest
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput, TopKRecord

NUM_VISION_SHOWN = 6
"""How many vision tokens, evenly spread over the sample, are shown with their first words."""
NUM_RESPONSE_SHOWN = 8
NUM_WORDS = 5


def find_sample(reader: CacheReader, name: str) -> int:
    """Index of the sample with this key, this source id, or a key that begins so.

    Repeated samples have keys of their own (`KEY`, `KEY-1`, ...). Source ids are looked up last,
    by reading all samples. ValueError unless exactly one sample is found.
    """
    if name in reader.keys:
        return reader.keys.index(name)
    found = [index for index, key in enumerate(reader.keys) if name and key.startswith(name)]
    if not found:
        ids = (reader.read(index, ()).sample.source_id for index in range(len(reader)))
        found = [index for index, source_id in enumerate(ids) if source_id == name]
    if len(found) == 1:
        return found[0]
    for rejected in reader.seal.rejected:
        if not found and name in (rejected.source_id, rejected.key):
            raise ValueError(f"{reader.cache}: the build rejected {name!r}: {rejected.reason}")
    near = [reader.keys[index] for index in found[:5]] or list(reader.keys[:5])
    raise ValueError(
        f"{reader.cache}: {len(found)} samples have the source id {name!r} or a key that begins "
        f"so, expected one; {'their keys are' if found else 'the first keys are'}: "
        f"{', '.join(near)}"
    )


def describe_sample(reader: CacheReader, key: str, tokenizer: Any = None) -> dict[str, Any]:
    """One sample: the conversation, the token grids, and the teacher's outputs.

    `key` as in `find_sample`. `tokenizer` is that of `load_tokenizer`, or None.
    """
    index = find_sample(reader, key)
    cached = reader.read(index, reader.parts)
    head = None if cached.output.hidden is None else reader.head()
    return {**_sample(cached, index, tokenizer), **_records(cached.output, head, tokenizer)}


def load_tokenizer(path: str, spec: CacheSpec) -> Any:
    """The tokenizer of a folder or hub id; ValueError unless it is the cache's teacher's."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer can be loaded: {error}") from error
    found = vocabulary_digest(tokenizer, spec.vocab_size)
    if found != spec.vocabulary:
        raise ValueError(
            f"{path}: the first {spec.vocab_size} ids stand for other tokens (vocabulary "
            f"{found[:12]}) than those of the cache's teacher ({spec.vocabulary[:12]}); give the "
            "teacher's folder, or omit it to see ids"
        )
    return tokenizer


def _sample(cached: CachedSample, index: int, tokenizer: Any) -> dict[str, Any]:
    sample, output = cached.sample, cached.output
    response = output.is_response
    return {
        "key": sample.key,
        "index": index,
        "source_id": sample.source_id,
        "messages": [f"{message.role}: {message.text}" for message in sample.messages],
        "image_bytes": [len(image) for image in sample.images],
        "views": [
            f"image {view.image} view {view.view}: {view.rows} x {view.cols} vision tokens"
            for view in output.views
        ],
        "content_tokens": len(output.content_ids),
        "response_tokens": int(response.sum()),
        "prompt": token_texts(tokenizer, output.content_ids[~response]),
        "response": token_texts(tokenizer, output.content_ids[response]),
    }


def _records(output: TeacherOutput, head: LmHead | None, tokenizer: Any) -> dict[str, Any]:
    records: dict[str, Any] = {}
    if output.vision is not None:
        records["vision_top_k"] = _summary(output.vision)
    if output.response is not None:
        records["response_top_k"] = _summary(output.response)
    if output.sketch is not None:
        codes = output.sketch.codes
        records["sketch"] = {"tokens": codes.shape[0], "rank": codes.shape[1]}
    if output.affinity is not None:
        cosine = output.affinity.cosine
        affinity: dict[str, Any] = {
            "text_tokens": cosine.shape[0],
            "vision_tokens": cosine.shape[1],
        }
        if cosine.numel():
            affinity["range"] = [round(float(cosine.min()), 4), round(float(cosine.max()), 4)]
        records["affinity"] = affinity
    if output.hidden is not None:
        records["hidden"] = {
            "vision": list(output.hidden.vision.shape),
            "text": list(output.hidden.text.shape),
            "predicting": list(output.hidden.predicting.shape),
            "dtype": str(output.hidden.vision.dtype).removeprefix("torch."),
        }
    if output.response_grid is not None:
        at = {str(ratio): _summary(record) for ratio, record in output.response_grid.items()}
        records["response_top_k_at_ratio"] = at
    if output.hidden_grid is not None:
        shapes = {str(ratio): list(states.shape) for ratio, states in output.hidden_grid.items()}
        records["predicting_states_at_ratio"] = shapes
    records["vision_says"] = _vision_says(output, head, tokenizer)
    records["response_says"] = _response_says(output, head, tokenizer)
    return records


def _summary(record: TopKRecord) -> dict[str, Any]:
    rows, kept = record.ids.shape
    if rows == 0:
        return {"positions": 0, "k": kept}
    tails = sorted(math.exp(value) for value in record.log_tail.tolist())
    more: dict[str, Any] = {}
    if record.num_kept is not None:
        counts = sorted(record.num_kept.tolist())
        more = {"k_fewest": counts[0], "k_median": counts[rows // 2]}
    least: dict[str, Any] = {}
    if record.log_least is not None:
        values = sorted(record.log_least.tolist())
        least = {"least_log_probability": {"median": values[rows // 2], "smallest": values[0]}}
    return {
        "positions": rows,
        "k": kept,
        **more,
        "tail_mass": {"median": round(tails[len(tails) // 2], 5), "largest": round(tails[-1], 5)},
        **least,
        "first_position_ids": record.ids[0, : record.counts[0]][:8].tolist(),
    }


def _vision_says(output: TeacherOutput, head: LmHead | None, tokenizer: Any) -> list[Any]:
    """The first words of vision tokens that are spread over all views."""
    names = [
        f"image {view.image} view {view.view} row {row} column {column}"
        for view in output.views
        for row in range(view.rows)
        for column in range(view.cols)
    ]
    count = min(NUM_VISION_SHOWN, len(names))
    rows = torch.arange(count) * len(names) // max(count, 1)
    states = None if output.hidden is None else output.hidden.vision
    return [
        {"at": names[row], "says": texts_with_shares(tokenizer, ids, shares)}
        for row, (ids, shares) in zip(
            rows.tolist(), _top(output.vision, states, head, rows), strict=True
        )
    ]


def _response_says(output: TeacherOutput, head: LmHead | None, tokenizer: Any) -> list[Any]:
    """The first response tokens, and what the teacher expected at their positions."""
    labels = output.content_ids[output.is_response][:NUM_RESPONSE_SHOWN]
    states = None if output.hidden is None else output.hidden.predicting
    top = _top(output.response, states, head, torch.arange(len(labels)))
    return [
        {"token": token, "expected": texts_with_shares(tokenizer, ids, shares)}
        for token, (ids, shares) in zip(token_texts(tokenizer, labels), top, strict=True)
    ]


_Top = list[tuple[Int[Tensor, " C"], Float[Tensor, " C"]]]
"""The first ids of each position, and their probabilities."""


def _top(
    record: TopKRecord | None, states: Tensor | None, head: LmHead | None, rows: Tensor
) -> _Top:
    """Of some positions, from their record, else from their states."""
    if record is None:
        assert states is not None
        assert head is not None
        record = top_k_from_hidden(states[rows], head, min(NUM_WORDS, head.vocab_size))
        rows = torch.arange(len(rows))
    shares = (record.logits.float() - record.logsumexp[:, None]).exp()
    counts = record.counts.clamp(max=NUM_WORDS).tolist()
    return [(record.ids[row, : counts[row]], shares[row, : counts[row]]) for row in rows.tolist()]
