"""Tokens of real processors: spans decode to the messages, vision positions to the placeholders."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors

from teacher_cache.encoding.chat_rendering import to_turns
from teacher_cache.encoding.collate import SEQUENCE_KEYS, EncodedSample
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import EARLIER_TEXT_RULES, TextRules
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, make_sample
from tests.conftest import TinyFolder
from tests.support.lazy import AutoConfig
from tests.support.tiny import FAMILIES, tiny_image, tiny_samples

Encoder = Callable[[str], SampleEncoder]


@pytest.fixture(scope="module")
def encoder(tiny_folder: TinyFolder) -> Encoder:
    """The encoder of a family; freshly loaded, so that a test may change it."""

    def load(family: str) -> SampleEncoder:
        folder = tiny_folder(family)
        config = AutoConfig.from_pretrained(folder)
        return SampleEncoder(load_processor(str(folder)), config)

    return load


def _text(encoder: SampleEncoder, ids: torch.Tensor) -> str:
    return encoder.processor.tokenizer.decode(ids)


def _said(sample: Sample, roles: tuple[str, ...], end: str) -> str:
    """All that some roles said, without image placeholders and the newline behind them."""
    texts: list[str] = []
    for message in sample.messages:
        if message.role in roles:
            text = message.text.replace(f"{IMAGE_PLACEHOLDER}\n", "")
            texts.append(text + (end if message.role == "assistant" else ""))
    return "".join(texts)


def _check_vision(encoder: SampleEncoder, encoded: EncodedSample) -> None:
    """Vision tokens are placeholders; in a family without newlines, all of them, in order."""
    token = encoder.config.image_token_id
    placeholders = [p for p, i in enumerate(encoded.inputs["input_ids"].tolist()) if i == token]
    vision = encoded.spans.vision.tolist()
    assert vision == sorted(set(vision))
    assert set(vision) <= set(placeholders)
    if encoder.config.model_type not in ("llava_next", "llava_onevision"):
        assert vision == placeholders


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_decode_to_what_was_said(family: str, encoder: Encoder) -> None:
    model = encoder(family)
    for sample in tiny_samples(5):
        encoded = model.encode(sample)
        spans, input_ids = encoded.spans, encoded.inputs["input_ids"]
        said = _said(sample, ("user", "assistant"), "<|im_end|>")
        assert _text(model, spans.content_ids) == said
        answers = _said(sample, ("assistant",), "<|im_end|>")
        assert _text(model, input_ids[spans.response]) == answers
        assert torch.equal(input_ids[spans.content], spans.content_ids)
        assert torch.equal(input_ids[spans.predicting + 1], input_ids[spans.response])
        assert {view.image for view in spans.views} == set(range(len(sample.images)))
        _check_vision(model, encoded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_the_beginning_of_its_conversation(family: str, encoder: Encoder) -> None:
    model = encoder(family)
    for sample in tiny_samples(5):
        prompt, whole = model.encode_prompt(sample), model.encode(sample)
        length = prompt.num_tokens
        assert torch.equal(prompt.inputs["input_ids"], whole.inputs["input_ids"][:length])
        assert int(whole.spans.response[whole.spans.response >= length][0]) == length
        assert prompt.spans.views == whole.spans.views


@pytest.mark.parametrize("family", FAMILIES)
def test_model_inputs_are_the_processors_own(family: str, encoder: Encoder) -> None:
    model = encoder(family)
    for sample in tiny_samples(5):
        encoded = model.encode(sample)
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.images]
        text = model.processor.apply_chat_template(to_turns(sample, None), tokenize=False)
        expected = model.processor(
            text=[text], images=[images] if images else None, return_tensors="pt"
        )
        names = set(expected) - {"token_type_ids", "text_replacement_offsets"}
        assert set(encoded.inputs) == names
        for name in names:
            values = expected[name][0] if name in SEQUENCE_KEYS else expected[name]
            assert encoded.inputs[name].dtype == values.dtype
            assert torch.equal(encoded.inputs[name], values)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_between_samples_changes_nothing(family: str, encoder: Encoder) -> None:
    model, samples = encoder(family), tiny_samples(10)
    for sample in [*samples, *samples]:
        fresh = SampleEncoder(model.processor, model.config)
        again, alone = model.encode(sample), fresh.encode(sample)
        assert again.spans.views == alone.spans.views
        for name in ("vision", "content", "content_ids", "is_response", "after_image"):
            assert torch.equal(getattr(again.spans, name), getattr(alone.spans, name))


def test_text_before_the_first_image_does_not_count_for_affinity(encoder: Encoder) -> None:
    model = encoder("llava")
    image = tiny_image(0)
    question = Message(role="user", text=f"describe {IMAGE_PLACEHOLDER}\nthis")
    sample = make_sample("s", [image], [question, Message(role="assistant", text="two.")])
    spans = model.encode(sample).spans
    first = int(spans.vision[0])
    assert spans.after_image.tolist() == [p > first for p in spans.content.tolist()]
    assert _text(model, spans.content_ids[~spans.after_image]) == "describe "
    alone = model.encode(tiny_samples(3)[2]).spans
    assert not alone.after_image.any()
    assert not len(alone.vision)


def test_the_system_prompt_opens_samples_that_bring_none(encoder: Encoder) -> None:
    model = encoder("llava")
    model.system_prompt = "how many digits"
    plain, own = tiny_samples(5)[0], tiny_samples(5)[4]
    assert "how many digits" in _text(model, model.encode(plain).inputs["input_ids"])
    assert "how many digits" not in _text(model, model.encode(own).inputs["input_ids"])


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_template_without_an_end_of_turn_gets_one_or_gives_the_text_alone(
    append_eos: bool, encoder: Encoder
) -> None:
    known = encoder("llava")
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rules = TextRules(append_eos=append_eos, template=template)
    model = SampleEncoder(known.processor, known.config, rules=rules)
    spans = model.encode(tiny_samples(1)[0]).spans
    end = "<|im_end|>" if append_eos else ""
    assert _text(model, spans.content_ids[spans.is_response]) == f" a red square, 0 digits.{end}"
    assert model.processor.chat_template == template


def test_tokens_of_tokenizers_that_trim_their_offsets_are_not_lost(encoder: Encoder) -> None:
    model = encoder("llava")
    backend: Tokenizer = model.processor.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [
        Message(role="user", text="what is\n\n \n in the"),
        Message(role="assistant", text="\n\na \n red square\n"),
    ]
    spans = model.encode(make_sample("s", [], messages)).spans
    assert _text(model, spans.content_ids[~spans.is_response]) == messages[0].text
    answer = f"{messages[1].text}<|im_end|>"
    assert _text(model, spans.content_ids[spans.is_response]) == answer


def test_letters_of_several_tokens_are_kept_whole(encoder: Encoder) -> None:
    model = encoder("idefics3")
    messages = [
        Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n\u4f60\u597d \U0001f600?"),
        Message(role="assistant", text="\u00e9t\u00e9 \U0001f680"),
    ]
    sample = make_sample("s", [tiny_image(1)], messages)
    spans = model.encode(sample).spans
    assert _text(model, spans.content_ids) == _said(sample, ("user", "assistant"), "<|im_end|>")


def _one(text: str, images: list[bytes]) -> Sample:
    return make_sample(
        "bad-1", images, [Message(role="user", text=text), Message(role="assistant", text="two.")]
    )


def test_a_corrupt_image_is_named(encoder: Encoder) -> None:
    cut = tiny_image(0)[:-200]
    text = f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}\nwhat?"
    with pytest.raises(SampleError, match=r"'bad-1': image 1 \(\d+ bytes\) cannot be decoded"):
        encoder("llava").encode(_one(text, [tiny_image(0), cut]))
    with pytest.raises(SampleError, match=r"image 0 .* cannot be decoded"):
        encoder("llava").encode(_one(f"{IMAGE_PLACEHOLDER}what?", [b"no image"]))


def _encoded_or_refused(model: SampleEncoder, sample: Sample) -> EncodedSample | SampleError:
    try:
        return model.encode(sample)
    except SampleError as error:
        return error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (3, 500), (1, 1)])
def test_images_of_absurd_shape_are_encoded_or_named(
    family: str, size: tuple[int, int], encoder: Encoder
) -> None:
    model = encoder(family)
    sample = _one(f"{IMAGE_PLACEHOLDER}what?", [tiny_image(0, *size)])
    encoded = _encoded_or_refused(model, sample)
    if isinstance(encoded, SampleError):
        assert re.match("sample 'bad-1': .*(too narrow|aspect ratio)", str(encoded))
    else:
        _check_vision(model, encoded)


def test_a_mosaic_without_columns_is_refused(encoder: Encoder) -> None:
    with pytest.raises(SampleError, match=r"image 0 is too narrow: its view 1 .* 4x0 vision"):
        encoder("llava_next").encode(_one(f"{IMAGE_PLACEHOLDER}?", [tiny_image(0, 1, 3000)]))


def _more_patches(model: SampleEncoder) -> None:
    model.processor.patch_size = 2


def _longer_tiles(model: SampleEncoder) -> None:
    model.processor.image_seq_length = 5


def _longer_sequence(model: SampleEncoder) -> None:
    model.processor.image_seq_len = 5


@pytest.mark.parametrize(
    ("family", "spoil"),
    [
        ("llava", _more_patches),
        ("llava_next", _more_patches),
        ("internvl", _longer_tiles),
        ("idefics3", _longer_sequence),
    ],
)
def test_counts_that_are_not_the_models_are_refused(
    family: str, spoil: Callable[[SampleEncoder], None], encoder: Encoder
) -> None:
    model = encoder(family)
    spoil(model)
    with pytest.raises(SampleError, match=r"tiny-0.*placeholder"):
        model.encode(tiny_samples(1)[0])


def test_a_message_may_not_spell_the_placeholder_token(encoder: Encoder) -> None:
    model = encoder("qwen2_5_vl")
    with pytest.raises(SampleError, match="image_pad"):
        model.encode(_one(f"{IMAGE_PLACEHOLDER}what is <|image_pad|>?", [tiny_image(0)]))
    with pytest.raises(SampleError, match="image_pad"):
        model.encode(_one("what is <|image_pad|>?", []))


def test_a_sample_longer_than_the_models_context_is_refused(encoder: Encoder) -> None:
    model = encoder("llava")
    limit = model.config.get_text_config().max_position_embeddings
    answer = Message(role="assistant", text="yes")
    question = Message(role="user", text="a b " * limit)
    with pytest.raises(SampleError, match=f"long.*context holds {limit}"):
        model.encode(make_sample("long", [], [question, answer]))


def test_a_sample_without_any_response_token_is_refused(encoder: Encoder) -> None:
    known = encoder("llava")
    known.processor.chat_template = known.processor.chat_template.replace("<|im_end|>", "")
    model = SampleEncoder(known.processor, known.config, rules=EARLIER_TEXT_RULES)
    messages = [Message(role="user", text="what?"), Message(role="assistant", text="")]
    with pytest.raises(SampleError, match="is a response"):
        model.encode(make_sample("s", [], messages))


def test_models_and_processors_that_cannot_be_used_are_refused(
    encoder: Encoder, tmp_path: Path
) -> None:
    model = encoder("llava")
    config: Any = AutoConfig.for_model("qwen2")
    with pytest.raises(ValueError, match=r"'qwen2' are not supported.*supported: .*idefics3"):
        SampleEncoder(model.processor, config)
    model.processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SampleEncoder(model.processor, model.config)
