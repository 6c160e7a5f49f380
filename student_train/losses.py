"""EM-KD's objective of a micro-batch: states and cached outputs in, four terms out.

    total = a supervised + (1 - a) RLD + b VSD + c VLAD        a = 0.5, b = 0.25, c = 25

    supervised  next-token cross-entropy on the response           mean over response tokens
    RLD         reverse KL on the response's logits                mean over response tokens
    VSD         reverse KL on matched vision logits                mean over pairs, then samples
    VLAD        smooth L1 of text-vision cosine affinities         mean over entries, then samples

The means over tokens run over the micro-batch, those over samples over its samples that have an
image (VLAD: and text to compare). `matching.py` finds the pairs, `terms.py` and `logit_terms.py`
compare what is paired, and this module alone knows both. Refuses states and teacher outputs that
do not belong to one text. Dimensions as in schema.py.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.fused_head import head_loss
from student_train.linear_head import LogitsOf, as_linear
from student_train.logit_terms import LogitTerm, divergence_term, head_rows, supervised_term
from student_train.matching import Assignment, match_tokens
from student_train.metrics import assignment_stats, row_mean_spread
from student_train.objective import ObjectiveConfig, TailPolicy
from student_train.signals import (
    Signal,
    TeacherAssets,
    concatenate,
    response_signal,
    vision_signal,
)
from student_train.terms import mean_of, token_mean, vlad_loss, vsd_loss
from student_train.top_k_signal import at_least_float32
from teacher_cache.affinity import cosine_affinity
from teacher_cache.schema import TeacherOutput, TokenSpans, ViewGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStates:
    """The student's final hidden states of one sample, gathered: padding has left no trace.

    `predicting[i]` is the state whose logits predict `response_ids[i]`; `text` are the content
    tokens after the image, of which `text_is_response` tells the response from the instruction.
    """

    views: tuple[ViewGrid, ...]
    vision: Float[Tensor, "N D"]
    text: Float[Tensor, "X D"]
    predicting: Float[Tensor, "R D"]
    text_is_response: Bool[Tensor, " X"]
    response_ids: Int[Tensor, " R"]
    content_ids: Int[Tensor, " T"]
    """Kept to be compared with the teacher's, so that no sample is distilled from another."""


def gather_states(
    hidden: Float[Tensor, "B L D"], spans: Sequence[TokenSpans], offsets: Sequence[int]
) -> list[SampleStates]:
    """Pick the states that the losses need from a padded batch, with gradient.

    Position p of sample i sits at column `p + offsets[i]`, so left and right padding gather the
    same states.
    """
    device = hidden.device
    states: list[SampleStates] = []
    for row, span, offset in zip(hidden, spans, offsets, strict=True):
        states.append(
            SampleStates(
                views=span.views,
                vision=row[(span.vision + offset).to(device)],
                text=row[(span.vlad_text + offset).to(device)],
                predicting=row[(span.predicting + offset).to(device)],
                text_is_response=span.is_response[span.after_image].to(device),
                response_ids=span.content_ids[span.is_response].to(device),
                content_ids=span.content_ids,
            )
        )
    return states


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The loss of a micro-batch, and everything that was computed on the way to it.

    `total` is the weighted sum; `terms` are unweighted and have gradients, by name, only those
    of positive weight. `tails` names the tail policy that each divergence really used, because
    values under different policies do not compare. `assignments` has one entry per sample, None
    without an image or without a vision term. `diagnostics` are plain numbers for the log.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    tails: dict[str, TailPolicy]
    assignments: tuple[Assignment | None, ...]
    diagnostics: dict[str, float]


def distillation_loss(
    states: Sequence[SampleStates],
    outputs: Sequence[TeacherOutput],
    head: LogitsOf,
    objective: ObjectiveConfig,
    assets: TeacherAssets | None = None,
) -> LossTerms:
    """The objective of one micro-batch: student states against cached teacher outputs.

    Terms of weight 0 are not computed, and what only they need is not touched. Logits appear a
    chunk at a time (`head_loss`), for matching those of one sample. Runs on the device and in the
    dtype of the states (autocast reaches the head only); put `assets` on that device once
    (`TeacherAssets.to`).
    ValueError where a sample's text differs between student and teacher, where a record that an
    active term needs is absent, and for whatever matching, divergence and head refuse.
    """
    if not states:
        raise ValueError("a micro-batch needs at least one sample")
    for position, (state, output) in enumerate(zip(states, outputs, strict=True)):
        _require_same_text(position, state, output)
    batch = _Batch(states, outputs, as_linear(head) or head, objective, assets or TeacherAssets())
    diagnostics: dict[str, float] = {}
    response = _response_block(batch)
    matched = _match_samples(batch, diagnostics)
    blocks = [block for block in (response, _vision_block(batch, matched)) if block is not None]
    terms: dict[str, Tensor] = {}
    tails: dict[str, TailPolicy] = {}
    totals: list[Tensor] = []
    if blocks:
        found = head_loss(batch.head, [head_rows(b.hidden, b.terms) for b in blocks])
        totals.append(found.total)
        for block, values in zip(blocks, found.values, strict=True):
            for term in block.terms:
                terms[term.name] = term.reduce(values[term.name])
                diagnostics |= term.diagnostics(values)
                if term.tail is not None:
                    tails[term.name] = term.tail
    for name, term in _vision_terms(batch, matched, terms).items():
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

    def weight(self, term: str) -> float:
        return getattr(self.objective, f"{term}_weight")


