"""Conversations for published templates, and their tokens and labels as text."""

from typing import Any

import torch

from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.options import TextRules
from teacher_cache.schema.samples import Message, Sample, make_sample
from tests.support.published_templates import PUBLISHED, published_processor
from tests.support.tiny import tiny_image

SYSTEM, ASKED = "be short", ("what?", "why?")


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
