"""Measures what each tier of a cache would lose on *this* teacher: `emkd plan --pilot`.

Every second sample fits the sketch's basis and the others are measured, so no number is flattered
by its own calibration. Records are made, encoded and turned into signals by the functions that
build and training use.

Holds the states of one batch and the records of one sample, whatever the number of samples. Refuses
a source with fewer than two usable samples, or without images.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config.build import SourceConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.plugins import load_plugins
from pipeline.fidelity.recommend import PilotReport, TierMeasure, TierTail, recommend
from pipeline.fidelity.sizes import SKETCH_RANKS, Tier, TierSize, asset_bytes, cost, tiers
from pipeline.fidelity.tier_bytes import TierBytes, shard_structure
from pipeline.fidelity.tier_loss import LossMeter
from pipeline.sources.source import open_source, warn_unread
from pipeline.sources.tried import samples_to_try
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import Signal
from teacher_cache.encoding.chat_template import text_rules
from teacher_cache.encoding.collate import EncodedSample, collate
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.make_records import make_output
from teacher_cache.records.sketch import HiddenMoments, SketchBasis, basis_from_moments
from teacher_cache.records.tail_template import MeanTail, TailTemplate
from teacher_cache.schema.errors import SampleError, first_causes
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.teacher.vision_sharing import vision_digest

SAMPLES_PER_SHARD = 256
"""The default of a build."""


class Pilot:
    """One pilot: a pass that calibrates, a pass that measures, a report."""

    def __init__(self, config: PlanConfig, progress: Progress = no_progress) -> None:
        if config.source is None or config.teacher is None:
            raise ValueError("a pilot needs a source and a teacher; give both")
        load_plugins(config.plugin)
        self.config = config
        self.progress = progress
        self.source = open_source(
            SourceConfig(
                path=config.source,
                image_root=config.image_root,
                max_pixels=config.max_pixels,
                confine_images=config.confine_images,
            )
        )
        self.teacher = Teacher.load(
            config.teacher,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            text=text_rules(config.append_eos, config.chat_template),
            samples=samples_to_try(self.source),
        )
        self.head = self.teacher.head
        self.vocab_size, self.hidden_size = self.head.weight.shape
        self.tiers = {tier.name: tier for tier in tiers(self.vocab_size, self.hidden_size)}
        self.bytes = {name: TierBytes() for name in self.tiers}
        self.rejected: list[str] = []
        self.batch_times: list[tuple[float, int]] = []
        """Seconds and samples of each batch."""
        self.tails: dict[tuple[int, str], list[Tensor]] = {}
        self.num_with_images, self.vision_digests = 0, set[str]()
        self.num_samples = self.num_vision = self.num_response = 0

    def run(self) -> PilotReport:
        """Calibrate, measure and recommend."""
        samples = self._read()
        moments = HiddenMoments(self.hidden_size)
        kept = {tier.top_k for tier in self.tiers.values() if tier.top_k is not None}
        tails = {top_k: MeanTail(self.vocab_size) for top_k in sorted(kept)}
        for _, encoded, states in self._states(samples[0::2], "calibrate"):
            moments.update(states[encoded.spans.vision])
            for top_k, tail in tails.items():
                tail.update(states[encoded.spans.vision], self.head, top_k)
        try:
            self.basis = basis_from_moments(moments, self.head, max(SKETCH_RANKS))
        except ValueError as error:
            raise ValueError(f"{error}{self._causes()}") from error
        self.teacher.sketch = self.basis
        self.meter = LossMeter(self.head, self.config.match_metric, self.tiers, self.basis)
        self.templates: dict[int | None, TailTemplate] = {
            top_k: TailTemplate(vision=tail.log_shares) for top_k, tail in tails.items()
        }
        self.specs: dict[RecordKind, CacheSpec] = {}
        for tier in self.tiers.values():
            if tier.records not in self.specs:
                self.specs[tier.records] = self.teacher.spec(
                    _settings(tier), batch_size=self.config.batch_size
                )
        for sample, encoded, states in self._states(samples[1::2], "measure"):
            self._measure(sample, encoded, states)
        spread = self.meter.row_mean_spread
        if spread is None:
            raise ValueError(
                f"{self.config.source}: none of the samples that the pilot measured has a view of "
                "more than one vision token; take more samples, or a source with images"
                f"{self._causes()}"
            )
        return self._report(moments.count, spread)

    def _causes(self) -> str:
        return first_causes(self.rejected, min(self.config.pilot, len(self.source)))

    def _read(self) -> list[Sample]:
        readable: list[Sample] = []
        for index in range(min(self.config.pilot, len(self.source))):
            try:
                readable.append(self.source[index])
            except SampleError as error:
                self.rejected.append(str(error))
        warn_unread(self.source.name, self.source.unread)
        if len(readable) < 2:
            raise ValueError(
                f"{self.config.source}: a pilot needs 2 usable samples, found {len(readable)} "
                f"among the first {self.config.pilot}: {'; '.join(self.rejected)}"
            )
        return readable

    def _states(
        self, samples: Sequence[Sample], what: str
    ) -> Iterator[tuple[Sample, EncodedSample, Tensor]]:
        """Each usable sample with its final states [L, D]; processor and teacher are timed."""
        size = self.config.batch_size
        for start in range(0, len(samples), size):
            begun = time.perf_counter()
            batch: list[tuple[Sample, EncodedSample]] = []
            for sample in samples[start : start + size]:
                try:
                    batch.append((sample, self.teacher.encoder.encode(sample)))
                except SampleError as error:
                    self.rejected.append(str(error))
            if batch:
                encoded = [item for _, item in batch]
                side = collate(encoded, self.teacher.encoder.pad_token_id, "right")
                states = self.teacher.hidden_states(side)
                float(states[0, 0, 0])  # waits for an accelerator
                self.batch_times.append((time.perf_counter() - begun, len(batch)))
                for (sample, item), rows in zip(batch, states, strict=True):
                    self._count_images(sample, item)
                    if bool(torch.isfinite(rows[: item.num_tokens]).all()):
                        yield sample, item, rows
                    else:
                        self.rejected.append(f"{sample.source_id}: NaN or infinite states")
            self.progress(what, min(start + size, len(samples)), len(samples))

    def _count_images(self, sample: Sample, encoded: EncodedSample) -> None:
        digest = vision_digest(sample, encoded)
        if digest is not None:
            self.num_with_images += 1
            self.vision_digests.add(digest)

    def _measure(self, sample: Sample, encoded: EncodedSample, states: Tensor) -> None:
        """Measure one sample in every tier: its bytes, its tails, and its views."""
        spans, device = encoded.spans, self.teacher.device
        self.num_samples += 1
        self.num_vision += len(spans.vision)
        self.num_response += len(spans.predicting)
        signals: dict[str, Signal] = {}
        for name, tier in self.tiers.items():
            rank = tier.sketch_rank
            sketch = None if rank is None else _shortened(self.basis, rank)
            output = make_output(spans, states, self.head, _settings(tier), sketch)
            cached = CachedSample(sample=sample, output=output)
            self.bytes[name].add(cached, self.specs[tier.records])
            self._keep_tails(tier, output)
            template = self.templates.get(tier.top_k)
            assets = TeacherAssets(head=self.head, sketch=sketch, template=template)
            signals[name] = vision_signal(output, assets.to(device)).to(device)
        self.meter.add(states[spans.vision], spans.views, signals)

    def _keep_tails(self, tier: Tier, output: TeacherOutput) -> None:
        if tier.records != "topk" or tier.top_k is None:
            return
        for where, record in (("vision", output.vision), ("response", output.response)):
            if record is not None:
                tails = self.tails.setdefault((tier.top_k, where), [])
                tails.append(record.log_tail.to(torch.float64).exp())

    def _report(self, calibration_tokens: int, row_mean_spread: float) -> PilotReport:
        seconds = self.config.teacher_seconds_per_sample
        seconds = _per_sample(self.batch_times) if seconds is None else seconds
        num_planned = self.config.samples or len(self.source)
        measured = tuple(self._tier(name, num_planned) for name in self.tiers)
        ranks = sorted({min(rank, self.hidden_size) for rank in SKETCH_RANKS})
        return PilotReport(
            samples=self.num_samples,
            rejected=tuple(self.rejected),
            calibration_tokens=calibration_tokens,
            vision_tokens=self.num_vision,
            response_tokens=self.num_response,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            match_metric=self.config.match_metric,
            teacher_seconds_per_sample=seconds,
            tails=tuple(self._tail(k) for k in sorted({k for k, _ in self.tails})),
            energy={rank: self.meter.energy(rank) for rank in ranks},
            samples_per_image=self.samples_per_image,
            row_mean_spread=row_mean_spread,
            tiers=measured,
            cost=cost(self.config, num_planned, seconds),
            recommendation=recommend(measured),
        )

    @property
    def samples_per_image(self) -> float:
        """Samples for each vision record: the setting if given, else as found so far."""
        given = self.config.samples_per_image
        found = self.num_with_images / len(self.vision_digests) if self.vision_digests else 1.0
        return found if given is None else given

    def _tail(self, top_k: int) -> TierTail:
        vision, response = (_quantiles(self.tails[top_k, at]) for at in ("vision", "response"))
        return TierTail(
            top_k=top_k,
            vision_median=vision[0],
            vision_p90=vision[1],
            response_median=response[0],
            response_p90=response[1],
        )

    def _tier(self, name: str, num_planned: int) -> TierMeasure:
        tier, sums, loss = self.tiers[name], self.bytes[name], self.meter.losses[name]
        spec = self.specs[tier.records]
        once = asset_bytes(tier, self.vocab_size, self.hidden_size, spec.logits_dtype)
        saved = sums.shareable * (1 - 1 / self.samples_per_image)
        per_row, per_shard = shard_structure(spec)
        structure = per_row + per_shard / SAMPLES_PER_SHARD
        per_sample = (sums.stored - saved) / self.num_samples + structure
        bare = tier.records == "topk" and tier.top_k is not None
        return TierMeasure(
            size=TierSize(
                tier=tier,
                per_vision_token=sums.stored_vision / self.num_vision,
                per_sample=per_sample,
                once=once,
                in_all=once + per_sample * num_planned,
            ),
            layout_per_vision_token=sums.layout_vision / self.num_vision,
            regret=loss.regret,
            agreement=loss.agreement,
            gradient_cosine=loss.gradient_cosine,
            tail_p90=self._tail(tier.top_k or 0).vision_p90 if bare else 0.0,
        )


def run_pilot(config: PlanConfig, progress: Progress = no_progress) -> PilotReport:
    """Measure the first `config.pilot` samples of the source with the teacher."""
    return Pilot(config, progress).run()


def _settings(tier: Tier) -> RecordSettings:
    return RecordSettings(
        records=tier.records,
        top_k=tier.top_k or 1,
        sketch_rank=tier.sketch_rank or 1,
        hidden_dtype=tier.hidden_dtype or "bfloat16",
    )


def _shortened(basis: SketchBasis, rank: int) -> SketchBasis:
    """The basis that the same states give at a smaller rank: axes are ordered by energy."""
    return replace(
        basis, projection=basis.projection[:, :rank], directions=basis.directions[:, :rank]
    )


def _per_sample(batch_times: Sequence[tuple[float, int]]) -> float:
    """Mean over all batches but the first, which also pays for start-up, if there are others."""
    counted = batch_times[1:] or batch_times
    return sum(seconds for seconds, _ in counted) / sum(count for _, count in counted)


def _quantiles(tails: Sequence[Tensor]) -> tuple[float, float]:
    """Median and 90th percentile; (0, 0) where there is nothing."""
    values = torch.cat(list(tails)).sort().values
    if not len(values):
        return 0.0, 0.0
    return float(values[len(values) // 2]), float(values[len(values) * 9 // 10])
