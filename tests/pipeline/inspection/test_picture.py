"""Promises of inspection/picture.py: each token has a cell, equal records equal pictures."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.lazy import draw_sample, token_values
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples


def _reader(folder: Path, model: Path, records: RecordKind) -> CacheReader:
    teacher = Teacher.load(str(model), device="cpu")
    settings = RecordSettings(records=records, top_k=8, hidden_dtype="float32")
    return build_cache(folder, teacher, tiny_samples(4), settings)


@pytest.mark.parametrize("records", ["topk", "hidden"])
def test_a_sample_becomes_a_picture(
    tmp_path: Path, tiny_folder: TinyFolder, records: RecordKind
) -> None:
    reader = _reader(tmp_path / "cache", tiny_folder("llava_next"), records)
    drawn = [draw_sample(reader, reader.keys[3], tmp_path / name / "p.png") for name in "ab"]
    with Image.open(drawn[0]) as picture:
        assert (picture.format, picture.height > 600) == ("PNG", True)  # two images, two rows
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 500
    assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_cells_are_tail_masses_or_entropies(tmp_path: Path, llava: Path) -> None:
    readers = {
        records: _reader(tmp_path / records, llava, records) for records in ("topk", "hidden")
    }
    top = readers["topk"].read(0, ("vision",)).output
    states = readers["hidden"].read(0, ("hidden",)).output
    what, masses = token_values(top, None)
    assert what == "mass outside the top-k"
    assert top.vision is not None
    assert states.hidden is not None
    head = readers["hidden"].head()
    what, entropies = token_values(states, head)
    assert what == "entropy in nats"
    assert masses.shape == entropies.shape == (16,)
    for row in range(16):
        probabilities = head.logits(states.hidden.vision[[row]])[0].double().softmax(0).tolist()
        kept = sum(probabilities[token] for token in top.vision.ids[row].tolist())
        assert float(masses[row]) == pytest.approx(1 - kept, abs=1e-5)
        entropy = -sum(p * math.log(p) for p in probabilities if p)
        assert float(entropies[row]) == pytest.approx(entropy, abs=1e-4)
    assert torch.isfinite(masses).all()


def test_samples_without_images_and_other_kinds_of_files_are_refused(
    tmp_path: Path, llava: Path
) -> None:
    reader = _reader(tmp_path, llava, "topk")
    with pytest.raises(ValueError, match="no image to draw"):
        draw_sample(reader, reader.keys[2], tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        draw_sample(reader, reader.keys[0], tmp_path / "p.jpg")
