"""Stores the answers of one evaluation: one JSON line for each sample, appended as they come.

Whole lines survive a kill; a torn last line is dropped and its sample answered again. Refuses any
other line that is not a prediction.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.stages import ScoreName
from pipeline.student.scores import SCORES
from teacher_cache.schema.strict_json import StrictRecord, decode_json
from teacher_cache.storage.durable_files import write_atomic

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(StrictRecord):
    """A model's answer to one sample, and the assistant's turn it is scored against."""

    key: str
    source_id: str
    answer: str
    reference: str
    seconds: float
    """This sample's share of its batch's wall time."""
    num_vision: int | None = None
    """Vision tokens of the prompt; not in the lines of earlier versions."""
    num_kept: int | None = None
    """How many of them reached the last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionLines(StrictRecord):
    """All lines of a file, to decode them at once."""

    lines: tuple[Prediction, ...]


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file, which may end in a torn line; none without a file."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    # JSON escapes line breaks inside strings, so splitting at "\n" is exact.
    lines = whole.split("\n") if whole else []
    wrapped = f'{{"lines": [{",".join(lines)}]}}'
    return list(decode_json(PredictionLines, wrapped, str(path)).lines)


def drop_torn_line(path: Path) -> None:
    """Cut the file after its last whole line, before anything is appended."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        write_atomic(path, data[: data.rfind(b"\n") + 1])


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append lines and sync them to disk."""
    lines = "".join(json.dumps(dataclasses.asdict(p)) + "\n" for p in predictions)
    with path.open("ab") as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def score_predictions(predictions: Sequence[Prediction], name: ScoreName) -> list[float]:
    """The score of each prediction, in order."""
    return [SCORES[name](p.answer, [p.reference]) for p in predictions]
