"""Locates the messages in the text that a chat template renders.

`locate` gives the character span of every user text and, for every assistant turn, the ends of the
generation prompt before it, of its text and of the turn. It finds texts by rendering the
conversation a second time with markers in place of the texts, so a text that also occurs in the
template ("user") is not confused with it. The template's text between markers is the same for all
conversations of one shape and may be cached. Refuses templates that reorder or rewrite a message,
and those that do not render a longer conversation by appending (generation would then see another
prompt than training).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Sample

Turn = dict[str, Any]
"""One message in the form of chat templates: its role and a list of image and text parts."""

Render = Callable[[list[Turn], bool], str]
"""Renders turns to text; the flag appends the generation prompt."""

TurnShape = tuple[bool | tuple[str, ...], ...]
"""What a marked rendering depends on: the generation prompt, then each turn's role and parts."""

Skeletons = dict[TurnShape, tuple[str, ...]]
"""By shape: one template's text before, between and after the messages; `locate` fills it."""

MAX_SKELETONS = 1024

_MARKER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """Characters of one assistant turn: generation begins at `start`, the text ends at
    `text_end`, and the template's suffix (an end-of-turn token) at `turn_end`."""

    start: int
    text_end: int
    turn_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """The rendered conversation, the spans of the user's texts, and the assistant's turns."""

    text: str
    instructions: tuple[tuple[int, int], ...]
    responses: tuple[Response, ...]


def to_turns(sample: Sample, system_prompt: str | None) -> list[Turn]:
    """Messages as lists of image and text parts.

    LLaVA's JSON has one newline between a placeholder and the text next to it; templates write
    their own, so it is removed. `system_prompt` comes first unless the sample has a system
    message.
    """
    turns: list[Turn] = []
    if system_prompt is not None and all(m.role != "system" for m in sample.messages):
        turns.append({"role": "system", "content": [_text_part(system_prompt)]})
    for message in sample.messages:
        pieces = message.text.split(IMAGE_PLACEHOLDER)
        content: list[Turn] = []
        for index, piece in enumerate(pieces):
            text = piece if index == 0 else piece.removeprefix("\n")
            text = text if index + 1 == len(pieces) else text.removesuffix("\n")
            if index > 0:
                content.append({"type": "image"})
            if text or len(pieces) == 1:
                content.append(_text_part(text))
        turns.append({"role": message.role, "content": content})
    return turns


def locate(
    turns: list[Turn],
    render: Render,
    add_generation_prompt: bool = False,
    skeletons: Skeletons | None = None,
) -> Rendering:
    """Render turns and find their texts; ValueError where the template makes that impossible.

    `skeletons` caches the marked rendering of each shape; it belongs to one template.
    """
    text = render(turns, add_generation_prompt)
    spans = _text_spans(turns, render, add_generation_prompt, text, skeletons)
    instructions: list[tuple[int, int]] = []
    responses: list[Response] = []
    for index, turn in enumerate(turns):
        own = [spans.pop(0) for part in turn["content"] if part["type"] == "text"]
        if turn["role"] == "user":
            instructions += own
        elif turn["role"] == "assistant":
            prompt = render(turns[:index], True)
            is_whole = index + 1 == len(turns) and not add_generation_prompt
            whole = text if is_whole else render(turns[: index + 1], False)
            (start, end) = own[0]
            if not text.startswith(prompt) or not text.startswith(whole):
                raise ValueError(
                    f"the chat template writes turn {index} differently once more turns follow "
                    "(or does not open it with its generation prompt); use a template whose text "
                    "only grows"
                )
            if not len(prompt) <= start <= end <= len(whole):
                raise ValueError(
                    f"the text of turn {index} stands at characters {start}..{end}, outside its "
                    f"turn at {len(prompt)}..{len(whole)}"
                )
            responses.append(Response(start=len(prompt), text_end=end, turn_end=len(whole)))
    return Rendering(text=text, instructions=tuple(instructions), responses=tuple(responses))


def _text_part(text: str) -> Turn:
    return {"type": "text", "text": text}


def _marked(turns: list[Turn]) -> list[Turn]:
    """The same turns with a numbered marker in place of each text."""
    number = 0
    marked: list[Turn] = []
    for turn in turns:
        content: list[Turn] = []
        for part in turn["content"]:
            if part["type"] == "text":
                content.append(_text_part(f"\ue000{number}\ue001"))
                number += 1
            else:
                content.append(part)
        marked.append({"role": turn["role"], "content": content})
    return marked


def _text_spans(
    turns: list[Turn],
    render: Render,
    add_generation_prompt: bool,
    text: str,
    skeletons: Skeletons | None,
) -> list[tuple[int, int]]:
    """Character spans of all text parts of `text`, along a kept skeleton or a new one."""
    texts: list[str] = [p["text"] for t in turns for p in t["content"] if p["type"] == "text"]
    shape = _shape(turns, add_generation_prompt)
    if skeletons is not None and shape in skeletons:
        try:
            return _read_along(texts, text, skeletons[shape])
        except ValueError:  # the template may write the date: render again before refusing
            del skeletons[shape]
    skeleton = _skeleton(render(_marked(turns), add_generation_prompt), len(texts))
    spans = _read_along(texts, text, skeleton)
    if skeletons is not None:
        if len(skeletons) >= MAX_SKELETONS:
            skeletons.clear()
        skeletons[shape] = skeleton
    return spans


def _shape(turns: list[Turn], add_generation_prompt: bool) -> TurnShape:
    shapes = [(t["role"], *(part["type"] for part in t["content"])) for t in turns]
    return (add_generation_prompt, *shapes)


def _skeleton(marked: str, num_texts: int) -> tuple[str, ...]:
    """What stands around the markers: one piece more than there are texts."""
    pieces = _MARKER.split(marked)
    numbers = [int(number) for number in pieces[1::2]]
    if numbers != list(range(num_texts)):
        raise ValueError(
            f"the chat template writes the {num_texts} texts of the conversation in the order "
            f"{numbers}; each must appear once, in order"
        )
    return tuple(pieces[0::2])


def _read_along(texts: Sequence[str], text: str, skeleton: Sequence[str]) -> list[tuple[int, int]]:
    """Character spans of `texts` in `text`, by reading it along the skeleton."""
    spans: list[tuple[int, int]] = []
    position = len(skeleton[0])
    if not text.startswith(skeleton[0]):
        raise ValueError("the chat template's opening depends on what the messages say")
    for number, (wanted, control) in enumerate(zip(texts, skeleton[1:], strict=True)):
        last = number + 1 == len(texts)
        for candidate in (wanted, wanted.strip()):
            end = position + len(candidate)
            rest = text[end:] == control if last else text.startswith(control, end)
            if text.startswith(candidate, position) and rest:
                break
        else:
            raise ValueError(
                f"the chat template changes the text {wanted[:40]!r}; it cannot be found in "
                f"{text[position : position + 60]!r}"
            )
        spans.append((position, end))
        position = end + len(control)
    return spans
