"""Compares accuracy against vision tokens kept, from evaluations under compression.

A point is one setting of compression: its height is the mean over seeds, its bar their range. The
evaluation without compression is the point where all tokens are kept. Differences are paired
(`comparison.py`): runs are compared at equal settings, never at merely similar counts.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.comparison import Difference, Group, compare, compare_progressions
from pipeline.report.figures import Budget, draw_budgets
from pipeline.report.run_folders import RunFolder
from student_train.config.compression import CompressionSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRow:
    """One setting of compression: every group's score, and their differences."""

    dropped: str
    """Share that is dropped at each layer: "75 %"."""
    num_kept: float
    """Mean over samples, groups and seeds."""
    scores: Mapping[str, Budget]
    """By group label."""
    differences: Mapping[tuple[str, str], Difference]
    """By labels of group and baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One compressor at its layers, by one score; most tokens kept first."""

    title: str
    score: str
    rows: tuple[BudgetRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """All panels, and the groups that are compared in any of them."""

    labels: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]

    def figure(self, colours: Mapping[str, str]) -> str:
        """The curves of all panels, as one SVG."""
        curves: dict[str, dict[str, list[Budget]]] = {}
        for panel in self.panels:
            lines = curves.setdefault(f"{panel.title}: {panel.score.replace('_', ' ')}", {})
            for row in panel.rows:
                for label, budget in row.scores.items():
                    lines.setdefault(label, []).append(budget)
        return draw_budgets("budgets", curves, colours)


def budgets_of(groups: Sequence[Group]) -> Budgets | None:
    """The budgets at which some run was evaluated; None if there are none."""
    found = {
        evaluation.compression: evaluation
        for group in groups
        for run in group.runs
        for evaluation in run.compressed
        if evaluation.compression is not None and evaluation.num_kept is not None
    }
    if not found:
        return None
    places: dict[str, list[CompressionSettings | None]] = {}
    for settings in found:
        places.setdefault(_place(settings), []).append(settings)
    names = dict.fromkeys(name for evaluation in found.values() for name in evaluation.scores)
    panels = [
        _panel(title, score, [None, *chosen], groups)
        for score in names
        for title, chosen in places.items()
    ]
    rows = [row for panel in panels for row in panel.rows]
    return Budgets(
        labels=tuple(dict.fromkeys(label for row in rows for label in row.scores)),
        pairs=tuple(dict.fromkeys(pair for row in rows for pair in row.differences)),
        panels=tuple(panels),
    )


def _panel(
    title: str, score: str, chosen: Sequence[CompressionSettings | None], groups: Sequence[Group]
) -> Panel:
    rows = [_row(score, settings, groups) for settings in chosen]
    known = [row for row in rows if row is not None]
    return Panel(
        title=title,
        score=score,
        rows=tuple(sorted(known, key=lambda row: row.num_kept, reverse=True)),
    )


def _row(
    score: str, settings: CompressionSettings | None, groups: Sequence[Group]
) -> BudgetRow | None:
    """All groups at one setting; None if none was evaluated there."""
    there = [
        Group(label=group.label, runs=tuple(_at(run, settings) for run in group.runs))
        for group in groups
    ]
    scores: dict[str, Budget] = {}
    for group in there:
        evaluations = [e for e in (run.evaluation for run in group.evaluated) if e is not None]
        counts = [e.num_kept for e in evaluations if score in e.scores and e.num_kept is not None]
        values = [e.scores[score] for e in evaluations if score in e.scores]
        if counts and len(counts) == len(values):
            scores[group.label] = Budget(num_kept=statistics.fmean(counts), scores=tuple(values))
    if not scores:
        return None
    differences = [*compare(there)[0], *compare_progressions(there)]
    return BudgetRow(
        dropped=_dropped(settings),
        num_kept=statistics.fmean(budget.num_kept for budget in scores.values()),
        scores=scores,
        differences={(d.label, d.baseline): d for d in differences if d.score == score},
    )


def _at(run: RunFolder, settings: CompressionSettings | None) -> RunFolder:
    """The run with its evaluation at this setting only."""
    there = (e for e in run.compressed if e.compression == settings)
    evaluation = run.evaluation if settings is None else next(there, None)
    return dataclasses.replace(run, evaluation=evaluation, compressed=())


def _place(settings: CompressionSettings) -> str:
    """Compressor and layers; settings of one curve differ in their ratios alone."""
    layers = [str(stage.layer) for stage in settings.stages]
    text = f"{settings.compressor} at layer{'s' * (len(layers) != 1)} {', '.join(layers)}"
    if settings.text != "instruction":
        text += f", {settings.text} text"
    return text if settings.seed == 0 else f"{text}, seed {settings.seed}"


def _dropped(settings: CompressionSettings | None) -> str:
    if settings is None:
        return "nothing"
    return ", then ".join(f"{100 * stage.ratio:g} %" for stage in settings.stages)
