"""Trains a student from start to end, or from where an earlier attempt was killed.

Runs in a plain process, under torchrun and in a Ray Train worker. A finished run returns at once; a
killed one continues from its newest complete checkpoint. A folder that holds another run is refused
with the fields that differ, and is not changed. Before the first step every sample of the cache is
checked against the student (preflight.py).
"""

import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from student_train.config.objective import ObjectiveConfig
from student_train.config.recipe import TrainerSettings
from student_train.data.batch_plan import BatchPlan, micro_batch
from student_train.data.sample_order import skipped_samples
from student_train.data.stream import TrainingStream, matching_scope, parts_needed
from student_train.epic.step_plan import require_progression
from student_train.losses.require_served import require_served
from student_train.models.forward import output_head
from student_train.models.student import LoadedStudent
from student_train.training.checkpoint import (
    FINAL_FOLDER,
    Checkpoint,
    FinishedRun,
    RunIdentity,
    complete,
    finished_run,
    newest_checkpoint,
    prune_checkpoints,
    require_same_run,
)
from student_train.training.fsdp import shard
from student_train.training.fsdp_trainer import ShardedTrainer
from student_train.training.preflight import (
    Preflight,
    check_cache,
    store_preflight,
    stored_preflight,
    what_is_compared,
)
from student_train.training.trainable import set_trainable
from student_train.training.trainer import EmkdTrainer, MetricsCallback, training_arguments
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import EmkdError
from teacher_cache.schema.options import TierName, tier_to_learn_from
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.storage.durable_files import sync_folder
from teacher_cache.storage.folder_owner import FolderOwner

logger = logging.getLogger(__name__)

LoadStudent = Callable[[], LoadedStudent]


def train_student(
    run: Path,
    reader: CacheReader,
    load: LoadStudent,
    settings: TrainerSettings,
    *,
    student: str,
    chat_template: str | None = None,
    begin: Callable[[], None] | None = None,
    report: MetricsCallback | None = None,
    progress: Progress = no_progress,
) -> FinishedRun:
    """Train the student that `load` returns and write it to `run/final`; every rank calls this.

    `student` is a digest of its weights and projector, so that a finished run is recognised without
    loading it. `chat_template` is the text of one that replaces the student's own; default: the one
    that replaced the teacher's when the cache was built, if any. `begin` is called on every rank
    when all checks have passed. `report` is called on every rank with each line of the metrics log,
    `progress` on rank 0 during the checks and after each step.

    CacheMismatchError where `run` holds another run, and where samples do not fit the student
    (`settings.on_bad_sample` skip leaves them out). ValueError for settings that do not fit
    together.
    """
    arguments = training_arguments(settings, run, settings.num_steps(len(reader)))
    plan = BatchPlan(
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size
        or micro_batch(settings.batch_size, arguments.world_size),
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    if settings.shard == "fsdp" and plan.world_size == 1:
        raise ValueError(
            "shard is fsdp, but there is only one worker; give --num-workers 2 or more, or "
            "--shard none"
        )
    compared = what_is_compared(reader, student, chat_template, matching_scope(settings.objective))
    prepare = cache(lambda: _prepare(reader, load, settings, chat_template))

    def check() -> Preflight:
        prepared = prepare()
        return check_cache(
            reader, prepared.model, prepared.encoder, compared, plan, settings, progress
        )

    preflight = stored_preflight(run, compared)
    if settings.on_bad_sample == "skip":  # what is skipped is part of the identity
        preflight = preflight or check()
        skipped = preflight.skipped(reader)
    else:
        skipped = ()
    num_steps = settings.num_steps(len(reader) - len(skipped))
    identity = RunIdentity(
        cache=reader.fingerprint,
        teacher=reader.spec.teacher_weights,
        student=student,
        num_steps=num_steps,
        recipe=settings.recipe,
        loss_means="step",
        skipped=skipped_samples([reader.keys[index] for index in skipped]),
    )
    require_same_run(run, identity)
    finished = finished_run(run)
    if finished is not None:
        logger.info("%s has already finished", run)
        return finished
    if preflight is None:
        preflight = check()
    if plan.rank == 0:
        store_preflight(run, preflight)
    if settings.on_bad_sample == "refuse":
        preflight.require_none(run, reader)
    elif skipped and plan.rank == 0:
        logger.warning("%s", preflight.describe_skipped(run))
    assets, model, processor, encoder = prepare()
    if begin is not None:
        begin()
    if skipped:
        arguments = training_arguments(settings, run, num_steps)
    arguments.per_device_train_batch_size = plan.micro_batch_size
    arguments.gradient_accumulation_steps = plan.accumulation_steps
    if settings.progression is not None:
        require_progression(model, settings.progression, num_steps)
    stream = TrainingStream(
        reader,
        encoder.encode,
        objective=settings.objective,
        tier=tier_to_learn_from(reader.spec.records, settings.records),
        pad_token_id=encoder.pad_token_id,
        seed=settings.seed,
        plan=plan,
        num_threads=settings.loader_threads,
        skipped=skipped,
    )
    owner, resumed = _take(run, identity, arguments)
    if resumed is not None:
        stream.seek(resumed.record.stream)
        logger.info("Continuing from step %d of %d", resumed.record.step, num_steps)
    if settings.shard == "fsdp":
        shard(model, arguments.device, getattr(torch, settings.dtype))
    trainer_class = ShardedTrainer if settings.shard == "fsdp" else EmkdTrainer
    trainer = trainer_class(
        model=model,
        processor=processor,
        arguments=arguments,
        settings=settings,
        stream=stream,
        assets=assets,
        identity=identity,
        owner=owner,
        resumed=None if resumed is None else resumed.record,
        report=report,
        progress=progress,
    )
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.folder))
    made = owner.private / FINAL_FOLDER
    if arguments.process_index == 0:
        trainer.run_log.settle()
    with owner.while_owned():
        trainer.save_student(made)
    record = FinishedRun(
        identity=identity,
        settings=settings,
        num_samples=trainer.num_samples,
        seconds=trainer.run_log.seconds,
        num_lines=trainer.run_log.num_lines,
    )
    if arguments.process_index == 0:
        with owner.while_owned():
            complete(made, record)
            owner.publish(made, FINAL_FOLDER)
        owner.release()
        sync_folder(run)
    wait_for_everyone()
    return finished_run(run) or record


