"""The demo's teacher: ordinary files that load back, one token per name and digit, same bits again.

Steps are few; that it learns is shown by a loss that falls, its accuracy by the demo itself.
"""

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.config.build import SourceConfig
from pipeline.demo.config import DigitsConfig
from pipeline.sources.source import open_source
from teacher_cache.encoding.sample_encoder import SampleEncoder
from tests.support.lazy import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    build_processor,
    build_tokenizer,
    demo_model,
    demo_teacher,
    digits,
    train_demo_teacher,
    write_digits,
)


@cache
def tiny() -> Any:
    return demo_teacher.TeacherSettings(
        vision_steps=3, vision_batch_size=8, language_steps=3, language_batch_size=8, seed=1
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    return write_digits(DigitsConfig(out=out, num_train=128, num_heldout=2))


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_demo_teacher(data, tmp_path_factory.mktemp("teacher"), tiny())


def texts(data: Path) -> list[str]:
    entries = json.loads((data / "train.json").read_bytes())
    return [turn["value"] for entry in entries for turn in entry["conversations"]]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_cell_names_and_digits_are_one_token_each(data: Path) -> None:
    tokenizer = build_tokenizer(texts(data))
    for name in digits.CELL_NAMES:
        for digit in range(10):
            assert tokenizer.tokenize(f" {name}{digit}") == [f"Ġ{name}", str(digit)]
        assert tokenizer.tokenize(f" {name}?") == [f"Ġ{name}", "?"]
    assert len(tokenizer) <= demo_model.VOCAB_SIZE


def test_any_text_survives_the_tokenizer(data: Path) -> None:
    tokenizer = build_tokenizer(texts(data))
    text = " \tFill in zz 42?\n\nç"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_prompt_is_a_prefix_and_every_turn_ends(data: Path) -> None:
    processor = build_processor(build_tokenizer(texts(data)))
    image = {"type": "image"}
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "Fill in bq?"}]},
        {"role": "assistant", "content": " bq5"},
        {"role": "user", "content": "<image>\nFill in gx?"},
        {"role": "assistant", "content": [{"type": "text", "text": " gx1"}]},
    ]
    whole = processor.apply_chat_template(turns, tokenize=False)
    prompt = processor.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + " gx1" + demo_model.END
    assert whole.count(demo_model.END) == len(turns)
    assert whole.count("<image>\nFill in") == 2
    assert whole.count(demo_model.ASSISTANT) == 2


def test_the_saved_teacher_loads_by_the_auto_classes_and_answers(data: Path, teacher: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(teacher)
    processor = AutoProcessor.from_pretrained(teacher)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.lm_head.weight is model.get_input_embeddings().weight
    entry = json.loads((data / "heldout.json").read_bytes())[0]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": entry["conversations"][0]["value"]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    with Image.open(data / entry["image"]) as image:
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    num_placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert num_placeholders == digits.PATCHES_SIDE**2 == model.config.image_seq_length
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    answer = generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_training_again_gives_the_same_files(data: Path, teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the caller's random state must not matter
    assert digests(train_demo_teacher(data, tmp_path, tiny())) == digests(teacher)


def test_a_finished_teacher_is_left_as_it_is(data: Path, teacher: Path) -> None:
    def refuse(_what: str, _done: int, _total: int) -> None:
        raise AssertionError("a finished teacher was trained again")

    before = digests(teacher)
    assert train_demo_teacher(data, teacher.parent, tiny(), refuse) == teacher
    assert digests(teacher) == before


def test_a_teacher_of_other_settings_or_data_is_refused(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'seed': 1.*'seed': 2"):
        train_demo_teacher(data, teacher.parent, dataclasses.replace(tiny(), seed=2))
    other = write_digits(DigitsConfig(out=tmp_path, num_train=1, num_heldout=1))
    with pytest.raises(ValueError, match="choose another folder"):
        train_demo_teacher(other, teacher.parent, tiny())


def test_a_killed_training_leaves_no_teacher(data: Path, tmp_path: Path) -> None:
    def kill(_what: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo_teacher(data, tmp_path, tiny(), kill)
    assert not (tmp_path / "final").exists()


def test_progress_counts_the_steps_of_both_stages(data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train_demo_teacher(data, tmp_path, tiny(), lambda _, done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_data_without_digits_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(data / "images")
    entries = json.loads((data / "train.json").read_bytes())
    del entries[5]["digits"]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"train\.json: found an entry without 'digits'"):
        train_demo_teacher(tmp_path, tmp_path / "out", tiny())


def test_too_few_samples_for_a_batch_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 128 samples, expected at least one batch of 129"):
        train_demo_teacher(data, tmp_path, demo_teacher.TeacherSettings(vision_batch_size=129))


def test_data_of_several_turns_is_refused_by_sample(data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(data / "images")
    entries = json.loads((data / "train.json").read_bytes())
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": " Yes"}]
    entries[5]["conversations"] += more
    (tmp_path / "train.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="sample 'train-00005': found 1 images and 4 turns"):
        train_demo_teacher(tmp_path, tmp_path / "out", tiny())


def test_the_teacher_learns_the_very_prompt_that_it_is_asked_later(
    data: Path, teacher: Path
) -> None:
    processor = AutoProcessor.from_pretrained(teacher)
    encoder = SampleEncoder(processor, AutoConfig.from_pretrained(teacher))
    sample = open_source(SourceConfig(path=str(data / "train.json")))[0]
    encoded = encoder.encode(sample)
    trained = demo_teacher._encode(processor, [sample])  # pyright: ignore[reportPrivateUsage]
    assert trained.ids[0].tolist() == encoded.inputs["input_ids"].tolist()
    assert torch.equal(trained.pixels, encoded.inputs["pixel_values"])
    assert (trained.labels[0] != demo_teacher.NO_LABEL).nonzero()[:, 0].tolist() == (
        encoded.spans.response.tolist()
    )
