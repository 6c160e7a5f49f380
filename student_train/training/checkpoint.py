"""Reads and writes a training run's folder: identity, checkpoints, final model.

    emkd_run.json       run identity, created exclusively after the first step
    owner.json          the process that writes here (teacher_cache/storage/folder_owner.py)
    checkpoint-<step>/  transformers' own files and emkd_checkpoint.json, which lists them
    preflight.json      which samples do not fit the student, see preflight.py
    metrics.jsonl       see metrics_log.py
    final/              model, processor and emkd_run.json, which lists them

Folders are made under a private name and appear complete, by rename. Records hold size and SHA-256
of every file beside them, and these are compared before the files are used: a run goes on from the
newest checkpoint that is intact. No folder holds two runs: another cache, student, recipe or length
is refused with the fields that differ.
"""

import dataclasses
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from student_train.config.recipe import TrainerSettings, TrainRecipe
from student_train.data.sample_order import SkippedSamples
from student_train.data.stream import StreamState
from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.manifest import require_equal
from teacher_cache.schema.strict_json import StrictRecord, decode_mapping
from teacher_cache.storage.durable_files import (
    create_exclusive,
    sha256_file,
    sync_file,
    write_atomic,
)

logger = logging.getLogger(__name__)

RUN_FILE = "emkd_run.json"
CHECKPOINT_FILE = "emkd_checkpoint.json"
PREFLIGHT_FILE = "preflight.json"
FINAL_FOLDER = "final"
NUM_KEPT = 2
"""Complete checkpoints to keep: one spare, in case the newest is unreadable."""

_Record = TypeVar("_Record")
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
class FileDigest(StrictRecord):
    """What a file must hold."""

    num_bytes: int
    sha256: str


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
    num_lines: int | None = None
    """Lines of metrics.jsonl up to this step; None in checkpoints of earlier versions."""
    files: dict[str, FileDigest] | None = None
    """Every other file of the folder; None in checkpoints of earlier versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun(StrictRecord):
    """Stored in `final/`: what was trained, its settings, and its cost."""

    identity: RunIdentity
    settings: TrainerSettings
    num_samples: int
    """Samples seen, repetitions counted."""
    seconds: float
    """Wall time of all attempts, including work lost to kills."""
    num_lines: int | None = None
    """Lines of metrics.jsonl; None in runs of earlier versions."""
    files: dict[str, FileDigest] | None = None
    """Every other file of `final/`; None in runs of earlier versions."""


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder and its record."""

    folder: Path
    record: CheckpointRecord


def require_same_run(run: Path, identity: RunIdentity) -> None:
    """Raise CacheMismatchError where the folder holds another run; an empty folder is accepted."""
    path = run / RUN_FILE
    if path.exists():
        remedy = "Nothing was changed. Continue with that run's settings, or give another --out"
        require_equal(read_identity(run), identity, f"The run in {run}", remedy)


def read_identity(run: Path) -> RunIdentity:
    """The identity of the run in a folder; DecodeError where its record is damaged."""
    return _read(RunIdentity, run / RUN_FILE)


def claim_run(run: Path, identity: RunIdentity) -> None:
    """Make `run` the folder of this run; CacheMismatchError where another run came first."""
    if not create_exclusive(run / RUN_FILE, _to_json(identity)):
        require_same_run(run, identity)


def finished_run(run: Path) -> FinishedRun | None:
    """Return the record in `final/`, or None while the run has not finished."""
    path = run / FINAL_FOLDER / RUN_FILE
    return _read(FinishedRun, path) if path.exists() else None


def require_intact(student: Path) -> None:
    """Raise DecodeError, which names the file, where a trained student's folder is damaged.

    Other folders, and those of earlier versions, whose records list no files, are accepted.
    """
    path = student / RUN_FILE
    record = _read(FinishedRun, path) if path.exists() else None
    if record is not None and record.files is not None:
        damage = _damage(student, record.files)
        if damage is not None:
            raise DecodeError(
                f"{student}: {damage}; restore the file, or remove {student} and run emkd train "
                "again, which ends from the run's last checkpoint"
            )


def complete(folder: Path, record: CheckpointRecord | FinishedRun) -> None:
    """Write the record that lists a private folder's files; all are on the disk afterwards."""
    name = CHECKPOINT_FILE if isinstance(record, CheckpointRecord) else RUN_FILE
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    digests = {
        file: FileDigest(num_bytes=path.stat().st_size, sha256=sha256_file(path))
        for file, path in files.items()
    }
    write_atomic(folder / name, _to_json(dataclasses.replace(record, files=digests)))
    for path in files.values():
        path.chmod((folder / name).stat().st_mode)  # safetensors makes files that only we may read
        sync_file(path)


def newest_checkpoint(run: Path, identity: RunIdentity) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None where the run has none.

    A damaged one is named in a warning, and the spare is taken. DecodeError where all are damaged;
    CacheMismatchError for one of another run.
    """
    damaged: list[str] = []
    for _, folder in reversed(_checkpoints(run)):
        marker = folder / CHECKPOINT_FILE
        if not marker.exists():
            continue
        try:
            record = _read(CheckpointRecord, marker)
        except DecodeError as error:
            damaged.append(str(error))
            continue
        remedy = "Remove that checkpoint, or give another --out"
        require_equal(record.identity, identity, f"The run that wrote {folder}", remedy)
        damage = None if record.files is None else _damage(folder, record.files)
        if damage is None:
            if damaged:
                logger.warning("%s; going on from %s", "; ".join(damaged), folder.name)
            return Checkpoint(folder=folder, record=record)
        damaged.append(f"{folder}: {damage}")
    if damaged:
        raise DecodeError(
            f"{run}: no checkpoint is intact: {'; '.join(damaged)}. Restore a file, or remove the "
            "checkpoints to train from the first step"
        )
    return None


def prune_checkpoints(run: Path, newest: int) -> None:
    """Remove checkpoints that are incomplete or of steps after `newest`, and all but `NUM_KEPT`."""
    complete_ones = [
        path
        for step, path in _checkpoints(run)
        if (path / CHECKPOINT_FILE).exists() and step <= newest
    ]
    for _, path in _checkpoints(run):
        if path not in complete_ones[-NUM_KEPT:]:
            # Remove the marker first: a removal that is killed half-way leaves no valid checkpoint.
            (path / CHECKPOINT_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)
            logger.info("Removed %s", path)


def _damage(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """What is wrong with the listed files; None where all are as listed."""
    for name, stated in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != stated.num_bytes:
            return f"{name} has {found} bytes, expected {stated.num_bytes}"
        if sha256_file(path) != stated.sha256:
            return f"{name} is damaged: its bytes do not have the digest that was stored"
    return None


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    found = [(_CHECKPOINT_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _read(cls: type[_Record], path: Path) -> _Record:
    return decode_mapping(cls, from_checked_json(path.read_bytes(), str(path)), str(path))


def _to_json(record: RunIdentity | CheckpointRecord | FinishedRun) -> bytes:
    return (to_checked_json(dataclasses.asdict(record), indent=1) + "\n").encode()
