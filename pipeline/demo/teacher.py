"""Trains the demo's vanilla teacher: a LLaVA that reads named cells of a grid of digits.

Two phases, as in LLaVA: the vision tower learns to name what each of its patches shows, then is
frozen; projector and language model learn the conversations from the tower's features. The same
data, settings and number of threads give the same weights. `<out>/final` is renamed into place
last; after a kill, training starts over.
B samples of a batch, C patches of a grid, D width of the tower.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.config.build import SourceConfig
from pipeline.demo.digits import GRID_SIDE, load_grids, patch_labels
from pipeline.demo.model import ASSISTANT, WIDTH, build_model, build_processor, build_tokenizer
from pipeline.sources.source import open_source
from teacher_cache.encoding.chat_rendering import to_turns
from teacher_cache.encoding.pictures import read_picture
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import Sample

NUM_DIGITS = 10
NO_LABEL = -100
MIN_LR_RATIO = 0.05
MAX_GRAD_NORM = 1.0
RECORD_FILE = "demo_teacher.json"
"""Beside the weights: the settings and the digest of the data they were trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """How long the two phases train; AdamW(0.9, 0.98), cosine to 5 %, weight decay 0.01."""

    vision_steps: int = 200
    vision_batch_size: int = 48
    vision_learning_rate: float = 2e-3
    language_steps: int = 360
    language_batch_size: int = 32
    language_learning_rate: float = 4e-3
    seed: int = 0
    torch_threads: int = 1
    """Sums are split by thread: another number of threads changes the last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examples:
    """The training split, processed once; labels are -100 outside the response."""

    pixels: Float[Tensor, "n 3 H W"]
    ids: Int[Tensor, "n L"]
    mask: Int[Tensor, "n L"]
    labels: Int[Tensor, "n L"]


def train_demo_teacher(
    data: Path,
    out: Path,
    settings: TeacherSettings = TeacherSettings(),
    progress: Progress = no_progress,
) -> Path:
    """Train on `data`/train.json (see `digits.py`) and return `out`/final, model and processor.

    A finished teacher is left as it is. Progress counts the steps of both phases. Raises ValueError
    if the data is not a set of digit grids, or if the finished teacher was trained with other
    settings or data.
    """
    final = out / "final"
    digest = hashlib.sha256((data / "train.json").read_bytes()).hexdigest()
    record: dict[str, object] = {**asdict(settings), "train.json": digest}
    if final.exists():
        _require_same(final / RECORD_FILE, record)
        return final
    samples = _read_samples(data / "train.json")
    grids = _read_grids(data / "train.json")
    tokenizer = build_tokenizer(turn.text for sample in samples for turn in sample.messages)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, settings.seed)
    total = settings.vision_steps + settings.language_steps
    done = 0

    def count_step() -> None:
        nonlocal done
        done += 1
        progress("teacher", done, total)

    with _threads(settings.torch_threads):
        examples = _encode(processor, samples)
        _train_vision_tower(model, examples.pixels, grids, settings, count_step)
        _train_language_model(model, examples, settings, count_step)
    partial = out / f".final.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / RECORD_FILE).write_text(json.dumps(record) + "\n")
    partial.rename(final)
    return final


def _require_same(path: Path, wanted: dict[str, object]) -> None:
    found = json.loads(path.read_bytes())
    if found != wanted:
        raise ValueError(
            f"{path}: found a teacher trained with {found}, expected {wanted}; "
            "choose another folder or remove this one"
        )


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_samples(path: Path) -> list[Sample]:
    source = open_source(SourceConfig(path=str(path)))
    samples = [source[index] for index in range(len(source))]
    for sample in samples:
        if len(sample.images) != 1 or len(sample.messages) != 2:
            raise ValueError(
                f"{path}, sample {sample.source_id!r}: found {len(sample.images)} images and "
                f"{len(sample.messages)} turns, expected one image, one question and one answer; "
                "write the data with emkd data digits"
            )
    return samples


def _read_grids(path: Path) -> Int[Tensor, "n 16"]:
    try:
        return torch.from_numpy(load_grids(path))
    except KeyError as error:
        raise ValueError(
            f"{path}: found an entry without {error}, expected the digits of each grid; "
            "write the data with emkd data digits"
        ) from error


def _encode(processor: LlavaProcessor, samples: Sequence[Sample]) -> _Examples:
    images = [read_picture(sample.images[0]) for sample in samples]
    # The prompt that cache and students use, so that the teacher learns it.
    rendered: list[str] = [
        processor.apply_chat_template(to_turns(sample, None), tokenize=False) for sample in samples
    ]
    batch = processor(
        images=images,
        text=rendered,
        padding=True,  # pyright: ignore[reportCallIssue]
        return_tensors="pt",  # pyright: ignore[reportCallIssue]
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    is_marker = ids == processor.tokenizer.convert_tokens_to_ids(ASSISTANT)
    after_marker = is_marker.cumsum(dim=1) - is_marker.long()
    labels = torch.where((after_marker * mask).bool(), ids, NO_LABEL)
    return _Examples(pixels=batch["pixel_values"], ids=ids, mask=mask, labels=labels)


def _train_vision_tower(
    model: LlavaForConditionalGeneration,
    pixels: Float[Tensor, "n 3 H W"],
    grids: Int[Tensor, "n 16"],
    settings: TeacherSettings,
    count_step: Callable[[], None],
) -> None:
    """Train the tower to name digit, row and column of the cell under each patch; freeze it."""
    labels = patch_labels(grids.numpy())
    digits_BC = torch.from_numpy(labels.digit)
    row_C, column_C = torch.from_numpy(labels.row), torch.from_numpy(labels.column)
    sizes = [NUM_DIGITS, GRID_SIDE, GRID_SIDE]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        # With a norm of its own: LLaVA reads the tower's states before the tower's last norm.
        heads = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(sizes)))
    tower = model.model.vision_tower
    batches = _batches(len(pixels), settings.vision_batch_size, settings.seed)

    def loss() -> Tensor:
        index = next(batches)
        scores = heads(_patch_states(model, pixels[index])).split(sizes, dim=-1)
        targets = (digits_BC[index], row_C.expand(len(index), -1), column_C.expand(len(index), -1))
        pairs = zip(scores, targets, strict=True)
        return sum((cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in pairs), torch.zeros(()))

    parameters = [*tower.parameters(), *heads.parameters()]
    _optimise(loss, parameters, settings.vision_steps, settings.vision_learning_rate, count_step)
    tower.requires_grad_(False)


def _train_language_model(
    model: LlavaForConditionalGeneration,
    examples: _Examples,
    settings: TeacherSettings,
    count_step: Callable[[], None],
) -> None:
    """Train projector and language model, supervised; the frozen tower runs only once."""
    with torch.no_grad():
        chunks = examples.pixels.split(256)
        states = torch.cat([_patch_states(model, chunk) for chunk in chunks])
    batches = _batches(len(states), settings.language_batch_size, settings.seed + 1)

    def loss() -> Tensor:
        index = next(batches)
        features = list(model.model.multi_modal_projector(states[index]))
        # LLaVA, too, puts a list there: one tensor per image.
        image_outputs = BaseModelOutputWithPooling(
            pooler_output=features  # pyright: ignore[reportArgumentType]
        )
        hidden = model.model(
            input_ids=examples.ids[index],
            attention_mask=examples.mask[index],
            mm_encoder_outputs={"image": image_outputs},
            use_cache=False,
        ).last_hidden_state
        labels = examples.labels[index][:, 1:]
        is_label = labels != NO_LABEL
        return cross_entropy(model.lm_head(hidden[:, :-1][is_label]), labels[is_label])

    parameters = [p for p in model.parameters() if p.requires_grad]
    _optimise(
        loss, parameters, settings.language_steps, settings.language_learning_rate, count_step
    )


def _patch_states(
    model: LlavaForConditionalGeneration, pixels: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, "B C D"]:
    """The projector's input for an image: the tower's last layer, before its final norm."""
    layer = model.config.vision_feature_layer
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]


def _batches(num_samples: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " B"]]:
    """Endless batches of indices: epochs shuffled by `seed`, incomplete last batches dropped."""
    if num_samples < batch_size:
        raise ValueError(
            f"found {num_samples} samples, expected at least one batch of {batch_size}; write more"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        yield from order[: num_samples - num_samples % batch_size].split(batch_size)


def _optimise(
    loss: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    num_steps: int,
    learning_rate: float,
    count_step: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )

    def decay(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
        return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        count_step()
