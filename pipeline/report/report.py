"""Writes one self-contained HTML page that compares runs: the report stage.

The page loads nothing from outside and runs no script; all text from data is escaped. It shows the
results of every objective, also where EM-KD does not win, and names what each run lacks.
"""

import base64
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pipeline.config.stages import ReportConfig
from pipeline.fidelity.cache_quality import summarise
from pipeline.fidelity.tables import human_bytes
from pipeline.report.comparison import (
    TERM_NAMES,
    Difference,
    Group,
    compare,
    compare_progressions,
    group_runs,
    measured_as,
    num_terms,
)
from pipeline.report.figures import COLOURS, Curve, MatchingPicture, draw_curves, lay_out_matching
from pipeline.report.run_folders import CacheFolder, Collection, RunFolder, collect
from pipeline.report.token_budgets import budgets_of
from teacher_cache.storage.durable_files import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSample:
    """One sample with its matching pictures and each group's answer."""

    source_id: str
    question: str
    reference: str
    answers: tuple[tuple[str, str], ...]
    """(group label, answer)."""
    views: tuple[MatchingPicture, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One group's line in the table of scores."""

    group: Group
    colour: str
    means: Mapping[str, float]
    per_seed: Mapping[str, tuple[float, ...]]
    differences: Mapping[str, Difference]


def write_report(config: ReportConfig) -> list[str]:
    """Write the page to `config.out`; returns what is missing, one line each.

    Raises ValueError if no folder is a run or a file is malformed.
    """
    found = collect(config.runs)
    groups = group_runs(found.runs)
    differences, incomparable = compare(groups)
    missing = [*found.missing, *incomparable]
    template = _environment().get_template("report.html.j2")
    page = template.render(**_context(found, groups, differences, missing))
    write_atomic(config.out, page.encode())
    return missing


def _context(
    found: Collection,
    groups: Sequence[Group],
    differences: Sequence[Difference],
    missing: Sequence[str],
) -> dict[str, Any]:
    colours = {group.label: COLOURS[number % len(COLOURS)] for number, group in enumerate(groups)}
    rows = [_score_row(group, colours[group.label], differences) for group in groups]
    scores = list(dict.fromkeys(name for row in rows for name in row.means))
    painter, pictures = _pictures(groups)
    budgets = budgets_of(groups)
    return {
        "groups": groups,
        "rows": rows,
        "scores": scores,
        "colours": colours,
        "sentences": [d.sentence() for d in (*differences, *compare_progressions(groups))],
        "budgets": budgets,
        "budget_curves": None if budgets is None else Markup(budgets.figure(colours)),
        "settings": [_settings(group, found.caches) for group in groups if group.is_trained_here],
        "loss_curves": _curves("loss", "term/", groups, colours),
        "gradient_curves": _curves("gradient", "gradient/", groups, colours),
        "caches": found.caches,
        "kept": [(cache, summarise(cache.seal)) for cache in found.caches],
        "ordered": [run for group in groups for run in group.runs],
        "painter": painter,
        "pictures": pictures,
        "missing": missing,
    }


def _score_row(group: Group, colour: str, differences: Sequence[Difference]) -> ScoreRow:
    evaluations = [run.evaluation for run in group.runs if run.evaluation is not None]
    names = list(dict.fromkeys(name for e in evaluations for name in e.scores))
    per_seed = {
        name: tuple(e.scores[name] for e in evaluations if name in e.scores) for name in names
    }
    return ScoreRow(
        group=group,
        colour=colour,
        means={name: statistics.fmean(values) for name, values in per_seed.items()},
        per_seed=per_seed,
        differences={d.score: d for d in differences if d.label == group.label},
    )


def _settings(group: Group, caches: Sequence[CacheFolder]) -> dict[str, Any]:
    """A group's objective and the settings that its seeds share."""
    identity = group.runs[0].identity
    assert identity is not None
    recipe = identity.recipe
    objective = recipe.objective
    weights = {
        name: getattr(objective, f"{name}_weight")
        for name in TERM_NAMES
        if getattr(objective, f"{name}_weight") > 0
    }
    cache = next((c for c in caches if c.seal.fingerprint == identity.cache), None)
    return {
        "label": group.label,
        "weights": weights,
        "seeds": [run.identity.recipe.seed for run in group.runs if run.identity is not None],
        "steps": identity.num_steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "parts": recipe.train_parts,
        "progression": recipe.progression,
        "dtype": recipe.dtype,
        "matching": objective.matching if objective.needs_vision else None,
        "cache": identity.cache,
        "records": None if cache is None else cache.seal.spec.records,
    }


def _curves(
    name: str, prefix: str, groups: Sequence[Group], colours: Mapping[str, str]
) -> Markup | None:
    """One panel for each value whose name begins with `prefix`; None if there is none.

    Runs that measure a term differently get separate panels.
    """
    panels: dict[str, dict[str, list[Curve]]] = {}
    terms = [*TERM_NAMES, *sorted(_terms(groups, prefix) - TERM_NAMES.keys())]
    for term in terms:
        for group in groups:
            for run in group.runs:
                if curve := _curve(run, prefix + term):
                    panel = panels.setdefault(_title(run, term), {})
                    panel.setdefault(group.label, []).append(curve)
    return Markup(draw_curves(name, panels, colours)) if panels else None


def _title(run: RunFolder, term: str) -> str:
    name = TERM_NAMES.get(term, term.replace("_", " "))
    measure = measured_as(run, term)
    return name if measure is None else f"{name}\n{measure}"


def _terms(groups: Sequence[Group], prefix: str) -> set[str]:
    return {
        key.removeprefix(prefix)
        for group in groups
        for run in group.runs
        for line in run.metrics
        for key in line
        if key.startswith(prefix)
    }


def _curve(run: RunFolder, key: str) -> Curve:
    return [(line["step"], float(line[key])) for line in run.metrics if line.get(key) is not None]


def _pictures(groups: Sequence[Group]) -> tuple[RunFolder | None, list[PictureSample]]:
    """The pictures of one run: of the group with most loss terms, the first run that has any."""
    drawn = [
        run
        for group in sorted(groups, key=lambda group: num_terms(group.runs[0]), reverse=True)
        for run in group.runs
        if run.evaluation is not None and run.evaluation.pictures is not None
    ]
    if not drawn:
        return None, []
    evaluation = drawn[0].evaluation
    assert evaluation is not None
    assert evaluation.pictures is not None
    samples = [_picture_sample(sample, groups) for sample in evaluation.pictures["samples"]]
    return drawn[0], samples


def _picture_sample(sample: Mapping[str, Any], groups: Sequence[Group]) -> PictureSample:
    answers: list[tuple[str, str]] = []
    for group in groups:
        for run in group.evaluated[:1]:
            assert run.evaluation is not None
            prediction = run.evaluation.predictions.get(sample["key"])
            if prediction is not None:
                answers.append((group.label, prediction.answer))
    texts = [text for role, text in sample["messages"] if role == "user"]
    return PictureSample(
        source_id=sample["source_id"],
        question=texts[-1].replace("<image>", "").strip(),
        reference=sample["messages"][-1][1].strip(),
        answers=tuple(answers),
        views=tuple(_view(view, sample["images"]) for view in sample["views"]),
    )


def _view(view: Mapping[str, Any], images: list[str]) -> MatchingPicture:
    image: str = images[view["image"]]
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        width, height = opened.size
    return lay_out_matching(view, image, width / height)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda value: f"{100 * value:.1f}",
        "points": lambda value: f"{100 * value:+.1f}",
        "count": lambda value: f"{value:,}",
        "bytes": human_bytes,
        "seconds": _seconds,
        "words": lambda value: value.replace("_", " "),
        "short": lambda value: value[:12],
        "number": lambda value: f"{value:g}",
        "digits": lambda value: f"{value:.3g}",
        "pixels": lambda value: f"{value:.1f}",
    }
    environment.filters.update(filters)
    return environment


def _seconds(value: int | float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
