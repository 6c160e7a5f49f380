"""Reads the conversation of one entry, in any of the layouts that data sets have.

    conversations, messages   turns: LLaVA, ShareGPT, OpenAI and the hub's lists of parts
    texts                     pairs of user and assistant texts: the_cauldron
    prompt, completion        TRL, as texts or as turns
    question, answer(s)       question answering, with choices and several answers
    caption, text             a caption of the images

docs/data.md has an example of each. The first layout whose fields are there is read. An image
stands where a text has `<image>` or a list of parts has an image. The layouts below `messages` have
no such marks of their own: there the images come first. ValueError names what was found.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.sources.media import unread_media
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Role

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_CATEGORY_FIELDS = ("category", "question_type", "answer_type", "subject", "subfield")
_REQUEST = "Answer with the option's letter from the given choices directly."
_PREFERENCES = ("chosen", "rejected")
_CALLS = ("tool_calls", "function_call")
_LOSS = ("loss", "weight", "loss_weight")
_TURN_READ = {"from", "role", "value", "content", *_LOSS}
TURN_FIELDS = frozenset(
    {"conversations", "messages", "texts", "prompt", "completion", "question", "answer", "answers"}
    | {"choices", "options", "caption", "text", "system", *_CATEGORY_FIELDS, *_PREFERENCES}
)
"""Every field that `read_conversation` may read."""
MARKED_LAYOUTS = ("conversations", "messages")
"""The layouts whose texts mark the place of each image."""
LAYOUTS = (*MARKED_LAYOUTS, "texts", "prompt", "question", "caption", "text")
"""The field that tells each layout, in the order in which they are looked for."""


@dataclass(kw_only=True)
class Conversation:
    """What an entry says: its messages, its images in the order of their places, its answer key."""

    messages: list[Message] = field(default_factory=list[Message])
    images: list[Any] = field(default_factory=list[Any])
    """As the entry stores each: a path, encoded bytes, or a struct of them."""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    category: str | None = None
    unread: list[str] = field(default_factory=list[str])
    """Fields of turns and parts that look like media and are not read."""


def read_conversation(entry: Mapping[str, Any], listed: Sequence[Any]) -> Conversation:
    """Read the turns of an entry; `listed` are the images of its image fields, in order.

    ValueError for an entry without turns, unknown roles and parts, and images that have no place.
    """
    layout = next((name for name in LAYOUTS if entry.get(name) is not None), None)
    if layout is None:
        raise ValueError(
            f"found the fields {', '.join(sorted(entry))}; expected one of {', '.join(LAYOUTS)}"
        )
    if pairs := [name for name in _PREFERENCES if entry.get(name) is not None]:
        raise ValueError(
            f"found {' and '.join(pairs)}; preference pairs are not read: write the answer to "
            "learn as the last turn and drop them"
        )
    found = Conversation(category=_category(entry))
    turns = _turns(layout, entry, found, bool(listed))
    if isinstance(entry.get("system"), str) and not any(_role(t) == "system" for t in turns):
        turns = [{"role": "system", "content": entry["system"]}, *turns]
    reader = _Reader(listed)
    for number, turn in enumerate(turns):
        found.messages.append(reader.message(turn, number))
    found.images = reader.images
    found.unread = reader.unread
    if listed and not found.images and layout not in MARKED_LAYOUTS:
        _put_first(found, listed)
    elif reader.taken != len(listed) and not reader.by_index:
        raise ValueError(
            f"found {reader.taken} {IMAGE_PLACEHOLDER} placeholders for {len(listed)} images; "
            f"write one {IMAGE_PLACEHOLDER} in the text for each image"
        )
    if reader.by_index and not reader.by_index.issuperset(range(reader.taken, len(listed))):
        found.unread.append("an image that no part shows")
    return found


def _turns(
    layout: str, entry: Mapping[str, Any], found: Conversation, has_images: bool
) -> list[Any]:
    """The turns of an entry, each with a role and a content."""
    if layout == "prompt":
        both = (("user", entry["prompt"]), ("assistant", entry.get("completion")))
        return [turn for role, said in both for turn in _said(role, said)]
    if layout == "question":
        return _question(entry, found)
    if layout in ("caption", "text"):
        if not has_images:
            raise ValueError(
                f"found {layout} without an image in `image` or `images`; a caption needs one"
            )
        return [*_said("user", ""), *_said("assistant", entry[layout])]
    turns = entry[layout]
    if not isinstance(turns, list):
        raise ValueError(f"{layout} must be a list of turns, found {type(turns).__name__}")
    if layout != "texts":
        return turns
    pairs = [each for each in turns if isinstance(each, Mapping) and "user" in each]
    if len(pairs) != len(turns):
        raise ValueError(f"texts must hold objects with user and assistant, found {turns!r}"[:200])
    return [
        turn
        for each in pairs
        for role in ("user", "assistant")
        for turn in _said(role, each.get(role))
    ]


def _said(role: str, content: Any) -> list[Any]:
    """One turn, or the turns that are there already; none for None."""
    if isinstance(content, list) and all(isinstance(c, Mapping) and _role(c) for c in content):
        return content
    return [] if content is None else [{"role": role, "content": content}]


def _question(entry: Mapping[str, Any], found: Conversation) -> list[Any]:
    """Question and answer; choices are listed under the question, as LLaVA-1.5's training has it.

    Of several answers the most frequent one is the turn, and all are references.
    """
    question = entry["question"]
    if not isinstance(question, str):
        raise ValueError(f"question must be a text, found {type(question).__name__}")
    stored = next((entry[name] for name in ("choices", "options") if entry.get(name)), None)
    found.choices = _choices(stored)
    answers = [_answer(each) for each in _answers(entry)]
    letters = [chr(ord("A") + place) for place in range(len(found.choices))]
    if letters:
        lines = [f"{a}. {text}" for a, text in zip(letters, found.choices, strict=True)]
        question = "\n".join([question, *lines, _REQUEST])
        answers = [_letter(answer, found.choices, letters) for answer in answers]
    found.references = tuple(str(answer) for answer in answers)
    best = Counter(found.references).most_common(1)
    return [*_said("user", question), *(t for text, _ in best for t in _said("assistant", text))]


def _answers(entry: Mapping[str, Any]) -> list[Any]:
    stored = entry.get("answers")
    if stored is None or stored == []:
        stored = entry.get("answer")
    return [] if stored is None else stored if isinstance(stored, list) else [stored]


def _answer(stored: Any) -> Any:
    """One answer: itself, or the `answer` of an annotator's record."""
    if isinstance(stored, Mapping) and "answer" in stored:
        stored = stored["answer"]
    if isinstance(stored, (str, int, float)) and not isinstance(stored, bool):
        return stored
    raise ValueError(f"an answer must be a text or a number, found {stored!r}"[:200])


