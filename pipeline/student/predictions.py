"""The answers of one evaluation, one JSON line for each sample, appended as they come.

Promises: whole lines survive a kill, the torn last one is dropped and its sample answered again;
no sample is answered twice. Refuses a line in the middle that is not a prediction.
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
    """What a model answered to one sample, and the assistant's turn it is scored against."""

    key: str
    source_id: str
    answer: str
    reference: str
    seconds: float
    """This sample's share of its batch's wall time."""
    num_vision: int | None = None
    """Vision tokens of the prompt; not in the lines of earlier versions."""
    num_kept: int | None = None
    """Those of them that reached the last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionLines(StrictRecord):
    """All lines of a file, decoded together."""

    lines: tuple[Prediction, ...]


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file that may end in a torn line; none where there is no file."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    # JSON escapes every line break inside a string: splitting at "\n" alone is exact.
    lines = whole.split("\n") if whole else []
    wrapped = f'{{"lines": [{",".join(lines)}]}}'
    return list(decode_json(PredictionLines, wrapped, str(path)).lines)


def drop_torn_line(path: Path) -> None:
    """Cut the file behind its last whole line, before anything is appended."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        write_atomic(path, data[: data.rfind(b"\n") + 1])


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Add lines at the end, down to the disk."""
    lines = "".join(json.dumps(dataclasses.asdict(p)) + "\n" for p in predictions)
    with path.open("ab") as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def score_predictions(predictions: Sequence[Prediction], name: ScoreName) -> list[float]:
    """The score of each prediction, in order."""
    return [SCORES[name](p.answer, [p.reference]) for p in predictions]
