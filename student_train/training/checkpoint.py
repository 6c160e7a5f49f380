"""Reads and writes a training run's folder: identity, checkpoints, final model.

    emkd_run.json       run identity, created exclusively after the first step
    checkpoint-<step>/  transformers' own files; emkd_checkpoint.json, written last, completes it
    preflight.json      which samples do not fit the student, see preflight.py
    metrics.jsonl       see metrics_log.py
    final/              model, processor and emkd_run.json; complete, by rename

No run resumes from a half-written checkpoint, and no folder holds two runs: another cache, student,
recipe or length is refused with the fields that differ.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from student_train.config.recipe import TrainerSettings, TrainRecipe
from student_train.data.sample_order import SkippedSamples
from student_train.data.stream import StreamState
from teacher_cache.schema.manifest import require_equal
from teacher_cache.schema.strict_json import StrictRecord, decode_json
from teacher_cache.storage.durable_files import (
    create_exclusive,
    sync_file,
    sync_folder,
    write_atomic,
)

logger = logging.getLogger(__name__)

RUN_FILE = "emkd_run.json"
CHECKPOINT_FILE = "emkd_checkpoint.json"
PREFLIGHT_FILE = "preflight.json"
FINAL_FOLDER = "final"
NUM_KEPT = 2
"""Complete checkpoints to keep: one spare, in case the newest is unreadable."""

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity(StrictRecord):
    """Everything that decides the final weights; equal for all attempts of one run."""

    cache: str
    """Fingerprint of the cache."""
    teacher: str
    """Digest of the weights of the cache's teacher."""
    student: str
    """Digest of the student's initial weights."""
    num_steps: int
    recipe: TrainRecipe
    loss_means: Literal["micro_batch", "step"] = "micro_batch"
    """What a term is a mean over. Runs begun before this field existed took the mean of the means
    of their micro-batches."""
    skipped: SkippedSamples | None = None
    """Samples that do not fit the student and were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord(StrictRecord):
    """Completes a checkpoint: its run, its step, and the open logging window.

    `window` holds sum and count of every value since the last logged line, so that a resumed run
    logs what an uninterrupted one would.
    """

    identity: RunIdentity
    step: int
    stream: StreamState
    seconds: float
    window: dict[str, tuple[float, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun(StrictRecord):
    """Stored in `final/`: what was trained, its settings, and its cost."""

    identity: RunIdentity
    settings: TrainerSettings
    num_samples: int
    """Samples seen, repetitions counted."""
    seconds: float
    """Wall time of all attempts, including work lost to kills."""


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder and its record."""

    folder: Path
    record: CheckpointRecord


def require_same_run(run: Path, identity: RunIdentity) -> None:
    """Raise CacheMismatchError where the folder holds another run; an empty folder is accepted."""
    path = run / RUN_FILE
    if path.exists():
        stored = decode_json(RunIdentity, path.read_bytes(), str(path))
        remedy = "Nothing was changed. Continue with that run's settings, or give another --out"
        require_equal(stored, identity, f"The run in {run}", remedy)


def claim_run(run: Path, identity: RunIdentity) -> None:
    """Make `run` the folder of this run; CacheMismatchError where another run came first."""
    if not create_exclusive(run / RUN_FILE, _to_json(identity)):
        require_same_run(run, identity)


def finished_run(run: Path) -> FinishedRun | None:
    """Return the record in `final/`, or None while the run has not finished."""
    path = run / FINAL_FOLDER / RUN_FILE
    return decode_json(FinishedRun, path.read_bytes(), str(path)) if path.exists() else None


def publish_final(run: Path, partial: Path, record: FinishedRun) -> None:
    """Complete the folder `partial` with its record and rename it to `final/`."""
    _sync_files(partial)
    write_atomic(partial / RUN_FILE, _to_json(record))
    os.replace(partial, run / FINAL_FOLDER)
    sync_folder(run)


def mark_complete(checkpoint: Path, record: CheckpointRecord) -> None:
    """Write the file that completes a checkpoint, after all its other files."""
    _sync_files(checkpoint)
    write_atomic(checkpoint / CHECKPOINT_FILE, _to_json(record))


def newest_checkpoint(run: Path, identity: RunIdentity) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None; refuses one of another run."""
    for _, folder in reversed(_checkpoints(run)):
        marker = folder / CHECKPOINT_FILE
        if marker.exists():
            record = decode_json(CheckpointRecord, marker.read_bytes(), str(marker))
            remedy = "Remove that checkpoint, or give another --out"
            require_equal(record.identity, identity, f"The run that wrote {folder}", remedy)
            return Checkpoint(folder=folder, record=record)
    return None


def prune_checkpoints(run: Path) -> None:
    """Remove incomplete checkpoints, and all complete ones but the newest `NUM_KEPT`."""
    complete = [path for _, path in _checkpoints(run) if (path / CHECKPOINT_FILE).exists()]
    for _, path in _checkpoints(run):
        if path not in complete[-NUM_KEPT:]:
            # Remove the marker first: a removal that is killed half-way leaves no valid checkpoint.
            (path / CHECKPOINT_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)
            logger.info("Removed %s", path)


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    found = [(_CHECKPOINT_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _to_json(record: RunIdentity | CheckpointRecord | FinishedRun) -> bytes:
    return (json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1) + "\n").encode()
