"""Promises of student/train.py: no teacher, the right cache and vocabulary, settings fed back."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config import recipes
from pipeline.config.stages import CONFIG_FILE, TrainConfig
from student_train.config.recipe import TrainPart
from student_train.training.trainable import PART_PREFIXES
from teacher_cache.codec.columns import encode_column, output_columns
from teacher_cache.folder.layout import SEAL_FILE
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.strict_json import decode_json
from teacher_cache.teacher.teacher import Teacher
from tests.conftest import TinyFolder
from tests.support.caches import student_loader
from tests.support.lazy import student_identity, train
from tests.support.runs import tiny_cache, weights
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def vanilla(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llava")


@pytest.fixture(scope="module")
def reader(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return tiny_cache(tmp_path_factory.mktemp("train") / "cache", vanilla, num_samples=6)


@pytest.fixture
def config(reader: CacheReader, vanilla: Path, tmp_path: Path) -> TrainConfig:
    return _small(TrainConfig(cache=reader.cache.url, student=str(vanilla), out=tmp_path / "run"))


def _small(config: TrainConfig) -> TrainConfig:
    """Two steps of four samples, which see every sample of the cache."""
    small = config.with_training(
        max_steps=2,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=1e-2,
        device="cpu",
        log_steps=1,
    )
    return dataclasses.replace(small, torch_threads=1)


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def _replace(file: Path, content: bytes) -> None:
    """Put another file in the place of one that a thread of the last attempt may still map."""
    other = file.with_suffix(".other")
    other.write_bytes(content)
    other.replace(file)


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[TrainPart]:
    """The parts of which any weight has changed."""
    names = {name for name in after if not torch.equal(before[name], after[name])}
    return {
        part
        for part, prefixes in PART_PREFIXES.items()
        if any(name.startswith(prefixes) for name in names)
    }


def test_a_student_is_trained_without_any_teacher(
    config: TrainConfig, vanilla: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def throwing(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the train stage touched a teacher")

    for name in ("__init__", "load", "outputs", "hidden_states"):
        monkeypatch.setattr(Teacher, name, throwing)
    final = train(config)
    assert final == config.out / "final"
    begun = student_loader(vanilla)()[0].state_dict()
    assert _moved(begun, weights(final)) == {"projector", "language_model"}
    with pytest.raises(AssertionError, match="touched a teacher"):
        Teacher.load("anything")


def test_the_settings_that_a_run_writes_can_be_fed_back(config: TrainConfig) -> None:
    train(config)
    text = (config.out / CONFIG_FILE).read_text()
    again = decode_json(TrainConfig, text, CONFIG_FILE)
    assert again == config
    assert train(again) == config.out / "final"
    assert (config.out / CONFIG_FILE).read_text() == text


def test_a_tokenizer_other_than_the_teachers_is_refused_before_anything_is_written(
    config: TrainConfig, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    other = _copy(vanilla, tmp_path / "other")
    file = other / "tokenizer.json"
    stored = json.loads(file.read_text())
    ids = stored["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]  # as many ids, but two of them mean other tokens
    file.write_text(json.dumps(stored))
    with pytest.raises(CacheMismatchError, match=r"tokenizer of .*other differs.*vocabulary") as e:
        train(dataclasses.replace(config, student=str(other)))
    assert reader.spec.vocabulary[:12] in str(e.value)
    assert not config.out.exists()
    train(config)  # the folder is free


def test_only_the_cache_that_is_expected_is_trained_from(
    config: TrainConfig, reader: CacheReader
) -> None:
    wrong = "0" if reader.fingerprint[0] != "0" else "1"
    with pytest.raises(CacheMismatchError, match=f"{reader.fingerprint}.*begins with {wrong}"):
        train(dataclasses.replace(config, expect_cache=wrong))
    assert not config.out.exists()
    train(dataclasses.replace(config, expect_cache=reader.fingerprint[:8]))


def test_a_half_built_cache_is_refused(
    config: TrainConfig, reader: CacheReader, tmp_path: Path
) -> None:
    half = _copy(Path(reader.cache.url), tmp_path / "half")
    (half / SEAL_FILE).unlink()
    sorted((half / "commits").iterdir())[0].unlink()
    with pytest.raises(IncompleteCacheError, match="1 of 2 shards"):
        train(dataclasses.replace(config, cache=str(half)))
    assert not config.out.exists()


def test_a_flipped_bit_of_a_record_stops_training_and_names_file_and_sample(
    config: TrainConfig, reader: CacheReader, tmp_path: Path
) -> None:
    damaged = _copy(Path(reader.cache.url), tmp_path / "damaged")
    victim = reader.read(4, ["vision"])
    frame = encode_column("v_logits", output_columns(victim.output)["v_logits"])
    file = damaged / reader.seal.shards[1].files[0].file
    intact = file.read_bytes()
    flipped = bytearray(intact)
    flipped[intact.index(frame) + len(frame) // 2] ^= 4
    _replace(file, bytes(flipped))
    config = dataclasses.replace(config, cache=str(damaged))
    with pytest.raises(ShardCorruptError, match=rf"{file.name}.*{victim.sample.key}.*v_logits"):
        train(config)
    assert not (config.out / "final").exists()
    _replace(file, intact)
    train(config)


def test_phase_two_goes_on_from_phase_one_which_moves_the_projector_alone(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model = tiny_folder("llava_next")  # LLaVA's phases: test_recipes.py
    cache = tiny_cache(tmp_path / "cache", model, num_samples=4).cache.url
    one = recipes.paper_phase_one(cache=cache, student=str(model), out=tmp_path / "one")
    first = train(_small(one))
    begun = student_loader(model)()[0].state_dict()
    assert _moved(begun, weights(first)) == {"projector"}
    two = recipes.paper_phase_two(cache=cache, student=str(first), out=tmp_path / "two")
    second = train(_small(two))
    assert _moved(weights(first), weights(second)) == set(PART_PREFIXES)
    with pytest.raises(ValueError, match="vision_pool_stride 2, but stride is 3"):
        train(dataclasses.replace(_small(two), out=tmp_path / "three", stride=3))


def test_a_student_is_known_by_all_that_it_begins_as(vanilla: Path, tmp_path: Path) -> None:
    identity = student_identity(str(vanilla), "avgpool", 2)
    same = _copy(vanilla, tmp_path / "same")
    (same / "README.md").write_text("Words about the model.")
    (same / "emkd_run.json").write_text("When and how long it was trained.")
    assert student_identity(str(same), "avgpool", 2) == identity
    others = {student_identity(str(vanilla), "avgpool", 4)}
    others.add(student_identity(str(tiny_llava(tmp_path / "weights", seed=1)), "avgpool", 2))
    for name in (CONFIG_FILE, "tokenizer.json", "chat_template.jinja"):
        changed = _copy(vanilla, tmp_path / name)
        (changed / name).write_text((changed / name).read_text() + " ")
        others.add(student_identity(str(changed), "avgpool", 2))
    assert len(others | {identity}) == 6


def test_a_run_is_not_resumed_with_a_student_whose_weights_have_changed(
    config: TrainConfig, vanilla: Path, tmp_path: Path
) -> None:
    folder = _copy(vanilla, tmp_path / "student")
    config = dataclasses.replace(config, student=str(folder))
    train(config)
    tiny_llava(folder, seed=1)
    with pytest.raises(CacheMismatchError, match="student: stored"):
        train(config)