def _choices(stored: Any) -> tuple[str, ...]:
    if stored is None:
        return ()
    texts = list(stored.values()) if isinstance(stored, Mapping) else stored
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choices must be a list of texts, found {stored!r}"[:200])
    if len(texts) > 26:
        raise ValueError(f"found {len(texts)} choices, expected at most 26")
    return tuple(texts)


def _letter(answer: Any, choices: Sequence[str], letters: Sequence[str]) -> str:
    """The letter of an answer, which may be a letter, a choice's text, or its number from 0."""
    if isinstance(answer, int) and 0 <= answer < len(letters):
        return letters[answer]
    if answer in choices:
        return letters[list[Any](choices).index(answer)]
    if answer in letters:
        return str(answer)
    raise ValueError(
        f"the answer {answer!r} is none of the choices {list(choices)}, no letter of them, and no "
        "number of one counted from 0"
    )


def _category(entry: Mapping[str, Any]) -> str | None:
    found = next((entry[name] for name in _CATEGORY_FIELDS if entry.get(name) is not None), None)
    return str(found) if isinstance(found, (str, int)) else None


def _put_first(found: Conversation, listed: Sequence[Any]) -> None:
    """Put all images in front of the first user message."""
    place = next((i for i, m in enumerate(found.messages) if m.role == "user"), None)
    if place is None:
        raise ValueError("found no user turn to show the images in")
    text = found.messages[place].text
    marks = "\n".join([IMAGE_PLACEHOLDER] * len(listed))
    joined = f"{marks}\n{text}" if text else marks
    found.messages[place] = Message(role="user", text=joined)
    found.images = list(listed)


