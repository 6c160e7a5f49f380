"""What it costs to turn a sample into model inputs and token positions, on one thread.

A is the straightforward way, written out below: every rendering that `rendering.locate` speaks of,
made anew for each sample, all of the processor's outputs as tensors, and masks of torch.
B is `teacher_cache.tokens.SampleEncoder`. Both are held to the same bits before they are timed,
sample by sample in turns; a cell is the mean over samples of the quickest of several rounds.

    python -m benchmarks.training.encode_samples [--quick] [--json PATH]
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig, SiglipVisionConfig

from pipeline.config.build import SourceConfig
from pipeline.demo.config import DigitsConfig
from pipeline.demo.digits import IMAGE_PIXELS, PATCH_PIXELS, write_digits
from pipeline.demo.model import build_processor, build_tokenizer
from pipeline.sources.source import open_source
from teacher_cache.encoding.chat_rendering import locate, to_turns
from teacher_cache.encoding.collate import SEQUENCE_KEYS, EncodedSample
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.view_geometry import ImageInputs, layout_images
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, TokenSpans, make_sample

NUM_TURNS = 5
PHOTO_SIZE = (640, 480)
LLAVA_PIXELS, LLAVA_PATCH = 336, 14
SPANS = ("vision", "content", "content_ids", "is_response", "after_image")

Encode = Callable[[Sample], EncodedSample]


class Straightforward:
    """A: nothing kept from sample to sample."""

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor = processor
        self.config = config
        self.control_ids = set(processor.tokenizer.all_special_ids)

    def encode(self, sample: Sample) -> EncodedSample:
        """The whole conversation."""
        turns = to_turns(sample, None)
        rendering = locate(turns, self._render)
        self._render(turns, False)  # where the last turn ends: once more, without a thought
        with_images = [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.images]
        outputs = dict(
            self.processor(
                text=[rendering.text],
                images=[with_images],
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_token_type_ids=False,
            )
        )
        [replaced] = outputs.pop("text_replacement_offsets")
        offsets = outputs.pop("offset_mapping")[0]
        inputs = {n: v[0] if n in SEQUENCE_KEYS else v for n, v in outputs.items()}
        input_ids = inputs["input_ids"]
        is_placeholder = input_ids == self.config.image_token_id
        placeholders = [
            (is_placeholder & _overlap(offsets, *r["new_span"])).nonzero()[:, 0] for r in replaced
        ]
        images = ImageInputs(
            tensors=inputs,
            placeholders=tuple(len(positions) for positions in placeholders),
            replacements=tuple(r["replacement"] for r in replaced),
        )
        layouts = layout_images(self.config, images)
        pairs = zip(placeholders, layouts, strict=True)
        vision = torch.cat([positions[layout.is_vision] for positions, layout in pairs])

        def moved(position: int) -> int:
            before = [r for r in replaced if r["span"][1] <= position]
            return position + sum(len(r["replacement"]) - len(r["text"]) for r in before)

        is_content = torch.zeros(len(input_ids), dtype=torch.bool)
        is_response = torch.zeros_like(is_content)
        for start, end in rendering.instructions:
            is_content |= _overlap(offsets, moved(start), moved(end))
        for turn in rendering.responses:
            is_response |= _overlap(offsets, moved(turn.start), moved(turn.text_end))
            behind = _overlap(offsets, moved(turn.text_end), moved(turn.turn_end)) & ~is_response
            for position in behind.nonzero()[:, 0].tolist():
                is_response[position] = True
                if int(input_ids[position]) in self.control_ids:
                    break
        content = (is_content | is_response).nonzero()[:, 0]
        spans = TokenSpans(
            views=tuple(view for layout in layouts for view in layout.views),
            vision=vision,
            content=content,
            content_ids=input_ids[content],
            is_response=is_response[content],
            after_image=content > vision[0],
        )
        return EncodedSample(key=sample.key, source_id=sample.source_id, inputs=inputs, spans=spans)

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _overlap(offsets: Tensor, start: int, end: int) -> Tensor:
    first, last = offsets[:, 0], offsets[:, 1]
    trimmed = (first == last) & (first > start) & (last <= end)
    return trimmed | ((first < end) & (last > start) & (first < last))


def _digits(num_samples: int) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        config = DigitsConfig(out=Path(folder), num_train=num_samples, num_heldout=1)
        source = open_source(SourceConfig(path=str(write_digits(config) / "train.json")))
        return [source[index] for index in range(num_samples)]


def _with_turns(samples: Sequence[Sample], num_turns: int) -> list[Sample]:
    """Ask of each image what was asked of the following ones too."""
    longer: list[Sample] = []
    for index, sample in enumerate(samples):
        messages = list(sample.messages)
        for step in range(1, num_turns):
            question, answer = samples[(index + step) % len(samples)].messages
            text = question.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
            messages += [Message(role="user", text=text), answer]
        longer.append(make_sample(sample.source_id, sample.images, messages))
    return longer


def _as_photos(samples: Sequence[Sample]) -> list[Sample]:
    photos: list[Sample] = []
    for sample in samples:
        stream = io.BytesIO()
        Image.open(io.BytesIO(sample.images[0])).resize(PHOTO_SIZE).save(stream, format="JPEG")
        photos.append(make_sample(sample.source_id, [stream.getvalue()], sample.messages))
    return photos


def _pair(samples: Sequence[Sample], pixels: int, patch: int) -> dict[str, Encode]:
    tokenizer = build_tokenizer(turn.text for sample in samples for turn in sample.messages)
    processor = build_processor(tokenizer)
    processor.image_processor.size = {"height": pixels, "width": pixels}
    processor.patch_size = patch
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=pixels, patch_size=patch),
        image_token_index=tokenizer.get_vocab()[IMAGE_PLACEHOLDER],
    )
    return {
        "A": Straightforward(processor, config).encode,
        "B": SampleEncoder(processor, config).encode,
    }


def _require_equal(samples: Sequence[Sample], encoders: dict[str, Encode]) -> None:
    """ValueError unless both ways give the same names, types and bits."""
    for sample in samples:
        one, two = encoders["A"](sample), encoders["B"](sample)
        values = [{**e.inputs, **{n: getattr(e.spans, n) for n in SPANS}} for e in (one, two)]
        same = list(values[0]) == list(values[1]) and one.spans.views == two.spans.views
        pairs = [(values[0][name], values[1][name]) for name in values[0]] if same else []
        if not same or not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"sample {sample.source_id!r} is encoded in two ways; mend one of them"
            )


def _milliseconds(
    samples: Sequence[Sample], encoders: dict[str, Encode], num_rounds: int
) -> dict[str, float]:
    """Mean over samples of the quickest of the rounds, for each way."""
    best = {way: [float("inf")] * len(samples) for way in encoders}
    for _ in range(num_rounds):
        for index, sample in enumerate(samples):
            for way, encode in encoders.items():
                start = time.perf_counter()
                encode(sample)
                best[way][index] = min(best[way][index], time.perf_counter() - start)
    return {way: 1000 * statistics.mean(seconds) for way, seconds in best.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_samples, num_rounds = (20, 10) if options.quick else (100, 20)
    digits = _digits(num_samples)
    cases = {
        "the demo's grids, 1 turn": (digits, IMAGE_PIXELS, PATCH_PIXELS),
        f"the same, {NUM_TURNS} turns": (
            _with_turns(digits, NUM_TURNS),
            IMAGE_PIXELS,
            PATCH_PIXELS,
        ),
        "640 x 480 JPEG at 336 pixels": (_as_photos(digits), LLAVA_PIXELS, LLAVA_PATCH),
    }
    rows: list[dict[str, object]] = []
    print(f"{'milliseconds per sample':30s} {'A':>8s} {'B':>8s} {'A / B':>7s}")
    for name, (samples, pixels, patch) in cases.items():
        encoders = _pair(samples, pixels, patch)
        _require_equal(samples, encoders)
        found = _milliseconds(samples, encoders, num_rounds)
        a, b = found["A"], found["B"]
        print(f"{name:30s} {a:8.3f} {b:8.3f} {a / b:7.2f}", flush=True)
        rows.append({"case": name, "a_ms": a, "b_ms": b, "ratio": a / b})
    if options.json is not None:
        options.json.write_text(json.dumps({"num_samples": num_samples, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
