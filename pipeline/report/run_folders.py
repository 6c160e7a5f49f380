"""Reads run folders for comparison: settings, loss terms, answers, pictures, cost.

Everything that a folder lacks is named in `missing`, with the command that makes it. Files tell
three kinds of folders apart: a trained student (emkd_run.json), a sealed cache (SEALED.json), any
other model (eval/metrics.json). Evaluations under compression are beside `eval`, in folders whose
names begin with `eval-`. Refuses malformed files.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.stages import CONFIG_FILE, ScoreName
from pipeline.student.predictions import (
    PREDICTIONS_FILE,
    Prediction,
    read_predictions,
    score_predictions,
)
from pipeline.student.scores import SCORES
from student_train.config.compression import CompressionSettings
from student_train.training.checkpoint import (
    FINAL_FOLDER,
    PREFLIGHT_FILE,
    RUN_FILE,
    FinishedRun,
    RunIdentity,
    finished_run,
    read_identity,
    require_intact,
)
from student_train.training.metrics_log import METRICS_LOG_FILE, read_log
from teacher_cache.folder.layout import SEAL_FILE, read_seal
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.strict_json import decode_mapping
from teacher_cache.storage.open_store import open_store

EVALUATION_FOLDER = "eval"
_METRICS_FILE = f"{EVALUATION_FOLDER}/metrics.json"
COMPRESSED_FOLDERS = "eval-*"
"""Evaluations of the same samples under compression; others are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The finished evaluation of one model: mean scores, and every sample's score by its key."""

    samples_digest: str
    num_samples: int
    seconds: float
    scores: dict[str, float]
    by_sample: dict[str, dict[str, float]]
    """Score name -> sample key -> score."""
    predictions: dict[str, Prediction]
    """By sample key."""
    pictures: dict[str, Any] | None
    compression: CompressionSettings | None = None
    """The compression inside the language model."""
    num_vision: float | None = None
    """Mean vision tokens of a sample; None if an earlier version answered some samples."""
    num_kept: float | None = None
    """Mean vision tokens that reached the last layer."""
    weights: str | None = None
    """Digest of the model's weights."""
    num_skipped: int = 0
    """Samples that could not be used and were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """One compared model: a student that was trained here, or any other model."""

    path: Path
    identity: RunIdentity | None
    """None for a model that `emkd train` did not make."""
    finished: FinishedRun | None
    metrics: tuple[dict[str, Any], ...]
    """Lines of metrics.jsonl: step, loss, term/<name>, gradient/<name>, ..."""
    evaluation: Evaluation | None
    compressed: tuple[Evaluation, ...] = ()
    """Evaluations of the same samples with vision tokens dropped; no settings twice."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """A sealed teacher cache that some of the runs were trained from."""

    location: str
    """Folder or URL."""
    seal: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Everything found, and everything missing."""

    runs: tuple[RunFolder, ...]
    caches: tuple[CacheFolder, ...]
    missing: tuple[str, ...]


def collect(folders: Iterable[Path]) -> Collection:
    """Read the folders; ValueError if none of them is a run."""
    folders = list(folders)
    runs: list[RunFolder] = []
    caches: dict[str, CacheFolder] = {}
    missing: list[str] = []
    for folder in folders:
        if (folder / SEAL_FILE).exists():
            _add_cache(caches, folder)
        elif any((folder / file).exists() for file in (RUN_FILE, _METRICS_FILE)):
            run = _read_run(folder, caches, missing)
            known = next((other for other in runs if _same(run, other)), None)
            if known is None:
                runs.append(run)
            else:
                missing.append(
                    f"{folder}: is left out; it repeats {known.path} (settings and seed) and would "
                    "count as one more seed"
                )
        else:
            missing.append(
                f"{folder}: is left out; found neither {RUN_FILE} nor {SEAL_FILE} nor "
                f"{_METRICS_FILE} in it"
            )
    if not runs:
        raise ValueError(
            f"found no run in {', '.join(map(str, folders)) or 'an empty list of folders'}; name "
            "folders that emkd train or emkd evaluate have written"
        )
    found = set(caches)
    wanted = {run.identity.cache for run in runs if run.identity is not None}
    missing += [
        f"cache {fingerprint[:12]}: its folder was not found, its cost is unknown; name the "
        "folder beside the runs"
        for fingerprint in sorted(wanted - found)
    ]
    return Collection(runs=tuple(runs), caches=tuple(caches.values()), missing=tuple(missing))


def _same(run: RunFolder, other: RunFolder) -> bool:
    """Whether both have one identity, seed included, or are one folder named twice."""
    if run.identity is None or other.identity is None:
        return run.path.resolve() == other.path.resolve()
    return run.identity == other.identity


def _add_cache(caches: dict[str, CacheFolder], location: str | Path) -> None:
    seal = read_seal(open_store(location))
    if seal is not None:
        caches.setdefault(seal.fingerprint, CacheFolder(location=str(location), seal=seal))


def _read_run(folder: Path, caches: dict[str, CacheFolder], missing: list[str]) -> RunFolder:
    identity = finished = None
    metrics: tuple[dict[str, Any], ...] = ()
    path = folder / RUN_FILE
    if path.exists():
        identity = read_identity(folder)
        finished = finished_run(folder)
        if identity.skipped is not None:
            missing.append(
                f"{folder}: was trained without {identity.skipped.num_samples} samples of its "
                f"cache, which do not fit the student; {PREFLIGHT_FILE} lists them"
            )
        if finished is not None:
            require_intact(folder / FINAL_FOLDER)
        else:
            missing.append(
                f"{folder}: final/ is missing, training has not ended; run emkd train again"
            )
        metrics = _read_metrics(folder, finished, missing)
        _find_cache(folder, caches, missing)
    # A vanilla student pairs each token with itself: no matching to draw.
    draws = identity is not None and identity.recipe.progression is None
    evaluation = _read_evaluation(folder, draws, missing)
    return RunFolder(
        path=folder,
        identity=identity,
        finished=finished,
        metrics=metrics,
        evaluation=evaluation,
        compressed=_read_compressed(folder, evaluation, missing),
    )


