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
from pipeline.student.scores import SCORES, choice_accuracy
from teacher_cache.schema.strict_json import StrictRecord, decode_json
from teacher_cache.storage.durable_files import write_atomic

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(StrictRecord):
    """A model's answer to one sample, and what it is scored against."""

    key: str
    source_id: str
    answer: str
    reference: str | None
    """The assistant's turn; None for a question without an answer."""
    seconds: float
    """This sample's share of its batch's wall time."""
    num_vision: int | None = None
    """Vision tokens of the prompt; not in the lines of earlier versions."""
    num_kept: int | None = None
    """How many of them reached the last layer."""
    references: tuple[str, ...] = ()
    """Right answers that the source lists apart; they replace the turn."""
    choices: tuple[str, ...] = ()
    category: str | None = None

    @property
    def answer_key(self) -> tuple[str, ...]:
        """All that counts as right; empty where nothing is known."""
        return self.references or (() if self.reference is None else (self.reference,))


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
    """The score of each prediction, in order; ValueError names a sample that cannot be scored."""

    def score(prediction: Prediction) -> float:
        answer, key = prediction.answer, prediction.answer_key
        try:
            if name == "choice_accuracy":
                return choice_accuracy(answer, key, prediction.choices)
            return SCORES[name](answer, key)
        except ValueError as error:
            raise ValueError(f"sample {prediction.source_id}: {error}") from error

    return [score(prediction) for prediction in predictions]
