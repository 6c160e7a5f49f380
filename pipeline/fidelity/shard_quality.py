"""What the records of one shard lose, measured while the teacher that made them is loaded.

Promises: tail masses are those of the shard's own records; some of its samples, spread evenly over
those with images, go through the teacher once more, alone, and what readers will decode of them is
compared with every logit (tier_loss.py). Which samples and what is found follow from the shard's
rows: whoever builds it, in whatever order, finds the same, up to what the number of threads changes
in the last bits. It holds at most `lm_head.MAX_LOGITS` logits at a time. Records without a top k
keep everything, and are not measured; where they keep both, the top k is.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.fidelity.tier_loss import TierSums, compare, logit_energy
from student_train.signals.from_cache import TeacherAssets, vision_signal
from student_train.signals.teacher_signal import HiddenSignal, Signal
from teacher_cache.codec.columns import output_columns, output_from_columns
from teacher_cache.models.collate import EncodedSample, collate
from teacher_cache.records.lm_head import row_chunks
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

_TIER = "records"


def measure_shard(
    teacher: Teacher, rows: Sequence[CachedSample], spec: CacheSpec, num_samples: int
) -> ShardQuality | None:
    """The quality of a shard of these rows; None where nothing is asked for, or nothing is lost.

    `teacher` has the sketch's basis, where the spec has one; `num_samples` go through it again.
    """
    if num_samples == 0 or not holds(spec.records, "topk"):
        return None
    own = [row.output.vision for row in rows if row.output.shared_from is None]
    return ShardQuality(
        vision_tail=_tail(own),
        response_tail=_tail(row.output.response for row in rows),
        sampled=_Sampled(teacher, spec).measure(sampled_rows(rows, num_samples)),
    )


def sampled_rows(rows: Sequence[CachedSample], num_samples: int) -> list[Sample]:
    """Samples at equal distances among those that have a view of more than one vision token."""
    shown = [row for row in rows if any(view.num_tokens > 1 for view in row.output.views)]
    count = min(num_samples, len(shown))
    return [shown[(2 * i + 1) * len(shown) // (2 * count)].sample for i in range(count)]


def _tail(records: Iterable[TopKRecord | None]) -> TailMass | None:
    tails = [record.log_tail for record in records if record is not None]
    return TailMass.of(torch.cat(tails)) if tails else None


class _Sampled:
    """Adds up what some samples of a shard lose, view by view."""

    def __init__(self, teacher: Teacher, spec: CacheSpec) -> None:
        self.teacher = teacher
        self.spec = dataclasses.replace(spec, records=measured_records(spec.records), grid=None)
        self.settings = self.spec.settings
        self.metric: MatchName = "raw_l1" if holds(self.spec.records, "sketch") else "prob_l1"
        self.sums = TierSums()
        self.held = self.total = 0.0
        self.spreads: list[float] = []

    def measure(self, samples: Sequence[Sample]) -> SampledLoss | None:
        """What these samples lose; None where there is none."""
        for sample in samples:
            self._add(sample)
        if self.sums.regret is None or self.sums.agreement is None:
            return None
        sketched = self.metric == "raw_l1"
        return SampledLoss(
            num_samples=len(samples),
            num_pairs=self.sums.num_pairs,
            metric=self.metric,
            regret=rounded(self.sums.regret),
            agreement=rounded(self.sums.agreement),
            gradient_cosine=rounded(self.sums.gradient_cosine),
            energy=rounded(self.held / self.total if self.total else 1.0) if sketched else None,
            row_mean_spread=rounded(sum(self.spreads) / len(self.spreads)),
        )

    def _add(self, sample: Sample) -> None:
        teacher, device = self.teacher, self.teacher.device
        encoded = teacher.encoder.encode(sample)
        states = self._states(encoded)
        signal, start = self._as_read(encoded, states).to(device), 0
        vision = states[encoded.spans.vision]
        for view in encoded.spans.views:
            rows = torch.arange(start, start + view.num_tokens, device=device)
            start += view.num_tokens
            if view.num_tokens == 1:
                continue  # the stand-in would be the teacher itself
            exact = HiddenSignal(hidden=vision[rows], head=teacher.head)
            here = {_TIER: signal.rows(rows)}
            compare(vision[rows], exact, view, teacher.head, self.metric, here, {_TIER: self.sums})
            self._add_logits(vision[rows])

    def _states(self, encoded: EncodedSample) -> Tensor:
        side = collate([encoded], self.teacher.encoder.pad_token_id, "right")
        return self.teacher.hidden_states(side)[0]

    def _as_read(self, encoded: EncodedSample, states: Tensor) -> Signal:
        """What a student is told of the vision tokens: made, stored and read back."""
        head, sketch = self.teacher.head, self.teacher.sketch
        output = make_output(encoded.spans, states, head, self.settings, sketch)
        columns = output_columns(output, self.spec)
        read = output_from_columns(columns, self.spec.vocab_size, self.spec.top_k)
        assets = TeacherAssets(sketch=sketch, template=self.teacher.template)
        return vision_signal(read, assets.to(self.teacher.device))

    def _add_logits(self, states: Tensor) -> None:
        """The energy of a view's logits, and how far their means are apart."""
        head, means = self.teacher.head, list[Tensor]()
        for rows in row_chunks(len(states), head.vocab_size):
            logits = head.logits(states[rows]).to(torch.float32)
            means.append(logits.mean(dim=1))
            if self.teacher.sketch is not None:
                held, total = logit_energy(states[rows], logits, self.teacher.sketch)
                self.held += float(held[-1])
                self.total += total
        self.spreads.append(float(torch.cat(means).std()))
