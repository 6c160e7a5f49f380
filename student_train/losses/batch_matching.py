"""Matches the vision tokens of a micro-batch, all samples together, in the background.

    pending = start_batch_matching(states, outputs, head, objective, assets)
    ...                                # work during which threads solve the assignments
    matched = pending.result()         # a Matched for each sample with vision tokens, else None

Promise: no gradient; the student's vision logits exist only for one problem at a time, or for a few
MiB of small ones. On a CPU a thread computes the costs: do not change states or head before
`result`. Logs one warning per metric when a matching is nearly arbitrary. Dimensions as in
teacher_output.py.
"""

import itertools
import logging
import zlib
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
from teacher_cache.schema.teacher_output import TeacherOutput, TopKRecord

logger = logging.getLogger(__name__)


MATCH_DIAGNOSTICS = (
    *("mean_cost", "separability", "arbitrary", "hubness"),
    *("distance", "inside", "local", "certified"),
)
"""Fields of `AssignmentStats` that are logged, as `match_<name>`."""


class Matched(NamedTuple):
    """A sample with an image, and its pairs."""

    state: SampleStates
    output: TeacherOutput
    pairs: Assignment
    teachers: Signal
    """The teacher at the matched positions of all samples, pair by pair."""
    place: slice
    """The rows of `teachers` that belong to this sample."""

    @property
    def teacher(self) -> Signal:
        """The teacher at this sample's matched positions, pair by pair."""
        return self.teachers.rows(self.place)

    @property
    def vision(self) -> Tensor:
        """The student's matched states, pair by pair; no copy where all are matched."""
        all_matched = len(self.pairs.student) == len(self.state.vision)
        return self.state.vision if all_matched else self.state.vision[self.pairs.student]


class _Started(NamedTuple):
    """The matching of all samples that have tokens to match."""

    teacher: Signal
    """At all their vision positions."""
    pairs: Future[PendingMatching]
    exact: Future[PendingMatching] | None
    """The first sample alone, matched over all V."""


@dataclass(kw_only=True)
class PendingBatch:
    """The matchings of a micro-batch while threads solve them."""

    samples: list[tuple[SampleStates, TeacherOutput] | None] = field(repr=False)
    """None where there is nothing to match."""
    metric: MatchMetric
    started: _Started | None = field(default=None, repr=False)
    diagnostics: dict[str, float] = field(default_factory=dict[str, float])
    """Numbers for the log; complete after `result`."""

    def result(self) -> list[Matched | None]:
        """Returns one entry for each sample; ValueError where costs are not finite."""
        if self.started is None:
            return [None] * len(self.samples)
        matching = self.started.pairs.result().result()
        self._describe(matching, self.started)
        teachers = self.started.teacher.rows(matching.teacher_rows)
        ends = itertools.accumulate(own.num_pairs for own in matching.samples)
        solved = zip(matching.samples, ends, strict=True)

        def matched(state: SampleStates, output: TeacherOutput) -> Matched:
            own, end = next(solved)
            return Matched(state, output, own, teachers, slice(end - own.num_pairs, end))

        return [None if sample is None else matched(*sample) for sample in self.samples]

    def _describe(self, matching: Matching, started: _Started) -> None:
        stats = assignment_stats(matching.samples)
        for name in MATCH_DIAGNOSTICS:
            if (value := getattr(stats, name)) is not None:
                self.diagnostics[f"match_{name}"] = value
        if matching.mean_logits is not None:
            spread = row_mean_spread(matching.mean_logits[:, None])
            self.diagnostics["student_row_mean_spread"] = spread
        if (stats.arbitrary or 0.0) >= 0.5:
            _warn_of_arbitrary(self.metric)
        if started.exact is not None:
            chosen, exact = matching.samples[0], started.exact.result().result().samples[0]
            quality = matching_quality(chosen, exact)
            first = started.teacher.rows(slice(chosen.num_teacher))
            prefix = "match" if first.exact else "match_sketch"
            self.diagnostics[f"{prefix}_regret"] = quality.regret
            self.diagnostics[f"{prefix}_agreement"] = quality.agreement


def start_batch_matching(
    states: Sequence[SampleStates],
    outputs: Sequence[TeacherOutput],
    head: LogitsOf,
    objective: ObjectiveConfig,
    assets: TeacherAssets,
    check: bool = False,
) -> PendingBatch:
    """Starts threads that compute the costs of all samples and solve the assignments.

    Matches nothing if no term of the objective needs it. With `check`, the first sample with an
    image is matched again, by costs over all V: known (diagnostics `match_regret` and
    `match_agreement`), or estimated by a sketch (`match_sketch_...`). ValueError, here or in
    `result`, for what matching refuses.
    """
    pending = PendingBatch(samples=[], metric=objective.matching.metric)
    for state, output in zip(states, outputs, strict=True):
        # A high ratio of few tokens drops all of them.
        lost_all = state.kept is not None and not len(state.kept)
        has_image = bool(state.views or output.views)
        matched = objective.needs_vision and has_image and not lost_all
        pending.samples.append((state, output) if matched else None)
    present = [sample for sample in pending.samples if sample is not None]
    if present:
        with torch.no_grad():
            hidden = torch.cat([state.vision for state, _ in present])
        signals = [vision_signal(output, assets) for _, output in present]
        teacher = concatenate(signals).to(hidden.device)
        is_random = objective.matching.correspondence == "random"
        tokens = [
            VisionTokens(state.views, output.views, state.kept, _seed(output) if is_random else 0)
            for state, output in present
        ]
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
    """Returns `start_matching`, run in another thread where costs would block this one.

    A GPU computes costs asynchronously anyway. A head that is a function may not be thread-safe.
    """

    def here(*arguments: Any) -> Future[PendingMatching]:
        done: Future[PendingMatching] = Future()
        done.set_result(start_matching(*arguments))
        return done

    def apart(*arguments: Any) -> Future[PendingMatching]:
        autocast = autocast_here(hidden.device)  # it is a setting of each thread

        def work() -> PendingMatching:
            with autocast:
                return start_matching(*arguments)

        return _cost_thread().submit(work)

    return apart if hidden.device.type == "cpu" and isinstance(head, LinearHead) else here


@cache
def _cost_thread() -> ThreadPoolExecutor:
    """A pool apart from the solvers', so that neither waits for the other."""
    return ThreadPoolExecutor(1, thread_name_prefix="matching-costs")


def _seed(output: TeacherOutput) -> int:
    """A number of the sample's image and text, from the teacher's record."""
    shown = output.hidden.vision if output.hidden is not None else output.vision
    values = shown.logsumexp if isinstance(shown, TopKRecord) else shown
    assert values is not None
    seen = values[:64].cpu().float().numpy().tobytes()
    return zlib.crc32(seen + output.content_ids.cpu().long().numpy().tobytes())


@cache
def _warn_of_arbitrary(metric: MatchMetric) -> None:
    """Logs what the diagnostics mean and what helps, once per metric in a process."""
    logger.warning(
        "vision tokens are matched almost arbitrarily: by %s, half or more of the matchings of a "
        "micro-batch have a separability below %g, so that most pairings cost nearly the same "
        "(diagnostic/match_arbitrary, student_row_mean_spread; docs/method.md). %s",
        metric,
        LEAST_SEPARABILITY,
        "Where a constant in the student's logits is the reason, match by centred_l1"
        if metric == "raw_l1"
        else "No constant in the student's logits can be the reason; compare with another metric, "
        f"such as {'prob_l1' if metric == 'centred_l1' else 'centred_l1'}",
    )
