"""Draws curves and lays out matching pictures for the report, as self-contained SVG.

The same numbers give the same bytes; ids of one figure do not clash with those of another. The
page's template writes and escapes the cells of a matching picture.
"""

import colorsys
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = ("#5b6770", "#0f7b8a", "#c2571a", "#6b4fa0", "#3f7d3a", "#a8324f", "#8a6d1d", "#2f5fb3")
PANEL_PIXELS = 232
PANEL_GAP = 24
MIN_LABEL_PIXELS = 26
MAX_LABEL = 5

_IDENTIFIER = re.compile(r'( id="|url\(#|href="#)')

Curve = Sequence[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The scores of a group's seeds at one number of vision tokens."""

    num_kept: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.scores)


def draw_curves(
    name: str, panels: Mapping[str, Mapping[str, Sequence[Curve]]], colours: Mapping[str, str]
) -> str:
    """One SVG with a panel for each term: panel title -> label -> curves of its seeds.

    The axis is logarithmic if all values are positive and spread. `name` keeps the ids of several
    figures of one page distinct.
    """
    return _draw(name, list(panels), lambda axes, title: _draw_panel(axes, panels[title], colours))


def draw_budgets(
    name: str, panels: Mapping[str, Mapping[str, Sequence[Budget]]], colours: Mapping[str, str]
) -> str:
    """One SVG with a panel for each compressor: title -> label -> budgets.

    A point is the mean over seeds; its bar spans the worst to the best seed.
    """

    def draw(axes: Axes, title: str) -> None:
        for label, budgets in panels[title].items():
            kept = [budget.num_kept for budget in budgets]
            means = [100 * budget.mean for budget in budgets]
            below = [100 * (budget.mean - min(budget.scores)) for budget in budgets]
            above = [100 * (max(budget.scores) - budget.mean) for budget in budgets]
            axes.errorbar(
                kept,
                means,
                yerr=(below, above),
                color=colours[label],
                linewidth=1.2,
                marker="o",
                markersize=2.6,
                elinewidth=0.9,
                capsize=1.8,
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("vision tokens kept", fontsize=7.5, color="#5b6770")

    return _draw(name, list(panels), draw)


def _draw(name: str, titles: Sequence[str], draw: Callable[[Axes, str], None]) -> str:
    """An SVG of panels in the page's style, four per row."""
    num_columns = min(4, max(1, len(titles)))
    num_rows = math.ceil(len(titles) / num_columns)
    settings: Any = {"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 8.5}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(2.65 * num_columns, 2.1 * num_rows), layout="constrained")
        for number, title in enumerate(titles, start=1):
            axes = figure.add_subplot(num_rows, num_columns, number)
            draw(axes, title)
            _style(axes, title)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return _IDENTIFIER.sub(rf"\1{name}-", svg[svg.index("<svg") :])


def _draw_panel(
    axes: Axes, groups: Mapping[str, Sequence[Curve]], colours: Mapping[str, str]
) -> None:
    values = [value for curves in groups.values() for curve in curves for _, value in curve]
    for label, curves in groups.items():
        for curve in curves:
            steps, heights = zip(*curve, strict=True)
            axes.plot(steps, heights, color=colours[label], linewidth=1.1, alpha=0.85)
    if values and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color="#22282d")
    axes.tick_params(labelsize=7, colors="#5b6770", length=2)
    axes.grid(color="#e6e9eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c3cace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One vision token in a picture."""

    x: float
    y: float
    width: float
    height: float
    colour: str | None
    """Colour of the student token that it is or is matched to; None if unmatched."""
    label: str | None
    """Text inside the cell; None if there is no room."""
    title: str
    """Tooltip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingPicture:
    """Three panels side by side: the image, the teacher's tokens, the student's tokens."""

    width: float
    height: float
    panels: tuple[float, float, float]
    """Left edge of each panel."""
    panel_width: float
    panel_height: float
    image: str
    """PNG as base64."""
    teacher: tuple[Cell, ...]
    student: tuple[Cell, ...]
    caption: str


def lay_out_matching(view: Mapping[str, Any], image: str, aspect: float) -> MatchingPicture:
    """Lay out the cells of one view of pictures.json; `aspect` is the image's width over height.

    A student token's colour follows its position (hue by column, lightness by row), so the
    teacher's panel looks like the student's if the matching keeps neighbours together.
    """
    width = PANEL_PIXELS * min(1.0, aspect)
    height = PANEL_PIXELS * min(1.0, 1 / aspect)
    edges = (0.0, width + PANEL_GAP, 2 * (width + PANEL_GAP))
    teacher, student = view["teacher"], view["student"]
    colours = _grid_colours(student["rows"], student["cols"])

    def cells(side: str, other: str, left: float, matches: Mapping[int, int]) -> tuple[Cell, ...]:
        grid, found = view[side], list[Cell]()
        cell_width, cell_height = width / grid["cols"], height / grid["rows"]
        roomy = min(cell_width, cell_height) >= MIN_LABEL_PIXELS
        for index, (word, share) in enumerate(grid["tokens"]):
            row, column = divmod(index, grid["cols"])
            match = matches.get(index)
            fate = "not matched" if match is None else f"matched to {other} token {match}"
            coloured = index if side == "student" else match
            cell = Cell(
                x=left + column * cell_width,
                y=row * cell_height,
                width=cell_width,
                height=cell_height,
                colour=None if coloured is None else colours[coloured],
                label=_shorten(word) if roomy else None,
                title=f"{side} token {index}: {word!r} ({share:.0%}), {fate}",
            )
            found.append(cell)
        return tuple(found)

    return MatchingPicture(
        width=edges[2] + width,
        height=height,
        panels=edges,
        panel_width=width,
        panel_height=height,
        image=image,
        teacher=cells("teacher", "student", edges[1], {j: i for i, j in view["pairs"]}),
        student=cells("student", "teacher", edges[2], dict(view["pairs"])),
        caption=(
            f"{len(teacher['tokens'])} teacher tokens ({teacher['rows']} x {teacher['cols']}), "
            f"{len(student['tokens'])} student tokens ({student['rows']} x {student['cols']}), "
            f"{len(view['pairs'])} pairs"
        ),
    )


def _shorten(word: str) -> str:
    """A token's text shortened to fit a cell; white space and control characters are escaped."""
    shown = word.strip() or word.encode("unicode_escape").decode() or "(none)"
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}\u2026"


def _grid_colours(rows: int, columns: int) -> list[str]:
    colours: list[str] = []
    for row in range(rows):
        for column in range(columns):
            hue = 0.86 * column / max(1, columns)
            lightness = 0.84 - 0.24 * row / max(1, rows - 1)
            channels = colorsys.hls_to_rgb(hue, lightness, 0.62)
            colours.append("#" + "".join(f"{round(255 * value):02x}" for value in channels))
    return colours
