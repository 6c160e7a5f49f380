"""The tiny models of tiny.py with more decoder layers, or another decoder, and batches.

Two layers are too few to drop tokens between them at two stages. Weights are drawn anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from student_train.compression.compression import compress
from student_train.config.compression import CompressionSettings
from student_train.data.token_layout import TokenLayout
from student_train.models.forward import final_hidden
from teacher_cache.encoding.collate import EncodedSample, ModelBatch, collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.models.checkpoint import load_model
from teacher_cache.schema.samples import Sample, TokenSpans, ViewGrid
from tests.support.lazy import (
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    Qwen2VLConfig,
    Qwen3Config,
)
from tests.support.tiny import tiny_samples

NUM_LAYERS = 4
DECODERS: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}


def deep_model(
    folder: Path, decoder: str | None = None, attention: str = "sdpa", **text: Any
) -> tuple[Any, Any]:
    """A saved tiny model made anew with four decoder layers, and its processor.

    `decoder` replaces the family's text decoder by one of `DECODERS`, or Qwen2.5-VL by `qwen2_vl`;
    `text` are fields of the text config.
    """
    loaded: Any = load_model(str(folder))
    vanilla, processor = loaded
    config = vanilla.config
    names = (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads "
        "max_position_embeddings initializer_range pad_token_id bos_token_id eos_token_id"
    )
    if decoder == "qwen2_vl":
        config = _qwen2_vl(config)
    elif decoder is not None:
        fields = {name: getattr(config.text_config, name) for name in names.split()}
        fields |= {"sliding_window": None} if decoder == "mistral" else {}
        config.text_config = DECODERS[decoder](**fields, head_dim=8)
    changes = {"num_hidden_layers": NUM_LAYERS, "layer_types": ["full_attention"] * NUM_LAYERS}
    for name, value in {**changes, **text}.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(1)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    model.generation_config = vanilla.generation_config
    return model.eval(), processor


def _qwen2_vl(config: Any) -> Any:
    """The config of a Qwen2-VL that takes what a tiny Qwen2.5-VL's processor gives."""
    text = config.text_config.to_dict()
    del text["model_type"]
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": config.text_config.hidden_size,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": config.vision_config.patch_size,
            "spatial_merge_size": config.vision_config.spatial_merge_size,
        },
        text_config=text,
        **{mark: getattr(config, mark) for mark in marks},
    )


def encode(
    model: Any, processor: Any, samples: Sequence[Sample] | None = None
) -> list[EncodedSample]:
    """Samples as the model's own encoder gives them: by default one of each kind."""
    encoder = SampleEncoder(processor, model.config)
    return [encoder.encode(sample) for sample in samples or tiny_samples(5)]


def deep_batch(
    folder: Path, side: Literal["left", "right"] = "right", **model: Any
) -> tuple[Any, ModelBatch]:
    """A model of four layers (`deep_model`), and a batch of one sample of each kind."""
    deep, processor = deep_model(folder, **model)
    return deep, batch_of(encode(deep, processor), side)


def made_up_sample(
    num_tokens: int, vision: Sequence[int], text: Sequence[int], response: Sequence[int], key: str
) -> EncodedSample:
    """A sample with these tokens at these positions; each vision token is a view of its own."""
    content = torch.tensor(sorted([*text, *response]), dtype=torch.int64)
    spans = TokenSpans(
        views=tuple(ViewGrid(image=0, view=n, rows=1, cols=1) for n in range(len(vision))),
        vision=torch.tensor(vision, dtype=torch.int64),
        content=content,
        content_ids=content,
        is_response=torch.isin(content, torch.tensor(response, dtype=torch.int64)),
        after_image=torch.zeros_like(content, dtype=torch.bool),
    )
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids + 1}
    return EncodedSample(key=key, source_id=key, inputs=inputs, spans=spans)


def at(ratio: float, compressor: str = "dart", layer: int = 2) -> CompressionSettings:
    return CompressionSettings.at_layer(layer, ratio, compressor)


@torch.no_grad()
def compressed(
    model: Any, settings: CompressionSettings, batch: ModelBatch, draw: int = 0
) -> tuple[Tensor, TokenLayout]:
    """Final states of a compressed pass, and where each token now is."""
    with compress(model, settings, batch, draw) as found:
        return final_hidden(model, batch.inputs), found.layout


def batch_of(
    samples: Sequence[EncodedSample], side: Literal["left", "right"] = "right"
) -> ModelBatch:
    return collate(samples, 0, side)
