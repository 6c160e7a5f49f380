"""From a sample to model inputs, and to the positions of its vision, content and response tokens.

Promise: the conversation is rendered with the processor's own chat template and nothing is cut
off. Characters are followed to tokens through the tokenizer's offsets and the processor's record
of how it spelled out each image. Content tokens are those of the user's and assistant's texts.
The response is what the model must generate: all tokens behind the generation prompt, up to and
including the first control token behind the assistant's text (a template without one, such as
that of llava-1.5-hf, teaches no end of turn). What does not add up is a `SampleError`.
"""

import io
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from teacher_cache.models.chat_rendering import Rendering, Skeletons, Turn, locate, to_turns
from teacher_cache.models.collate import SEQUENCE_KEYS, EncodedSample
from teacher_cache.models.view_geometry import ImageInputs, layout_images, require_supported
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample, TokenSpans, ViewGrid


class SampleEncoder:
    """Encodes samples for one model: holds its processor and its config.

    `system_prompt` opens every conversation that has no system message of its own. ValueError for
    models of an unknown family, slow tokenizers and processors without a chat template.
    """

    def __init__(self, processor: Any, model_config: Any, system_prompt: str | None = None) -> None:
        require_supported(model_config.model_type)
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} gives no character offsets; convert it to "
                "a fast tokenizer (tokenizer.json)"
            )
        if not processor.chat_template:
            raise ValueError(
                f"the {type(processor).__name__} has no chat template; add chat_template.jinja "
                "to the model's folder"
            )
        self.processor = processor
        self.config = model_config
        self.system_prompt = system_prompt
        self._control_ids = frozenset(processor.tokenizer.all_special_ids)
        self._skeletons: Skeletons = {}

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
        """The conversation without its last answer, ending with the generation prompt."""
        return self._encode(sample, to_turns(sample, self.system_prompt)[:-1], True)

    def _encode(
        self, sample: Sample, turns: list[Turn], add_generation_prompt: bool
    ) -> EncodedSample:
        try:
            rendering = locate(turns, self._render, add_generation_prompt, self._skeletons)
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
            content, is_response = self._content(rendering, input_ids, offsets, replaced)
            spans = TokenSpans(
                views=views,
                vision=vision,
                content=torch.from_numpy(content),
                content_ids=torch.from_numpy(input_ids[content]),
                is_response=torch.from_numpy(is_response),
                after_image=torch.from_numpy(
                    content > int(vision[0]) if len(vision) else np.zeros_like(is_response)
                ),
            )
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(sample.source_id, str(error)) from error
        return EncodedSample(key=sample.key, source_id=sample.source_id, inputs=inputs, spans=spans)

    def _render(self, turns: list[Turn], add_generation_prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template's own raise_exception, and jinja's errors
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _process(self, sample: Sample, text: str) -> dict[str, Any]:
        """Run the processor on one sample, with the character maps that `_encode` needs.

        Image inputs come as tensors, what belongs to the text as lists: transformers' conversion
        of nested lists costs more than tokenising them.
        """
        images = [_decode(sample, index) for index in range(len(sample.images))]
        tokenizer = self.processor.tokenizer
        opened = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        outputs = dict(
            self.processor(
                text=[text],
                images=[images] if images else None,
                text_kwargs={"return_tensors": None},
                images_kwargs={"return_tensors": "pt"},
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_token_type_ids=False,
                add_special_tokens=not opened,
            )
        )
        # One list per text; without images Idefics3 gives nothing and InternVL an empty tensor.
        of_texts = outputs.pop("text_replacement_offsets", None)
        outputs["text_replacement_offsets"] = of_texts[0] if images and of_texts else []
        return outputs

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

    def _content(
        self,
        rendering: Rendering,
        input_ids: Int[np.ndarray, " L"],
        offsets: Int[np.ndarray, "L 2"],
        replaced: list[dict[str, Any]],
    ) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Content positions, ascending, and which of them are the response."""

        def tokens(start: int, end: int) -> np.ndarray:  # a shape would be built at every call
            return _overlap(offsets, _expanded(start, replaced), _expanded(end, replaced))

        is_content = np.zeros(len(input_ids), dtype=np.bool_)
        is_response = np.zeros_like(is_content)
        for start, end in rendering.instructions:
            is_content |= tokens(start, end)
        for turn in rendering.responses:
            is_response |= tokens(turn.start, turn.text_end)
            behind = np.flatnonzero(tokens(turn.text_end, turn.turn_end) & ~is_response)
            ids: list[int] = input_ids[behind].tolist()
            stop = next((i for i, token in enumerate(ids) if token in self._control_ids), None)
            if stop is not None:
                is_response[behind[: stop + 1]] = True
        content = np.flatnonzero(is_content | is_response)
        return content, is_response[content]


def _row(values: Any) -> Int[Tensor, " L"]:
    """The one row of a sequence-long output of the processor, lists within a list."""
    return torch.from_numpy(np.array(values[0], dtype=np.int64))


def _decode(sample: Sample, index: int) -> Image.Image:
    data = sample.images[index]
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        # Pillow prints the address of the stream; a reason is stored and must be the same again.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "its format is unknown" if unknown else str(error)
        raise SampleError(
            sample.source_id,
            f"image {index} ({len(data)} bytes) cannot be decoded: {why}; replace the file",
        ) from error


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