def _read_metrics(
    folder: Path, finished: FinishedRun | None, missing: list[str]
) -> tuple[dict[str, Any], ...]:
    if not (folder / METRICS_LOG_FILE).exists():
        missing.append(f"{folder}: {METRICS_LOG_FILE} is missing, no loss curves")
        return ()
    lines, damaged = read_log(folder)
    expected = None if finished is None else finished.num_lines
    if damaged or (expected is not None and expected != len(lines)):
        missing.append(
            f"{folder}: {METRICS_LOG_FILE} has {len(lines)} whole lines of "
            f"{len(lines) + damaged if expected is None else expected}; its curves have gaps"
        )
    if not any(name.startswith("gradient/") for line in lines for name in line):
        missing.append(f"{folder}: no gradient norms were measured; train with grad_norm_steps > 0")
    return tuple(lines)


def _find_cache(folder: Path, caches: dict[str, CacheFolder], missing: list[str]) -> None:
    """Add the cache that the run's settings name, if it can still be read there."""
    path = folder / CONFIG_FILE
    if path.exists():
        location = str(json.loads(path.read_text())["cache"])
        try:
            _add_cache(caches, location)
        except OSError as error:
            missing.append(f"{folder}: its cache cannot be read: {error}")


def _read_evaluation(folder: Path, draws: bool, missing: list[str]) -> Evaluation | None:
    place = folder / EVALUATION_FOLDER
    if not (place / "metrics.json").exists():
        missing.append(
            f"{folder}: {_METRICS_FILE} is missing; emkd evaluate --model {folder}/final --out "
            f"{place} writes it"
        )
        return None
    evaluation = read_evaluation(place)
    if evaluation.num_skipped:
        missing.append(
            f"{folder}: its evaluation skipped {evaluation.num_skipped} samples; its scores are "
            f"means over the {evaluation.num_samples} that it answered"
        )
    if draws and evaluation.pictures is None:
        missing.append(
            f"{folder}: {EVALUATION_FOLDER}/pictures.json is missing; emkd evaluate --cache, with "
            "a cache of the evaluated samples, draws the matching"
        )
    return evaluation


def _read_compressed(
    folder: Path, plain: Evaluation | None, missing: list[str]
) -> tuple[Evaluation, ...]:
    """The evaluations under compression, each setting once."""
    found: list[Evaluation] = []
    for place in sorted(folder.glob(COMPRESSED_FOLDERS)):
        if not (place / "metrics.json").exists():
            missing.append(f"{place}: metrics.json is missing, the evaluation has not ended")
            continue
        evaluation = read_evaluation(place)
        if evaluation.compression is None:
            continue
        if plain is not None and plain.samples_digest != evaluation.samples_digest:
            missing.append(f"{place}: is left out; its samples are not those of {folder}/eval")
        elif plain is not None and plain.weights != evaluation.weights:
            missing.append(f"{place}: is left out; its model is not that of {folder}/eval")
        elif any(evaluation.compression == other.compression for other in found):
            missing.append(f"{place}: is left out; another folder of the run has its settings")
        else:
            found.append(evaluation)
    return tuple(sorted(found, key=lambda evaluation: repr(evaluation.compression)))


def read_evaluation(place: Path) -> Evaluation:
    """What an evaluation found; ValueError where its files do not agree."""
    metrics = _read_checked(place / "metrics.json")
    predictions = read_predictions(place / PREDICTIONS_FILE)
    if len(predictions) != metrics["num_samples"]:
        raise ValueError(
            f"{place}: {PREDICTIONS_FILE} holds {len(predictions)} answers, metrics.json counts "
            f"{metrics['num_samples']}; remove the folder and evaluate again"
        )
    names: list[ScoreName] = [name for name in SCORES if name in metrics["scores"]]
    known = [prediction for prediction in predictions if prediction.answer_key]
    by_sample = {
        name: dict(zip((p.key for p in known), score_predictions(known, name), strict=True))
        for name in names
    }
    pictures = place / "pictures.json"
    # The metrics of earlier versions hold neither.
    settings, tokens = metrics.get("compression"), metrics.get("vision_tokens") or {}
    return Evaluation(
        samples_digest=metrics["samples_digest"],
        num_samples=metrics["num_samples"],
        seconds=metrics["seconds"],
        # Not those of the file: the rule of a score may have changed since.
        scores={name: math.fsum(each.values()) / len(each) for name, each in by_sample.items()},
        by_sample=by_sample,
        predictions={prediction.key: prediction for prediction in predictions},
        pictures=_read_checked(pictures) if pictures.exists() else None,
        compression=settings and decode_mapping(CompressionSettings, settings, str(place)),
        num_vision=tokens.get("before"),
        num_kept=tokens.get("kept"),
        weights=metrics.get("weights"),
        num_skipped=metrics.get("num_skipped", 0),
    )


def _read_checked(path: Path) -> dict[str, Any]:
    try:
        return from_checked_json(path.read_bytes(), str(path))
    except DecodeError as error:
        raise DecodeError(f"{error}; run emkd evaluate again, which writes it anew") from None
