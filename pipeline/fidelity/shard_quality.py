"""Measures what the records of one shard lose, while the teacher that made them is loaded.

Tail masses are those of the shard's own records. A few samples, evenly spread over those with
images, go through the teacher once more, alone; what readers will decode of them is compared with
every logit (tier_loss.py). The result depends on the shard's rows only (the last bits also on the
number of threads). Where records hold hidden states beside the top k, the top k is measured.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.fidelity.tier_loss import LossMeter
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import Signal
from teacher_cache.codec.columns import output_columns, output_from_columns
from teacher_cache.encoding.collate import EncodedSample, collate
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.make_records import make_output
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import holds
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.shard_quality import (
    MatchName,
    SampledLoss,
    ShardQuality,
    TailMass,
    measured_records,
    rounded,
)
from teacher_cache.schema.teacher_output import CachedSample, TopKRecord
from teacher_cache.teacher.teacher import Teacher

_NAME = "records"
"""The one signal that is measured."""


def measure_shard(
    teacher: Teacher, rows: Sequence[CachedSample], spec: CacheSpec, num_samples: int
) -> ShardQuality | None:
    """The quality of a shard of these rows; None if `num_samples` is 0 or nothing is lost.

    `teacher` has the sketch's basis, where the spec has one; `num_samples` go through it again.
    """
    if num_samples == 0 or not holds(spec.records, "topk"):
        return None
    own = [row.output.vision for row in rows if row.output.shared_from is None]
    return ShardQuality(
        vision_tail=_tail(own),
        response_tail=_tail(row.output.response for row in rows),
        sampled=_sampled_loss(teacher, sampled_rows(rows, num_samples), spec),
    )


def sampled_rows(rows: Sequence[CachedSample], num_samples: int) -> list[Sample]:
    """Samples at equal distances among those that have a view of more than one vision token."""
    shown = [row for row in rows if any(view.num_tokens > 1 for view in row.output.views)]
    count = min(num_samples, len(shown))
    return [shown[(2 * i + 1) * len(shown) // (2 * count)].sample for i in range(count)]


def _tail(records: Iterable[TopKRecord | None]) -> TailMass | None:
    tails = [record.log_tail for record in records if record is not None]
    return TailMass.of(torch.cat(tails)) if tails else None


def _sampled_loss(
    teacher: Teacher, samples: Sequence[Sample], spec: CacheSpec
) -> SampledLoss | None:
    """What these samples lose; None where there are none."""
    spec = dataclasses.replace(spec, records=measured_records(spec.records), grid=None)
    metric: MatchName = "raw_l1" if holds(spec.records, "sketch") else "prob_l1"
    meter = LossMeter(teacher.head, metric, [_NAME], teacher.sketch)
    for sample in samples:
        encoded = teacher.encoder.encode(sample)
        batch = collate([encoded], teacher.encoder.pad_token_id, "right")
        states = teacher.hidden_states(batch)[0]
        signal = _as_read(teacher, encoded, states, spec).to(teacher.device)
        meter.add(states[encoded.spans.vision], encoded.spans.views, {_NAME: signal})
    loss, spread = meter.losses[_NAME], meter.row_mean_spread
    if loss.regret is None or loss.agreement is None or spread is None:
        return None
    return SampledLoss(
        num_samples=len(samples),
        num_pairs=loss.num_pairs,
        metric=metric,
        regret=rounded(loss.regret),
        agreement=rounded(loss.agreement),
        gradient_cosine=rounded(loss.gradient_cosine),
        energy=rounded(meter.energy()) if metric == "raw_l1" else None,
        row_mean_spread=rounded(spread),
    )


def _as_read(teacher: Teacher, encoded: EncodedSample, states: Tensor, spec: CacheSpec) -> Signal:
    """What a student learns of the vision tokens: their records, stored and read back."""
    output = make_output(encoded.spans, states, teacher.head, spec.settings, teacher.sketch)
    columns = output_columns(output, spec)
    read = output_from_columns(columns, spec.vocab_size, spec.top_k)
    assets = TeacherAssets(sketch=teacher.sketch, template=teacher.template)
    return vision_signal(read, assets.to(teacher.device))
