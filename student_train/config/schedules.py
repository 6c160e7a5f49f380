"""EPIC's schedules TCD, LCD and ICD: where and how much each training step drops.

    p = steps done / steps in all        u = random_uniform(seed, "ratio", step), in [0, 1)

    TCD  fixed layer K;  r_student = low(p) + u (high(p) - low(p))       (token-wise)
    LCD  layer = round(L - p (L - K));  r_student as above, ramps constant  (layer-wise)
    ICD  phases of equal length at descending layers, a whole TCD ramp in each
    all  r_teacher = max(0, r_student - gap(p));  same layer for both

Pure functions of progress and draw, so that a resumed run continues the same draws. Refuse
progress outside [0, 1], ratios outside [0, 1) and layers that the model does not have. Imports
nothing heavy.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from teacher_cache.schema.strict_json import StrictRecord

SchedulePreset = Literal["paper_notes", "released_code"]
ScheduleName = Literal["tcd", "lcd", "icd"]


class Difficulty(NamedTuple):
    """The layer at which both passes of a step drop tokens, and the share that each drops."""

    layer: int
    student_ratio: float
    teacher_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp(StrictRecord):
    """A ratio that goes linearly from `start` to `end`, and stays there from progress `until`."""

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} of a ramp is {getattr(self, name)}, expected [0, 1)")
        if not 0 < self.until <= 1:
            raise ValueError(f"a ramp reaches its end at progress {self.until}, expected (0, 1]")

    def at(self, progress: float) -> float:
        """Return the ratio at a progress in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}, expected a number from 0 to 1")
        if progress >= self.until:
            return self.end
        return self.start + (self.end - self.start) * progress / self.until  # constant: exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioRamps(StrictRecord):
    """The interval of the student's ratio, and the gap down to the teacher's."""

    low: Ramp
    high: Ramp
    gap: Ramp

    def __post_init__(self) -> None:
        points = sorted({0.0, self.low.until, self.high.until, 1.0})
        if any(self.low.at(point) > self.high.at(point) for point in points):
            raise ValueError(f"low {self.low} is above high {self.high} at some progress")

    def at(self, progress: float, draw: float) -> tuple[float, float]:
        """Return the ratios of student and teacher at a progress, for a draw in [0, 1).

        The difference is rounded to 12 decimals: 0.8 - 0.2 in floating point is more than 0.6 and
        would drop one token more.
        """
        if not 0 <= draw < 1:
            raise ValueError(f"a draw is {draw}, expected 0 <= draw < 1")
        low, high = self.low.at(progress), self.high.at(progress)
        student = low + draw * (high - low)
        return student, round(max(0.0, student - self.gap.at(progress)), 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSchedule(StrictRecord):
    """TCD: drops more and more tokens at one layer."""

    ratios: RatioRamps
    layer: int = 2

    def at(self, progress: float, draw: float) -> Difficulty:
        """Return what the step at this progress drops, for its draw in [0, 1)."""
        return Difficulty(self.layer, *self.ratios.at(progress, draw))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSchedule(StrictRecord):
    """LCD: drops tokens at ever lower layers, from behind the last (none) down to `layer`."""

    ratios: RatioRamps
    num_layers: int
    layer: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.layer <= self.num_layers:
            raise ValueError(f"layer is {self.layer}, expected 1 to {self.num_layers}")

    def at(self, progress: float, draw: float) -> Difficulty:
        """Return what the step at this progress drops; halves round to the deeper layer."""
        depth = self.num_layers - progress * (self.num_layers - self.layer)
        return Difficulty(int(depth + 0.5), *self.ratios.at(progress, draw))


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegratedSchedule(StrictRecord):
    """ICD: TCD's ramps at each of several descending layers, an equal share of steps for each."""

    ratios: RatioRamps
    layers: tuple[int, ...]
    """Descending."""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers), reverse=True):
            raise ValueError(f"layers are {self.layers}, expected descending, each only once")

    def at(self, progress: float, draw: float) -> Difficulty:
        """Return what the step at this progress drops; ramps start again at each layer."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}, expected a number from 0 to 1")
        position = progress * len(self.layers)
        number = min(int(position), len(self.layers) - 1)
        return Difficulty(self.layers[number], *self.ratios.at(position - number, draw))


Schedule = TokenSchedule | LayerSchedule | IntegratedSchedule

PAPER_NOTES = RatioRamps(
    low=Ramp(start=0.0, end=0.5), high=Ramp(start=0.05, end=0.9), gap=Ramp(start=0.05, end=0.3)
)
RELEASED_CODE = RatioRamps(
    low=Ramp(start=0.1, end=0.26),
    high=Ramp(start=0.1, end=0.74),
    gap=Ramp(start=0.1, end=0.3, until=0.4),
)


def schedule_preset(
    name: SchedulePreset,
    kind: ScheduleName,
    num_layers: int,
    layer: int = 2,
    icd_layers: tuple[int, ...] = (),
) -> Schedule:
    """Return the schedule of notes on the paper or of its released code, for a decoder's depth.

    All end at `layer`. ICD's layers before it are `icd_layers`, by default 3/4, 1/2 and 1/4 of the
    depth (the paper's number is not known). ValueError for `released_code` with another schedule
    than TCD, and for a decoder that is too shallow.
    """
    if name == "released_code":
        if kind != "tcd":
            raise ValueError(
                f"the released code has no {kind}, only tcd; take the preset paper_notes"
            )
        return TokenSchedule(ratios=RELEASED_CODE, layer=layer)
    if kind == "tcd":
        return TokenSchedule(ratios=PAPER_NOTES, layer=layer)
    if kind == "lcd":
        ratios = RatioRamps(low=_constant(0.2), high=_constant(0.9), gap=PAPER_NOTES.gap)
        return LayerSchedule(ratios=ratios, num_layers=num_layers, layer=layer)
    quarters = (3 * num_layers // 4, num_layers // 2, num_layers // 4)
    layers = (*(icd_layers or quarters), layer)
    if list(layers) != sorted(set(layers), reverse=True) or layers[0] >= num_layers:
        raise ValueError(
            f"ICD's layers are {layers} in a decoder of {num_layers} layers, expected descending "
            f"ones below {num_layers}; name others (icd_layers), or take the schedule tcd or lcd"
        )
    return IntegratedSchedule(ratios=PAPER_NOTES, layers=layers)


def fixed_schedule(ratio: float, gap: float, layer: int) -> TokenSchedule:
    """Return a constant schedule: one ratio, one gap and one layer at every step."""
    ratios = RatioRamps(low=_constant(ratio), high=_constant(ratio), gap=_constant(gap))
    return TokenSchedule(ratios=ratios, layer=layer)


def _constant(ratio: float) -> Ramp:
    return Ramp(start=ratio, end=ratio)