def _role(turn: Any) -> Any:
    return turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None


class _Reader:
    """Reads turns in order, and gives each image mark its image."""

    def __init__(self, listed: Sequence[Any]) -> None:
        self.images: list[Any] = []
        self.unread: list[str] = []
        self.taken = 0
        """Marks that took the next listed image, or found none left."""
        self.by_index: set[int] = set()
        """The listed images that parts name."""
        self._listed = listed

    def message(self, turn: Any, number: int) -> Message:
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} must be a mapping, found {type(turn).__name__}")
        name = _role(turn)
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise ValueError(
                f"turn {number} has the role {name!r}, expected one of {', '.join(_ROLES)}"
            )
        if calls := [name for name in _CALLS if turn.get(name)]:
            raise ValueError(
                f"turn {number} holds {', '.join(calls)}; tool calls are not read: write them into "
                "the turn's text or remove the sample"
            )
        self.unread += [f"{name} of a turn" for name in unread_media(turn, _TURN_READ)]
        text = self._text(turn.get("value", turn.get("content")), number)
        return Message(role=role, text=text, learn=_learn(turn, number))

    def _text(self, content: Any, number: int) -> str:
        if isinstance(content, str):
            for _ in range(content.count(IMAGE_PLACEHOLDER)):
                self._take_next()
            return content
        if not isinstance(content, list):
            raise ValueError(
                f"turn {number} must have a text in `value` or `content`, found "
                f"{type(content).__name__}"
            )
        return "".join(self._part(part, number) for part in content)

    def _part(self, part: Any, number: int) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            self.unread += [f"{name} of a text part" for name in unread_media(part, {"text"})]
            return self._text(part["text"], number)
        if kind not in ("image", "image_url"):
            raise ValueError(
                f"turn {number} holds the part {str(part)[:80]!r}, expected "
                '{"type": "text", "text": ...} or {"type": "image"}; other media are not read: '
                "remove the sample"
            )
        own = next(
            (part[n] for n in ("image", "image_url", "path", "url", "bytes") if part.get(n)), None
        )
        index = part.get("index")
        if own is not None:
            is_link = kind == "image_url" and isinstance(own, Mapping)
            self.images.append(own.get("url") if is_link else own)
        elif index is not None:
            if not isinstance(index, int) or not 0 <= index < len(self._listed):
                raise ValueError(
                    f"turn {number} shows image {index!r} of {len(self._listed)} images; indices "
                    "count from 0"
                )
            self.by_index.add(index)
            self.images.append(self._listed[index])
        else:
            self._take_next()
        return IMAGE_PLACEHOLDER

    def _take_next(self) -> None:
        if self.taken < len(self._listed):
            self.images.append(self._listed[self.taken])
        self.taken += 1


def _learn(turn: Mapping[str, Any], number: int) -> bool:
    """Whether a turn is learnt: `loss` or `weight` 0 leaves it out of the loss."""
    name = next((n for n in _LOSS if turn.get(n) is not None), None)
    if name is None or turn[name] in (0, 1):
        return name is None or bool(turn[name])
    raise ValueError(f"turn {number} has {name} {turn[name]!r}, expected 0, 1, true or false")
