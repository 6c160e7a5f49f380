"""Plans the token dropping of one optimizer step: layer, ratios and random draws of both passes.

    p = step / num_steps                            u = random_uniform(seed, "ratio", step)
    student   draw 2 step, student's ratio          teacher   draw 2 step + 1, teacher's ratio

Promise: a pure function of (settings, seed, step, number of steps, depth of the decoder). So a run
that resumes repeats the same plans, and micro-batch size and number of ranks do not matter.
"""

from dataclasses import dataclass

from torch import nn

from student_train.compression.decoder import decoder_of, require_compressible
from student_train.config.compression import CompressionSettings, grid_ratio
from student_train.config.progression import ProgressionConfig
from student_train.config.schedules import Difficulty
from student_train.data.seeded_random import random_uniform
from teacher_cache.schema.options import GridSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The compression of both passes of a step."""

    difficulty: Difficulty
    student: CompressionSettings
    teacher: CompressionSettings
    student_draw: int
    teacher_draw: int
    drops: bool
    """False where LCD begins: behind the last layer nothing is dropped."""
    cached_ratio: float = 0.0
    """The ratio of the cached response record that KD learns from, under `epic-cached-*`."""


def plan_step(
    progression: ProgressionConfig,
    *,
    seed: int,
    step: int,
    num_steps: int,
    num_layers: int,
    grid: GridSettings | None = None,
) -> StepPlan:
    """Return the plan of optimizer step `step`, counted from 0; ValueError beyond the last.

    `grid` is the cache's. The step uses the largest grid ratio that is at most the teacher's, if
    the student drops at the grid's layer or before; dropping deeper than the cached teacher, the
    student would see more than it did. Otherwise it uses ratio 0 (all tokens).
    """
    schedule = progression.schedule_of(num_layers)
    difficulty = schedule.at(step / num_steps, random_uniform(seed, "ratio", step))

    def settings(ratio: float) -> CompressionSettings:
        compressor, text = progression.compressor, progression.text
        return CompressionSettings.at_layer(difficulty.layer, ratio, compressor, text, seed)

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
    """Return the number of decoder layers of a model, which may be wrapped."""
    return len(decoder_of(model).layers)


def require_progression(model: nn.Module, progression: ProgressionConfig, num_steps: int) -> None:
    """Raise ValueError, with the remedy, where the model cannot carry out some step.

    Runs no forward pass. Refused: an unknown compressor, a decoder that cannot be compressed, a
    layer that it lacks, attention that does not expose what the compressor needs.
    """
    schedule = progression.schedule_of(num_layers_of(model))
    layers = {schedule.at(step / num_steps, 0.0).layer for step in range(num_steps)}
    for layer in sorted(layers):
        require_compressible(
            model, CompressionSettings.at_layer(layer, 0.5, progression.compressor)
        )
