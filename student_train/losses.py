"""EM-KD's objective of a micro-batch: states and cached outputs in, four terms out.

    total = a supervised + (1 - a) RLD + b VSD + c VLAD        a = 0.5, b = 0.25, c = 25

    supervised  next-token cross-entropy on the response           mean over response tokens
    RLD         reverse KL on the response's logits                mean over response tokens
    VSD         reverse KL on matched vision logits                mean over pairs, then samples
    VLAD        smooth L1 of text-vision cosine affinities         mean over entries, then samples

The means over tokens run over the micro-batch, those over samples over its samples that have an
image (VLAD: and text to compare). `matching.py` finds the pairs, `terms.py` compares what is
paired, and this module alone knows both. Refuses states and teacher outputs that do not belong to
one text. Dimensions as in schema.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.divergence import Divergence, resolve_tail, reverse_kl
from student_train.matching import Assignment, match_tokens
from student_train.metrics import assignment_stats, kept_mass, row_mean_spread
from student_train.objective import ObjectiveConfig, TailPolicy
from student_train.signals import (
    Signal,
    TeacherAssets,
    concatenate,
    response_signal,
    vision_signal,
)
from student_train.terms import mean_of, rld_loss, supervised_loss, vlad_loss, vsd_loss
from teacher_cache.affinity import cosine_affinity
from teacher_cache.schema import TeacherOutput, TokenSpans, ViewGrid

LogitsOf = Callable[[Tensor], Tensor]
"""The student's LM head: final hidden states [n, D] to logits [n, W], W >= V, with gradient."""


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

    Terms of weight 0 are not computed, and what only they need is not touched. Runs on the device
    and in the dtype of the states (autocast reaches the head only); put `assets` on that device
    once (`TeacherAssets.to`).
    ValueError where a sample's text differs between student and teacher, where a record that an
    active term needs is absent, and for whatever matching and divergence refuse.
    """
    if not states:
        raise ValueError("a micro-batch needs at least one sample")
    for position, (state, output) in enumerate(zip(states, outputs, strict=True)):
        _require_same_text(position, state, output)
    batch = _Batch(states, outputs, objective, assets or TeacherAssets())
    response_logits, vision_logits = _student_logits(states, head, objective)
    parts = _Parts({}, {}, {})
    assignments: list[Assignment | None] = [None] * len(states)
    # The head belongs to the model and runs in its precision; what is compared is float32.
    with torch.autocast(states[0].predicting.device.type, enabled=False):
        if response_logits is not None:
            _response_terms(batch, response_logits, parts)
        if objective.needs_vision:
            assignments = _vision_terms(batch, vision_logits, parts)
    weights = {name: getattr(objective, f"{name}_weight") for name in parts.terms}
    weighted = [weights[name] * term for name, term in parts.terms.items()]
    return LossTerms(
        total=torch.stack(weighted).sum(),
        terms=parts.terms,
        weights=weights,
        tails=parts.tails,
        assignments=tuple(assignments),
        diagnostics=parts.diagnostics,
    )


class _Batch(NamedTuple):
    states: Sequence[SampleStates]
    outputs: Sequence[TeacherOutput]
    objective: ObjectiveConfig
    assets: TeacherAssets

    def divergence(self, student_logits: Tensor, teacher: Signal) -> Divergence:
        chosen = self.objective
        return reverse_kl(student_logits, teacher, chosen.tail, chosen.temperature, chosen.blend)


class _Parts(NamedTuple):
    terms: dict[str, Tensor]
    tails: dict[str, TailPolicy]
    diagnostics: dict[str, float]

    def add_divergence(
        self, name: str, term: Tensor, teacher: Signal, policy: TailPolicy, values: Divergence
    ) -> None:
        """Record a KL term with what its value rests on, where that is not the whole teacher."""
        self.terms[name] = term
        self.tails[name] = resolve_tail(policy, teacher)
        if self.tails[name] != "exact" and len(values.value):
            self.diagnostics[f"{name}_tail_part"] = float(values.tail.detach().mean())
            self.diagnostics[f"{name}_lower_bound"] = float(values.lower.mean())
            self.diagnostics[f"{name}_student_tail_mass"] = float(values.student_tail_mass.mean())
            self.diagnostics[f"{name}_teacher_kept_mass"] = kept_mass(teacher)


def _student_logits(
    states: Sequence[SampleStates], head: LogitsOf, objective: ObjectiveConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of all predicting and of all vision states, each only where some term needs them.

    Vision logits have a gradient only under VSD; matching alone needs none.
    """
    response_logits = vision_logits = None
    if objective.supervised_weight > 0 or objective.rld_weight > 0:
        response_logits = head(torch.cat([state.predicting for state in states]))
    matches_logits = objective.needs_vision and objective.matching.metric != "hidden_cosine"
    if objective.vsd_weight > 0 or matches_logits:
        with torch.set_grad_enabled(torch.is_grad_enabled() and objective.vsd_weight > 0):
            vision_logits = head(torch.cat([state.vision for state in states]))
    return response_logits, vision_logits


