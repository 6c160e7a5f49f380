"""Every damage to an evaluation's folder is named or mended, and two processes make one table."""

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.stages import EvaluateConfig
from pipeline.report.run_folders import read_evaluation
from pipeline.student.predictions import append_predictions, read_predictions
from teacher_cache.schema.errors import EmkdError, FolderTakenError
from teacher_cache.storage.folder_owner import FolderOwner
from tests.support.lazy import evaluate
from tests.support.llava_json import evaluation

APPEND = "pipeline.student.evaluate.append_predictions"

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def done(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    config = evaluation(tiny_folder("llava"), tmp_path_factory.mktemp("evaluated"), batch_size=2)
    evaluate(config)
    return config


def _table(place: Path) -> tuple[dict[str, float], list[tuple[str, str]]]:
    found = read_evaluation(place)
    return found.scores, sorted((key, each.answer) for key, each in found.predictions.items())


def _damages(data: bytes, draws: random.Random) -> Iterator[bytes | None]:
    for _ in range(12):
        flipped = bytearray(data)
        flipped[draws.randrange(len(data) - 1)] ^= 1 << draws.randrange(8)
        yield bytes(flipped)
    for _ in range(4):
        yield data[: draws.randrange(len(data) - 1)]
    lines = data.split(b"\n")
    yield b"\n".join([lines[0], *lines])
    yield b"\n".join(lines[1:])
    yield b""
    yield None


def test_every_damage_is_refused_by_the_report_or_changes_nothing(
    done: EvaluateConfig, tmp_path: Path
) -> None:
    draws, wanted, num_damages = random.Random(4), _table(done.out), 0
    for name in ("predictions.jsonl", "metrics.json"):
        for data in _damages((done.out / name).read_bytes(), draws):
            place = tmp_path / f"set{num_damages}"
            shutil.copytree(done.out, place)
            (place / name).unlink() if data is None else (place / name).write_bytes(data)
            num_damages += 1
            try:
                found = _table(place)
            except (EmkdError, ValueError, FileNotFoundError) as error:
                assert name in str(error)  # noqa: PT017
            else:
                assert found == wanted, data
    assert num_damages >= 40


def test_evaluating_again_mends_answers_and_names_what_it_dropped(
    done: EvaluateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = _table(done.out)
    place = tmp_path / "set"
    shutil.copytree(done.out, place)
    path = place / "predictions.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    stranger = read_predictions(done.out / "predictions.jsonl")[0]
    path.write_text(others[0] + "".join(others) + first.replace("answer", "answes"))
    append_predictions(path, [_renamed(stranger, "0" * 64)])
    with path.open("a") as file:
        file.write('{"key": "torn')
    (place / "metrics.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        evaluate(_at(done, place))
    assert _table(place) == wanted
    said = " ".join(caplog.messages)
    for what in ("is damaged", "again", "which the source does not have"):
        assert what in said
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(wanted[1])


def test_a_damaged_identity_is_refused(done: EvaluateConfig, tmp_path: Path) -> None:
    place = tmp_path / "set"
    shutil.copytree(done.out, place)
    text = (place / "evaluation.json").read_text()
    (place / "evaluation.json").write_text(
        text.replace('"max_new_tokens": 6', '"max_new_tokens": 7')
    )
    with pytest.raises(EmkdError, match=r"evaluation.json is damaged"):
        evaluate(_at(done, place))


def test_an_overtaken_evaluation_stops_and_every_sample_is_answered_once(
    done: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process takes the folder at each moment of the first, which writes one more line."""
    wanted, append = _table(done.out), append_predictions
    for moment in range(3):
        place = tmp_path / f"set{moment}"
        config, calls = _at(done, place), iter(range(100))

        def overtaken(path: Path, predictions: Any, moment: int = moment) -> None:
            append(path, predictions)
            if next(calls) == moment:  # noqa: B023
                monkeypatch.setattr(APPEND, append)
                evaluate(config)  # noqa: B023
                append(path, predictions)  # between its check and the other's start

        monkeypatch.setattr(APPEND, overtaken)
        with pytest.raises(FolderTakenError, match="writes to this folder since"):
            evaluate(config)
        monkeypatch.setattr(APPEND, append)
        evaluate(config)
        assert _table(place) == wanted
        keys = [prediction.key for prediction in read_predictions(place / "predictions.jsonl")]
        assert len(keys) == len(set(keys)) == len(wanted[1])


def test_a_folder_that_was_taken_meanwhile_is_left_alone(
    done: EvaluateConfig, tmp_path: Path
) -> None:
    config = _at(done, tmp_path / "set")

    def take(_what: str, _done: int, _total: int) -> None:
        FolderOwner.take(config.out)

    with pytest.raises(FolderTakenError, match="stop it and run this command again"):
        evaluate(config, take)
    assert not (config.out / "metrics.json").exists()
    evaluate(config)
    assert _table(config.out) == _table(done.out)


def _at(config: EvaluateConfig, place: Path) -> EvaluateConfig:
    return replace(config, out=place)


def _renamed(prediction: Any, key: str) -> Any:
    return replace(prediction, key=key)
