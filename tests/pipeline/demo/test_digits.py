"""Promises of pipeline/demo/digits.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.demo.config import DigitsConfig
from tests.support.lazy import digits as digits_demo
from tests.support.lazy import load_digits, load_grids, patch_labels, write_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    return write_digits(DigitsConfig(out=out, num_train=40, num_heldout=20, seed=3))


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _cells(folder: Path, split: str) -> set[bytes]:
    found: set[bytes] = set()
    for entry in json.loads((folder / f"{split}.json").read_text()):
        grid = np.asarray(Image.open(folder / entry["image"]))[:, :, 0]
        for row in range(4):
            for column in range(4):
                cell = grid[12 * row : 12 * row + 12, 12 * column : 12 * column + 12]
                found.add(cell.tobytes())
    return found


def test_held_out_handwriting_never_appears_in_training(folder: Path) -> None:
    train, heldout = _cells(folder, "train"), _cells(folder, "heldout")
    assert len(train) > 300
    assert not train & heldout


def test_same_settings_give_the_same_bytes_in_any_folder(folder: Path, tmp_path: Path) -> None:
    write_digits(DigitsConfig(out=tmp_path, num_train=40, num_heldout=20, seed=3))
    assert _files(folder) == _files(tmp_path)


def test_an_interrupted_run_is_completed_by_running_it_again(folder: Path, tmp_path: Path) -> None:
    config = DigitsConfig(out=tmp_path, num_train=40, num_heldout=20, seed=3)

    def stop(_what: str, done: int, total: int) -> None:
        assert total == 60
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digits(config, stop)
    assert not (tmp_path / "digits.json").exists()
    write_digits(config)
    assert _files(folder) == _files(tmp_path)


def test_a_folder_with_other_settings_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4"):
        write_digits(DigitsConfig(out=folder, num_train=40, num_heldout=20, seed=4))


def test_the_answer_names_the_digits_that_the_picture_shows(folder: Path) -> None:
    entries = json.loads((folder / "train.json").read_text())
    grids = load_grids(folder / "train.json")
    assert grids.shape == (40, 16)
    for entry, digits in zip(entries, grids, strict=True):
        question, answer = (turn["value"] for turn in entry["conversations"])
        assert question.startswith("<image>\nFill in ")
        asked = question.removeprefix("<image>\nFill in ").split()
        assert len(set(asked)) == 8
        expected = [f"{name[:2]}{digits[digits_demo.CELL_NAMES.index(name[:2])]}" for name in asked]
        assert answer == "".join(f" {word}" for word in expected)


def test_the_written_digits_are_the_ones_drawn(folder: Path) -> None:
    pixels, labels = load_digits(return_X_y=True)
    known: dict[bytes, int] = {}
    for glyph, label in zip(pixels.reshape(-1, 8, 8), labels, strict=True):
        grey = Image.fromarray(np.round(glyph * (255 / 16)).astype(np.uint8))
        large = grey.resize((12, 12), Image.Resampling.BILINEAR)
        known[np.asarray(large).tobytes()] = int(label)
    first = json.loads((folder / "heldout.json").read_text())[0]
    grid = np.asarray(Image.open(folder / first["image"]))[:, :, 0]
    cells = [grid[12 * (i // 4) :, 12 * (i % 4) :][:12, :12] for i in range(16)]
    assert [known[cell.tobytes()] for cell in cells] == first["digits"]


def test_patch_labels_name_the_cell_at_the_patch_centre() -> None:
    grids = np.arange(32).reshape(2, 16)
    labels = patch_labels(grids)
    assert labels.row.reshape(6, 6)[:, 0].tolist() == [0, 1, 1, 2, 3, 3]
    assert labels.column.reshape(6, 6)[0].tolist() == [0, 1, 1, 2, 3, 3]
    assert labels.digit[0].tolist() == [
        4 * r + c for r, c in zip(labels.row, labels.column, strict=True)
    ]
    assert (labels.digit[1] == labels.digit[0] + 16).all()


def test_rows_are_named_before_the_image_and_read_cell_by_cell(
    folder: Path, tmp_path: Path
) -> None:
    write_digits(DigitsConfig(out=tmp_path, questions="rows", num_train=40, num_heldout=20, seed=3))
    entries = json.loads((tmp_path / "train.json").read_text())
    rows: set[int] = set()
    for entry, digits in zip(entries, load_grids(tmp_path / "train.json"), strict=True):
        question, answer = (turn["value"] for turn in entry["conversations"])
        row = "bdfg".index(question.removeprefix("Read ").removesuffix("\n<image>"))
        read = digits.reshape(4, 4)[row]
        assert answer == "".join(
            f" {name}{digit}" for name, digit in zip("qsvx", read, strict=True)
        )
        rows.add(row)
    assert rows == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="found digits made with"):
        write_digits(DigitsConfig(out=folder, questions="rows", num_train=40, seed=3))


def test_settings_of_earlier_versions_asked_for_cells(tmp_path: Path) -> None:
    config = DigitsConfig(out=tmp_path, num_train=2, num_heldout=1)
    write_digits(config)
    settings = json.loads((tmp_path / "digits.json").read_text())
    assert settings.pop("questions") == "cells"
    (tmp_path / "digits.json").write_text(json.dumps(settings))
    before = _files(tmp_path)
    write_digits(config)
    assert _files(tmp_path) == before


@pytest.mark.parametrize("change", [{"num_train": 0}, {"num_heldout": 0}, {"seed": -1}])
def test_sets_without_pictures_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be >= "):
        DigitsConfig(**{"out": tmp_path, **change})  # pyright: ignore[reportArgumentType]
