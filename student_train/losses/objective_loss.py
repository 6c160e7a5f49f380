"""Computes the objective of a micro-batch: states and cached outputs in, up to five terms out.

reference.py has the method on one page; the values here equal it where all logits are known.

    supervised  next-token cross-entropy on the response           mean over response tokens
    RLD         reverse KL on the response's logits                mean over response tokens
    KD          forward KL, from the student with more tokens or a cache     mean over the same
    VSD         reverse KL on matched vision logits                mean over pairs, then samples
    VLAD        smooth L1 of text-vision cosine affinities         mean over entries, then samples

Means over tokens run over the whole step, means over samples over its samples with an image (VLAD:
and with text after it to compare): `counts` has these numbers, and the result is this micro-batch's
share of each mean. Refuses states and teacher outputs of different texts. Dimensions as in
teacher_output.py.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.config.objective import ObjectiveConfig, UsedTail
from student_train.data.sample_states import SampleStates
from student_train.head.fused_loss import IncrementalHeadLoss
from student_train.head.linear_head import LogitsOf, as_linear, without_gradient
from student_train.losses.batch_matching import Matched, start_batch_matching
from student_train.losses.logit_terms import (
    ConsistencyTerm,
    LogitTerm,
    SupervisedTerm,
    divergence_term,
    head_rows,
)
from student_train.losses.step_counts import StepCounts
from student_train.losses.vlad import batch_vlad
from student_train.matching.assignment import Assignment
from student_train.signals.from_cache import teacher_response_at
from student_train.signals.teacher_signal import Signal, concatenate
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.teacher_output import TeacherOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """A micro-batch's share of the loss of its step, with its terms.

    `total` is the weighted sum. `terms` are unweighted shares of the step's terms, by name, with
    gradients; only those of positive weight. `tails` names the tail policy of each divergence;
    values under different policies do not compare. `assignments` has one entry per sample, None
    where no vision token is left or no term needs any. `diagnostics` are plain numbers to log.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    tails: dict[str, UsedTail]
    assignments: tuple[Assignment | None, ...]
    diagnostics: dict[str, float]


def distillation_loss(
    states: Sequence[SampleStates],
    outputs: Sequence[TeacherOutput],
    head: LogitsOf,
    objective: ObjectiveConfig,
    assets: TeacherAssets | None = None,
    consistency_teacher_states: Float[Tensor, "R D"] | None = None,
    cached_ratio: float = 0.0,
    *,
    counts: StepCounts | None = None,
    check_matching: bool = False,
) -> LossTerms:
    """The objective of one micro-batch: student states against cached teacher outputs.

    `consistency_teacher_states` come from the student's own pass with more vision tokens and
    predict the batch's response tokens in order. They are KD's teacher unless that comes from the
    cache; None where both passes are the same, so that KD is zero. A cached teacher is one that
    drops `cached_ratio` of its vision tokens, or the next smaller share in the cache. `counts` are
    those of the whole step, over all micro-batches and ranks; None: these samples are the step.
    `check_matching` adds the quality of one sample's matching to the diagnostics.

    Terms of weight 0 are not computed, and records that only they need are not read. Runs on the
    device and in the dtype of the states (autocast reaches the head only); put `assets` on that
    device once (`TeacherAssets.to`). ValueError where a sample's text differs between
    student and teacher, where a record that an active term needs is missing, and for whatever
    matching, divergence and head refuse.
    """
    if not states:
        raise ValueError("a micro-batch needs at least one sample")
    for position, (state, output) in enumerate(zip(states, outputs, strict=True)):
        _require_same_text(position, state, output)
    linear = as_linear(head) or head
    assets = assets or TeacherAssets()
    counts = counts or StepCounts.of_states(states, objective.vlad_text)
    batch = _Batch(
        states, outputs, linear, objective, assets, consistency_teacher_states, cached_ratio, counts
    )
    run, blocks = IncrementalHeadLoss(batch.head), list[list[LogitTerm]]()

    def compute(hidden: Sequence[Tensor], terms: list[LogitTerm]) -> None:
        if terms:
            run.add(head_rows(torch.cat(list(hidden)), terms))
            blocks.append(terms)

    # Threads solve the assignments while the response passes through the head and back.
    pending = start_batch_matching(
        states, outputs, batch.head, objective, batch.assets, check_matching
    )
    compute([state.predicting for state in states], _response_terms(batch))
    matched = pending.result()
    found = [sample for sample in matched if sample is not None]
    compute([sample.vision for sample in found], _vision_terms(batch, found))
    diagnostics = dict(pending.diagnostics)
    terms: dict[str, Tensor] = {}
    tails: dict[str, UsedTail] = {}
    totals: list[Tensor] = []
    if blocks:
        computed = run.finish()
        totals.append(computed.total)
        for block, values in zip(blocks, computed.values, strict=True):
            for term in block:
                terms[term.name] = term.reduce(values[term.name])
                diagnostics.update(term.diagnostics(values))
                if term.tail is not None:
                    tails[term.name] = term.tail
    for name, term in _other_terms(batch, found, terms).items():
        terms[name] = term
        totals.append(batch.weight(name) * term)
    return LossTerms(
        total=torch.stack(totals).sum(),
        terms=terms,
        weights={name: batch.weight(name) for name in terms},
        tails=tails,
        assignments=tuple(None if sample is None else sample.pairs for sample in matched),
        diagnostics=diagnostics,
    )


