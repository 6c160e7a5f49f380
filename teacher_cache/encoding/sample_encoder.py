"""Encodes a sample as model inputs, and finds its vision, content and response tokens.

Promise: the conversation is rendered with the processor's own chat template and nothing is cut
off, whatever the tokenizer's files say of truncation and padding. Characters are followed to
tokens through the tokenizer's offsets and the processor's record of how it spelled out each image.
Content tokens are those of the user's texts and the responses. The response is what the model must
generate: the tokens that begin behind the generation prompt, up to and including the control token
that ends the turn (chat_rendering.py, chat_template.py). What does not add up is a `SampleError`:
so is a message that is empty, spells a control token, or has a letter unknown to the tokenizer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from teacher_cache.encoding.chat_rendering import Rendering, Turn, to_turns
from teacher_cache.encoding.chat_template import ChatTemplate
from teacher_cache.encoding.collate import SEQUENCE_KEYS, EncodedSample
from teacher_cache.encoding.pictures import read_picture
from teacher_cache.encoding.view_geometry import ImageInputs, layout_images, require_supported
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import PICTURE_RULE, PictureRule, TextRules
from teacher_cache.schema.samples import Sample, TokenSpans, ViewGrid

_WHOLE_TEXT: dict[str, Any] = {
    "padding": False,
    "truncation": False,
    "is_split_into_words": False,
    "return_attention_mask": True,
    "return_length": False,
    "return_overflowing_tokens": False,
    "return_special_tokens_mask": False,
}
"""Arguments that win over those of tokenizer.json, tokenizer_config.json and the processor."""


class SampleEncoder:
    """Encodes samples for one model: holds its processor and its config.

    `system_prompt` opens every conversation that has no system message of its own. `rules` says
    how messages become tokens, `pictures` how images are read: those of a cache, or today's.
    ValueError for models of an unknown family, slow tokenizers, processors without a chat template,
    and templates that hide messages.
    """

    def __init__(
        self,
        processor: Any,
        model_config: Any,
        system_prompt: str | None = None,
        rules: TextRules | None = None,
        pictures: PictureRule = PICTURE_RULE,
    ) -> None:
        require_supported(model_config.model_type)
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; convert it to "
                "a fast tokenizer (tokenizer.json)"
            )
        self.processor = processor
        self.config = model_config
        self.system_prompt = system_prompt
        self.pictures: PictureRule = pictures
        self.template = ChatTemplate(processor, rules or TextRules())
        self._is_earlier = self.rules.version == 1
        self._control_ids = frozenset(tokenizer.all_special_ids)
        if not self._is_earlier:
            self._control_ids |= self.template.controls.ids
            _read_control_tokens(processor)
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    @property
    def rules(self) -> TextRules:
        """The rules in use; `append_eos` only where the template needs it."""
        return self.template.rules

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an assistant turn, appended or the template's own; None: none."""
        token = self.template.end_of_turn
        return None if token is None else self.processor.tokenizer.convert_tokens_to_ids(token)

    @property
    def pad_token_id(self) -> int:
        """Id for padded positions, which are masked (0 where the tokenizer names none)."""
        pad: int | None = self.processor.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def encode(self, sample: Sample) -> EncodedSample:
        """The whole conversation; raises `SampleError`."""
        encoded = self._encode(sample, to_turns(sample, self.system_prompt), False)
        if not bool(encoded.spans.is_response.any()):
            raise SampleError(sample.source_id, "no token of it is a response; fill the answer in")
        return encoded

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The conversation up to its last question, ending with the generation prompt."""
        turns = to_turns(sample, self.system_prompt)
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return self._encode(sample, asked, True)

    def _encode(
        self, sample: Sample, turns: list[Turn], add_generation_prompt: bool
    ) -> EncodedSample:
        try:
            rendering = self.template.locate(turns, add_generation_prompt)
            self._require_images(turns, rendering.text)
            outputs = self._process(sample, rendering.text)
            replaced: list[dict[str, Any]] = outputs.pop("text_replacement_offsets")
            offsets = np.array(outputs.pop("offset_mapping")[0], dtype=np.int64).reshape(-1, 2)
            inputs: dict[str, Tensor] = {
                name: _row(values) if name in SEQUENCE_KEYS else values
                for name, values in outputs.items()
            }
            input_ids = inputs["input_ids"].numpy()
            self._require_fits(len(input_ids))
            views, vision = self._vision(inputs, offsets, replaced)
            learn = [message.learn for message in sample.messages if message.role == "assistant"]
            content, is_response = self._content(rendering, learn, input_ids, offsets, replaced)
            self._refuse_unknown(input_ids[content])
            spans = TokenSpans(
                views=views,
                vision=vision,
                content=torch.from_numpy(content),
                content_ids=torch.from_numpy(input_ids[content]),
                is_response=torch.from_numpy(is_response),
                answers=torch.from_numpy(self._answers(rendering, offsets, replaced)),
                after_image=torch.from_numpy(
                    content > int(vision[0]) if len(vision) else np.zeros_like(is_response)
                ),
            )
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(sample.source_id, str(error)) from error
        return EncodedSample(key=sample.key, source_id=sample.source_id, inputs=inputs, spans=spans)

    def read_picture(self, data: bytes) -> Image.Image:
        """The picture of an image file; ValueError where there is none."""
        return read_picture(data, self.pictures)

    def _picture(self, sample: Sample, index: int) -> Image.Image:
        try:
            return self.read_picture(sample.images[index])
        except ValueError as error:
            what = f"image {index} ({len(sample.images[index])} bytes) {error}"
            raise SampleError(sample.source_id, what) from error

    def _process(self, sample: Sample, text: str) -> dict[str, Any]:
        """Run the processor on one sample, with the character maps that `_encode` needs.

        Image inputs come as tensors, what belongs to the text as lists: transformers' conversion
        of nested lists costs more than tokenising them.
        """
        images = [self._picture(sample, number) for number in range(len(sample.images))]
        tokenizer = self.processor.tokenizer
        opened = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        outputs = _run(
            self.processor,
            text=[text],
            images=[images] if images else None,
            text_kwargs={"return_tensors": None, **({} if self._is_earlier else _WHOLE_TEXT)},
            images_kwargs={"return_tensors": "pt"},
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_token_type_ids=False,
            add_special_tokens=not opened,
        )
        # One list per text; without images Idefics3 gives nothing and InternVL an empty tensor.
        of_texts = outputs.pop("text_replacement_offsets", None)
        outputs["text_replacement_offsets"] = of_texts[0] if images and of_texts else []
        if not self._is_earlier:
            _cut_added(outputs)
        return outputs

    def _require_images(self, turns: list[Turn], text: str) -> None:
        """Refuse a template that does not write each image of these turns once."""
        wanted = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        found = text.count(self.processor.image_token)
        if found != wanted and not self._is_earlier:
            raise ValueError(
                f"the chat template writes {found} image placeholders for {wanted} images; give "
                "another template with --chat-template FILE"
            )

    def _refuse_unknown(self, content_ids: Int[np.ndarray, " T"]) -> None:
        """Refuse messages with letters that the tokenizer has no token for."""
        tokenizer = self.processor.tokenizer
        unknown = tokenizer.unk_token_id
        if self._is_earlier or unknown in (None, tokenizer.eos_token_id, self.end_of_turn_id):
            return
        count = int((content_ids == unknown).sum())
        if count:
            raise ValueError(
                f"its text has {count} characters or words that the tokenizer does not know "
                f"({tokenizer.unk_token}); replace them or leave the sample out"
            )

    def _require_fits(self, num_tokens: int) -> None:
        """Refuse what is longer than the model's context: nothing is cut off, nothing overflows."""
        text: Any = self.config.get_text_config()
        limit: int | None = getattr(text, "max_position_embeddings", None)
        rope: Any = getattr(text, "rope_parameters", None) or {}
        stretch = max(1.0, float(rope.get("factor") or 1.0))
        if limit is not None and num_tokens > limit * stretch:
            raise ValueError(
                f"it has {num_tokens} tokens, the model's context holds {limit * stretch:g}; "
                "shorten it or leave it out"
            )

    def _vision(
        self,
        inputs: dict[str, Tensor],
        offsets: Int[np.ndarray, "L 2"],
        replaced: list[dict[str, Any]],
    ) -> tuple[tuple[ViewGrid, ...], Int[Tensor, " M"]]:
        """Views and vision positions; every image's placeholders are checked on their own."""
        is_placeholder = inputs["input_ids"].numpy() == self.config.image_token_id
        per_image = [
            np.flatnonzero(is_placeholder & _overlap(offsets, *item["new_span"]))
            for item in replaced
        ]
        found = sum(len(positions) for positions in per_image)
        total = np.count_nonzero(is_placeholder)
        if found != total:
            raise ValueError(
                f"{total} placeholder tokens in the sequence, {found} of them "
                "written for images; a message may not spell the placeholder token"
            )
        images = ImageInputs(
            tensors=inputs,
            placeholders=tuple(len(positions) for positions in per_image),
            replacements=tuple(item["replacement"] for item in replaced),
        )
        layouts = layout_images(self.config, images)
        views = tuple(view for layout in layouts for view in layout.views)
        vision = [
            positions[layout.is_vision.numpy()]
            for positions, layout in zip(per_image, layouts, strict=True)
        ]
        empty = np.zeros(0, dtype=np.int64)
        return views, torch.from_numpy(np.concatenate([empty, *vision]))

    def _answers(
        self,
        rendering: Rendering,
        offsets: Int[np.ndarray, "L 2"],
        replaced: list[dict[str, Any]],
    ) -> Int[np.ndarray, " A"]:
        """The first token of every assistant's text, learnt or not."""
        spans = [
            (_expanded(turn.start, replaced), _expanded(turn.turn_end, replaced))
            for turn in rendering.responses
        ]
        firsts = [
            np.flatnonzero(
                _overlap(offsets, start, end) & (self._is_earlier | (offsets[:, 0] >= start))
            )[:1]
            for start, end in spans
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *firsts])

    def _content(
        self,
        rendering: Rendering,
        learn: Sequence[bool],
        input_ids: Int[np.ndarray, " L"],
        offsets: Int[np.ndarray, "L 2"],
        replaced: list[dict[str, Any]],
    ) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Content positions, ascending, and which of them are the response."""

        def tokens(start: int, end: int) -> np.ndarray:  # a shape would be built at every call
            return _overlap(offsets, _expanded(start, replaced), _expanded(end, replaced))

        is_content = np.zeros(len(input_ids), dtype=np.bool_)
        is_response = np.zeros_like(is_content)
        first = offsets[:, 0]
        for start, end in rendering.instructions:
            is_content |= tokens(start, end)
        for turn, wanted in zip(rendering.responses, learn, strict=False):  # a prompt has one less
            if not (turn.is_learnt and wanted):
                continue
            generated = tokens(turn.start, turn.text_end)
            if not self._is_earlier:  # a token that begins in the prompt is not generated
                generated &= first >= _expanded(turn.start, replaced)
            is_response |= generated
            tail = tokens(turn.text_end, turn.turn_end) & ~is_response
            behind = np.flatnonzero(tail & (offsets[:, 1] <= _expanded(turn.turn_end, replaced)))
            ids: list[int] = input_ids[behind].tolist()
            stop = next((i for i, token in enumerate(ids) if token in self._control_ids), None)
            if stop is not None:
                is_response[behind[: stop + 1]] = True
        content = np.flatnonzero(is_content | is_response)
        return content, is_response[content]


def _run(processor: Any, **arguments: Any) -> dict[str, Any]:
    try:
        return dict(processor(**arguments))
    except Exception as error:
        raise ValueError(f"the processor fails: {type(error).__name__}: {error}") from error


def _read_control_tokens(processor: Any) -> None:
    """Switch off a tokenizer's setting that splits control tokens, and what followed from it."""
    if processor.tokenizer.split_special_tokens:
        processor.tokenizer.split_special_tokens = False
        if "image_token_id" in vars(processor):
            image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
            processor.image_token_id = image


