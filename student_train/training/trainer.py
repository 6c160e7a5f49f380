"""Runs the optimizer loop: a transformers.Trainer with our data stream and our loss.

Each term is one mean over all micro-batches and ranks of a step (step_counts.py). So
micro_batch_size and world size change neither which samples form a step nor its gradient, rounding
aside. Refuses a loss that is not finite, and trainable weights in half precision.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from student_train.config.recipe import TrainerSettings
from student_train.data.stream import StudentBatch, TrainingStream
from student_train.epic.step_plan import StepPlan, num_layers_of, plan_step
from student_train.head.linear_head import LogitsOf
from student_train.losses.step_counts import StepCounts
from student_train.models.forward import output_head
from student_train.training.checkpoint import (
    CheckpointRecord,
    RunIdentity,
    claim_run,
    complete,
    prune_checkpoints,
)
from student_train.training.gradient_norms import term_gradient_norms
from student_train.training.metrics_log import MeanWindow, MetricsLog, means, merge_sums
from student_train.training.student_loss import student_loss
from teacher_cache.models.checkpoint import load_model
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.storage.folder_owner import FolderOwner

logger = logging.getLogger(__name__)

MetricsCallback = Callable[[Mapping[str, float]], None]
"""Called on every rank with each line of the metrics log."""


def training_arguments(settings: TrainerSettings, run: Path, num_steps: int) -> TrainingArguments:
    """Translate the settings for transformers; logging and saving stay ours."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {settings.device!r}, expected auto, cpu or cuda")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; use device auto or cpu")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and settings.dtype == "float16":
        raise ValueError(  # transformers would silently compute in float32
            "dtype float16 needs a CUDA device; use dtype bfloat16 or float32"
        )
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
        warmup_steps=round(settings.warmup_ratio * num_steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=on_cpu,
        seed=settings.seed,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        ignore_data_skip=True,
        use_cache=True,  # for the saved config, used in generation; our forward passes say False
        ddp_find_unused_parameters=True,
        disable_tqdm=True,
        report_to="none",
    )
    if arguments.n_gpu > 1:  # one process drives one device; DataParallel would split our batches
        arguments._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    return arguments


