"""Settings of a training run: those that decide the weights, and those of the computation.

A run resumes only with the same `TrainRecipe`. What `TrainerSettings` adds may change between two
attempts of one run. Imports nothing heavy.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from student_train.config.objective import ObjectiveConfig
from student_train.config.progression import ProgressionConfig
from teacher_cache.schema.options import TierName
from teacher_cache.schema.strict_json import StrictRecord

TrainDtype = Literal["float32", "bfloat16", "float16"]
TrainPart = Literal["vision_tower", "projector", "language_model"]
ShardName = Literal["none", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe(StrictRecord):
    """What decides the trained weights, besides the cache, the student and the number of steps."""

    objective: ObjectiveConfig = ObjectiveConfig()
    progression: ProgressionConfig | None = None
    """Progressive dropping of vision tokens inside the language model (EPIC); None: every layer
    gets all tokens of the projector."""
    records: TierName | None = None
    """Tier to learn from where the cache holds several; default: the most exact one it holds."""
    train_parts: tuple[TrainPart, ...] = ("projector", "language_model")
    """Parts whose weights are trained; the others are frozen."""
    seed: int = 0
    batch_size: int = 32
    """Samples of one optimizer step, over all workers and accumulation steps."""
    learning_rate: float = 1e-5
    """Peak of the schedule."""
    min_lr_ratio: float = 0.0
    """The cosine schedule ends at this share of the learning rate."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay; none for biases and norms."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    dtype: TrainDtype = "float32"
    """Dtype of the computation; weights stay float32 (mixed precision) unless it is float32."""

    def __post_init__(self) -> None:
        expected = self.objective.epic_schedule
        found = None if self.progression is None else self.progression.schedule
        if expected is not None and found != expected:
            raise ValueError(
                f"objective {self.objective.name!r} goes with schedule {expected!r}, found "
                f"{found!r}; give both the same, or take objective 'supervised' or 'emkd', which "
                "go with any"
            )
        gap, compressor = None, None
        if self.progression is not None:
            gap, compressor = self.progression.gap, self.progression.compressor
        if gap is not None and self.objective.kd_weight == 0:
            raise ValueError(
                f"gap would have no effect: objective {self.objective.name!r} has no kd term; "
                "omit it, or take an epic objective"
            )
        if gap == 0 and compressor in ("dart", "fastv") and not self.objective.kd_from_cache:
            raise ValueError(
                "gap is 0, so teacher and student keep the same tokens and kd is 0 at every "
                "step; give a gap above 0, or take objective 'supervised' with the schedule"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, found {self.batch_size}")
        if not self.train_parts:
            raise ValueError("train_parts is empty; name at least one part to train")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, found {getattr(self, name)}")
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], found {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings(TrainRecipe):
    """A recipe, its length, and settings of the computation."""

    max_steps: int | None = None
    """Optimizer steps; default: as many as `epochs` need."""
    epochs: float = 1.0
    """Passes over the cache."""
    micro_batch_size: int | None = None
    """Samples of one forward pass of one worker; default: at most 8, a divisor of its share."""
    shard: ShardName = "none"
    """`fsdp` shards the language model's matrices over the workers (FSDP2): weights, gradients and
    optimizer state. `none` keeps all of them on every worker."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    device: str = "auto"
    """`auto` takes CUDA where it is available."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """refuse: stop before the first step and name the samples of the cache that do not fit the
    student; skip: leave them out and list them in preflight.json."""
    loader_threads: int = 2
    """Threads that read and encode samples ahead; 0 does it between the steps."""
    save_steps: int = 500
    """Write a checkpoint every N steps."""
    log_steps: int = 10
    """Write a line of metrics.jsonl every N steps."""
    grad_norm_steps: int = 50
    """Measure each loss term's gradient norm every N steps; 0 disables it."""
    match_check_steps: int = 0
    """Match one sample again by costs over the whole vocabulary every N steps, and log how far the
    training's matching is from it; 0 disables it."""

    def __post_init__(self) -> None:
        # zero-argument super() does not work in a dataclass that slots=True has built anew
        TrainRecipe.__post_init__(self)
        for name in ("micro_batch_size", "save_steps", "log_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")
        for name in ("loader_threads", "grad_norm_steps", "match_check_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, found {getattr(self, name)}")
        if self.shard == "fsdp" and self.dtype == "float16":
            raise ValueError(
                "dtype float16 scales its loss by gradients that no worker of a sharded student "
                "has whole; take dtype bfloat16 or float32, or shard none"
            )
        if self.match_check_steps:
            self.objective.require_sampled_costs()
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be >= 1, found {self.max_steps}")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be > 0, found {self.epochs}")

    @property
    def recipe(self) -> TrainRecipe:
        """The settings that are part of the run's identity."""
        return TrainRecipe(**{f.name: getattr(self, f.name) for f in fields(TrainRecipe)})

    def num_steps(self, num_samples: int) -> int:
        """Return the optimizer steps for a cache of `num_samples` samples."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.epochs * num_samples / self.batch_size)
