"""Collates tokenised samples into a batch of model inputs.

Position p of sample i is at column `p + offsets[i]` of the batch, for either padding side; nothing
is truncated. Sequence inputs are padded to the longest sample. All others are image inputs:
concatenated along their first axis, their other axes padded with zeros (tiles of LLaVA-NeXT, images
of Idefics3), and absent where no sample has an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from teacher_cache.schema.samples import TokenSpans

SEQUENCE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Model inputs with one entry for each position of the sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """One sample as its processor encodes it, without padding.

    `inputs` holds the sequence-long inputs without a batch axis (shape [L]) and the image inputs
    with their leading image or batch axis; `spans` has the roles of the positions.
    """

    key: str
    source_id: str
    inputs: dict[str, Tensor]
    spans: TokenSpans

    def __post_init__(self) -> None:
        for name in ("input_ids", "attention_mask"):
            if name not in self.inputs:
                raise ValueError(f"sample {self.source_id!r} has no {name}")
        for name in self.inputs.keys() & set(SEQUENCE_KEYS):
            found, expected = tuple(self.inputs[name].shape), (self.num_tokens,)
            if found != expected:
                raise ValueError(
                    f"sample {self.source_id!r}: {name} has shape {found}, expected {expected}"
                )

    @property
    def num_tokens(self) -> int:
        """Length L of the sequence, image placeholders included."""
        return len(self.inputs["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBatch:
    """A padded batch: `inputs` go to the model, `offsets[i]` is row i's left padding."""

    inputs: dict[str, Tensor]
    offsets: tuple[int, ...]
    samples: tuple[EncodedSample, ...]

    def to(self, device: torch.device) -> "ModelBatch":
        """The same batch with its model inputs on another device."""
        moved = {name: values.to(device) for name, values in self.inputs.items()}
        return ModelBatch(inputs=moved, offsets=self.offsets, samples=self.samples)

    def columns(self, row: int, positions: Tensor) -> Tensor:
        """Columns of the batch for the given positions of sample `row`."""
        return positions + self.offsets[row]


def collate(
    samples: Sequence[EncodedSample], pad_token_id: int, side: Literal["left", "right"]
) -> ModelBatch:
    """Pad and join encoded samples; ValueError where they do not go together.

    Padded positions hold `pad_token_id`, and 0 in every other sequence-long input (the attention
    mask among them). Image inputs keep the order of the samples; text-only samples add none.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    length = max(sample.num_tokens for sample in samples)
    offsets = tuple(length - s.num_tokens if side == "left" else 0 for s in samples)
    names = list(dict.fromkeys(name for sample in samples for name in sample.inputs))
    inputs: dict[str, Tensor] = {}
    for name in names:
        found = [sample.inputs[name] for sample in samples if name in sample.inputs]
        if name not in SEQUENCE_KEYS:
            inputs[name] = _concatenate(name, found)
            continue
        if len(found) != len(samples):
            missing = next(s.source_id for s in samples if name not in s.inputs)
            raise ValueError(
                f"sample {missing!r} has no {name}, which others of its batch have; "
                "encode all samples with one processor"
            )
        fill = pad_token_id if name == "input_ids" else 0
        rows = found[0].new_full((len(samples), length), fill)
        for row, (values, offset) in enumerate(zip(found, offsets, strict=True)):
            rows[row, offset : offset + len(values)] = values
        inputs[name] = rows
    return ModelBatch(inputs=inputs, offsets=offsets, samples=tuple(samples))


def _concatenate(name: str, parts: list[Tensor]) -> Tensor:
    if len({(part.ndim, part.dtype) for part in parts}) != 1:
        found = sorted({f"{part.dtype} of {part.ndim} axes" for part in parts})
        raise ValueError(f"{name} differs between samples of one batch: {', '.join(found)}")
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined = parts[0].new_zeros((sum(len(part) for part in parts), *shape))
    start = 0
    for part in parts:
        corner = tuple(slice(0, size) for size in part.shape[1:])
        joined[(slice(start, start + len(part)), *corner)] = part
        start += len(part)
    return joined
