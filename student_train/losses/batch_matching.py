"""Matches the vision tokens of a micro-batch, all samples together, in the background.

    pending = start_batch_matching(states, outputs, head, objective, assets)
    ...                                # work that hides the solving
    matched = pending.result()         # a Matched for each sample with vision tokens, else None

Promise: of the student's vision logits no more exist at a time than the costs of one problem, or of
a few mebibytes of small ones, look at, and none afterwards; no gradient; the pairs do not depend on
when they are asked for. On a CPU costs have a thread of their own: until `result`, states and head
must stay as they are. A matching that is close to arbitrary is said so, once, in the program's log.
Refuses what `matching.py` and `cost.py` refuse. Dimensions as in schema.py.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from student_train.config.objective import MatchMetric, ObjectiveConfig
from student_train.data.sample_states import SampleStates
from student_train.head.linear_head import LinearHead, LogitsOf
from student_train.head.student_logits import autocast_here
from student_train.matching.assignment import Assignment
from student_train.matching.cost import require_comparable
from student_train.matching.matching import Matching, PendingMatching, start_matching
from student_train.matching.problems import VisionTokens
from student_train.matching.quality import (
    LEAST_SEPARABILITY,
    assignment_stats,
    matching_quality,
    row_mean_spread,
)
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import Signal, concatenate
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.teacher_output import TeacherOutput

logger = logging.getLogger(__name__)


class Matched(NamedTuple):
    """A sample with an image, after matching."""

    state: SampleStates
    output: TeacherOutput
    pairs: Assignment
    teachers: Signal
    """The teacher at the matched positions of all samples, pair by pair."""
    place: slice
    """Which of these are the sample's own."""

    @property
    def teacher(self) -> Signal:
        """The teacher at the matched positions, pair by pair."""
        return self.teachers.rows(self.place)

    @property
    def vision(self) -> Tensor:
        """The student's states that were matched, pair by pair."""
        # Usually these are all, and pairs are in their order: then nothing has to be copied.
        every = len(self.pairs.student) == len(self.state.vision)
        return self.state.vision if every else self.state.vision[self.pairs.student]


class _Started(NamedTuple):
    """The matching of the samples that have something to match."""

    teacher: Signal
    """At the vision positions of all of them."""
    pairs: Future[PendingMatching]
    exact: Future[PendingMatching] | None
    """The first of them, by all of V."""


@dataclass(kw_only=True)
class PendingBatch:
    """The matchings of a micro-batch, while they are solved."""

    samples: list[tuple[SampleStates, TeacherOutput] | None] = field(repr=False)
    """None where there is nothing to match."""
    metric: MatchMetric
    started: _Started | None = field(default=None, repr=False)
    diagnostics: dict[str, float] = field(default_factory=dict[str, float])
    """Plain numbers for the log; complete once `result` was asked for."""

    def result(self) -> list[Matched | None]:
        """One entry for each sample; ValueError where costs are not finite."""
        if self.started is None:
            return [None] * len(self.samples)
        matching = self.started.pairs.result().result()
        self._describe(matching, self.started)
        teachers = self.started.teacher.rows(matching.teacher_rows)
        found: list[Matched | None] = []
        rest, start = iter(matching.samples), 0
        for sample in self.samples:
            if sample is None:
                found.append(None)
                continue
            own = next(rest)
            place = slice(start, start + own.num_pairs)
            found.append(Matched(*sample, own, teachers, place))
            start = place.stop
        return found

    def _describe(self, matching: Matching, started: _Started) -> None:
        stats = assignment_stats(matching.samples)
        self.diagnostics["match_mean_cost"] = stats.mean_cost
        self.diagnostics["match_separability"] = stats.separability
        self.diagnostics["match_arbitrary"] = stats.arbitrary
        self.diagnostics["match_hubness"] = stats.hubness
        if stats.certified is not None:
            self.diagnostics["match_certified"] = stats.certified
        if matching.mean_logits is not None:
            spread = row_mean_spread(matching.mean_logits[:, None])
            self.diagnostics["student_row_mean_spread"] = spread
        if stats.arbitrary >= 0.5:
            _warn_of_arbitrary(self.metric)
        if started.exact is not None:
            chosen, exact = matching.samples[0], started.exact.result().result().samples[0]
            quality = matching_quality(chosen, exact)
            first = started.teacher.rows(slice(chosen.num_teacher))
            of = "match" if first.exact else "match_sketch"
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
    """Let threads compute the costs of all samples and solve the assignments.

    Nothing is matched where no term of the objective needs it. With `check`, the first sample with
    an image is matched a second time, by costs summed over all V that its record knows or, of a
    sketch, estimates (diagnostics `match_regret`, `match_agreement`, or `match_sketch_...`).
    ValueError where a record cannot serve the metric and, here or with the result, for all else
    that matching refuses.
    """
    pending = PendingBatch(samples=[], metric=objective.matching.metric)
    for state, output in zip(states, outputs, strict=True):
        shown = bool(state.views or output.views)
        matched = objective.needs_vision and shown and not _lost_all(state)
        pending.samples.append((state, output) if matched else None)
    present = [sample for sample in pending.samples if sample is not None]
    if present:
        with torch.no_grad():
            hidden = torch.cat([state.vision for state, _ in present])
        signals = [vision_signal(output, assets) for _, output in present]
        teacher = concatenate(signals).to(hidden.device)
        tokens = [VisionTokens(state.views, output.views, state.kept) for state, output in present]
        require_comparable(hidden, teacher, objective.matching)
        start = _starter(hidden, head)
        pairs = start(tokens, hidden, head, teacher, objective.matching)
        exact = None
        if check:
            whole = replace(objective.matching, num_shared_ids=None, certify=False)
            first = teacher.rows(slice(signals[0].num_rows))
            own = hidden[: len(present[0][0].vision)]
            exact = start(tokens[:1], own, head, first, whole)
        pending.started = _Started(teacher, pairs, exact)
    return pending


def _starter(hidden: Tensor, head: LogitsOf) -> Callable[..., Future[PendingMatching]]:
    """`start_matching`, in a thread of its own where costs would keep this one busy.

    A GPU computes them by itself; a head that is some function may not be called by two threads.
    """

    def here(*arguments: Any) -> Future[PendingMatching]:
        done: Future[PendingMatching] = Future()
        done.set_result(start_matching(*arguments))
        return done

    def apart(*arguments: Any) -> Future[PendingMatching]:
        autocast = autocast_here(hidden.device)  # which is each thread's own

        def work() -> PendingMatching:
            with autocast:
                return start_matching(*arguments)

        return _cost_thread().submit(work)

    return apart if hidden.device.type == "cpu" and isinstance(head, LinearHead) else here


@cache
def _cost_thread() -> ThreadPoolExecutor:
    """Not one of those that solve: it must never wait for them, nor they for it."""
    return ThreadPoolExecutor(1, thread_name_prefix="matching-costs")


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
