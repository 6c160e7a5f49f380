"""Defines a sample before the model sees it: messages, images, and the positions of its tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.strict_json import StrictRecord

IMAGE_PLACEHOLDER = "<image>"
"""Stands for one image in the text of a message, as in LLaVA's JSON files."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation; `<image>` in the text stands for one image."""

    role: Role
    text: str
    learn: bool = True
    """False leaves an assistant's turn out of the response: it is shown, and not learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image-text conversation as the source gave it.

    `key` is a content digest (`sample_key`), `source_id` the source's name for the sample, `images`
    the encoded bytes (JPEG, PNG, ...) in the order of the placeholders. Only an evaluation reads
    `references`, `choices` and `category`, which are no part of the key; only there the last
    message may be a question without an answer.
    """

    key: str
    source_id: str
    images: tuple[bytes, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    """Right answers to the last question, where the source lists them apart."""
    choices: tuple[str, ...] = ()
    category: str | None = None

    def __post_init__(self) -> None:
        placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in self.messages)
        if placeholders != len(self.images):
            raise SampleError(
                self.source_id,
                f"found {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(self.images)} "
                f"images; write one {IMAGE_PLACEHOLDER} in the text for each image",
            )
        roles = [message.role for message in self.messages if message.role != "system"]
        expected = ["user", "assistant"] * len(roles)
        if not roles or roles != expected[: len(roles)]:
            raise SampleError(
                self.source_id,
                f"found turns {roles}, expected user and assistant in alternation, beginning "
                "with user and ending with assistant",
            )
        if any(IMAGE_PLACEHOLDER in m.text for m in self.messages if m.role != "user"):
            raise SampleError(
                self.source_id, f"{IMAGE_PLACEHOLDER} is allowed in the user's messages only"
            )


def sample_key(images: Iterable[bytes], messages: Iterable[Message]) -> str:
    """The content digest of a sample: 32 hex digits over image bytes and messages."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    texts = [[m.role, m.text] if m.learn else [m.role, m.text, "shown"] for m in messages]
    digest.update(json.dumps(texts, ensure_ascii=False).encode())
    return digest.hexdigest()[:32]


def make_sample(
    source_id: str, images: Iterable[bytes], messages: Iterable[Message], **answers: Any
) -> Sample:
    """Build a `Sample` with its content key; raises `SampleError` as `Sample` does.

    `answers` are `references`, `choices` and `category`.
    """
    images, messages = tuple(images), tuple(messages)
    key = sample_key(images, messages)
    return Sample(key=key, source_id=source_id, images=images, messages=messages, **answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewGrid:
    """One rectangle of vision tokens: a whole image, its base view, a tile or the tiles' mosaic.

    `image` numbers the sample's images, `view` the views of that image (0 is the base view, if the
    family has one). Newline and separator positions are not part of the grid.
    """

    image: int
    view: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.image < 0 or self.view < 0:
            raise ValueError(f"a view needs rows, cols >= 1 and image, view >= 0; found {self}")

    @property
    def num_tokens(self) -> int:
        """Vision tokens in this view."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpans:
    """The roles of the positions of one tokenised sample, counted from 0 without padding.

    `vision` lists the vision tokens view by view, in raster order. `content` lists the tokens of
    the messages' own text (no control tokens of the template), ascending. The assistant's content
    tokens, end-of-turn token included, are the response. VLAD uses the content tokens
    `after_image`: with causal attention, text before the first image does not depend on it.
    """

    views: tuple[ViewGrid, ...]
    vision: Int[Tensor, " M"]
    content: Int[Tensor, " T"]
    content_ids: Int[Tensor, " T"]
    is_response: Bool[Tensor, " T"]
    after_image: Bool[Tensor, " T"]
    answers: Int[Tensor, " A"] | None = None
    """First position of every assistant's text, learnt or not; None: all of them are learnt."""

    def __post_init__(self) -> None:
        num_tokens = sum(view.num_tokens for view in self.views)
        if num_tokens != len(self.vision):
            raise ValueError(
                f"the views {self.views} have {num_tokens} vision tokens, "
                f"the sequence has {len(self.vision)}"
            )
        if len(self.content) and bool((self.content[self.is_response] < 1).any()):
            raise ValueError("a response token at position 0 has no position that predicts it")

    @property
    def response(self) -> Int[Tensor, " R"]:
        """Positions of the response tokens (the labels)."""
        return self.content[self.is_response]

    @property
    def predicting(self) -> Int[Tensor, " R"]:
        """Positions whose logits predict the response tokens: one to the left of each."""
        return self.response - 1

    @property
    def vlad_text(self) -> Int[Tensor, " X"]:
        """Positions of the text tokens whose affinity to vision tokens is distilled."""
        return self.content[self.after_image]

    @property
    def images_before_text(self) -> Int[Tensor, " X"]:
        """How many images stand before each token of `vlad_text`; images lie in their order."""
        starts: dict[int, int] = {}
        place = 0
        for view in self.views:
            starts.setdefault(view.image, int(self.vision[place]))
            place += view.num_tokens
        return (torch.tensor(list(starts.values())) < self.vlad_text[:, None]).sum(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedSample(StrictRecord):
    """A sample that the build could not use; it is counted and listed."""

    key: str
    source_id: str
    reason: str
