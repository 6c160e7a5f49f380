"""Finding messages in what a chat template made of them, and refusing templates that hide them."""

from typing import Any

import jinja2
import pytest

from teacher_cache.encoding.chat_rendering import (
    Render,
    Skeletons,
    Turn,
    append_to_turns,
    locate,
    to_turns,
)
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, make_sample
from tests.support.tiny import template

CHATML = template("<image>")
STOCK_LLAVA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _render(source: str) -> Render:
    compiled = jinja2.Environment().from_string(source)

    def render(turns: list[Turn], add_generation_prompt: bool) -> str:
        return compiled.render(messages=turns, add_generation_prompt=add_generation_prompt)

    return render


def _turns(*texts: str, system: str | None = None) -> list[Turn]:
    roles: list[Any] = ["user", "assistant"] * (len(texts) // 2)
    images = [b""] * sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    messages = [Message(role=r, text=t) for r, t in zip(roles, texts, strict=True)]
    return to_turns(make_sample("s", images, messages), system)


def test_newlines_next_to_a_placeholder_are_the_writers_not_the_messages() -> None:
    [turn, _] = _turns("<image>\nwhat\n?\n<image>\n", "that")
    image: Turn = {"type": "image"}
    assert turn["content"] == [image, {"type": "text", "text": "what\n?"}, image]


def test_texts_that_look_like_the_templates_own_words_are_found() -> None:
    turns = _turns("user", "assistant", "<|im_end|>\n", "", system="user")
    rendering = locate(turns, _render(CHATML))
    texts = [rendering.text[start:end] for start, end in rendering.instructions]
    assert texts == ["user", "<|im_end|>\n"]
    answers = [rendering.text[r.start : r.text_end] for r in rendering.responses]
    ends = [rendering.text[r.text_end : r.turn_end] for r in rendering.responses]
    assert answers == ["assistant", ""]
    assert ends == ["<|im_end|>\n"] * 2


def test_a_response_begins_where_generation_does() -> None:
    rendering = locate(_turns("<image>\nwhat?", "a dog"), _render(STOCK_LLAVA))
    assert rendering.text == "USER: <image>\nwhat? ASSISTANT: a dog "
    [response] = rendering.responses
    assert rendering.text[response.start : response.text_end] == " a dog"


def test_a_template_may_trim_messages() -> None:
    trimming = CHATML.replace("part['text']", "part['text'] | trim")
    rendering = locate(_turns("  what? ", "a dog\n"), _render(trimming))
    [(start, end)] = rendering.instructions
    assert rendering.text[start:end] == "what?"


def test_conversations_of_one_shape_share_their_marked_rendering() -> None:
    rendered: list[int] = []

    def counting(turns: list[Turn], add_generation_prompt: bool) -> str:
        rendered.append(len(turns))
        return _render(CHATML)(turns, add_generation_prompt)

    skeletons: Skeletons = {}
    for first, second in (("what?", "a dog"), ("<|im_end|>", ""), ("\ue0000\ue001", "user\n")):
        turns = _turns(first, second)
        assert locate(turns, counting, skeletons=skeletons) == locate(turns, _render(CHATML))
    assert rendered == [2, 2, 1, 2, 2, 2]  # with markers, as a prompt and alone: once for all
    other = _turns("what?", "a dog", system="user")
    assert locate(other, counting, skeletons=skeletons) == locate(other, _render(CHATML))
    assert len(skeletons) == 2


def test_a_template_that_writes_the_date_outlives_its_shape() -> None:
    skeletons: Skeletons = {}
    for date in ("1 May", "2 May"):
        render = _render(date + CHATML)
        rendering = locate(_turns("what?", "a dog"), render, skeletons=skeletons)
        assert rendering == locate(_turns("what?", "a dog"), render)


def test_a_kept_shape_refuses_what_a_new_one_refuses() -> None:
    shouting = _render(CHATML.replace("part['text']", "part['text'] | replace('dog', 'DOG')"))
    skeletons: Skeletons = {}
    locate(_turns("what?", "a cat"), shouting, skeletons=skeletons)
    with pytest.raises(ValueError, match="changes the text 'a dog'"):
        locate(_turns("what?", "a dog"), shouting, skeletons=skeletons)


def test_what_only_the_last_turn_has_belongs_to_that_turn() -> None:
    source = CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}"
    rendering = locate(_turns("what?", "a dog", "why?", "no reason"), _render(source))
    ends = [rendering.text[r.text_end : r.turn_end] for r in rendering.responses]
    assert [end[:11] for end in ends] == ["<|im_end|>\n"] * 2
    assert ends[1] == "<|im_end|>\n<eos>"


@pytest.mark.parametrize(
    ("written", "generated"),
    [
        ("assistant\n", "a dog"),  # the prompt itself
        ("assistant \n", "a dog"),
        ("assistant\n\n\n", "\n\na dog"),  # the prompt, then newlines
        ("assistant", "a dog"),
        ("assistant \n<x> ", "<x> a dog"),
    ],
)
def test_generation_begins_where_the_prompt_ends(written: str, generated: str) -> None:
    source = CHATML.replace(
        "<|im_start|>{{ message['role'] }}\n",
        "<|im_start|>{{ '" + written + "' if message['role'] == 'assistant' else 'user\n' }}",
    )
    rendering = locate(_turns("what?", "a dog"), _render(source))
    [response] = rendering.responses
    assert rendering.text[response.start : response.text_end] == generated
    assert rendering.text[: response.text_end].endswith("a dog")


@pytest.mark.parametrize("thinking", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_a_prompt_may_have_a_thinking_block_that_the_turn_lacks(thinking: str) -> None:
    asking = "%}<|im_start|>assistant\n"
    rendering = locate(_turns("what?", "a"), _render(CHATML.replace(asking, asking + thinking)))
    [response] = rendering.responses
    assert rendering.text[response.start : response.text_end] == "a"


def test_a_token_is_written_behind_the_turns_that_lack_an_end() -> None:
    rendering = locate(_turns("<image>\nwhat?", "a dog", "why?", "no"), _render(STOCK_LLAVA))
    found = append_to_turns(rendering, "</s>", lambda text: False)
    assert found.text == "USER: <image>\nwhat? ASSISTANT: a dog</s> USER: why? ASSISTANT: no</s> "
    said = [found.text[start:end] for start, end in found.instructions]
    assert said == ["what?", "why?"]
    assert [found.text[r.start : r.turn_end] for r in found.responses] == [
        " a dog</s> ",
        " no</s> ",
    ]
    assert append_to_turns(rendering, "</s>", lambda text: True) == rendering


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("part['text']", "part['text'] | upper"), "changes the text"),
        (CHATML.replace("part['text']", "'hello'"), "each must appear once"),
        (CHATML.replace("in messages", "in messages | reverse"), "each must appear once"),
        (CHATML.replace("%}<|im_start|>assistant\n", "%}<|im_start|>model\n"), "differently"),
        (CHATML.replace("<|im_start|>{{ message['role'] }}\n", ""), "differently"),
        ("{{ messages | length }}" + CHATML, "differently"),
    ],
)
def test_templates_that_hide_messages_are_refused(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        locate(_turns("what?", "a dog", "why?", "no reason"), _render(source))
