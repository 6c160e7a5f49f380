"""Settings of progressive compression: how many vision tokens each training step drops.

The schedule (TCD, LCD, ICD) gives layer and ratio of each step, the preset its numbers, and the
compressor chooses the tokens. EPIC's objectives need a progression; others may have one:
`supervised` with a schedule is EPIC without its consistency term. Settings that no model could
carry out are refused here; those that a given model cannot, by `decoder.py` before training.
Imports nothing heavy.
"""

from dataclasses import dataclass
from typing import Literal

from student_train.config.compression import TextSource
from student_train.config.schedules import (
    Schedule,
    ScheduleName,
    SchedulePreset,
    fixed_schedule,
    schedule_preset,
)
from teacher_cache.schema.strict_json import StrictRecord

ProgressionPreset = SchedulePreset | Literal["fixed"]

FIXED_GAP = 0.3
"""Default gap of the preset `fixed`: the final gap of the other presets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressionConfig(StrictRecord):
    """Compression inside the language model during training; part of a run's identity."""

    schedule: ScheduleName = "tcd"
    preset: ProgressionPreset = "paper_notes"
    """Ratios from notes on the paper, from its released code (tcd only), or `fixed`."""
    compressor: str = "dart"
    """A name in `compressors.COMPRESSORS`: dart, fastv, random, or a registered one."""
    text: TextSource = "instruction"
    """Text that decides what is kept (`CompressionSettings.text`)."""
    layer: int = 2
    """Decoder layer, counted from 0, whose input is shortened; LCD and ICD end at it."""
    icd_layers: tuple[int, ...] = ()
    """ICD's earlier layers, descending; default: 3/4, 1/2 and 1/4 of the depth."""
    ratio: float | None = None
    """Share of vision tokens dropped at every step; required by the preset `fixed` alone."""
    gap: float | None = None
    """Student's ratio minus the teacher's, for the preset `fixed`; default 0.3."""

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(
                f"layer is {self.layer}, expected 1 or more: the layer below decides what is kept"
            )
        if self.preset == "released_code" and self.schedule != "tcd":
            raise ValueError(
                f"the released code has no {self.schedule}, only tcd; take the preset paper_notes"
            )
        if self.icd_layers and self.schedule != "icd":
            raise ValueError(
                f"icd_layers is {self.icd_layers}, but the schedule is {self.schedule}; omit it, "
                "or take the schedule icd"
            )
        if self.compressor == "random" and self.text != "instruction":
            raise ValueError(
                f"text is {self.text!r}, but the compressor random uses no text; omit it"
            )
        layers = [*self.icd_layers, self.layer]
        if layers != sorted(set(layers), reverse=True):
            raise ValueError(
                f"icd_layers is {self.icd_layers}, expected descending layers above {self.layer}"
            )
        if self.preset == "fixed":
            if self.ratio is None or not 0 < self.ratio < 1:
                raise ValueError(
                    f"the preset fixed needs a ratio, 0 < ratio < 1, found {self.ratio}; 0.75 "
                    "keeps a quarter of the vision tokens"
                )
            if self.schedule != "tcd":
                raise ValueError(
                    f"the preset fixed drops at one layer throughout, found schedule "
                    f"{self.schedule}; take tcd"
                )
            if self.gap is not None and not 0 <= self.gap < 1:
                raise ValueError(f"gap is {self.gap}, expected 0 <= gap < 1")
        elif self.ratio is not None or self.gap is not None:
            name = "ratio" if self.ratio is not None else "gap"
            raise ValueError(
                f"{name} is set, but the preset {self.preset} has its own ratios; omit it, or take "
                "the preset fixed"
            )

    def schedule_of(self, num_layers: int) -> Schedule:
        """Return the schedule for a decoder's depth; ValueError where it is too shallow."""
        if self.layer >= num_layers:
            raise ValueError(
                f"tokens are to be dropped at the input of layer {self.layer}, but the decoder has "
                f"{num_layers} layers; choose a layer from 1 to {num_layers - 1}"
            )
        if self.preset == "fixed":
            assert self.ratio is not None  # checked above
            return fixed_schedule(
                self.ratio, FIXED_GAP if self.gap is None else self.gap, self.layer
            )
        return schedule_preset(self.preset, self.schedule, num_layers, self.layer, self.icd_layers)
