"""Real models of six families, random and small, saved with real processors; and tiny samples.

Each builder writes a folder that `load_model` loads; those of families with videos are in
tiny_videos.py.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, make_sample
from tests.support.lazy import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    token_id,
    tokenizer,
)
from tests.support.tiny_parts import (
    PINPOINTS,
    SIZE,
    VISION,
    template,
    text_model,
    text_settings,
)
from tests.support.tiny_videos import (
    tiny_internvl,
    tiny_onevision,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_vl,
    tiny_smolvlm,
)


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_llava(folder: Path, vision: str = "siglip", seed: int = 0) -> Path:
    """LLaVA, 4x4 vision tokens; with a CLIP tower ("clip") the class token is cut off."""
    torch.manual_seed(seed)
    words = tokenizer({"image_token": "<image>"})
    clip = vision == "clip"
    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**VISION),
        text_config=text_model(),
        image_token_index=token_id(words, "<image>"),
        vision_feature_select_strategy="default" if clip else "full",
        vision_feature_layer=-2 if clip else -1,
        tie_word_embeddings=True,
    )
    pixels = CLIPImageProcessor(size=SIZE, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=pixels if clip else SiglipImageProcessor(size=SIZE),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if clip else 0,
        chat_template=template("<image>"),
    )
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def tiny_llava_next(folder: Path, vision: str = "siglip", seed: int = 0) -> Path:
    """LLaVA-NeXT: a 4x4 base view, an unpadded mosaic of tiles, a newline after each row."""
    torch.manual_seed(seed)
    words = tokenizer({"image_token": "<image>"})
    clip = vision == "clip"
    config = LlavaNextConfig(
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**VISION),
        text_config=text_model(),
        image_token_index=token_id(words, "<image>"),
        vision_feature_select_strategy="default" if clip else "full",
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if clip else 0,
        chat_template=template("<image>"),
    )
    return _save(folder, LlavaNextForConditionalGeneration(config), processor)


def tiny_idefics3(folder: Path, seed: int = 0) -> Path:
    """Idefics3: tiles of 2x2 tokens behind row and column tags, the whole image last."""
    torch.manual_seed(seed)
    tags = {f"tag_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    words = tokenizer(
        {
            "fake": "<fake_token_around_image>",
            "image_token": "<image>",
            "end": "<end_of_utterance>",
            "whole": "<global-img>",
            **tags,
        }
    )
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**text_settings()),
        image_token_id=token_id(words, "<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=words,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    return _save(folder, Idefics3ForConditionalGeneration(config), processor)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_onevision,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "internvl": tiny_internvl,
    "idefics3": tiny_idefics3,
}
"""The families that most tests go through."""

LISTED: dict[str, Callable[[Path], Path]] = FAMILIES | {
    "qwen2_vl": tiny_qwen2_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "smolvlm": tiny_smolvlm,
}
"""Every family that is listed as supported."""


def tiny_image(seed: int, width: int = 24, height: int = 16) -> bytes:
    """A small PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def tiny_samples(count: int, seed: int = 0) -> list[Sample]:
    """Samples in turn: one image; several turns; text alone; two images; a system message."""
    samples: list[Sample] = []
    for index in range(count):
        kind, number = index % 5, 100 * seed + index
        image, other = tiny_image(number), tiny_image(number + 50, width=16, height=40)
        question = Message(role="user", text=f"{IMAGE_PLACEHOLDER}\nwhat is picture {number}?")
        answer = Message(role="assistant", text=f"a red square, {number} digits.")
        images: list[bytes] = [image]
        messages = [question, answer]
        if kind == 1:
            messages += [Message(role="user", text="user"), Message(role="assistant", text="two.")]
        elif kind == 2:
            images, messages = [], [Message(role="user", text=f"how many? {number}"), answer]
        elif kind == 3:
            images = [image, other]
            text = f"describe {IMAGE_PLACEHOLDER}\nand {IMAGE_PLACEHOLDER}\nboth images {number}"
            messages = [Message(role="user", text=text), answer]
        elif kind == 4:
            messages = [Message(role="system", text="describe the picture"), question, answer]
        samples.append(make_sample(f"tiny-{number}", images, messages))
    return samples


def ask(
    text: str,
    answer: str = "two.",
    seeds: Sequence[int] = (1,),
    system: str | None = None,
    source_id: str = "asked",
) -> Sample:
    """A question about the images of these seeds; `<image>` stands where the text says."""
    turns = [Message(role="user", text=text), Message(role="assistant", text=answer)]
    opening = [] if system is None else [Message(role="system", text=system)]
    return make_sample(source_id, [tiny_image(seed) for seed in seeds], [*opening, *turns])
