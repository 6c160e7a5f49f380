"""Locates the messages in the text that a chat template renders.

`locate` finds the text of every message, and of every assistant turn what the model must generate.
It renders the conversation a second time with markers in place of the texts, so a text that also
occurs in the template ("user") is not confused with it. The template's text between markers is the
same for all conversations of one shape and may be cached.

What the model must generate begins where the generation prompt ends: the prompt of the turn is
compared with what the template writes before the turn's text. Where the two differ in white space
(llava-onevision) or in a thinking block that only the prompt has (Qwen3), it begins with the text.
Refuses templates that reorder, repeat, drop or rewrite a message, whose prompt is another than what
precedes the text, or that show other earlier turns in the prompt than in training.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Sample

Turn = dict[str, Any]
"""One message in the form of chat templates: its role and a list of image and text parts."""

Render = Callable[[list[Turn], bool], str]
"""Renders turns to text; the flag appends the generation prompt."""

FindMarks = Callable[[list[Turn]], list[tuple[int, int]]]
"""The spans of the rendering that the template marks with `{% generation %}`."""

TurnShape = tuple[bool | tuple[str, ...], ...]
"""What a marked rendering depends on: the generation prompt, then each turn's role and parts."""

MAX_SKELETONS = 1024

_MARKER = re.compile("\ue000([0-9]+)\ue001")
_THINKING = re.compile("<think>(</think>)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantTurn:
    """The template's characters around an assistant's text that belong to the turn.

    `lead`: those before the text that the model generates. `tail`: those behind it up to the end
    of the turn. `is_learnt` is False where the template marks other turns for training.
    """

    lead: int
    tail: int
    is_learnt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The template's text before, between and after the messages of one shape."""

    pieces: tuple[str, ...]
    turns: tuple[AssistantTurn, ...]


Skeletons = dict[TurnShape, Skeleton]
"""By shape, what one template writes; `locate` fills it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """Characters of one assistant turn: generation begins at `start`, the text ends at
    `text_end`, and the template's suffix (an end-of-turn token) at `turn_end`."""

    start: int
    text_end: int
    turn_end: int
    is_learnt: bool = True


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
    find_marks: FindMarks | None = None,
    end_of_turn: str | None = None,
) -> Rendering:
    """Render turns and find their texts; ValueError where the template makes that impossible.

    `skeletons` caches what the template writes around each shape; it belongs to one template.
    With `find_marks`, assistant turns outside the template's marks are not learnt. `end_of_turn`
    is the token with which the template ends turns; it must not stand inside a message.
    """
    text = render(turns, add_generation_prompt)
    texts = texts_of(turns)
    shape = _shape(turns, add_generation_prompt)
    skeleton = None if skeletons is None else skeletons.get(shape)
    spans: list[tuple[int, int]] | None = None
    if skeleton is not None:
        try:
            spans = _read_along(texts, text, skeleton.pieces)
        except ValueError:  # the template may write the date: render again before refusing
            skeleton = None
    if skeleton is None or spans is None:
        skeleton = _skeleton(turns, render, add_generation_prompt, find_marks)
        _refuse_ends_inside(turns, skeleton.pieces, end_of_turn)
        spans = _read_along(texts, text, skeleton.pieces)
        if skeletons is not None:
            if len(skeletons) >= MAX_SKELETONS:
                skeletons.clear()
            skeletons[shape] = skeleton
    instructions: list[tuple[int, int]] = []
    responses: list[Response] = []
    around = iter(skeleton.turns)
    for turn in turns:
        own = [spans.pop(0) for part in turn["content"] if part["type"] == "text"]
        if turn["role"] == "user":
            instructions += own
        elif turn["role"] == "assistant":
            (start, end), edges = own[0], next(around)
            response = Response(
                start=start - edges.lead,
                text_end=end,
                turn_end=end + edges.tail,
                is_learnt=edges.is_learnt,
            )
            responses.append(response)
    return Rendering(text=text, instructions=tuple(instructions), responses=tuple(responses))


def append_to_turns(rendering: Rendering, token: str, ends: Callable[[str], bool]) -> Rendering:
    """Write a token directly behind the text of each assistant turn that the template does not end.

    `ends` says whether the template's text behind a message ends the turn.
    """
    text, shift = rendering.text, 0
    instructions = list(rendering.instructions)
    responses: list[Response] = []
    for response in rendering.responses:
        at, turn_end = response.text_end + shift, response.turn_end + shift
        added = 0 if ends(text[at:turn_end]) else len(token)
        if added:
            text = text[:at] + token + text[at:]
        moved = replace(
            response,
            start=response.start + shift,
            text_end=at,
            turn_end=turn_end + added,
        )
        responses.append(moved)
        instructions = [
            (start + added, end + added) if start >= at else (start, end)
            for start, end in instructions
        ]
        shift += added
    return Rendering(text=text, instructions=tuple(instructions), responses=tuple(responses))