def _response_terms(batch: _Batch, logits_RW: Tensor, parts: _Parts) -> None:
    if batch.objective.supervised_weight > 0:
        labels = torch.cat([state.response_ids for state in batch.states])
        parts.terms["supervised"] = supervised_loss(logits_RW, labels)
    if batch.objective.rld_weight > 0:
        signals = [response_signal(output, batch.assets) for output in batch.outputs]
        teacher = concatenate(signals).to(logits_RW.device)
        values = batch.divergence(logits_RW, teacher)
        parts.add_divergence("rld", rld_loss(values), teacher, batch.objective.tail, values)


class _Matched(NamedTuple):
    """A sample with an image, after matching."""

    state: SampleStates
    output: TeacherOutput
    pairs: Assignment
    teacher: Signal
    """The teacher at the matched positions, pair by pair."""


def _vision_terms(
    batch: _Batch, logits_NW: Tensor | None, parts: _Parts
) -> list[Assignment | None]:
    """Match every sample that has an image, then compare what was matched."""
    found = _match_samples(batch, logits_NW)
    matched = [sample for sample in found if sample is not None]
    zero = torch.cat([state.vision for state in batch.states])[:0].sum()
    if batch.objective.vsd_weight > 0:
        parts.terms["vsd"] = zero
        if logits_NW is not None and matched:
            _add_vsd(batch, parts, logits_NW, found)
    if batch.objective.vlad_weight > 0:
        losses = [_sample_vlad(sample, batch.objective) for sample in matched]
        parts.terms["vlad"] = mean_of([loss for loss in losses if loss is not None], zero)
    if matched:
        stats = assignment_stats([sample.pairs for sample in matched])
        parts.diagnostics["match_mean_cost"] = stats.mean_cost
        parts.diagnostics["match_separability"] = stats.separability
        parts.diagnostics["match_hubness"] = stats.hubness
        if logits_NW is not None:
            parts.diagnostics["student_row_mean_spread"] = row_mean_spread(logits_NW)
    return [None if sample is None else sample.pairs for sample in found]


def _match_samples(batch: _Batch, logits_NW: Tensor | None) -> list[_Matched | None]:
    config = batch.objective.matching
    found: list[_Matched | None] = []
    start = 0
    for state, output in zip(batch.states, batch.outputs, strict=True):
        rows = slice(start, start + len(state.vision))
        start = rows.stop
        if not state.views and not output.views:
            found.append(None)
            continue
        teacher = vision_signal(output, batch.assets).to(state.vision.device)
        logits = None if logits_NW is None else logits_NW[rows]
        pairs = match_tokens(state.vision, logits, state.views, teacher, output.views, config)
        found.append(_Matched(state, output, pairs, teacher.rows(pairs.teacher)))
    return found


def _add_vsd(
    batch: _Batch, parts: _Parts, logits_NW: Tensor, found: Sequence[_Matched | None]
) -> None:
    chosen: list[Tensor] = []
    start = 0
    for state, sample in zip(batch.states, found, strict=True):
        if sample is not None:
            chosen.append(sample.pairs.student + start)
        start += len(state.vision)
    index = torch.cat(chosen)
    # Usually every student token is matched, in order: then the logits need no copy.
    matched_PW = logits_NW if len(index) == len(logits_NW) else logits_NW[index]
    teacher = concatenate([sample.teacher for sample in found if sample is not None])
    values = batch.divergence(matched_PW, teacher)
    term = vsd_loss(values, [len(rows) for rows in chosen], logits_NW[:0].sum())
    parts.add_divergence("vsd", term, teacher, batch.objective.tail, values)


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
