"""The trainer of a sharded student: what transformers' Trainer has to be told about one.

It trains a model that is sharded already (`sharding.shard`), whose gathers and reductions come
with it. Checkpoints are those of an unsharded run, file by file: written whole by rank 0, read by
every worker, which keeps its part. Any number of workers, sharded or not, goes on from them.
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
from teacher_cache.models.checkpoint import load_model

_OPTIMIZER_FILE, _SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
"""How transformers calls them."""


class ShardedTrainer(EmkdTrainer):
    """`EmkdTrainer` for a model that `shard` has sharded."""

    _head: LinearHead | None = None
    """Gathered for the current micro-batch."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; after the last one of a step, all gradients are means over the ranks."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._send_home(model)
        self._head = None  # not held while the optimizer steps
        if self.accelerator.sync_gradients:
            average_gradients(model.parameters())
        return loss

    def _head_of(self, model: nn.Module) -> LogitsOf:
        self._head = gathered_head(model)
        return self._head

    def _send_home(self, model: nn.Module) -> None:
        if self._head is not None:
            scatter_head(model, self._head)

    def _gradient_norms(self, model: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Of the mean over the ranks: a sharded gradient comes from no other backward pass."""
        norms: dict[str, float] = {}
        for name, term in terms.items():
            term.backward(retain_graph=True)
            self._send_home(model)
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
        """Not transformers' way, which waits for gradients that a rank without images lacks."""

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Generator[None]:
        """Not put off to a step's last micro-batch: until then each rank would hold all of them."""
        yield

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        saved, _ = load_model(resume_from_checkpoint, torch.float32)
        target: Any = model if model is not None else self.model
        load_weights(target, saved.state_dict())

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
        # Mapped, so that only what a rank keeps has to come into memory.
        state = torch.load(folder / _OPTIMIZER_FILE, weights_only=True, mmap=True)
        load_optimizer(optimizer, self._groups(), state)
        schedule = torch.load(folder / _SCHEDULER_FILE, weights_only=True)
        scheduler.load_state_dict(_for_groups(schedule, len(optimizer.param_groups)))

    def _groups(self) -> list[ParameterGroup]:
        """The optimizer's groups of an unsharded run; a sharded one's are split once more."""
        model: Any = self.model
        decays = set(self.get_decay_parameter_names(model))
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [
            [p for name, p in trained if name in decays],
            [p for name, p in trained if name not in decays],
        ]


def _for_groups(schedule: Mapping[str, Any], num_groups: int) -> dict[str, Any]:
    """A scheduler's state for so many groups of the optimizer, which all have one learning rate."""
    return {k: v[:1] * num_groups if isinstance(v, list) else v for k, v in schedule.items()}
