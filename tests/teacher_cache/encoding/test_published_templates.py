"""The templates of published checkpoints: what they render, and exactly which tokens are labels."""

from dataclasses import dataclass

import pytest

from teacher_cache.encoding import chat_template
from teacher_cache.encoding.control_tokens import ControlTokens
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import EARLIER_TEXT_RULES
from teacher_cache.schema.samples import Message, make_sample
from tests.support.labels import conversation, encoder_of, labels, spelled
from tests.support.published_templates import PUBLISHED, published_processor
from tests.support.tiny import tiny_image


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a conversation of two turns becomes: its texts, and the label strings of each turn.

    `opening` is the text without and with a system message, `first` the first question without and
    with an image, `rest` all that follows, `prompt` the end of a prompt for the second answer.
    """

    opening: tuple[str, str]
    first: tuple[str, str]
    rest: str
    labels: list[str]
    prompt: str
    appended: bool = False


def _chatml(
    opening: str, image: str, between: str, space: str = "\n", system: str | None = None
) -> Expected:
    """ChatML with `space` behind roles and `between` behind ends; prompts always have newlines."""
    stop = f"<|im_end|>{between}"
    role = {name: f"<|im_start|>{name}{space}" for name in ("system", "user", "assistant")}
    asked = f"{stop}{role['user']}why?{stop}"
    return Expected(
        opening=(opening, f"{system or ''}{role['system']}be short{stop}"),
        first=(f"{role['user']}what?", f"{role['user'].removesuffix(space)}{image}what?"),
        rest=f"{stop}{role['assistant']}a dog.{asked}{role['assistant']}5 legs{stop}",
        labels=["a dog.<|im_end|>", "5 legs<|im_end|>"],
        prompt=f"a dog.{asked}<|im_start|>assistant\n",
    )


_LLAVA = Expected(
    opening=("<s> ", "<s> be short "),
    first=("USER: what? ", "USER: <image>\nwhat? "),
    rest="ASSISTANT: a dog.</s> USER: why? ASSISTANT: 5 legs</s> ",
    labels=[" a dog.</s>", " 5 legs</s>"],
    prompt=" a dog.</s> USER: why? ASSISTANT:",
    appended=True,
)
_QWEN_IMAGE = "\n<|vision_start|><|image_pad|><|vision_end|>"
_QWEN2 = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_END = "<end_of_utterance>\n"


def _utterances(opening: str) -> Expected:
    stop = "<end_of_utterance>"
    return Expected(
        opening=(opening, f"{opening}System: be short{_END}"),
        first=("User: what?", "User:<image>what?"),
        rest=f"{_END}Assistant: a dog.{_END}User: why?{_END}Assistant: 5 legs{_END}",
        labels=[f" a dog.{stop}", f" 5 legs{stop}"],
        prompt=f" a dog.{_END}User: why?{_END}Assistant:",
    )


def _mistral(stop: str, appended: bool) -> Expected:
    return Expected(
        opening=("<s> ", "<s> <<SYS>>\nbe short\n<</SYS>>\n\n"),
        first=("[INST] what?", "[INST] <image>\nwhat?"),
        rest=f" [/INST] a dog.{stop} [INST] why? [/INST] 5 legs{stop} ",
        labels=[" a dog.</s>", " 5 legs</s>"],
        prompt=f" a dog.{stop} [INST] why? [/INST]",
        appended=appended,
    )


def _llama3(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


EXPECTED: dict[str, Expected] = {
    "llava-1.5": _LLAVA,
    "llava-v1.6-vicuna": _LLAVA,
    "llava-v1.6-mistral": _mistral("</s>", appended=False),
    "llava-v1.6-mistral, first": _mistral("</s><\\s>", appended=True),
    "llava-v1.6-34b": _chatml(
        "<|startoftext|><|im_start|>system\nAnswer the questions.<|im_end|>",
        "\n<image>\n",
        "",
        system="<|startoftext|>",
    ),
    "llama3-llava-next": Expected(
        opening=("<|begin_of_text|>", f"<|begin_of_text|>{_llama3('system')}\nbe short<|eot_id|>"),
        first=(f"{_llama3('user')}\nwhat?", f"{_llama3('user')}<image>\nwhat?"),
        rest=(
            f"<|eot_id|>{_llama3('assistant')}\na dog.<|eot_id|>{_llama3('user')}\nwhy?<|eot_id|>"
            f"{_llama3('assistant')}\n5 legs<|eot_id|>"
        ),
        labels=["a dog.<|eot_id|>", "5 legs<|eot_id|>"],
        prompt=f"a dog.<|eot_id|>{_llama3('user')}\nwhy?<|eot_id|>{_llama3('assistant')}",
    ),
    "llava-onevision": _chatml("", " <image>\n", "", space=" \n"),
    "llava-onevision, converted": _chatml("", "\n<image>\n", "\n"),
    "qwen2-vl": _chatml(_QWEN2, _QWEN_IMAGE, "\n"),
    "qwen2.5-vl": _chatml(_QWEN2, _QWEN_IMAGE, "\n"),
    "qwen3-vl": _chatml("", _QWEN_IMAGE, "\n"),
    "internvl": _chatml("", "\n<IMG_CONTEXT>\n", "\n"),
    "idefics3": _utterances("<|begin_of_text|>"),
    "smolvlm": _utterances("<|im_start|>"),
}
VARIANTS = [(image, system) for image in (False, True) for system in (False, True)]


@pytest.mark.parametrize("name", EXPECTED)
def test_labels_are_what_the_model_must_generate(name: str) -> None:
    model, wanted = encoder_of(name), EXPECTED[name]
    for image, system in VARIANTS:
        encoded = model.encode(conversation(image, system))
        text = wanted.opening[system] + wanted.first[image] + wanted.rest
        assert spelled(model, encoded.inputs["input_ids"]) == text
        assert labels(model, encoded) == wanted.labels
        assert len(encoded.spans.vision) == (16 if image else 0)
    assert model.rules.append_eos == wanted.appended


@pytest.mark.parametrize("name", EXPECTED)
def test_a_prompt_ends_where_its_answer_begins(name: str) -> None:
    model, wanted = encoder_of(name), EXPECTED[name]
    for image, system in VARIANTS:
        encoded = model.encode_prompt(conversation(image, system))
        text = spelled(model, encoded.inputs["input_ids"])
        assert text.startswith(wanted.opening[system] + wanted.first[image])
        assert text.endswith(wanted.prompt)
    stop = model.end_of_turn_id
    whole = model.encode(conversation())
    assert stop == int(whole.spans.content_ids[whole.spans.is_response][-1])


def test_a_question_may_be_an_image_alone() -> None:
    messages = [Message(role="user", text="<image>"), Message(role="assistant", text="a dog.")]
    for name in EXPECTED:
        model = encoder_of(name)
        encoded = model.encode(make_sample("s", [tiny_image(0)], messages))
        assert labels(model, encoded) == EXPECTED[name].labels[:1]


def test_qwen3s_text_template_gets_strings_and_prompts_without_thinking() -> None:
    model = encoder_of("qwen3")
    encoded = model.encode(conversation(False, True))
    text = spelled(model, encoded.inputs["input_ids"])
    assert text == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\na dog.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n5 legs<|im_end|>\n"
    )
    assert labels(model, encoded) == ["a dog.<|im_end|>", "5 legs<|im_end|>"]
    prompt = model.encode_prompt(conversation()).inputs["input_ids"]
    assert spelled(model, prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert labels(model, model.encode(conversation(False, False, "\na dog.\n"))) == [
        "a dog.\n<|im_end|>"
    ]


def test_a_template_without_a_place_for_images_refuses_them() -> None:
    with pytest.raises(SampleError, match=r"one string and has no place for images.*--chat-temp"):
        encoder_of("qwen3").encode(conversation(True))
    model = encoder_of("llava-1.5", template=PUBLISHED["qwen3-vl"].template.replace("image", "no"))
    with pytest.raises(SampleError, match=r"writes 0 image placeholders for 1 images.*--chat-t"):
        model.encode(conversation(True))


def test_what_a_thinking_prompt_leaves_open_is_learnt() -> None:
    model = encoder_of("qwen3-vl-thinking")
    for image in (False, True):
        encoded = model.encode(conversation(image))
        assert labels(model, encoded) == ["a dog.<|im_end|>", "</think>\n\n5 legs<|im_end|>"]
    prompt = model.encode_prompt(conversation()).inputs["input_ids"]
    assert spelled(model, prompt).endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("name", [name for name, wanted in EXPECTED.items() if wanted.appended])
def test_nothing_is_appended_where_it_is_switched_off(name: str) -> None:
    model = encoder_of(name, append_eos=False)
    assert labels(model, model.encode(conversation())) == [" a dog.", " 5 legs"]
    assert "</s>" not in spelled(model, model.encode(conversation()).inputs["input_ids"])
    assert model.end_of_turn_id is None
    assert not model.rules.append_eos


def test_what_is_appended_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    chat_template.say_once.cache_clear()
    for _ in range(3):
        encoder_of("llava-1.5")
    encoder_of("qwen2-vl")
    encoder_of("llava-1.5", append_eos=False)
    said = [record.message for record in caplog.records if "append" in record.message]
    assert len(said) == 1
    assert "</s> is appended" in said[0]
    assert "--no-append-eos" in said[0]


def test_turns_without_any_end_are_said(caplog: pytest.LogCaptureFixture) -> None:
    chat_template.say_once.cache_clear()
    processor, config = published_processor(PUBLISHED["llava-1.5"])
    processor.tokenizer.eos_token = None
    model = SampleEncoder(processor, config)
    assert labels(model, model.encode(conversation())) == [" a dog.", " 5 legs"]
    assert not model.rules.append_eos
    [record] = caplog.records
    assert "does not learn to stop" in record.message


def test_only_turns_that_the_template_leaves_open_get_an_end() -> None:
    last = PUBLISHED["llava-1.5"].template + "{% if not add_generation_prompt %}</s>{% endif %}"
    model = encoder_of("llava-1.5", template=last)
    assert labels(model, model.encode(conversation())) == [" a dog.</s>", " 5 legs </s>"]
    assert model.rules.append_eos


def test_the_beginning_of_the_next_turn_ends_no_turn() -> None:
    open_turns = PUBLISHED["qwen3-vl"].template.replace("<|im_end|>", "")
    last = open_turns + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    model = encoder_of("qwen3-vl", template=last, append_eos=False)
    assert labels(model, model.encode(conversation())) == ["a dog.", "5 legs\n<|im_end|>"]


# What the labels were before rules were recorded, where they differ from today's.
EARLIER = {
    "llava-1.5": [" a dog.", " 5 legs"],
    "llava-v1.6-vicuna": [" a dog.", " 5 legs"],
    "llava-v1.6-mistral, first": [" a dog.", " 5 legs"],
    "llama3-llava-next": ["\n\n\na dog.", "\n\n\n5 legs"],
    "idefics3": [" a dog.", " 5 legs"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_earlier_caches_keep_their_labels(name: str) -> None:
    processor, config = published_processor(PUBLISHED[name])
    model = SampleEncoder(processor, config, rules=EARLIER_TEXT_RULES)
    assert model.rules == EARLIER_TEXT_RULES
    wanted = EARLIER.get(name, EXPECTED[name].labels)
    assert labels(model, model.encode(conversation())) == wanted


def test_turns_outside_the_templates_marks_are_not_learnt() -> None:
    last = PUBLISHED["llava-onevision"].template.replace(
        "m.role == 'assistant'", "m.role == 'assistant' and loop.last"
    )
    # loop is that of the texts inside a message; the message's own must be named
    last = last.replace("{% for m in messages %}", "{% for m in messages %}{% set outer = loop %}")
    model = encoder_of("llava-onevision", template=last.replace("and loop.last", "and outer.last"))
    encoded = model.encode(conversation())
    assert labels(model, encoded) == ["5 legs<|im_end|>"]
    said = spelled(model, encoded.spans.content_ids)
    assert said == "what?why?5 legs<|im_end|>"  # the other is context, as a system message is


def test_a_token_that_begins_in_the_prompt_is_neither_label_nor_content() -> None:
    model = encoder_of("qwen2-vl")
    encoded = model.encode(conversation(False, False, "\na dog."))
    assert "assistant\n\na dog." in spelled(model, encoded.inputs["input_ids"])
    assert labels(model, encoded) == ["a dog.<|im_end|>"]
    assert spelled(model, encoded.spans.content_ids) == "what?a dog.<|im_end|>"


def test_a_message_that_the_template_rewrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_of("qwen3")
    monkeypatch.setattr(ControlTokens, "require_plain", lambda *_: None)
    with pytest.raises(SampleError, match=r"changes the text '<think>why</think>a dog\.'"):
        model.encode(conversation(False, False, "<think>why</think>a dog.", "5 legs"))


def test_templates_that_want_one_role_as_a_string_get_it() -> None:
    template = PUBLISHED["qwen3-vl"].template
    wants = "{% if m.role == 'system' %}{{ m.content | trim }}{% elif m.content is string %}"
    model = encoder_of("qwen3-vl", template=template.replace("{% if m.content is string %}", wants))
    text = spelled(model, model.encode(conversation(True, True)).inputs["input_ids"])
    assert text.startswith("<|im_start|>system\nbe short<|im_end|>")
    assert "<|image_pad|>" in text


def test_a_template_for_single_turns_refuses_the_second_only() -> None:
    single = "{% if messages | length > 2 %}{{ raise_exception('one turn, please') }}{% endif %}"
    model = encoder_of("llava-1.5", template=single + PUBLISHED["llava-1.5"].template)
    assert labels(model, model.encode(conversation(True, False, "a dog."))) == [" a dog.</s>"]
    with pytest.raises(SampleError, match="one turn, please"):
        model.encode(conversation())


def test_templates_that_show_no_text_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"cannot be used.*in the order \[\].*--chat-template"):
        encoder_of("llava-1.5", template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ValueError, match=r"cannot be used.*no chats today"):
        encoder_of("llava-1.5", template="{{ raise_exception('no chats today') }}")


def test_templates_that_write_the_date_write_a_fixed_one() -> None:
    dated = "{{ 'Today: ' ~ strftime_now('%d %b %Y') ~ '. ' }}" + PUBLISHED["llava-1.5"].template
    default = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    llama = default + "{% endif %}{{ 'Today: ' ~ date_string ~ '. ' }}"
    for template in (dated, llama + PUBLISHED["llava-1.5"].template):
        model = encoder_of("llava-1.5", template=template)
        text = spelled(model, model.encode(conversation()).inputs["input_ids"])
        assert text.startswith("<s> Today: 26 Jul 2024. USER: what?")
        assert labels(model, model.encode(conversation())) == [" a dog.</s>", " 5 legs</s>"]
