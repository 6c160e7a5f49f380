"""Records that the command line has in place of those of `pipeline.config`.

Their defaults depend on other flags (a preset, `--records`, `--ratios`). `resolve` makes the record
that the stage takes, and refuses a flag that would have no effect.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import refuse_changed, refuse_idle_choice
from student_train.config.compression import TextSource
from student_train.config.objective import ObjectiveConfig
from student_train.config.progression import ProgressionConfig, ProgressionPreset
from student_train.config.schedules import ScheduleName
from teacher_cache.schema.options import GridSettings, RecordKind, RecordSettings

PRESET = "preset"
Preset = Literal["preset"]
"""The value of an override that is not given: the preset decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressionFlags:
    """Vision tokens dropped inside the student's language model while it trains (EPIC)."""

    schedule: ScheduleName | Literal["none"] | Preset = PRESET
    """Ever more tokens (tcd), ever earlier layers (lcd), or both (icd). Preset: what an epic
    objective is named after, none for others."""
    schedule_preset: ProgressionPreset | Preset = PRESET
    """Whose ratios; `fixed` has one from beginning to end. Preset: paper_notes."""
    compressor: str | Preset = PRESET
    """Which tokens go: dart (the preset), fastv, random, or one that was registered."""
    compress_text: TextSource | Preset = PRESET
    """Text that decides: the turn's instruction (the preset), or released, answers included."""
    compress_layer: int | Preset = PRESET
    """Decoder layer, counted from 0, at whose input they go; where lcd and icd end. Preset: 2."""
    icd_layers: tuple[int, ...] | Preset = PRESET
    """ICD's layers before that, descending. Preset: 3/4, 1/2 and 1/4 of the depth."""
    ratio: float | Preset = PRESET
    """Share of vision tokens dropped, with --schedule-preset fixed."""
    ratio_gap: float | Preset = PRESET
    """How much smaller EPIC's teacher's is, with --schedule-preset fixed. Preset: 0.3."""

    def resolve(
        self, objective: ObjectiveConfig, known: ProgressionConfig | None
    ) -> ProgressionConfig | None:
        """The progression: `known` (from --config) or the defaults, and what the flags change.

        Another schedule, preset or objective leaves behind what belongs to the known one alone.
        """
        names = {
            "schedule_preset": "preset",
            "compressor": "compressor",
            "compress_text": "text",
            "compress_layer": "layer",
            "icd_layers": "icd_layers",
            "ratio": "ratio",
            "ratio_gap": "gap",
        }
        given = {flag: getattr(self, flag) for flag in names}
        given = {flag: value for flag, value in given.items() if value != PRESET}
        schedule = objective.epic_schedule or (known.schedule if known else "none")
        schedule = schedule if self.schedule == PRESET else self.schedule
        if schedule == "none":
            if given:
                flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in given)
                raise ValueError(
                    f"{flags} would have no effect: nothing is dropped inside the language model; "
                    "add --schedule, or take an epic objective"
                )
            return None
        base = known or ProgressionConfig()
        changes = {names[flag]: value for flag, value in given.items()}
        if schedule != base.schedule:
            changes = {"icd_layers": (), **changes}
        if changes.get("preset", base.preset) != base.preset:
            changes = {"ratio": None, "gap": None, **changes}
        if objective.kd_weight == 0:
            changes = {"gap": None, **changes}
        return dataclasses.replace(base, schedule=schedule, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFlags:
    """Response records without some of the vision tokens, which the teacher drops itself."""

    compressor: str | None = None
    """With --ratios: how the teacher drops vision tokens (dart, fastv, random)."""
    ratios: tuple[float, ...] = ()
    """Also store the teacher's response logits without these shares of its vision tokens, for
    example 0.25 0.5 0.75, for students of epic-cached-*."""
    compress_layer: int = 2
    """Decoder layer, counted from 0, at whose input they are dropped."""
    compress_text: TextSource = "instruction"
    """Text that decides which ones are kept; `released`: answers too, as in EPIC's code."""
    compress_seed: int = 0
    """Seed of the compressor random."""

    def resolve(self) -> GridSettings | None:
        """The grid, None without one; ValueError for flags without effect."""
        if (self.compressor is None) != (not self.ratios):
            raise ValueError(
                f"a grid needs both --compressor and --ratios; found compressor {self.compressor}, "
                f"ratios {self.ratios}"
            )
        if self.compressor is None:
            names = ("compress_layer", "compress_text", "compress_seed")
            refuse_changed(self, "no ratios are given", *names)
            return None
        refuse_idle_choice(self, self.compressor)
        return GridSettings(
            compressor=self.compressor,
            ratios=self.ratios,
            layer=self.compress_layer,
            text=self.compress_text,
            seed=self.compress_seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRecords(RecordSettings):
    """Flags of records that are added to a cache; none are added without `--records`."""

    records: RecordKind | None = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    """Further records of the samples that are there, from the images that the cache holds. The
    flags below are their settings."""
