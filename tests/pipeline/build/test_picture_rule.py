"""The rule by which images are read belongs to a cache: build, verify and train keep it."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.build.build import CacheBuilder, build
from pipeline.build.teacher_identity import load_as, other_teacher
from pipeline.inspection.cache import describe_cache
from teacher_cache.encoding import sample_encoder
from teacher_cache.encoding.pictures import read_picture
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.manifest import to_json
from teacher_cache.schema.options import PictureRule
from teacher_cache.schema.samples import Sample, make_sample
from teacher_cache.teacher.teacher import Teacher
from tests.conftest import TinyFolder
from tests.support.caches import build_cache
from tests.support.lazy import AutoConfig
from tests.support.llava_json import settings_of, small_build
from tests.support.runs import PAIRS, SETTINGS, train
from tests.support.tiny import LISTED, ask, tiny_samples


def turned_and_clear() -> bytes:
    """A PNG with a transparent half whose EXIF turns it by a quarter."""
    image = Image.new("RGBA", (24, 16), (250, 10, 20, 255))
    image.paste((0, 0, 0, 0), (0, 0, 12, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def sample_of(data: bytes) -> Sample:
    return make_sample("clear", [data], list(ask("<image>what is in the picture?").messages))


@pytest.mark.parametrize("family", sorted(LISTED))
def test_a_model_sees_what_its_processor_makes_of_the_picture(
    family: str, tiny_folder: TinyFolder
) -> None:
    folder = tiny_folder(family)
    processor: Any = load_processor(str(folder))
    encoder = SampleEncoder(processor, AutoConfig.from_pretrained(folder))
    data = turned_and_clear()
    inputs = encoder.encode(sample_of(data)).inputs
    picture = read_picture(data)
    assert picture.size == (16, 24)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((0, 23)) == (250, 10, 20)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False
    )
    wanted = processor(text=[text], images=[[picture]], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], wanted["pixel_values"])


def test_new_caches_name_the_rule_and_earlier_ones_keep_theirs(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder("llava")
    samples = [sample_of(turned_and_clear()), *tiny_samples(3)]
    rules: set[str] = set()

    def spied(data: bytes, rule: PictureRule) -> Image.Image:
        rules.add(rule)
        return read_picture(data, rule)

    monkeypatch.setattr(sample_encoder, "read_picture", spied)
    earlier = Teacher.load(str(model), device="cpu", dtype="float32", pictures="convert-rgb")
    reader = build_cache(tmp_path / "earlier", earlier, samples, PAIRS)
    assert reader.spec.pictures == "convert-rgb"
    assert "pictures" not in json.loads(to_json(reader.spec)), "as they were written before"
    again = load_as(str(model), reader.spec, device="cpu")
    assert again.encoder.pictures == "convert-rgb"
    assert other_teacher(reader.spec, again) == []
    train(tmp_path / "run", reader, model, dataclasses.replace(SETTINGS, max_steps=1))
    assert rules == {"convert-rgb"}
    today = Teacher.load(str(model), device="cpu", dtype="float32")
    assert other_teacher(reader.spec, today) == [
        ("pictures", "'convert-rgb'", "'upright-on-white'")
    ]
    described = describe_cache(reader)["pictures"]
    assert described["rule"] == "convert-rgb"
    assert (described["images"], described["turned"], described["transparent"]) == (3, 1, 1)


def test_a_build_stores_todays_rule_and_goes_on_by_that_of_its_plan(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_build(
        tmp_path, tiny_samples(2), tiny_folder("llava"), settings_of("topk"), 2, format="arrow"
    )
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.build.build.PICTURE_RULE", "convert-rgb")
        assert CacheBuilder(config).prepare().spec.pictures == "convert-rgb"
    assert build(config).spec.pictures == "convert-rgb"
    fresh = small_build(
        tmp_path / "fresh", tiny_samples(2), tiny_folder("llava"), settings_of("topk"), 2,
        format="arrow",
    )  # fmt: skip
    assert build(fresh).spec.pictures == "upright-on-white"
    reader = CacheReader.open(tmp_path / "fresh" / "cache")
    assert json.loads(to_json(reader.spec))["pictures"] == "upright-on-white"
