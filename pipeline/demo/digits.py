"""Writes the demo's data: 48 x 48 images of 4 x 4 handwritten digits (UCI's, from scikit-learn).

`cells`: a prompt names eight cells ("Fill in bs? dq? ..."), the response gives their digits (" bs5
dq2 ..."). Digits straddle patches (8 pixels) and pooling windows (16), so that a student with
pooled vision tokens sees less than its teacher. `rows`: a prompt names one row before the image
("Read d\n<image>"), the response reads it (" q7 s2 v9 x1"). A cell is read in the first decoder
layer; a row must be looked up first, so the next layer needs vision tokens too.

The same settings give the same bytes; no digit image is in both splits. Written: train.json,
heldout.json (LLaVA JSON, with the 16 digits of each grid), images/*.png, and last digits.json.
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from pipeline.demo.config import DigitQuestions, DigitsConfig
from teacher_cache.schema.progress import Progress, no_progress

GRID_SIDE = 4
CELL_PIXELS = 12
IMAGE_PIXELS = GRID_SIDE * CELL_PIXELS
PATCH_PIXELS = 8
PATCHES_SIDE = IMAGE_PIXELS // PATCH_PIXELS
NUM_QUESTIONS = 8
NUM_TRAIN_DIGITS = 1350
ROW_LETTERS = "bdfg"
COLUMN_LETTERS = "qsvx"
CELL_NAMES = tuple(row + column for row in ROW_LETTERS for column in COLUMN_LETTERS)
"""Names of the 16 cells in raster order; each should be one token of the demo's tokenizer."""

PROMPT_PREFIX = "Fill in"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchLabels:
    """The cell at the centre of each 8 x 8 patch, in raster order."""

    digit: Int[np.ndarray, "n 36"]
    row: Int[np.ndarray, " 36"]
    column: Int[np.ndarray, " 36"]


def write_digits(config: DigitsConfig, progress: Progress = no_progress) -> Path:
    """Write both splits under `config.out` and return that folder.

    Repeats an interrupted run; leaves a finished one as it is. ValueError if the folder holds a set
    that was made with other settings.
    """
    from sklearn.datasets import load_digits  # an extra, needed by this function only

    settings = dataclasses.asdict(config)
    del settings["out"]
    settings_file = config.out / "digits.json"
    if settings_file.exists():
        # Earlier versions asked for cells and did not store that.
        stored = {"questions": "cells", **json.loads(settings_file.read_bytes())}
        if stored != settings:
            raise ValueError(
                f"{settings_file}: found digits made with {stored}, expected {settings}; "
                "choose another --out or remove the folder"
            )
        return config.out
    (config.out / "images").mkdir(parents=True, exist_ok=True)
    pixels, labels = load_digits(return_X_y=True)
    glyphs = np.stack([_enlarge(glyph) for glyph in pixels.reshape(-1, 8, 8)])
    order = np.random.default_rng(config.seed).permutation(len(glyphs))
    pools = {"train": order[:NUM_TRAIN_DIGITS], "heldout": order[NUM_TRAIN_DIGITS:]}
    counts = {"train": config.num_train, "heldout": config.num_heldout}
    done, total = 0, sum(counts.values())
    for number, (split, pool) in enumerate(pools.items()):
        rng = np.random.default_rng([config.seed, number])
        entries: list[dict[str, object]] = []
        for index in range(counts[split]):
            chosen = rng.choice(pool, size=GRID_SIDE**2, replace=False)
            asked = _asked(config.questions, rng)
            name = f"{split}-{index:05d}"
            _write(config.out / "images" / f"{name}.png", _png(_grid(glyphs[chosen])))
            entries.append(_entry(name, labels[chosen].tolist(), *asked))
            done += 1
            progress("digits", done, total)
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        _write(config.out / f"{split}.json", f"[\n{lines}\n]\n".encode())
    _write(settings_file, (json.dumps(settings) + "\n").encode())
    return config.out


def load_grids(path: Path) -> Int[np.ndarray, "n 16"]:
    """Read the true digits of every grid of a split (train.json or heldout.json), in order."""
    entries = json.loads(path.read_bytes())
    return np.array([entry["digits"] for entry in entries], dtype=np.int64).reshape(-1, 16)


def patch_labels(grids: Int[np.ndarray, "n 16"]) -> PatchLabels:
    """Name digit, row and column of the cell at the centre of each of the 36 patches.

    A centre on the border of two cells belongs to the later one.
    """
    centres = np.arange(PATCHES_SIDE) * PATCH_PIXELS + PATCH_PIXELS // 2
    row, column = np.divmod(np.arange(PATCHES_SIDE**2), PATCHES_SIDE)
    row, column = (centres // CELL_PIXELS)[row], (centres // CELL_PIXELS)[column]
    return PatchLabels(digit=grids[:, row * GRID_SIDE + column], row=row, column=column)


def _enlarge(glyph: np.ndarray) -> UInt8[np.ndarray, "12 12"]:
    grey = Image.fromarray(np.round(glyph * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.BILINEAR))


def _grid(glyphs: UInt8[np.ndarray, "16 12 12"]) -> UInt8[np.ndarray, "48 48"]:
    cells = glyphs.reshape(GRID_SIDE, GRID_SIDE, CELL_PIXELS, CELL_PIXELS)
    return cells.transpose(0, 2, 1, 3).reshape(IMAGE_PIXELS, IMAGE_PIXELS)


def _png(grey: UInt8[np.ndarray, "48 48"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _asked(questions: DigitQuestions, rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """The prompt, and the cells of its response by the names that they have there."""
    if questions == "rows":
        row = int(rng.integers(GRID_SIDE))
        names = {name: GRID_SIDE * row + column for column, name in enumerate(COLUMN_LETTERS)}
        return f"Read {ROW_LETTERS[row]}\n<image>", names
    cells: list[int] = rng.choice(GRID_SIDE**2, size=NUM_QUESTIONS, replace=False).tolist()
    question = " ".join(f"{CELL_NAMES[cell]}?" for cell in cells)
    return f"<image>\n{PROMPT_PREFIX} {question}", {CELL_NAMES[cell]: cell for cell in cells}


def _entry(
    name: str, digits: list[int], question: str, cells: Mapping[str, int]
) -> dict[str, object]:
    answer = "".join(f" {asked}{digits[cell]}" for asked, cell in cells.items())
    return {
        "id": name,
        "image": f"images/{name}.png",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "digits": digits,
    }


def _write(path: Path, data: bytes) -> None:
    """Publish by rename, so that the file is whole or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
