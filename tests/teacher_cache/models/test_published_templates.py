"""The templates of published checkpoints: what they render, and exactly which tokens are labels."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from teacher_cache.models.collate import EncodedSample
from teacher_cache.models.sample_encoder import SampleEncoder
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import EARLIER_TEXT_RULES, TextRules
from teacher_cache.schema.samples import Message, Sample, make_sample
from tests.support.published_templates import PUBLISHED, published_processor
from tests.support.tiny import tiny_image

SYSTEM, ASKED = "be short", ("what?", "why?")


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


def encoder_of(name: str, **rules: Any) -> SampleEncoder:
    """An encoder with the template and the tokens of a published checkpoint."""
    processor, config = published_processor(PUBLISHED[name])
    return SampleEncoder(processor, config, rules=TextRules(**rules))


def conversation(with_image: bool = False, with_system: bool = False, *answers: str) -> Sample:
    """A turn for each answer; the first question is about the image."""
    messages = [Message(role="system", text=SYSTEM)] if with_system else []
    for number, answer in enumerate(answers or ("a dog.", "5 legs")):
        image = "<image>\n" if with_image and number == 0 else ""
        messages += [Message(role="user", text=f"{image}{ASKED[number]}")]
        messages += [Message(role="assistant", text=answer)]
    return make_sample("s", [tiny_image(0)] if with_image else [], messages)


def spelled(model: SampleEncoder, ids: torch.Tensor) -> str:
    """The tokens' own spelling, with plain white space and one placeholder for each image."""
    text = "".join(model.processor.tokenizer.convert_ids_to_tokens(ids))
    for written, plain in (("\u2581", " "), ("\u0120", " "), ("\u010a", "\n")):
        text = text.replace(written, plain)
    image = model.processor.image_token
    return text.replace(image * 16, image)


def labels(model: SampleEncoder, encoded: EncodedSample) -> list[str]:
    """The label strings, one for each run of label positions."""
    runs: list[list[int]] = []
    for position in encoded.spans.response.tolist():
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return [spelled(model, encoded.inputs["input_ids"][run]) for run in runs]


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
