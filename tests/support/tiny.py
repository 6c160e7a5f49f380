"""Real models of six families, random and small, saved with real processors; and tiny samples.

Each builder writes a folder that `load_model` loads. Processors of families with videos are written
as their published checkpoints are (tiny_processors.py).
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
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    publish,
    token_id,
    tokenizer,
)

WIDTH = 32
HEAD_ROWS = 384
"""Rows of every LM head: more than the tokenizers have entries, as in released models."""


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(image: str) -> str:
    return CHAT_TEMPLATE.replace("IMAGE", image)


def _text_settings() -> dict[str, Any]:
    return {
        "vocab_size": HEAD_ROWS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _text(tied: bool = True) -> Qwen2Config:
    return Qwen2Config(**_text_settings(), tie_word_embeddings=tied)


_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SIZE = {"height": 16, "width": 16}


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
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**_VISION),
        text_config=_text(),
        image_token_index=token_id(words, "<image>"),
        vision_feature_select_strategy="default" if clip else "full",
        vision_feature_layer=-2 if clip else -1,
        tie_word_embeddings=True,
    )
    pixels = CLIPImageProcessor(size=_SIZE, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=pixels if clip else SiglipImageProcessor(size=_SIZE),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if clip else 0,
        chat_template=template("<image>"),
    )
    return _save(folder, LlavaForConditionalGeneration(config), processor)


_PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def tiny_llava_next(folder: Path, vision: str = "siglip", seed: int = 0) -> Path:
    """LLaVA-NeXT: a 4x4 base view, an unpadded mosaic of tiles, a newline after each row."""
    torch.manual_seed(seed)
    words = tokenizer({"image_token": "<image>"})
    clip = vision == "clip"
    config = LlavaNextConfig(
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**_VISION),
        text_config=_text(),
        image_token_index=token_id(words, "<image>"),
        vision_feature_select_strategy="default" if clip else "full",
        vision_feature_layer=-2,
        image_grid_pinpoints=_PINPOINTS,
        tie_word_embeddings=True,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size=_SIZE, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if clip else 0,
        chat_template=template("<image>"),
    )
    return _save(folder, LlavaNextForConditionalGeneration(config), processor)


def tiny_onevision(folder: Path, seed: int = 0) -> Path:
    """LLaVA-OneVision with at most 2 tiles' worth of mosaic tokens, so that the cap is met."""
    torch.manual_seed(seed)
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=_text(),
        image_token_index=token_id(words, "<image>"),
        video_token_index=token_id(words, "<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    publish(
        folder,
        words,
        "LlavaOnevisionProcessor",
        template("<image>"),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": _PINPOINTS,
            "size": _SIZE,
        },
        processor={
            "image_token": "<image>",
            "num_image_tokens": 16,
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_2",
            "vision_feature_select_strategy": "full",
        },
    )
    return folder


def tiny_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL: as many merged patches as the image's size asks for; untied head."""
    torch.manual_seed(seed)
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    words = tokenizer({f"{name}_mark": f"<|{name}|>" for name in names})
    ids = {name: token_id(words, f"<|{name}|>") for name in names}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **_text_settings(),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    publish(
        folder,
        words,
        "Qwen2_5_VLProcessor",
        template("<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "merge_size": 2,
            "min_pixels": 64,
            "max_pixels": 2048,
            "patch_size": 4,
            "temporal_patch_size": 2,
        },
    )
    return folder


def tiny_internvl(folder: Path, seed: int = 0) -> Path:
    """InternVL: tiles of 2x2 tokens and, where there are several, the whole image last."""
    torch.manual_seed(seed)
    words = tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[16, 16],
            patch_size=[4, 4],
        ),
        text_config=_text(),
        image_token_id=token_id(words, "<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    publish(
        folder,
        words,
        "InternVLProcessor",
        template("<IMG_CONTEXT>"),
        {
            "crop_to_patches": True,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 4,
            "min_patches": 1,
            "size": _SIZE,
        },
        processor={"image_seq_length": 4},
        videos={"size": _SIZE, "video_processor_type": "InternVLVideoProcessor"},
        jinja=True,
    )
    return folder


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
        vision_config=_VISION,
        text_config=LlamaConfig(**_text_settings()),
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
