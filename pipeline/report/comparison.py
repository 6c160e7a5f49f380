"""Compares objectives: paired differences of their scores, with two uncertainties.

Runs are pooled over seeds only if all other settings agree. A difference is always paired, sample
by sample and seed by seed. The baseline of a group is the supervised group that differs in the
objective alone; a group with a growing ratio is also compared with the one that differs in not
having it. The uncertainties are the standard deviation over seeds (training noise) and a bootstrap
interval over samples (the choice of held-out samples).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.run_folders import RunFolder
from teacher_cache.schema.fingerprint import digest_json

BASELINE = "supervised"
NUM_RESAMPLES = 2000

TERM_NAMES = {
    "supervised": "supervised",
    "rld": "RLD (response)",
    "kd": "KD (consistency)",
    "vsd": "VSD (vision)",
    "vlad": "VLAD (affinity)",
}
"""Loss terms by their names in settings and logs, and their titles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in the seed alone, or one model that was not trained here."""

    label: str
    runs: tuple[RunFolder, ...]

    @property
    def evaluated(self) -> tuple[RunFolder, ...]:
        """The runs that have scores."""
        return tuple(run for run in self.runs if run.evaluation is not None)

    @property
    def is_trained_here(self) -> bool:
        """Whether `emkd train` made these models."""
        return self.runs[0].identity is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of (group - baseline) of one score over the same samples and seeds, in its own unit."""

    label: str
    baseline: str
    score: str
    by_seed: tuple[tuple[int, float], ...]
    """(seed, mean difference over samples)."""
    low: float
    high: float
    """95 % bootstrap interval over samples of the mean over seeds."""
    num_samples: int

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(value for _, value in self.by_seed)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (divisor n - 1); None for one seed."""
        values = [value for _, value in self.by_seed]
        return statistics.stdev(values) if len(values) > 1 else None

    def sentence(self) -> str:
        """The result as a sentence, whichever side is better."""
        count = len(self.by_seed)
        spread = f"sd {100 * self.deviation:.1f}, " if self.deviation is not None else ""
        if self.low > 0:
            verdict = f"{self.label} is better on these samples"
        elif self.high < 0:
            verdict = f"{self.label} is worse on these samples"
        else:
            verdict = "no difference can be shown on these samples"
        return (
            f"{self.label} - {self.baseline} = {100 * self.mean:+.1f} pp of "
            f"{self.score.replace('_', ' ')} ({spread}n = {count} seed{'s' * (count != 1)}; 95 % "
            f"interval over {self.num_samples} samples {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}): {verdict}."
        )


def group_runs(runs: Sequence[RunFolder]) -> list[Group]:
    """Pool runs over seeds; models not trained here come first, then by number of loss terms."""
    pools: dict[str, list[RunFolder]] = {}
    for run in runs:
        pools.setdefault(_settings(run), []).append(run)
    ordered = sorted(pools.values(), key=lambda pool: _rank(pool[0]))
    labels: dict[str, int] = {}
    groups: list[Group] = []
    for pool in ordered:
        name = _name(pool[0])
        labels[name] = labels.get(name, 0) + 1
        label = name if labels[name] == 1 else f"{name} #{labels[name]}"
        groups.append(Group(label=label, runs=tuple(sorted(pool, key=_seed))))
    return groups


def num_terms(run: RunFolder) -> int:
    """How many loss terms the run was trained with; 0 for a model not trained here."""
    if run.identity is None:
        return 0
    objective = run.identity.recipe.objective
    return sum(getattr(objective, f"{name}_weight") > 0 for name in TERM_NAMES)


def measured_as(run: RunFolder, term: str) -> str | None:
    """How a term was measured in this run: divergence, tail policies, temperature.

    None for terms that are not divergences. Values measured differently do not compare.
    """
    if run.identity is None or term not in ("rld", "vsd", "kd"):
        return None
    objective = run.identity.recipe.objective
    name = "forward_kl" if term == "kd" else objective.divergence
    mark = f"diagnostic/{term}_tail_is_"
    tails = {key.removeprefix(mark) for line in run.metrics for key in line if key.startswith(mark)}
    policies = " and ".join(sorted(tails)) if tails else "exact"
    blended = any(tail.startswith("blend") for tail in tails)
    weight = f" {objective.blend:g}" if blended else ""
    at = f", T = {objective.temperature:g}" if objective.temperature != 1 else ""
    return f"{name.replace('_', ' ')}, {policies}{weight}{at}"


def compare(groups: Sequence[Group]) -> tuple[list[Difference], list[str]]:
    """Paired differences of every group to its supervised baseline; reasons for missing ones."""
    differences: list[Difference] = []
    missing: list[str] = []
    for group in groups:
        if not group.is_trained_here or _objective(group.runs[0]) == BASELINE:
            continue
        baseline = next((g for g in groups if _is_baseline(g, group)), None)
        if baseline is None:
            missing.append(
                f"{group.label}: no difference, since no {BASELINE} run differs in the objective "
                "alone; train one"
            )
            continue
        found = _differences(group, baseline)
        if not found:
            missing.append(
                f"{group.label}: no difference, since no seed was evaluated on the same samples as "
                f"{baseline.label}; evaluate both on one source"
            )
        differences += found
    return differences, missing


def compare_progressions(groups: Sequence[Group]) -> list[Difference]:
    """Paired differences of groups with a schedule to those that only lack it."""
    return [
        difference
        for group in groups
        if _progresses(group.runs[0])
        for baseline in groups
        if baseline.is_trained_here
        and not _progresses(baseline.runs[0])
        and _settings(group.runs[0], "progression") == _settings(baseline.runs[0], "progression")
        for difference in _differences(group, baseline)
    ]


def _differences(group: Group, baseline: Group) -> list[Difference]:
    """The difference of each score that all runs have; none without seeds of the same samples."""
    pairs = _pairs(group, baseline)
    names = list(_scores(pairs[0][0])) if pairs else []
    return [
        _difference(group, baseline, pairs, name)
        for name in names
        if all(name in _scores(run) for pair in pairs for run in pair)
    ]


def _difference(
    group: Group, baseline: Group, pairs: Sequence[tuple[RunFolder, RunFolder]], score: str
) -> Difference:
    keys = sorted(_scores(pairs[0][0])[score])
    by_run = np.array(
        [
            [_scores(ours)[score][k] - _scores(theirs)[score][k] for k in keys]
            for ours, theirs in pairs
        ]
    )
    by_sample = by_run.mean(axis=0)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(keys), size=(NUM_RESAMPLES, len(keys)))
    low, high = np.quantile(by_sample[draws].mean(axis=1), [0.025, 0.975])
    seeds = [_seed(ours) for ours, _ in pairs]
    return Difference(
        label=group.label,
        baseline=baseline.label,
        score=score,
        by_seed=tuple(zip(seeds, by_run.mean(axis=1).tolist(), strict=True)),
        low=float(low),
        high=float(high),
        num_samples=len(keys),
    )


def _pairs(group: Group, baseline: Group) -> list[tuple[RunFolder, RunFolder]]:
    """Runs of one seed on both sides, evaluated on the same samples."""
    known = {_seed(run): run for run in baseline.evaluated}
    return [
        (run, known[_seed(run)])
        for run in group.evaluated
        if _seed(run) in known and _samples(run) == _samples(known[_seed(run)])
    ]


def _is_baseline(candidate: Group, group: Group) -> bool:
    ours, theirs = group.runs[0], candidate.runs[0]
    return (
        candidate.is_trained_here
        and _objective(theirs) == BASELINE
        and _settings(ours, "objective") == _settings(theirs, "objective")
    )


def _progresses(run: RunFolder) -> bool:
    """Whether the ratio or the layer changed while the run was trained."""
    progression = None if run.identity is None else run.identity.recipe.progression
    return progression is not None and progression.preset != "fixed"


def _settings(run: RunFolder, *without: str) -> str:
    """Digest of all that shaped the weights except the seed and the recipe fields `without`."""
    if run.identity is None:
        return str(run.path)
    fields = dataclasses.asdict(run.identity)
    for name in ("seed", *without):
        del fields["recipe"][name]
    return digest_json(fields)


def _objective(run: RunFolder) -> str | None:
    return None if run.identity is None else run.identity.recipe.objective.name


def _name(run: RunFolder) -> str:
    """The objective, and what is dropped in training unless its name says so."""
    if run.identity is None:
        return run.name
    recipe = run.identity.recipe
    name: str = recipe.objective.name
    progression = recipe.progression
    if recipe.objective.kd_from_cache:
        name += " (a variant)"  # not EPIC: its teacher is frozen
    if progression is None:
        return name
    if progression.preset == "fixed":
        return f"{name}, fixed {progression.ratio:g}"
    return name if recipe.objective.epic_schedule else f"{name}, {progression.schedule}"


def _seed(run: RunFolder) -> int:
    return 0 if run.identity is None else run.identity.recipe.seed


def _rank(run: RunFolder) -> tuple[bool, int, str]:
    return (run.identity is not None, num_terms(run), _name(run))


def _samples(run: RunFolder) -> str | None:
    return None if run.evaluation is None else run.evaluation.samples_digest


def _scores(run: RunFolder) -> dict[str, dict[str, float]]:
    return {} if run.evaluation is None else run.evaluation.by_sample
