"""Measures how much faster prefill is when vision tokens are dropped inside the language model.

A is the model unchanged, B the same model under `compression.compress`, at K = 2 with EPIC's
ratios, alternating in one process on one thread. Times are the thread's processor time, which a
busy machine disturbs least. The model is a LLaVA with random weights, 576 vision tokens and a short
question; its vision tower is one small layer, so that the language model dominates. A cell is the
median over rounds; a speed-up is the median of the rounds' ratios A / B, with quartiles.

    python -m benchmarks.training.compression [--quick] [--json PATH]
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlavaConfig, SiglipVisionConfig
from transformers import LlavaForConditionalGeneration as Llava

from student_train.compression.compression import compress
from student_train.config.compression import CompressionSettings
from teacher_cache.encoding.collate import EncodedSample, ModelBatch, collate
from teacher_cache.schema.samples import TokenSpans, ViewGrid

SIDE, PATCH = 24, 4
NUM_VISION = SIDE * SIDE
BEFORE, QUESTION, CONTROL = 35, 40, 5
"""Text as in LLaVA-1.5: system prompt, then the image, a question, and the generation prompt."""
IMAGE_ID, VOCABULARY = 3, 2048
LAYER = 2
RATIOS = (0.889, 0.778, 0.556)
COMPRESSORS = ("dart", "fastv", "random")


def make_model(width: int, num_layers: int) -> Any:
    """Make a LLaVA with random weights: Llama decoder, 576 vision tokens, a tiny vision tower."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return Llava(config).eval()


def make_batch(num_answer: int = 0, num_control: int = CONTROL) -> ModelBatch:
    """Make one sample with one image, padded left for a prompt, right with an answer."""
    length = BEFORE + NUM_VISION + QUESTION + num_answer + num_control
    ids = torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    vision = torch.arange(BEFORE, BEFORE + NUM_VISION)
    ids[vision] = IMAGE_ID
    content = torch.arange(BEFORE + NUM_VISION, length - num_control)
    spans = TokenSpans(
        views=(ViewGrid(image=0, view=0, rows=SIDE, cols=SIDE),),
        vision=vision,
        content=content,
        content_ids=ids[content],
        is_response=torch.arange(len(content)) >= QUESTION,
        after_image=torch.ones_like(content, dtype=torch.bool),
    )
    pixels = torch.rand(1, 3, SIDE * PATCH, SIDE * PATCH)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }
    sample = EncodedSample(key="0" * 32, source_id="made up", inputs=inputs, spans=spans)
    return collate([sample], 0, "right" if num_answer else "left")


@torch.no_grad()
def prefill(
    model: Any, batch: ModelBatch, settings: CompressionSettings | None
) -> tuple[float, int, int]:
    """Return milliseconds to fill a cache and compute the next logits, vision tokens, cache bytes.

    The time includes opening the context, choosing tokens and removing hooks.
    """
    cache = DynamicCache(config=model.config.text_config)
    start = time.thread_time()
    context = nullcontext() if settings is None else compress(model, settings, batch)
    with context as found:
        model(**batch.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    elapsed = (time.thread_time() - start) * 1e3
    vision = batch.samples[0].spans.vision
    left = len(vision) if found is None else int(found.layout.kept(0, vision).sum())
    return elapsed, left, sum(2 * layer.keys.nbytes for layer in cache.layers)  # pyright: ignore


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, num_layers, num_rounds = (256, 4, 5) if options.quick else (512, 8, 15)
    model, batch = make_model(width, num_layers), make_batch()
    ways: dict[str, CompressionSettings | None] = {"A: uncompressed": None}
    for ratio in RATIOS:
        for name in COMPRESSORS:
            ways[f"{name}, ratio {ratio}"] = CompressionSettings.at_layer(LAYER, ratio, name)
    found = {name: prefill(model, batch, way)[1:] for name, way in ways.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, way in ways.items():
            times[name].append(prefill(model, batch, way)[0])
    plain = times["A: uncompressed"]
    print(
        f"Llama, {num_layers} layers of width {width}, {batch.inputs['input_ids'].shape[1]} tokens"
    )
    print(f"{'':24s} {'vision':>6s} {'ms':>8s} {'A / B':>6s} {'quartiles':>12s} {'cache MiB':>9s}")
    rows: list[dict[str, object]] = []
    for name in ways:
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(plain, times[name], strict=True)], n=4
        )
        left, num_bytes = found[name]
        median = statistics.median(times[name])
        print(
            f"{name:24s} {left:6d} {median:8.1f} {middle:6.2f} {low:6.2f}{high:6.2f} "
            f"{num_bytes / 2**20:9.2f}"
        )
        rows.append(
            {"way": name, "vision_tokens": left, "ms": median, "ratio": middle, "bytes": num_bytes}
        )
    if options.json is not None:
        report = {"width": width, "num_layers": num_layers, "num_rounds": num_rounds, "rows": rows}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
