"""What a training run leaves in its folder, and how it is found again after a kill.

    emkd_run.json       run identity, created exclusively after the first step
    checkpoint-<step>/  transformers' own files; emkd_checkpoint.json, written last, makes it count
    metrics.jsonl       see run_log.py
    final/              model and processor, with emkd_run.json inside; renamed into place whole

Promise: a half-written checkpoint is never resumed from, and a run folder never mixes two runs:
another cache, student, recipe or length is refused with the names of the fields that differ.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from student_train.config.recipe import TrainerSettings, TrainRecipe
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
FINAL_FOLDER = "final"
NUM_KEPT = 2
"""Complete checkpoints that are kept: a spare one, should the newest prove unreadable."""

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity(StrictRecord):
    """Everything that decides the final weights; two attempts of one run agree in every field."""

    cache: str
    """Fingerprint of the cache."""
    teacher: str
    """Digest of the weights of the teacher that filled the cache."""
    student: str
    """What the student began as: a digest of its weights."""
    num_steps: int
    recipe: TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord(StrictRecord):
    """Makes a checkpoint count: whose it is, how far it came, and the open logging window.

    `window` holds the sum and the count of every value since the last logged line, so that a
    resumed run logs what an undisturbed one would.
    """

    identity: RunIdentity
    step: int
    stream: StreamState
    seconds: float
    window: dict[str, tuple[float, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun(StrictRecord):
    """Stored in `final/`: what was trained, with which settings, and what it took."""

    identity: RunIdentity
    settings: TrainerSettings
    num_samples: int
    """Samples seen, repetitions counted."""
    seconds: float
    """Wall time of all attempts, work that was lost to a kill included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: its folder and its record."""

    folder: Path
    record: CheckpointRecord


def require_same_run(run: Path, identity: RunIdentity) -> None:
    """Refuse a folder in which another run lives (CacheMismatchError); an empty one is fine."""
    path = run / RUN_FILE
    if path.exists():
        stored = decode_json(RunIdentity, path.read_bytes(), str(path))
        remedy = "Nothing was changed. Go on with the settings of that run, or give another --out"
        require_equal(stored, identity, f"The run in {run}", remedy)


def claim_run(run: Path, identity: RunIdentity) -> None:
    """Make `run` the folder of this run; CacheMismatchError where another run was faster."""
    if not create_exclusive(run / RUN_FILE, _to_json(identity)):
        require_same_run(run, identity)


def finished_run(run: Path) -> FinishedRun | None:
    """The record in `final/`, or None while the run has not ended."""
    path = run / FINAL_FOLDER / RUN_FILE
    return decode_json(FinishedRun, path.read_bytes(), str(path)) if path.exists() else None


def publish_final(run: Path, partial: Path, record: FinishedRun) -> None:
    """Complete the folder `partial` with its record and rename it to `final/`."""
    _sync_files(partial)
    write_atomic(partial / RUN_FILE, _to_json(record))
    os.replace(partial, run / FINAL_FOLDER)
    sync_folder(run)


def mark_complete(checkpoint: Path, record: CheckpointRecord) -> None:
    """Write the file that makes a checkpoint count, after all its other files."""
    _sync_files(checkpoint)
    write_atomic(checkpoint / CHECKPOINT_FILE, _to_json(record))


def newest_checkpoint(run: Path, identity: RunIdentity) -> Checkpoint | None:
    """The complete checkpoint with the most steps, or None; refuses one of another run."""
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
            # the marker goes first: a removal that is killed half-way leaves no seeming checkpoint
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
