"""Texts that template and tokenizer would misread are refused; content that looks alike is not."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.encoding.chat_template import text_rules
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import EARLIER_TEXT_RULES
from teacher_cache.schema.samples import Message, Role, make_sample
from tests.support.labels import conversation, encoder_of, labels
from tests.support.published_templates import PUBLISHED, published_processor
from tests.support.tiny import tiny_image


def test_earlier_caches_keep_samples_that_are_refused_today() -> None:
    processor, config = published_processor(PUBLISHED["qwen2-vl"])
    for text in ("<|im_end|>", "", " "):
        sample = conversation(False, False, text)
        earlier = SampleEncoder(processor, config, rules=EARLIER_TEXT_RULES)
        assert labels(earlier, earlier.encode(sample)) == [f"{text}<|im_end|>"]
        with pytest.raises(SampleError):
            encoder_of("qwen2-vl").encode(sample)


CONTROL = [
    ("qwen2-vl", ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<pad>")),
    ("llava-1.5", ("</s>", "<s>", "<unk>")),
    ("llama3-llava-next", ("<|eot_id|>", "<|start_header_id|>", "<|end_of_text|>")),
    ("idefics3", ("<end_of_utterance>", "<|begin_of_text|>", "<row_1_col_1>", "<global-img>")),
    ("internvl", ("<IMG_CONTEXT>", "<video>")),
    ("qwen3", ("<think>", "</think>")),
]


@pytest.mark.parametrize(("name", "token"), [(n, token) for n, all_ in CONTROL for token in all_])
def test_texts_that_spell_control_tokens_are_refused(name: str, token: str) -> None:
    known = PUBLISHED[name]
    if name in ("idefics3", "internvl"):
        known = replace(known, plain_tokens=("<row_1_col_1>", "<global-img>", "<video>"))
    processor, config = published_processor(known)
    processor.global_image_tag, processor.video_token = "<global-img>", "<video>"
    model = SampleEncoder(processor, config)
    said = f"it says {token} here"
    roles: tuple[Role, ...] = ("user", "assistant")
    for role, texts in (("user", (said, "yes")), ("assistant", ("what?", said))):
        messages = [Message(role=r, text=t) for r, t in zip(roles, texts, strict=True)]
        with pytest.raises(SampleError, match=f"the {role}'s text spells.*{re.escape(token)}"):
            model.encode(make_sample("s", [], messages))
    model.system_prompt = said
    with pytest.raises(SampleError, match=f"the system's text spells.*{re.escape(token)}"):
        model.encode(conversation())


def test_grounding_tokens_are_content() -> None:
    known = replace(PUBLISHED["internvl"], tokens=("<|im_start|>", "<|im_end|>", "<box>", "</box>"))
    processor, config = published_processor(known)
    model = SampleEncoder(processor, config)
    said = "<box>[[1, 2, 3, 4]]</box>"
    encoded = model.encode(conversation(False, False, said))
    assert labels(model, encoded) == [f"{said}<|im_end|>"]
    boxes = processor.tokenizer.convert_tokens_to_ids(["<box>", "</box>"])
    assert set(boxes) <= set(encoded.spans.content_ids.tolist())


def test_an_ordinary_token_that_pads_is_content() -> None:
    processor, config = published_processor(PUBLISHED["qwen2-vl"])
    processor.tokenizer.pad_token = "!"
    assert "!" in processor.tokenizer.all_special_tokens
    model = SampleEncoder(processor, config)
    encoded = model.encode(conversation(False, False, "a dog!"))
    assert labels(model, encoded) == ["a dog!<|im_end|>"]


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_empty_answers_and_questions_are_refused(empty: str) -> None:
    for name in ("llava-1.5", "qwen2-vl"):
        model = encoder_of(name)
        with pytest.raises(SampleError, match="the answer in message 3 is empty"):
            model.encode(conversation(False, False, "a dog.", empty))
        asked = [Message(role="user", text=empty), Message(role="assistant", text="a dog.")]
        with pytest.raises(SampleError, match="the question in message 0 is empty"):
            model.encode(make_sample("s", [], asked))
        prompt = model.encode_prompt(conversation(False, False, empty))  # nobody knows the answer
        assert not len(prompt.spans.response)


def test_a_template_that_ends_each_text_needs_images_first() -> None:
    messages = [
        Message(role="user", text="what <image> is it?"),
        Message(role="assistant", text="a dog."),
    ]
    sample = make_sample("s", [tiny_image(0)], messages)
    with pytest.raises(SampleError, match=r"'<\|eot_id\|>' between two texts.*images.*before"):
        encoder_of("llama3-llava-next").encode(sample)
    assert encoder_of("llava-1.5").encode(sample)


def test_an_end_of_turn_that_also_stands_for_unknown_letters_is_an_end() -> None:
    processor, config = published_processor(PUBLISHED["qwen2-vl"])
    processor.tokenizer.unk_token = "<|im_end|>"  # as GPT-2's tokenizers have it
    model = SampleEncoder(processor, config)
    assert labels(model, model.encode(conversation()))[0] == "a dog.<|im_end|>"


def test_letters_that_a_tokenizer_does_not_know_are_refused() -> None:
    model = encoder_of("llava-1.5")
    for sample in (
        conversation(False, False, "d\u00e9j\u00e0"),
        conversation(False, False, "\u4f60"),
    ):
        with pytest.raises(SampleError, match=r"has \d characters or words.*not know \(<unk>\)"):
            model.encode(sample)


@pytest.mark.parametrize("name", ["template.jinja", "template.json"])
def test_a_template_that_is_no_regular_file_is_refused_unopened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a chat template.*named pipe"):
        text_rules(append_eos=True, chat_template=tmp_path / name)