class EmkdTrainer(Trainer):
    """Trains `model` on `stream`; `train` runs to the end, `save_student` writes the result."""

    loss_is_scaled_for_ga = True
    """A micro-batch's loss is its share of the step's mean; the shares are added up."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        arguments: TrainingArguments,
        settings: TrainerSettings,
        stream: TrainingStream,
        assets: TeacherAssets,
        identity: RunIdentity,
        owner: FolderOwner,
        resumed: CheckpointRecord | None = None,
        report: MetricsCallback | None = None,
        progress: Progress = no_progress,
    ) -> None:
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        if dtypes != {torch.float32}:
            raise ValueError(
                f"trainable weights are {sorted(map(str, dtypes))}; load the student in float32: "
                "mixed precision (dtype) casts inside the forward pass"
            )
        self._run, self._owner = owner.folder, owner
        flow = _LogAndSaveCallback(settings.save_steps, self._claim, progress)
        super().__init__(model=model, args=arguments, callbacks=[flow])
        self.remove_callback(PrinterCallback)
        self.processing_class = processor
        self.settings = settings
        self.stream = stream
        self.assets = assets.to(arguments.device)
        self.identity = identity
        self.report = report
        first = self.is_world_process_zero()
        self.window = MeanWindow(resumed.window if resumed is not None and first else None)
        self.run_log = MetricsLog(
            self._run,
            step=resumed.step if resumed is not None else 0,
            seconds=resumed.seconds if resumed is not None else 0.0,
            owner=owner if first else None,
            expected=None if resumed is None else resumed.num_lines,
        )
        self._last_step: int | None = None

    def get_train_dataloader(self) -> Any:
        """Return the stream: endless, of this rank, at the right position."""
        return self.stream

    def get_batch_samples(
        self, epoch_iterator: Iterator[StudentBatch], num_batches: int, device: torch.device
    ) -> tuple[list[StudentBatch], Any]:
        """Return this rank's micro-batches of one step, and the `StepCounts` of all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        spans = [sample.spans for batch in batches for sample in batch.model.samples]
        own = StepCounts.of_spans(spans, self.settings.objective.vlad_text)
        every: Any = self.accelerator.gather(torch.tensor([own], device=device))
        return batches, StepCounts(*every.sum(dim=0).tolist())

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate ignores the vision tower."""
        return 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        return replace(inputs, model=inputs.model.to(self.args.device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return one micro-batch's share of the step's loss, times the number of ranks.

        In float32 whatever the dtype of the forward pass. Gradients are means over ranks, so that
        the factor makes them sums. `num_items_in_batch` is the step's `StepCounts`.
        """
        step = self.state.global_step + 1
        first, self._last_step = self._last_step != step, step
        check = first and _is_due(step, self.settings.match_check_steps)
        plan, head_of = self._plan(model), self._head_of
        objective, counts = self.settings.objective, num_items_in_batch
        loss = student_loss(
            model, inputs, objective, self.assets, plan, check, head_of, counts=counts
        )
        # Shares add up to the step's value, which counts once: on one rank, in one micro-batch.
        once = int(first and self.is_world_process_zero())
        shares = {name: term for name, term in loss.terms.items() if counts.of_term(name)}
        self.window.add({"loss": loss.total, **_named("term", shares)}, once)
        self.window.add(_named("weight", loss.weights))
        self.window.add(_named("diagnostic", loss.diagnostics))
        if first and _is_due(step, self.settings.grad_norm_steps):
            spans = [sample.spans for sample in inputs.model.samples]
            own = StepCounts.of_spans(spans, objective.vlad_text)
            means = {
                name: share * (counts.of_term(name) / max(1, own.of_term(name)))
                for name, share in shares.items()
            }
            self.window.add(_named("gradient", self._gradient_norms(model, means)))
        return loss.total * self.args.world_size

    def _head_of(self, model: nn.Module) -> LogitsOf:
        return output_head(model)

    def _gradient_norms(self, model: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, float]:
        return term_gradient_norms(terms, model.parameters())

    def _plan(self, model: nn.Module) -> StepPlan | None:
        """Return what the current step drops, equal in all its micro-batches and ranks."""
        if self.settings.progression is None:
            return None
        return plan_step(
            self.settings.progression,
            seed=self.settings.seed,
            step=self.state.global_step,
            num_steps=self.state.max_steps,
            num_layers=num_layers_of(model),
            grid=self.stream.grid,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means to transformers' line and write it to metrics.jsonl."""
        if "loss" in logs:  # the call at the end of training has only run times
            logs |= means(self._merged_window())
            self.window = MeanWindow()
            self.state.epoch = self.num_samples / self.stream.num_rows
            logs |= {
                "epoch": self.state.epoch,
                "step": self.state.global_step,
                "samples": self.num_samples,
                "seconds": self.run_log.seconds,
            }
            self.run_log.append(logs)
            if self.report is not None:
                self.report(logs)
        super().log(logs, start_time)

    @property
    def num_samples(self) -> int:
        """Samples that optimizer steps have used; the stream's position."""
        return self.state.global_step * self.settings.batch_size

    def _merged_window(self) -> dict[str, tuple[float, int]]:
        merged = merge_sums(gather_object([self.window.sums()]))
        total = merged["loss"][0] if "loss" in merged else 0.0
        if not torch.isfinite(torch.tensor(total)):
            raise ValueError(
                f"the loss became {total} within the logging window that ends at step "
                f"{self.state.global_step}; lower learning_rate or max_grad_norm, raise "
                "warmup_ratio, or use dtype float32. Checkpoints before it are intact"
            )
        return merged

    def _claim(self) -> None:
        self._owner.require()
        claim_run(self._run, self.identity)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write transformers' files; once every rank has written, rank 0 publishes the folder."""
        window = self._merged_window()
        with self._owner.while_owned():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            step = self.state.global_step
            record = CheckpointRecord(
                identity=self.identity,
                step=step,
                stream=self.stream.state(self.num_samples),
                seconds=self.run_log.seconds,
                window=window,
                num_lines=self.run_log.num_lines,
            )
            name = f"checkpoint-{step}"
            made = self._owner.private / name
            with self._owner.while_owned():
                complete(made, record)
                self._owner.publish(made, name)
            prune_checkpoints(self._run, step)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the weights with `load_model`, which misses none.

        A vanilla class saves its weights under the names of its family's first release. The stock
        method skips names that are not its modules', with a warning.
        """
        saved, _ = load_model(resume_from_checkpoint, torch.float32)
        self._load_weights(model if model is not None else self.model, saved.state_dict())

    def _load_weights(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        model.load_state_dict(weights)

    def save_student(self, folder: Path) -> None:
        """Write model and processor so that `from_pretrained` loads them; call on every rank."""
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            (folder / "training_args.bin").unlink(missing_ok=True)  # an unused pickle


class _LogAndSaveCallback(TrainerCallback):
    """Saves every `save_steps` steps except the last, where `final/` follows; logs the last step.

    Claims the run's folder after the first step, so that a run that cannot start claims nothing.
    """

    def __init__(self, save_steps: int, claim: Callable[[], None], progress: Progress) -> None:
        self._save_steps = save_steps
        self._claim: Callable[[], None] | None = claim
        self._progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.logging_steps = int(args.logging_steps)  # a checkpoint restores its attempt's

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._claim is not None and state.is_world_process_zero:
            self._claim()
            self._claim = None
        last = state.global_step >= state.max_steps
        control.should_log |= last
        control.should_save = not last and state.global_step % self._save_steps == 0
        if state.is_world_process_zero:
            self._progress("steps", state.global_step, state.max_steps)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
