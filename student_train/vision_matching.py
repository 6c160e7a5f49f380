"""Matches the vision tokens of a micro-batch, sample by sample, in the background.

    pending = start_batch_matching(states, outputs, head, objective, assets)
    ...                                # work that hides the solving
    matched = pending.result()         # a Matched for each sample with vision tokens, else None

Promise: of the student's vision logits no more exist at a time than the costs of one problem look
at, and none afterwards; no gradient; the pairs do not depend on when they are asked for. A matching
that is close to arbitrary is said so, once, in the program's log. Refuses what `matching.py` and
`cost.py` refuse. Dimensions as in schema.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from student_train.linear_head import LogitsOf
from student_train.matching import Assignment, PendingMatching, start_matching
from student_train.metrics import (
    LEAST_SEPARABILITY,
    assignment_stats,
    matching_quality,
    row_mean_spread,
)
from student_train.objective import MatchingConfig, MatchMetric, ObjectiveConfig
from student_train.sample_states import SampleStates
from student_train.signals import Signal, TeacherAssets, vision_signal
from teacher_cache.schema import TeacherOutput

logger = logging.getLogger(__name__)


class Matched(NamedTuple):
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


class _Started(NamedTuple):
    state: SampleStates
    output: TeacherOutput
    teacher: Signal
    pairs: PendingMatching


@dataclass(kw_only=True)
class PendingBatch:
    """The matchings of a micro-batch, while they are solved."""

    samples: list[_Started | None] = field(repr=False)
    metric: MatchMetric
    exact: PendingMatching | None = None
    """The first sample with an image, by all of V."""
    diagnostics: dict[str, float] = field(default_factory=dict[str, float])
    """Plain numbers for the log; complete once `result` was asked for."""

    def result(self) -> list[Matched | None]:
        """One entry for each sample; ValueError where costs are not finite."""
        found = [None if sample is None else _finish(sample) for sample in self.samples]
        pairs = [sample.pairs for sample in found if sample is not None]
        if pairs:
            self._describe(pairs)
        return found

    def _describe(self, pairs: Sequence[Assignment]) -> None:
        stats = assignment_stats(pairs)
        self.diagnostics["match_mean_cost"] = stats.mean_cost
        self.diagnostics["match_separability"] = stats.separability
        self.diagnostics["match_arbitrary"] = stats.arbitrary
        self.diagnostics["match_hubness"] = stats.hubness
        if stats.certified is not None:
            self.diagnostics["match_certified"] = stats.certified
        means = [mean for each in pairs for mean in each.mean_logits]
        if means:
            self.diagnostics["student_row_mean_spread"] = row_mean_spread(torch.cat(means)[:, None])
        if stats.arbitrary >= 0.5:
            _warn_of_arbitrary(self.metric)
        first = next(sample for sample in self.samples if sample is not None)
        if self.exact is not None:
            quality = matching_quality(first.pairs, self.exact)
            of = "match" if first.teacher.exact else "match_sketch"
            self.diagnostics[f"{of}_regret"] = quality.regret
            self.diagnostics[f"{of}_agreement"] = quality.agreement


def start_batch_matching(
    states: Sequence[SampleStates],
    outputs: Sequence[TeacherOutput],
    head: LogitsOf,
    objective: ObjectiveConfig,
    assets: TeacherAssets,
    check: bool = False,
) -> PendingBatch:
    """Compute every sample's costs, and let threads solve the assignments.

    Nothing is matched where no term of the objective needs it. With `check`, the first sample with
    an image is matched a second time, by costs summed over all V that its record knows or, of a
    sketch, estimates (diagnostics `match_regret`, `match_agreement`, or `match_sketch_...`).
    ValueError where a record cannot serve the metric and where the two sides do not show the same
    views.
    """
    pending = PendingBatch(samples=[], metric=objective.matching.metric)
    for state, output in zip(states, outputs, strict=True):
        shown = bool(state.views or output.views)
        if not objective.needs_vision or not shown or _lost_all(state):
            pending.samples.append(None)
            continue
        teacher = vision_signal(output, assets).to(state.vision.device)
        pairs = _start(state, output, teacher, head, objective.matching)
        pending.samples.append(_Started(state, output, teacher, pairs))
        if check and pending.exact is None:
            whole = replace(objective.matching, num_shared_ids=None, certify=False)
            pending.exact = _start(state, output, teacher, head, whole)
    return pending


def _lost_all(state: SampleStates) -> bool:
    """Whether every vision token was dropped: few tokens and a high ratio leave none."""
    return state.kept is not None and not len(state.kept)


@cache
def _warn_of_arbitrary(metric: MatchMetric) -> None:
    """Once for each metric in a process: what the log's numbers mean, and what helps."""
    logger.warning(
        "vision tokens are matched almost arbitrarily: by %s, half or more of the matchings of a "
        "micro-batch have a separability below %g, so that most pairings cost nearly the same "
        "(diagnostic/match_arbitrary, student_row_mean_spread; docs/method.md). Where a constant "
        "in the student's logits is the reason, match by centred_l1",
        metric,
        LEAST_SEPARABILITY,
    )


def _start(
    state: SampleStates,
    output: TeacherOutput,
    teacher: Signal,
    head: LogitsOf,
    config: MatchingConfig,
) -> PendingMatching:
    return start_matching(
        state.vision, head, state.views, teacher, output.views, config, state.kept
    )


def _finish(sample: _Started) -> Matched:
    pairs = sample.pairs.result()
    return Matched(sample.state, sample.output, pairs, sample.teacher.rows(pairs.teacher))
