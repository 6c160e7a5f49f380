"""What one optimizer step does to vision tokens: how many both passes drop, where, by which draw.

    p = step / num_steps                            u = random_uniform(seed, "ratio", step)
    student   draw 2 step, student's ratio           teacher   draw 2 step + 1, teacher's ratio

Promise: a pure function of (settings, seed, step, steps in all, depth of the decoder). So a run
that resumes at a step goes on as it would have, and neither the size of a micro-batch nor the
number of ranks changes anything. Refuses, before the first step, what some later step could not
carry out: every layer that the schedule will visit is asked.
"""

from dataclasses import dataclass

from torch import nn

from student_train.compression.decoder import decoder_of, require_compressible
from student_train.config.compression import CompressionSettings, DropStage, grid_ratio
from student_train.config.progression import ProgressionConfig
from student_train.config.schedules import Difficulty
from student_train.data.seeded_random import random_uniform
from teacher_cache.schema.options import GridSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The compression of a step's two passes."""

    difficulty: Difficulty
    student: CompressionSettings
    teacher: CompressionSettings
    student_draw: int
    teacher_draw: int
    drops: bool
    """False where LCD begins: behind the last layer there is nothing left to drop for."""
    cached_ratio: float = 0.0
    """Which record of a cache's grid teaches the step, where KD's teacher is the cached one."""


def plan_step(
    progression: ProgressionConfig,
    *,
    seed: int,
    step: int,
    num_steps: int,
    num_layers: int,
    grid: GridSettings | None = None,
) -> StepPlan:
    """The plan of optimizer step `step`, counted from 0; ValueError beyond the last.

    `grid` is that of the cache. Its largest ratio that is no more than the teacher's serves, and
    only where the student drops no deeper than the cached teacher did: else that would have seen
    less than the student. Ratio 0, every token, serves the rest.
    """
    schedule = progression.schedule_of(num_layers)
    difficulty = schedule.at(step / num_steps, random_uniform(seed, "ratio", step))

    def settings(ratio: float) -> CompressionSettings:
        return CompressionSettings(
            compressor=progression.compressor,
            stages=(DropStage(layer=difficulty.layer, ratio=ratio),),
            text=progression.text,
            seed=seed,
        )

    return StepPlan(
        difficulty=difficulty,
        student=settings(difficulty.student_ratio),
        teacher=settings(difficulty.teacher_ratio),
        student_draw=2 * step,
        teacher_draw=2 * step + 1,
        drops=difficulty.layer < num_layers,
        cached_ratio=grid_ratio(grid.ratios, difficulty.teacher_ratio)
        if grid is not None and difficulty.layer <= grid.layer
        else 0.0,
    )


def num_layers_of(model: nn.Module) -> int:
    """Decoder layers of a model, wrapped or not."""
    return len(decoder_of(model).layers)


def require_progression(model: nn.Module, progression: ProgressionConfig, num_steps: int) -> None:
    """Raise ValueError, with the remedy, where some step of the schedule could not be carried out.

    Costs nothing: no forward pass. An unknown compressor, a decoder that cannot be compressed, a
    layer that it does not have, or attention that does not show what the compressor needs.
    """
    schedule = progression.schedule_of(num_layers_of(model))
    layers = {schedule.at(step / num_steps, 0.0).layer for step in range(num_steps)}
    for layer in sorted(layers):
        stages = (DropStage(layer=layer, ratio=0.5),)
        require_compressible(
            model, CompressionSettings(compressor=progression.compressor, stages=stages)
        )
