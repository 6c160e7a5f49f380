"""Chat templates and appended ends of turn, from the build to the student's answers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.build.build import CacheBuilder, build
from pipeline.build.extend_samples import extend_samples
from pipeline.config.build import BuildConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.inspection.verify_teacher import verify_teacher
from pipeline.student.generation import Generator, without_thinking
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import CacheMismatchError
from teacher_cache.schema.options import EARLIER_TEXT_RULES, RecordSettings, TextRules
from tests.conftest import TinyFolder
from tests.support.extended import extension
from tests.support.lazy import evaluate, load_student, train
from tests.support.llava_json import evaluation, small_build, write_llava_json
from tests.support.published_templates import ONEVISION, VICUNA
from tests.support.tiny import tiny_samples
from tests.support.tiny_parts import CHAT_TEMPLATE

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    """A file with LLaVA-1.5's template, which ends no turn."""
    path = tmp_path / "vicuna.jinja"
    path.write_text(VICUNA)
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_folder: TinyFolder, vicuna: Path) -> BuildConfig:
    return small_build(
        tmp_path,
        tiny_samples(5),
        tiny_folder("llava"),
        RecordSettings(records="topk+sketch", top_k=8, sketch_rank=8),
        chat_template=vicuna,
    )


def _training(cache: str, student: Path, out: Path) -> TrainConfig:
    config = TrainConfig(cache=cache, student=str(student), out=out, torch_threads=1)
    return config.with_training(
        max_steps=1, batch_size=5, micro_batch_size=5, device="cpu", log_steps=1
    )


def _labels(cache: str, model: Path, row: int = 0) -> str:
    output = CacheReader.open(cache).read(row, ()).output
    _, processor = load_student(str(model))
    return processor.tokenizer.decode(output.content_ids[output.is_response])


def test_what_a_build_was_given_reaches_student_and_answers(
    config: BuildConfig, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    vanilla = tiny_folder("llava")
    seal = build(config)
    assert seal.spec.text == TextRules(append_eos=True, template=VICUNA)
    assert _labels(config.out, vanilla) == " a red square, 0 digits.<|im_end|>"

    final = train(_training(config.out, vanilla, tmp_path / "run"))
    assert (final / "chat_template.jinja").read_text() == VICUNA

    answers = evaluation(final, tmp_path)
    evaluate(answers)
    identity = json.loads((answers.out / "evaluation.json").read_text())
    assert identity["append_eos"] is True
    without = dataclasses.replace(answers, append_eos=False)
    with pytest.raises(CacheMismatchError, match="append_eos: stored True, wanted False"):
        evaluate(without)


@pytest.mark.parametrize("kind", ["jinja", "json"])
def test_evaluate_takes_a_template(tmp_path: Path, tiny_folder: TinyFolder, kind: str) -> None:
    path = tmp_path / f"template.{kind}"
    path.write_text(ONEVISION if kind == "jinja" else json.dumps({"chat_template": ONEVISION}))
    plain = evaluation(tiny_folder("llava"), tmp_path)
    other: EvaluateConfig = dataclasses.replace(plain, out=tmp_path / "b", chat_template=path)
    evaluate(plain)
    evaluate(other)
    first, second = (
        from_checked_json((config.out / "evaluation.json").read_bytes(), "it")
        for config in (plain, other)
    )
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"chat_template"}