def _cut_added(outputs: dict[str, Any]) -> None:
    """Remove the tokens that the tokenizer adds behind the text: a prompt goes on there."""
    offsets: list[tuple[int, int]] = outputs["offset_mapping"][0]
    length = len(offsets)
    while length and tuple(offsets[length - 1]) == (0, 0):
        length -= 1
    for name in outputs.keys() & {*SEQUENCE_KEYS, "offset_mapping"}:
        outputs[name] = [outputs[name][0][:length]]


def _row(values: Any) -> Int[Tensor, " L"]:
    """The one row of a sequence-long output of the processor, lists within a list."""
    return torch.from_numpy(np.array(values[0], dtype=np.int64))


def _expanded(position: int, replaced: list[dict[str, Any]]) -> int:
    """Where a character of the rendering stands once each image is spelled out in full."""
    before = [item for item in replaced if item["span"][1] <= position]
    return position + sum(len(item["replacement"]) - len(item["text"]) for item in before)


def _overlap(offsets: Int[np.ndarray, "L 2"], start: int, end: int) -> Bool[np.ndarray, " L"]:
    """Tokens that hold characters of [start, end).

    Byte-level tokenizers that trim their offsets leave whitespace tokens with an empty interval
    at their right end; those count where that end lies in (start, end].
    """
    first, last = offsets[:, 0], offsets[:, 1]
    trimmed = (first == last) & (first > start) & (last <= end)
    return trimmed | ((first < end) & (last > start) & (first < last))
