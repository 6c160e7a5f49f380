"""Generates greedy answers, several prompts at a time.

An answer is what the model gives to that prompt alone, up to the last bits of its logits. It ends
at the checkpoint's end tokens or at the chat template's own end of turn, whichever comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student_train.compression.compression import compress
from student_train.compression.decoder import require_compressible, require_effect
from student_train.config.compression import CompressionSettings
from teacher_cache.encoding.collate import EncodedSample, ModelBatch, collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.options import TextRules


def model_inputs(model: Any, batch: ModelBatch) -> dict[str, Tensor]:
    """A batch's inputs on the model's device, pixels in the model's dtype."""
    return {
        name: values.to(model.dtype) if values.is_floating_point() else values
        for name, values in batch.to(model.device).inputs.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer, and how many of the prompt's vision tokens it used."""

    text: str
    """Without control tokens, what the model thought first, and outer white space."""
    num_vision: int
    num_kept: int
    """How many reached the last layer; all of them without compression."""


class Generator:
    """A model that answers samples greedily, several at a time.

    ValueError if this model cannot drop tokens as `compression` says.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        system_prompt: str | None,
        max_new_tokens: int,
        compression: CompressionSettings | None = None,
        text: TextRules | None = None,
    ) -> None:
        if compression is not None:
            require_compressible(model, compression)
            require_effect(model, compression)
        self._compression = compression
        self.model = model
        self.encoder = SampleEncoder(processor, model.config, system_prompt, text)
        self._tokenizer = processor.tokenizer
        self._max_new_tokens = max_new_tokens

    @torch.no_grad()
    def answers(self, prompts: Sequence[EncodedSample], stop_ids: Sequence[int]) -> list[Answer]:
        """The answer to each prompt; seeds and the checkpoint's sampling settings do not matter."""
        from transformers import GenerationConfig

        batch = collate(prompts, self.encoder.pad_token_id, side="left")
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=self.encoder.pad_token_id,
        )
        vision = [prompt.spans.vision for prompt in prompts]
        num_kept = [len(tokens) for tokens in vision]
        inputs = model_inputs(self.model, batch)
        if self._compression is None:
            output_BL = self.model.generate(**inputs, generation_config=settings)
        else:
            with compress(self.model, self._compression, batch) as compression:
                output_BL = self.model.generate(**inputs, generation_config=settings)
            kept = compression.layout.kept
            num_kept = [int(kept(row, tokens).sum()) for row, tokens in enumerate(vision)]
        new_BL = output_BL[:, batch.inputs["input_ids"].shape[1] :]
        texts: list[str] = self._tokenizer.batch_decode(
            new_BL, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [
            Answer(text=without_thinking(text), num_vision=len(tokens), num_kept=count)
            for text, tokens, count in zip(texts, vision, num_kept, strict=True)
        ]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the checkpoint's, and the template's own end of turn."""
        known = self.model.generation_config.eos_token_id
        found: list[int | None] = list(known) if isinstance(known, list) else [known]
        found += [self._tokenizer.eos_token_id, self.encoder.end_of_turn_id]
        return sorted({token for token in found if token is not None})


def without_thinking(text: str) -> str:
    """What follows the end of a model's thinking; all of a text in which none ends."""
    return text.rpartition("</think>")[2].strip()