def test_a_template_file_that_cannot_be_read_is_named(config: BuildConfig, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    for path in (bad, tmp_path / "nowhere.jinja"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as a chat template"):
            build(dataclasses.replace(config, chat_template=path))


def test_a_build_goes_on_with_the_same_template_and_ends_only(
    config: BuildConfig, vicuna: Path
) -> None:
    CacheBuilder(config).prepare()
    without = dataclasses.replace(config, append_eos=False)
    with pytest.raises(CacheMismatchError, match=r"text\.append_eos: stored True, wanted False"):
        build(without)
    vicuna.write_text(ONEVISION)
    with pytest.raises(CacheMismatchError, match=r"chat_template: .*(\n.*)*text\.template: stored"):
        build(config)
    vicuna.write_text(VICUNA)
    assert build(config).num_samples == 5


def test_a_student_must_learn_the_ends_that_its_cache_has(
    config: BuildConfig, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    build(config)
    training = _training(config.out, tiny_folder("llava"), tmp_path / "run")
    with pytest.raises(CacheMismatchError, match="append_eos is off; omit --no-append-eos"):
        train(dataclasses.replace(training, append_eos=False))
    other = tmp_path / "other.jinja"
    other.write_text(ONEVISION)
    with pytest.raises(CacheMismatchError, match="chat template of the cache's teacher"):
        train(dataclasses.replace(training, chat_template=other))


def test_the_students_template_is_part_of_its_run(
    tmp_path: Path, tiny_folder: TinyFolder, config: BuildConfig
) -> None:
    vanilla = tiny_folder("llava")
    plain = dataclasses.replace(config, chat_template=None, out=str(tmp_path / "plain"))
    assert build(plain).spec.text == TextRules(append_eos=False)  # the template ends its turns
    training = _training(plain.out, vanilla, tmp_path / "run")
    train(training)
    own = tmp_path / "own.jinja"
    own.write_text("{{ '' }}" + (vanilla / "chat_template.jinja").read_text())
    with pytest.raises(CacheMismatchError, match="student: stored"):
        train(dataclasses.replace(training, chat_template=own))
    final = train(dataclasses.replace(training, chat_template=own, out=tmp_path / "other"))
    assert (final / "chat_template.jinja").read_text() == own.read_text()


def test_earlier_caches_are_built_on_verified_extended_and_trained_on_as_before(
    config: BuildConfig, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla = tmp_path / "vanilla"
    model, processor = load_student(str(tiny_folder("llava")))
    processor.chat_template = VICUNA
    model.save_pretrained(vanilla)
    processor.save_pretrained(vanilla)
    config = dataclasses.replace(config, teacher=str(vanilla), chat_template=None)
    with monkeypatch.context() as patch:
        patch.setattr(CacheBuilder, "text_rules", lambda _: EARLIER_TEXT_RULES)
        seal = build(config)
    assert '"text"' not in (Path(config.out) / "plan.json").read_text()
    assert CacheReader.open(config.out).spec.text == EARLIER_TEXT_RULES
    assert _labels(config.out, vanilla) == " a red square, 0 digits."

    (Path(config.out) / "build.json").unlink()  # so that the plan is made and compared again
    assert build(config) == seal
    given = tmp_path / "given.jinja"
    given.write_text(VICUNA)
    with pytest.raises(CacheMismatchError, match=r"text\.version: stored 1, wanted 2"):
        build(dataclasses.replace(config, chat_template=given))

    report = verify_teacher(CacheReader.open(config.out), str(vanilla), device="cpu")
    assert report.problems == report.other_teacher == ()

    source = write_llava_json(tmp_path / "more", tiny_samples(8))
    longer = extension(config.out, tmp_path / "longer", vanilla, source=str(source))
    assert extend_samples(longer).spec.text == EARLIER_TEXT_RULES
    assert _labels(str(tmp_path / "longer"), vanilla, 7).endswith("digits.")

    training = _training(str(tmp_path / "longer"), vanilla, tmp_path / "run")
    assert train(training) == tmp_path / "run" / "final"


def test_answers_keep_the_spaces_that_a_tokenizer_would_clean_up(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_student(str(tiny_folder("llava")))
    words = processor.tokenizer
    words.clean_up_tokenization_spaces = True
    words.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    said = "a . b , c ?"
    assert words.decode(words(said)["input_ids"]) != said  # the test can fail
    generator = Generator(model, processor, None, max_new_tokens=4)
    prompt = generator.encoder.encode_prompt(tiny_samples(1)[0])

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([words(said)["input_ids"]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert generator.answers([prompt], generator.stop_ids)[0].text == said


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("\n</think>\n\n5 legs", "5 legs"),
        ("<think>it is a dog</think> 5 legs\n", "5 legs"),
        (" 5 legs", "5 legs"),
        ("<think>is it a dog", "<think>is it a dog"),
    ],
)
def test_what_a_model_thinks_first_is_no_part_of_its_answer(said: str, answer: str) -> None:
    assert without_thinking(said) == answer


def test_the_checkpoints_and_the_templates_ends_stop_an_answer(tiny_folder: TinyFolder) -> None:
    model, processor = load_student(str(tiny_folder("llava")))
    begin = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|im_start|>")
    model.generation_config.eos_token_id = [5, 7]
    generator = Generator(model, processor, None, max_new_tokens=4)
    assert generator.stop_ids == sorted([5, 7, begin, processor.tokenizer.eos_token_id])
