"""Trains a student that `fsdp.shard` has sharded.

Checkpoints have the files of an unsharded run: rank 0 writes them whole, every worker reads them
and keeps its shard. Any number of workers, sharded or not, can resume from them.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from student_train.head.linear_head import LinearHead, LogitsOf
from student_train.training.fsdp import (
    ParameterGroup,
    average_gradients,
    gathered_head,
    gradient_norm,
    load_optimizer,
    load_weights,
    scatter_head,
    whole_optimizer,
    whole_weights,
)
from student_train.training.trainer import EmkdTrainer

_OPTIMIZER_FILE, _SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
"""File names of transformers."""


class ShardedTrainer(EmkdTrainer):
    """`EmkdTrainer` for a model that `shard` has sharded."""

    _head: LinearHead | None = None
    """Gathered for the current micro-batch."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch; after the last one of a step, gradients are means over ranks."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._scatter_head(model)
        self._head = None  # freed before the optimizer steps
        if self.accelerator.sync_gradients:
            average_gradients(model.parameters())
        return loss

    def _head_of(self, model: nn.Module) -> LogitsOf:
        self._head = gathered_head(model)
        return self._head

    def _scatter_head(self, model: nn.Module) -> None:
        if self._head is not None:
            scatter_head(model, self._head)

    def _gradient_norms(self, model: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Measure norms of rank means: sharded gradients exist only after a backward pass."""
        norms: dict[str, float] = {}
        for name, term in terms.items():
            term.backward(retain_graph=True)
            self._scatter_head(model)
            average_gradients(model.parameters())
            norms[name] = gradient_norm(model.parameters())
            model.zero_grad()
        return norms

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather the weights on rank 0, which writes them; call on every rank."""
        model: Any = self.model
        weights = whole_weights(model)
        if self.is_world_process_zero():
            self._save(output_dir, state_dict=weights)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Do nothing: the stock method waits for gradients that a rank without images lacks."""

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Generator[None]:
        """Reduce after each micro-batch: until then each rank holds whole gradients."""
        yield

    def _load_weights(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        load_weights(model, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        groups = self._groups()
        state = whole_optimizer(optimizer, groups)
        if self.is_world_process_zero():
            torch.save(state, Path(output_dir) / _OPTIMIZER_FILE)
            schedule = _for_groups(scheduler.state_dict(), len(groups))
            torch.save(schedule, Path(output_dir) / _SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        folder = Path(checkpoint)
        # Memory-mapped, so that a rank reads only its shard.
        state = torch.load(folder / _OPTIMIZER_FILE, weights_only=True, mmap=True)
        load_optimizer(optimizer, self._groups(), state)
        schedule = torch.load(folder / _SCHEDULER_FILE, weights_only=True)
        scheduler.load_state_dict(_for_groups(schedule, len(optimizer.param_groups)))

    def _groups(self) -> list[ParameterGroup]:
        """Return the optimizer groups of an unsharded run; a sharded run splits them further."""
        model: Any = self.model
        decays = set(self.get_decay_parameter_names(model))
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [
            [p for name, p in trained if name in decays],
            [p for name, p in trained if name not in decays],
        ]


def _for_groups(schedule: Mapping[str, Any], num_groups: int) -> dict[str, Any]:
    """Return a scheduler's state for `num_groups` optimizer groups with one learning rate."""
    return {k: v[:1] * num_groups if isinstance(v, list) else v for k, v in schedule.items()}
