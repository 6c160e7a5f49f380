"""Teachers of six families: states give the model's own logits, samples stand for themselves."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacher_cache.encoding.collate import EncodedSample, collate
from teacher_cache.models.processors import load_processor
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.manifest import CacheSpec, to_json
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.schema.samples import (
    IMAGE_PLACEHOLDER,
    Message,
    RejectedSample,
    Sample,
    make_sample,
)
from teacher_cache.schema.strict_json import decode_json
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.teacher.plain_head import shared_head
from teacher_cache.teacher.teacher import Teacher
from tests.conftest import TinyFolder
from tests.support.lazy import (
    AutoModelForImageTextToText,
)
from tests.support.tiny import FAMILIES, tiny_image, tiny_llava, tiny_samples
from tests.support.tiny_parts import HEAD_ROWS

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")
TOP_K = 8
SKETCHED = RecordSettings(records="topk+sketch", top_k=TOP_K, sketch_rank=16)


@pytest.fixture(scope="module")
def llava(tiny_folder: TinyFolder) -> Teacher:
    teacher = Teacher.load(str(tiny_folder("llava")), device="cpu")
    teacher.calibrate([tiny_samples(5)], SKETCHED)
    return teacher


def _bad_image() -> Sample:
    text = Message(role="user", text=f"{IMAGE_PLACEHOLDER}\nwhat?")
    return make_sample("bad", [b"no image"], [text, Message(role="assistant", text="two.")])


def _accepted(outputs: list[TeacherOutput | RejectedSample]) -> list[TeacherOutput]:
    accepted = [output for output in outputs if isinstance(output, TeacherOutput)]
    assert len(accepted) == len(outputs), outputs
    return accepted


def _tensors(output: TeacherOutput) -> list[Tensor]:
    assert output.vision is not None
    assert output.affinity is not None
    assert output.response is not None
    return [
        output.vision.logits,
        output.vision.log_tail,
        output.affinity.cosine,
        output.response.logits,
        output.response.logsumexp,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_give_the_models_own_logits(family: str, tiny_folder: TinyFolder) -> None:
    teacher = Teacher.load(str(tiny_folder(family)), device="cpu")
    encoded = [teacher.encoder.encode(sample) for sample in tiny_samples(5)]
    batch = collate(encoded, teacher.encoder.pad_token_id, "right")
    states = teacher.hidden_states(batch)
    with torch.no_grad():
        logits = teacher.model(**batch.inputs).logits
    assert torch.equal(teacher.model.get_output_embeddings()(states), logits)
    assert logits.shape[-1] == HEAD_ROWS
    assert teacher.head.vocab_size == len(teacher.encoder.processor.tokenizer) < HEAD_ROWS
    assert not states.requires_grad
    settings = RecordSettings(records="topk", top_k=TOP_K)
    for row, output in enumerate(_accepted(teacher.outputs(tiny_samples(5), settings))):
        spans = encoded[row].spans
        assert output.vision is not None
        assert output.response is not None
        for record, positions in (
            (output.vision, spans.vision),
            (output.response, spans.predicting),
        ):
            wanted = logits[row, positions, : teacher.head.vocab_size]
            at_ids = wanted.gather(1, record.ids.long())
            torch.testing.assert_close(record.logits, at_ids)
            torch.testing.assert_close(record.logits, wanted.topk(TOP_K).values)
            torch.testing.assert_close(record.logsumexp, wanted.logsumexp(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_its_neighbours(family: str, tiny_folder: TinyFolder) -> None:
    teacher = Teacher.load(str(tiny_folder(family)), device="cpu")
    samples = tiny_samples(5)
    settings = RecordSettings(records="topk", top_k=TOP_K, affinity_dtype="float32")
    together = _accepted(teacher.outputs(samples, settings))
    again = _accepted(teacher.outputs(samples, settings))
    for sample, output, repeated in zip(samples, together, again, strict=True):
        [alone] = _accepted(teacher.outputs([sample], settings))
        for found, wanted in zip(_tensors(output), _tensors(alone), strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
        for found, wanted in zip(_tensors(output), _tensors(repeated), strict=True):
            assert torch.equal(found, wanted)


def test_the_side_of_the_padding_moves_columns_only(llava: Teacher) -> None:
    encoded = [llava.encoder.encode(sample) for sample in tiny_samples(5)]
    left = collate(encoded, llava.encoder.pad_token_id, "left")
    right = collate(encoded, llava.encoder.pad_token_id, "right")
    padded_left, padded_right = llava.hidden_states(left), llava.hidden_states(right)
    for row, sample in enumerate(encoded):
        positions = torch.arange(sample.num_tokens)
        found = padded_left[row, left.columns(row, positions)]
        wanted = padded_right[row, right.columns(row, positions)]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_keeping_the_vocabulary_keeps_every_bit(llava: Teacher) -> None:
    samples, vocab_size = tiny_samples(4), llava.head.vocab_size
    settings = RecordSettings(records="topk", top_k=vocab_size)
    encoded = [llava.encoder.encode(sample) for sample in samples]
    states = llava.hidden_states(collate(encoded, 0, "right"))
    for row, output in enumerate(_accepted(llava.outputs(samples, settings))):
        assert output.vision is not None
        dense = llava.head.logits(states[row, encoded[row].spans.vision])
        stored = torch.empty_like(dense).scatter(1, output.vision.ids.long(), output.vision.logits)
        assert torch.equal(stored, dense)


@pytest.mark.parametrize("tier", TIERS)
def test_a_bad_sample_is_named_and_spoils_no_other(tier: RecordKind, llava: Teacher) -> None:
    settings = RecordSettings(records=tier, top_k=TOP_K)
    good = tiny_samples(2)
    outputs = llava.outputs([good[0], _bad_image(), good[1]], settings)
    kinds = [type(output) for output in outputs]
    assert kinds == [TeacherOutput, RejectedSample, TeacherOutput]
    bad = outputs[1]
    assert isinstance(bad, RejectedSample)
    assert bad.source_id == "bad"
    assert "image 0 (8 bytes) cannot be decoded" in bad.reason
    [only] = llava.outputs([_bad_image()], settings)
    assert only == bad


def test_numbers_that_are_not_finite_reject_the_sample(tmp_path: Path) -> None:
    teacher = Teacher.load(str(tiny_llava(tmp_path)), device="cpu")
    teacher.head = LmHead(weight=teacher.head.weight.clone().fill_(torch.nan))
    [output] = teacher.outputs(tiny_samples(1), RecordSettings(records="topk", top_k=TOP_K))
    assert isinstance(output, RejectedSample)
    assert "NaN or infinite" in output.reason


def test_settings_that_cannot_work_are_refused(llava: Teacher, tiny_folder: TinyFolder) -> None:
    too_many = RecordSettings(records="topk", top_k=llava.head.vocab_size + 1)
    with pytest.raises(ValueError, match="share 330 vocabulary rows; lower top_k"):
        llava.outputs([], too_many)
    with pytest.raises(ValueError, match="lower top_k"):
        llava.spec(too_many, batch_size=1)
    bare = Teacher.load(str(tiny_folder("llava")), device="cpu")
    with pytest.raises(ValueError, match="calibrate first"):
        bare.outputs([], RecordSettings(records="topk+sketch", top_k=TOP_K))
    with pytest.raises(ValueError, match="is fitted to vision tokens, found 0") as error:
        bare.calibrate([[tiny_samples(3)[2], _bad_image()]], SKETCHED)
    assert "1 of 2 samples cannot be used: bad: image 0 (8 bytes) cannot be decoded" in str(
        error.value
    )
    with pytest.raises(ValueError, match=r"no tokens\. 1 of 1 samples cannot be used: bad: image"):
        bare.calibrate([[_bad_image()]], RecordSettings(records="topk", top_k=4))


def test_a_basis_of_another_teacher_is_refused(llava: Teacher, tiny_folder: TinyFolder) -> None:
    other = Teacher.load(str(tiny_folder("idefics3")), device="cpu")
    other.head = LmHead(weight=other.head.weight[:300])
    with pytest.raises(ValueError, match="330 vocabulary rows and width 32"):
        other.sketch = llava.sketch


@pytest.mark.parametrize("change", [lambda z: z * 0.99, lambda z: 30 * torch.tanh(z / 30)])
def test_heads_that_are_scaled_or_capped_are_refused(
    change: Callable[[Tensor], Tensor], tiny_folder: TinyFolder
) -> None:
    folder = tiny_folder("llava")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(ValueError, match="scaled or soft-capped head"):
        Teacher(model, load_processor(str(folder)))


def test_heads_that_are_not_one_linear_layer_are_refused(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("llava")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = load_processor(str(folder)).tokenizer
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    with pytest.raises(ValueError, match="has Sequential for an LM head"):
        shared_head(model, tokenizer)


@pytest.mark.parametrize("tier", TIERS)
def test_two_loads_have_one_spec_that_survives_json(
    tier: RecordKind, tiny_folder: TinyFolder
) -> None:
    settings = RecordSettings(records=tier, top_k=TOP_K, sketch_rank=99)
    specs: list[CacheSpec] = []
    for _ in range(2):
        teacher = Teacher.load(str(tiny_folder("llava")), device="cpu")
        if tier == "topk+sketch":
            teacher.calibrate([tiny_samples(2)], settings)
        specs.append(teacher.spec(settings, batch_size=3))
    assert specs[0] == specs[1]
    assert decode_json(CacheSpec, to_json(specs[0]), "spec.json") == specs[0]
    spec = specs[0]
    assert (spec.vocab_size, spec.hidden_size, spec.batch_size) == (330, 32, 3)
    assert (spec.top_k is None) == (spec.hidden_dtype is not None) == (tier == "hidden")
    assert (spec.head_digest is not None) == (tier == "hidden")
    assert spec.sketch_rank == (32 if tier == "topk+sketch" else None)
    assert (spec.sketch_digest is not None) == (tier == "topk+sketch")


def test_what_changes_numbers_changes_the_spec(llava: Teacher, tiny_folder: TinyFolder) -> None:
    folder, settings = str(tiny_folder("llava")), RecordSettings(records="topk", top_k=TOP_K)
    spec = llava.spec(settings, batch_size=1)
    half = Teacher.load(folder, device="cpu", dtype="bfloat16")
    eager = Teacher.load(folder, device="cpu", attention="eager", system_prompt="describe")
    bfloat16, plain = half.spec(settings, batch_size=1), eager.spec(settings, batch_size=1)
    assert (bfloat16.compute_dtype, bfloat16.logits_dtype) == ("bfloat16", "bfloat16")
    assert (plain.attention, plain.system_prompt) == ("eager", "describe")
    assert spec.teacher_config == bfloat16.teacher_config == plain.teacher_config
    assert spec.teacher_weights == plain.teacher_weights
    assert len({spec.fingerprint, bfloat16.fingerprint, plain.fingerprint}) == 3
    [output] = _accepted(half.outputs(tiny_samples(1), settings))
    assert output.vision is not None
    assert output.vision.logits.dtype == torch.bfloat16


def test_calibration_reads_vision_states_only_and_passes_bad_samples_over(
    llava: Teacher,
) -> None:
    samples = tiny_samples(4)
    rejected = llava.calibrate([[samples[0], _bad_image()], samples[2:], []], SKETCHED)
    assert [each.source_id for each in rejected] == ["bad"]
    basis = llava.sketch
    assert basis is not None
    encoded: list[EncodedSample] = [llava.encoder.encode(samples[index]) for index in (0, 3)]
    states = [llava.hidden_states(collate([item], 0, "right"))[0] for item in encoded]
    vision = torch.cat([h[item.spans.vision] for h, item in zip(states, encoded, strict=True)])
    torch.testing.assert_close(basis.hidden_mean, vision.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert basis.rank == 16


def test_calibration_takes_batches_until_it_has_enough_tokens(llava: Teacher) -> None:
    samples, told, taken = tiny_samples(5), list[tuple[str, int, int]](), list[int]()

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    def batches() -> Iterator[list[Sample]]:
        for number, sample in enumerate(samples):
            taken.append(number)
            yield [sample]

    llava.calibrate(batches(), SKETCHED, 20, progress)  # 16 vision tokens an image
    assert taken == [0, 1]
    assert told == [("calibrate", 16, 20), ("calibrate", 20, 20)]
    first = _fitted(llava)
    llava.calibrate([[sample] for sample in samples[:2]], SKETCHED)
    assert _fitted(llava) == first
    llava.calibrate(batches(), SKETCHED, 10_000, progress)  # all there are
    assert [done for _, done, _ in told[2:]] == [16, 32, 32, 64, 80, 80]


def _fitted(teacher: Teacher) -> tuple[str, str]:
    """Digests of what calibration leaves."""
    assert teacher.sketch is not None
    assert teacher.template is not None
    return teacher.sketch.digest, teacher.template.digest


def test_calibration_without_images_counts_response_tokens_and_knows_no_vision_tail(
    tiny_folder: TinyFolder,
) -> None:
    teacher, told = Teacher.load(str(tiny_folder("llava")), device="cpu"), list[int]()
    text = tiny_samples(3)[2]
    settings = RecordSettings(records="topk", top_k=TOP_K)
    teacher.calibrate([[text]], settings, progress=lambda _what, done, _total: told.append(done))
    assert told == [int(teacher.encoder.encode(text).spans.is_response.sum())]
    assert teacher.sketch is None
    assert teacher.template is not None
    assert teacher.template.vision is None
    assert teacher.template.response is not None
    teacher.calibrate([[text]], RecordSettings(records="topk", top_k=teacher.head.vocab_size))
    assert teacher.template is None, "records of every logit leave no tail"


def test_images_of_other_samples_are_not_seen(llava: Teacher) -> None:
    text = "what is in the picture?"
    turns = [
        Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{text}"),
        Message(role="assistant", text="two."),
    ]
    first = make_sample("a", [tiny_image(1)], turns)
    second = make_sample("b", [tiny_image(2)], turns)
    settings = RecordSettings(records="topk", top_k=TOP_K)
    straight = _accepted(llava.outputs([first, second], settings))
    swapped = _accepted(llava.outputs([second, first], settings))
    for found, wanted in zip(_tensors(straight[0]), _tensors(swapped[1]), strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(_tensors(straight[0])[0], _tensors(straight[1])[0])
