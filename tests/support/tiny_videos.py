"""Real models of the families that take videos, random and small, in folders as published.

Their processor files are written as the checkpoints of each family have them, so that writing them
needs no torchvision (tiny_processors.py).
"""

from pathlib import Path
from typing import Any

import torch

from tests.support.lazy import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    publish,
    token_id,
    tokenizer,
)
from tests.support.tiny_parts import (
    PINPOINTS,
    SIZE,
    VISION,
    WIDTH,
    template,
    text_model,
    text_settings,
)


def tiny_onevision(folder: Path, seed: int = 0) -> Path:
    """LLaVA-OneVision with at most 2 tiles' worth of mosaic tokens, so that the cap is met."""
    torch.manual_seed(seed)
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=text_model(),
        image_token_index=token_id(words, "<image>"),
        video_token_index=token_id(words, "<video>"),
        image_grid_pinpoints=PINPOINTS,
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
            "image_grid_pinpoints": PINPOINTS,
            "size": SIZE,
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


_QWEN_TOKENS = ("vision_start", "vision_end", "image_pad", "video_pad")
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
_QWEN_IMAGES: dict[str, Any] = {"merge_size": 2, "patch_size": 4, "temporal_patch_size": 2}


def _qwen(
    folder: Path,
    name: str,
    of_class: tuple[Any, Any],
    vision: dict[str, Any],
    images: dict[str, Any],
    videos: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A model of Qwen's with config and model class `of_class`; `name` is its processor's."""
    torch.manual_seed(seed)
    words = tokenizer({f"{each}_mark": f"<|{each}|>" for each in _QWEN_TOKENS})
    ids = {each: token_id(words, f"<|{each}|>") for each in _QWEN_TOKENS}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = of_class[0](
        vision_config=vision,
        text_config={**text_settings(), "rope_parameters": rope, **(text or {})},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    of_class[1](config).save_pretrained(folder)
    written = template("<|vision_start|><|image_pad|><|vision_end|>")
    publish(folder, words, name, written, {**_QWEN_IMAGES, **images}, videos=videos)
    return folder


def tiny_qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: as Qwen2.5-VL, with another vision model."""
    vision = {**_QWEN_VISION, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _qwen(
        folder,
        "Qwen2VLProcessor",
        (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        {name: vision[name] for name in vision.keys() - {"intermediate_size", "out_hidden_size"}},
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 64, "max_pixels": 2048},
    )


def tiny_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL: as many merged patches as the image's size asks for; untied head."""
    return _qwen(
        folder,
        "Qwen2_5_VLProcessor",
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 64, "max_pixels": 2048},
        seed=seed,
    )


def tiny_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: merged patches, and features of a vision layer added inside the decoder."""
    size = {"longest_edge": 2048, "shortest_edge": 64}
    return _qwen(
        folder,
        "Qwen3VLProcessor",
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size},
        {**_QWEN_IMAGES, "size": size, "video_processor_type": "Qwen3VLVideoProcessor"},
        {"head_dim": 8},
    )


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
        text_config=text_model(),
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
            "size": SIZE,
        },
        processor={"image_seq_length": 4},
        videos={"size": SIZE, "video_processor_type": "InternVLVideoProcessor"},
        jinja=True,
    )
    return folder


def tiny_smolvlm(folder: Path) -> Path:
    """SmolVLM2: as Idefics3, with a processor of its own that spells numbers out for videos."""
    torch.manual_seed(0)
    tags = {f"tag_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    words = tokenizer(
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
            **tags,
        }
    )
    config = SmolVLMConfig(
        vision_config=VISION,
        text_config=LlamaConfig(**text_settings()),
        image_token_id=token_id(words, "<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    publish(
        folder,
        words,
        "SmolVLMProcessor",
        template("<image>"),
        {
            "do_image_splitting": True,
            "do_pad": True,
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": 16},
            "resample": 1,
            "size": {"longest_edge": 32},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 16}},
        },
        processor={"image_seq_len": 4},
    )
    return folder