def _take(
    run: Path, identity: RunIdentity, arguments: TrainingArguments
) -> tuple[FolderOwner, Checkpoint | None]:
    """Make this attempt the folder's owner; rank 0 decides where all ranks go on."""
    found: list[Any] = [None, None]
    if arguments.process_index == 0:
        try:
            found = [FolderOwner.take(run).token, newest_checkpoint(run, identity)]
        except EmkdError as error:  # the other ranks wait for an answer
            found = [error, None]
    broadcast_object_list(found)
    token, resumed = found
    if isinstance(token, EmkdError):
        raise token
    owner = FolderOwner(run, token)
    if arguments.process_index == 0:
        prune_checkpoints(run, 0 if resumed is None else resumed.record.step)
    arguments.output_dir = str(owner.private)
    return owner, resumed


class _Prepared(NamedTuple):
    """What the checks and the training share."""

    assets: TeacherAssets
    model: PreTrainedModel
    processor: ProcessorMixin
    encoder: SampleEncoder


def _prepare(
    reader: CacheReader, load: LoadStudent, settings: TrainerSettings, chat_template: str | None
) -> _Prepared:
    """Load the student; ValueError for settings that do not fit it or the cache."""
    tier = tier_to_learn_from(reader.spec.records, settings.records)
    assets = _assets(reader, settings.objective, tier)
    require_served(settings.objective, reader.spec, assets, tier)
    _refuse_idle_gap(settings, reader)
    model, processor = load()
    set_trainable(model, settings.train_parts)
    if "language_model" not in settings.train_parts:
        _differentiate_text(model)
    _require_vocabulary(model, reader)
    if settings.progression is not None:
        require_progression(model, settings.progression, settings.num_steps(len(reader)))
    rules = reader.spec.text
    if chat_template is not None:
        rules = dataclasses.replace(rules, template=chat_template)
    encoder = SampleEncoder(
        processor, model.config, reader.spec.system_prompt, rules, reader.spec.pictures
    )
    return _Prepared(assets, model, processor, encoder)


def _assets(reader: CacheReader, objective: ObjectiveConfig, tier: TierName) -> TeacherAssets:
    parts = parts_needed(objective, tier)
    return TeacherAssets(
        head=reader.head() if "hidden" in parts else None,
        sketch=reader.sketch_basis() if "sketch" in parts else None,
        template=None if "hidden" in parts else reader.tail_template(),
    )


def _refuse_idle_gap(settings: TrainerSettings, reader: CacheReader) -> None:
    """Refuse a gap that no response record of the cache can follow."""
    progression, grid = settings.progression, reader.spec.grid
    if progression is None or progression.gap is None or not settings.objective.kd_from_cache:
        return
    found = f"gap is {progression.gap}, but would have no effect"
    if grid is None:
        raise ValueError(
            f"{found}: the cache's teacher dropped no vision tokens; omit it, or build the cache "
            "with --compressor and --ratios"
        )
    if progression.layer > grid.layer:  # only the preset fixed has a gap; it stays at this layer
        raise ValueError(
            f"{found}: the student drops at layer {progression.layer}, deeper than the cache's "
            f"teacher at layer {grid.layer}, whose grid cannot teach it; omit it, or drop at layer "
            f"{grid.layer} or before"
        )


def _differentiate_text(model: PreTrainedModel) -> None:
    """Require a gradient of text embeddings although none of their weights is trained.

    Otherwise the loss of a micro-batch without images depends on no trained weight, and `backward`
    fails. A sharded model also needs all ranks to run its backward pass together.
    """

    def require_gradient(_module: nn.Module, _inputs: object, embedded: Tensor) -> None:
        if torch.is_grad_enabled():
            embedded.requires_grad_()

    model.get_input_embeddings().register_forward_hook(require_gradient)


def _require_vocabulary(model: PreTrainedModel, reader: CacheReader) -> None:
    head = output_head(model).get_parameter("weight")
    found, expected = head.shape[0], reader.spec.vocab_size
    if found < expected:
        raise ValueError(
            f"the student's head has {found} rows, the cache's teacher {expected}; use a student "
            "with the vocabulary of the teacher"
        )