class _Matched(NamedTuple):
    """A sample with an image, after matching."""

    state: SampleStates
    output: TeacherOutput
    pairs: Assignment
    teacher: Signal
    """The teacher at the matched positions, pair by pair."""

    @property
    def vision(self) -> Tensor:
        """The student's states that were matched, pair by pair."""
        # Usually these are all, and pairs are in their order: then nothing has to be copied.
        every = len(self.pairs.student) == len(self.state.vision)
        return self.state.vision if every else self.state.vision[self.pairs.student]


class _Block(NamedTuple):
    """Rows that go through the head together, and the terms that look at their logits."""

    hidden: Tensor
    terms: list[LogitTerm]


def _match_samples(batch: _Batch, diagnostics: dict[str, float]) -> list[_Matched | None]:
    """Match every sample that has an image, one by one: logits of one sample exist at a time."""
    if not batch.objective.needs_vision:
        return [None] * len(batch.states)
    found: list[_Matched | None] = []
    mean_logits: list[Tensor] = []
    for state, output in zip(batch.states, batch.outputs, strict=True):
        if not state.views and not output.views:
            found.append(None)
            continue
        logits = None
        if batch.objective.matching.metric != "hidden_cosine":
            with torch.no_grad():
                logits = batch.head(state.vision)
            mean_logits.append(at_least_float32(logits).mean(dim=1, keepdim=True))
        found.append(_match(batch, state, output, logits))
    pairs = [sample.pairs for sample in found if sample is not None]
    if pairs:
        stats = assignment_stats(pairs)
        diagnostics["match_mean_cost"] = stats.mean_cost
        diagnostics["match_separability"] = stats.separability
        diagnostics["match_hubness"] = stats.hubness
    if mean_logits:
        diagnostics["student_row_mean_spread"] = row_mean_spread(torch.cat(mean_logits))
    return found


def _match(
    batch: _Batch, state: SampleStates, output: TeacherOutput, logits: Tensor | None
) -> _Matched:
    config, device = batch.objective.matching, state.vision.device
    with torch.autocast(device.type, enabled=False):
        teacher = vision_signal(output, batch.assets).to(device)
        pairs = match_tokens(state.vision, logits, state.views, teacher, output.views, config)
    return _Matched(state, output, pairs, teacher.rows(pairs.teacher))


def _response_block(batch: _Batch) -> _Block | None:
    """Supervised and RLD look at one and the same logits."""
    hidden = torch.cat([state.predicting for state in batch.states])
    terms: list[LogitTerm] = []
    if batch.objective.supervised_weight > 0:
        labels = torch.cat([state.response_ids for state in batch.states])
        terms.append(supervised_term(batch.objective.supervised_weight, labels, token_mean))
    if batch.objective.rld_weight > 0:
        signals = [response_signal(output, batch.assets) for output in batch.outputs]
        teacher = concatenate(signals).to(hidden.device)
        weight = batch.objective.rld_weight
        terms.append(divergence_term("rld", weight, teacher, batch.objective, token_mean))
    return _Block(hidden, terms) if terms else None


def _vision_block(batch: _Batch, matched: Sequence[_Matched | None]) -> _Block | None:
    """VSD looks at the logits of the vision tokens that were matched."""
    found = [sample for sample in matched if sample is not None]
    if batch.objective.vsd_weight == 0 or not found:
        return None
    hidden = torch.cat([sample.vision for sample in found])
    teacher = concatenate([sample.teacher for sample in found])
    num_pairs = [sample.pairs.num_pairs for sample in found]

    def reduce(values: Tensor) -> Tensor:
        return vsd_loss(values, num_pairs, values.sum())

    term = divergence_term("vsd", batch.objective.vsd_weight, teacher, batch.objective, reduce)
    return _Block(hidden, [term])


def _vision_terms(
    batch: _Batch, matched: Sequence[_Matched | None], known: Collection[str]
) -> dict[str, Tensor]:
    """VLAD, and a zero for VSD where there was nothing to match."""
    found = [sample for sample in matched if sample is not None]
    zero = torch.cat([state.vision for state in batch.states])[:0].sum()
    terms: dict[str, Tensor] = {}
    if batch.objective.vsd_weight > 0 and "vsd" not in known:
        terms["vsd"] = zero
    if batch.objective.vlad_weight > 0:
        with torch.autocast(zero.device.type, enabled=False):
            losses = [_sample_vlad(sample, batch.objective) for sample in found]
            terms["vlad"] = mean_of([loss for loss in losses if loss is not None], zero)
    return terms


def _sample_vlad(sample: _Matched, objective: ObjectiveConfig) -> Tensor | None:
    """VLAD of one sample, or None where it has no text to compare."""
    chosen = _vlad_rows(sample.state, objective)
    if not bool(chosen.any()):
        return None
    own = cosine_affinity(sample.state.text[chosen], sample.state.vision[sample.pairs.student])
    theirs = _teacher_affinity(sample.output, chosen, sample.pairs.teacher)
    return vlad_loss(own, theirs, objective.smooth_l1_beta)


def _vlad_rows(state: SampleStates, objective: ObjectiveConfig) -> Tensor:
    """Which of the text tokens after the image take part in VLAD: a mask [X]."""
    if objective.vlad_text == "response":
        return state.text_is_response
    if objective.vlad_text == "instruction":
        return ~state.text_is_response
    return torch.ones_like(state.text_is_response)


def _teacher_affinity(output: TeacherOutput, text_rows: Tensor, vision_rows: Tensor) -> Tensor:
    """The stored affinity, or that of the stored states: rows by mask, columns by matching."""
    device = vision_rows.device
    if output.affinity is not None:
        return output.affinity.cosine.to(device)[text_rows][:, vision_rows]
    if output.hidden is None:
        raise ValueError("the cached sample was read without its part `affinity` (or `hidden`)")
    text, vision = output.hidden.text.to(device), output.hidden.vision.to(device)
    return cosine_affinity(text[text_rows], vision[vision_rows])


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
