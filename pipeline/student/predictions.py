"""Stores the answers of one evaluation: one JSON line for each sample, appended as they come.

A line holds a digest of itself (schema/checked_json.py). Whole lines survive a kill. A torn last
line, a damaged line and a second answer to one sample are dropped when an evaluation goes on, and
the samples are answered again; whoever only reads is refused instead.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.config.stages import ScoreName
from pipeline.student.scores import SCORES, choice_accuracy
from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.strict_json import StrictRecord, decode_mapping
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


class FoundPredictions(NamedTuple):
    """The usable lines of a file, and what is wrong with the others."""

    predictions: list[Prediction]
    problems: list[str]


def find_predictions(path: Path) -> FoundPredictions:
    """Read a file, which may end in a torn line; nothing without a file."""
    data = path.read_bytes() if path.exists() else b""
    found: dict[str, Prediction] = {}
    problems: list[str] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        where = f"line {number} of {path}"
        try:
            prediction = decode_mapping(Prediction, from_checked_json(line, where), where)
        except DecodeError as error:
            problems.append(str(error))
            continue
        if found.setdefault(prediction.key, prediction) is not prediction:
            problems.append(f"{where} answers sample {prediction.source_id} again")
    return FoundPredictions(list(found.values()), problems)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file; DecodeError for a damaged line or a sample answered twice."""
    predictions, problems = find_predictions(path)
    if problems:
        raise DecodeError(f"{problems[0]}; run emkd evaluate again, which answers it anew")
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write all lines anew, whole or not at all."""
    write_atomic(path, "".join(map(_line, predictions)).encode())


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append lines and sync them to disk."""
    with path.open("ab") as file:
        file.write("".join(map(_line, predictions)).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(prediction: Prediction) -> str:
    return to_checked_json(dataclasses.asdict(prediction)) + "\n"


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
