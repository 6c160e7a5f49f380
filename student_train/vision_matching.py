"""Matches the vision tokens of a micro-batch, sample by sample, in the background.

    pending = start_batch_matching(states, outputs, head, objective, assets)
    ...                                # work that hides the solving
    matched = pending.result()         # one Matched for each sample that has an image, else None

Promise: the student's matching logits of one sample exist at a time and are gone before the next;
no gradient; the pairs do not depend on when they are asked for. Refuses what `matching.py` and
`cost.py` refuse. Dimensions as in schema.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from student_train.linear_head import LogitsOf
from student_train.matching import Assignment, PendingMatching, start_matching
from student_train.metrics import assignment_stats, row_mean_spread
from student_train.objective import ObjectiveConfig
from student_train.sample_states import SampleStates
from student_train.signals import Signal, TeacherAssets, vision_signal
from student_train.top_k_signal import at_least_float32
from teacher_cache.schema import TeacherOutput


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
    diagnostics: dict[str, float] = field(default_factory=dict[str, float])
    """Plain numbers for the log; complete once `result` was asked for."""

    def result(self) -> list[Matched | None]:
        """One entry for each sample; ValueError where costs are not finite."""
        found = [None if sample is None else _finish(sample) for sample in self.samples]
        pairs = [sample.pairs for sample in found if sample is not None]
        if pairs:
            stats = assignment_stats(pairs)
            self.diagnostics["match_mean_cost"] = stats.mean_cost
            self.diagnostics["match_separability"] = stats.separability
            self.diagnostics["match_hubness"] = stats.hubness
            if stats.certified is not None:
                self.diagnostics["match_certified"] = stats.certified
        return found


def start_batch_matching(
    states: Sequence[SampleStates],
    outputs: Sequence[TeacherOutput],
    head: LogitsOf,
    objective: ObjectiveConfig,
    assets: TeacherAssets,
) -> PendingBatch:
    """Compute every sample's costs, and let threads solve the assignments.

    Nothing is matched where no term of the objective needs it. ValueError where a record cannot
    serve the metric and where the two sides do not show the same views.
    """
    if not objective.needs_vision:
        return PendingBatch(samples=[None] * len(states))
    started: list[_Started | None] = []
    mean_logits: list[Tensor] = []
    for state, output in zip(states, outputs, strict=True):
        if not state.views and not output.views:
            started.append(None)
            continue
        logits = None
        if objective.matching.metric != "hidden_cosine":
            with torch.no_grad():
                logits = head(state.vision)
            mean_logits.append(at_least_float32(logits).mean(dim=1, keepdim=True))
        with torch.autocast(state.vision.device.type, enabled=False):
            teacher = vision_signal(output, assets).to(state.vision.device)
            pairs = start_matching(
                state.vision,
                logits,
                state.views,
                teacher,
                output.views,
                objective.matching,
                state.kept,
            )
        started.append(_Started(state, output, teacher, pairs))
    pending = PendingBatch(samples=started)
    if mean_logits:
        pending.diagnostics["student_row_mean_spread"] = row_mean_spread(torch.cat(mean_logits))
    return pending


def _finish(sample: _Started) -> Matched:
    pairs = sample.pairs.result()
    return Matched(sample.state, sample.output, pairs, sample.teacher.rows(pairs.teacher))