def texts_of(turns: list[Turn]) -> list[str]:
    """The text parts of all turns, in order."""
    return [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]


def marked(turns: list[Turn]) -> list[Turn]:
    """The same turns with a numbered marker in place of each text."""
    number = 0
    found: list[Turn] = []
    for turn in turns:
        content: list[Turn] = []
        for part in turn["content"]:
            if part["type"] == "text":
                content.append(_text_part(f"\ue000{number}\ue001"))
                number += 1
            else:
                content.append(part)
        found.append({"role": turn["role"], "content": content})
    return found


def split_at_markers(rendered: str, num_texts: int) -> tuple[str, ...]:
    """What stands around the markers: one piece more than there are texts."""
    pieces = _MARKER.split(rendered)
    numbers = [int(number) for number in pieces[1::2]]
    if numbers != list(range(num_texts)):
        raise ValueError(
            f"the chat template writes the {num_texts} texts of the conversation in the order "
            f"{numbers}; each must appear once, in order. Give another template with "
            "--chat-template FILE"
        )
    return tuple(pieces[0::2])


def _text_part(text: str) -> Turn:
    return {"type": "text", "text": text}


def _shape(turns: list[Turn], add_generation_prompt: bool) -> TurnShape:
    shapes = [(t["role"], *(part["type"] for part in t["content"])) for t in turns]
    return (add_generation_prompt, *shapes)


def _skeleton(
    turns: list[Turn], render: Render, add_generation_prompt: bool, find_marks: FindMarks | None
) -> Skeleton:
    """What the template writes around these turns, from renderings with markers."""
    turns = marked(turns)
    whole = render(turns, add_generation_prompt)
    pieces = split_at_markers(whole, len(texts_of(turns)))
    marks = [] if find_marks is None else find_marks(turns)
    found: list[AssistantTurn] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        number = len(texts_of(turns[:index]))
        prompt = split_at_markers(render(turns[:index], True), number)
        lead = _lead(pieces[number], prompt[-1])
        if prompt[:-1] != pieces[:number] or lead is None:
            raise ValueError(
                f"the chat template writes turn {index} differently once more turns follow (or "
                f"does not open it with its generation prompt): the prompt ends with "
                f"{prompt[-1][-40:]!r}, the text follows {pieces[number][-40:]!r}. Give another "
                "template with --chat-template FILE"
            )
        alone = split_at_markers(render(turns[: index + 1], False), number + 1)[-1]
        at = whole.index(f"\ue000{number}\ue001")
        found.append(
            AssistantTurn(
                lead=lead,
                tail=_common_length(alone, pieces[number + 1]),
                is_learnt=find_marks is None or any(a <= at < b for a, b in marks),
            )
        )
    return Skeleton(pieces=pieces, turns=tuple(found))


def _lead(header: str, prompt: str) -> int | None:
    """Characters at the end of `header`, which precedes a text, that follow the generation prompt.

    None where the header does not agree with the prompt.
    """
    if header.startswith(prompt):
        return len(header) - len(prompt)
    bare_header, bare_prompt = "".join(header.split()), "".join(prompt.split())
    if bare_header.startswith(bare_prompt):  # they differ in white space
        ends = [at + 1 for at, character in enumerate(header) if not character.isspace()]
        behind = header[ends[len(bare_prompt) - 1] if bare_prompt else 0 :]
        return len(behind.lstrip())
    more = bare_prompt.removeprefix(bare_header)
    return 0 if more != bare_prompt and _THINKING.fullmatch(more) else None


def _common_length(first: str, second: str) -> int:
    """Characters with which both begin."""
    shorter = min(len(first), len(second))
    differ = (at for at in range(shorter) if first[at] != second[at])
    return next(differ, shorter)


def _refuse_ends_inside(turns: list[Turn], pieces: Sequence[str], end_of_turn: str | None) -> None:
    """Refuse a template that ends a turn between two texts of one message."""
    number = 0
    for turn in turns:
        count = len(texts_of([turn]))
        for piece in pieces[number + 1 : number + count]:
            if end_of_turn is not None and end_of_turn in piece:
                raise ValueError(
                    f"the chat template writes {end_of_turn!r} between two texts of one message; "
                    "put the images of the message before its text"
                )
        number += count


def _read_along(texts: Sequence[str], text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Character spans of `texts` in `text`, by reading it along the pieces between them."""
    spans: list[tuple[int, int]] = []
    position = len(pieces[0])
    if not text.startswith(pieces[0]):
        raise ValueError("the chat template's opening depends on what the messages say")
    for number, (wanted, control) in enumerate(zip(texts, pieces[1:], strict=True)):
        last = number + 1 == len(texts)
        trimmed = (wanted.strip(), wanted.lstrip(), wanted.rstrip())
        for candidate in (wanted, *trimmed, *(wanted.strip("\n"), wanted.lstrip("\n"))):
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