class _Batch(NamedTuple):
    states: Sequence[SampleStates]
    outputs: Sequence[TeacherOutput]
    head: LogitsOf
    objective: ObjectiveConfig
    assets: TeacherAssets
    consistency_teacher_states: Tensor | None
    cached_ratio: float
    counts: StepCounts

    def weight(self, term: str) -> float:
        return getattr(self.objective, f"{term}_weight")

    def cached(self, ratio: float) -> Signal:
        """The cached teacher over all response tokens, dropping this share of its vision tokens."""
        found = [teacher_response_at(output, self.assets, ratio) for output in self.outputs]
        return concatenate(found).to(self.states[0].predicting.device)


def _response_terms(batch: _Batch) -> list[LogitTerm]:
    """Supervised, RLD and KD share the response's logits."""
    objective, terms = batch.objective, list[LogitTerm]()
    if objective.supervised_weight > 0:
        labels = torch.cat([state.response_ids for state in batch.states])
        weight, count = objective.supervised_weight, batch.counts.of_term("supervised")
        terms.append(SupervisedTerm(weight=weight, count=count, response_ids=labels))
    if objective.rld_weight > 0:
        weight, count = objective.rld_weight, batch.counts.of_term("rld")
        terms.append(divergence_term("rld", weight, batch.cached(0.0), objective, count=count))
    if objective.kd_weight > 0:
        terms += _kd_terms(batch)
    return terms


def _kd_terms(batch: _Batch) -> list[LogitTerm]:
    """EPIC's term, from the cache or the student itself; none where both passes are the same."""
    objective, weight = batch.objective, batch.objective.kd_weight
    count = batch.counts.of_term("kd")
    if objective.kd_from_cache:
        teacher = batch.cached(batch.cached_ratio)
        return [divergence_term("kd", weight, teacher, objective, "forward_kl", count=count)]
    states = batch.consistency_teacher_states
    if states is None:
        return []
    term = ConsistencyTerm(
        weight=weight,
        count=count,
        hidden=states.detach(),
        teacher_logits=without_gradient(batch.head),
        temperature=objective.temperature,
    )
    return [term]


def _vision_terms(batch: _Batch, found: Sequence[Matched]) -> list[LogitTerm]:
    """VSD needs the logits of the matched vision tokens."""
    objective, weight = batch.objective, batch.objective.vsd_weight
    if weight == 0 or not found:
        return []
    num_pairs = [sample.pairs.num_pairs for sample in found]
    teacher, count = found[0].teachers, batch.counts.of_term("vsd")
    return [
        divergence_term("vsd", weight, teacher, objective, pairs_per_sample=num_pairs, count=count)
    ]


def _other_terms(
    batch: _Batch, found: Sequence[Matched], known: Collection[str]
) -> dict[str, Tensor]:
    """VLAD, and zeros for KD and VSD where nothing can be compared."""
    zero = torch.cat([state.vision for state in batch.states])[:0].sum()
    terms: dict[str, Tensor] = {}
    for name in ("kd", "vsd"):
        if batch.weight(name) > 0 and name not in known:
            terms[name] = zero
    if batch.objective.vlad_weight > 0:
        with torch.autocast(zero.device.type, enabled=False):
            count = batch.counts.of_term("vlad")
            terms["vlad"] = batch_vlad(found, batch.objective, count) if found else zero
    return terms


def _require_same_text(position: int, state: SampleStates, output: TeacherOutput) -> None:
    if not torch.equal(state.content_ids.cpu().long(), output.content_ids.cpu().long()):
        raise ValueError(
            f"sample {position} of the batch: the student's {len(state.content_ids)} text tokens "
            f"are not the teacher's {len(output.content_ids)}; train a student that has the "
            "teacher's tokenizer and chat template"
        )
    text_is_response = output.is_response[output.after_image].cpu()
    if not torch.equal(state.text_is_response.cpu(), text_is_response):
        raise ValueError(
            f"sample {position} of the batch: student and teacher disagree on which text tokens "
            "follow the image or belong to the response; use one chat template for both"
        )
