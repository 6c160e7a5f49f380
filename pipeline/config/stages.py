"""Settings of training, evaluation and report; flags, help and `--config` files follow from them.

Imports nothing heavy, so that `emkd --help` answers at once.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.build import SourceConfig
from pipeline.config.checks import (
    Dtype,
    at_least_one,
    refuse_changed,
    refuse_idle_choice,
    refuse_url_paths,
)
from student_train.config.compression import CompressionSettings, DropStage
from student_train.config.recipe import TrainerSettings
from teacher_cache.schema.options import TextSource
from teacher_cache.schema.strict_json import StrictRecord

CONFIG_FILE = "config.json"
"""A run's resolved settings, beside the run, ready for `--config`."""

ScoreName = Literal[
    "exact_match",
    "choice_accuracy",
    "token_f1",
    "word_accuracy",
    "vqa_accuracy",
    "anls",
    "relaxed_accuracy",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(StrictRecord):
    """Train one student from a sealed cache; no teacher is loaded."""

    cache: str
    """Folder or URL of a sealed cache."""
    student: str
    """A vanilla model, which gets the projector below, or a student that `emkd train` wrote."""
    out: Path
    """Folder of the run."""
    projector: Literal["avgpool", "none"] = "avgpool"
    """`avgpool` pools the vision tokens (LLaVA, LLaVA-NeXT); `none` leaves a model of any family
    unchanged: a schedule can then drop tokens inside its language model."""
    stride: int = 2
    """Vision tokens are pooled by stride x stride."""
    expect_cache: str | None = None
    """Refuse a cache whose fingerprint does not begin with this."""
    chat_template: Path | None = None
    """File with the student's chat template, which replaces its own; default: the one given to
    the build, if any."""
    append_eos: bool = True
    """Learn the end-of-sequence token that the build appended to assistant turns; off: refuse a
    cache with it."""
    training: TrainerSettings = TrainerSettings()
    torch_threads: int | None = None
    """CPU threads of torch; set it where results must repeat to the bit on other machines."""
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_url_paths(self)
        if self.projector == "none":
            refuse_changed(self, "projector none does not pool", "stride")

    def with_training(self, **changes: Any) -> "TrainConfig":
        """The same run with some of its training settings changed."""
        return replace(self, training=replace(self.training, **changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(StrictRecord):
    """Generate answers for a source and score them against the last assistant turn."""

    model: str
    """Folder of a student (RUN/final), or folder or hub id of any image-text-to-text model."""
    source: SourceConfig
    out: Path
    """Folder of the evaluation."""
    scores: tuple[ScoreName, ...] = ("exact_match", "word_accuracy")
    """Scores of an answer; docs/operations.md names the rule of each."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """refuse: name all samples that cannot be used, before the first answer; skip: leave them out,
    list them in skipped.jsonl and count them in metrics.json."""
    batch_size: int = 16
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    device: str = "auto"
    dtype: Dtype | None = None
    """Dtype of the computation; default: the checkpoint's."""
    system_prompt: str | None = None
    chat_template: Path | None = None
    """File with a chat template that replaces the model's own."""
    append_eos: bool = True
    """Append the tokenizer's end-of-sequence token to earlier assistant turns that the chat
    template does not end, as in training."""
    cache: str | None = None
    """A cache (folder or URL) of the same source, for whose first samples the matching of vision
    tokens is drawn, with the words of both models."""
    num_pictures: int = 4
    """Samples whose matching is drawn, with `cache`."""
    compressor: str | None = None
    """Drop vision tokens inside the language model, by dart, fastv, random, or a registered
    compressor; default: drop none."""
    compress_layer: int = 2
    """Decoder layer, counted from 0, at whose input tokens are dropped."""
    ratio: float | None = None
    """Share of the vision tokens that is dropped there."""
    stages: tuple[str, ...] = ()
    """Instead of layer and ratio, a pyramid: 8:0.5 16:0.5 drops half at the input of layer 8 and
    half of what is left at that of layer 16."""
    compress_text: TextSource = "instruction"
    """Text that decides what is kept: the turn's `instruction`, or `released`: all text after the
    images."""
    compress_seed: int = 0
    """Seed of the compressor random."""
    torch_threads: int | None = None
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_url_paths(self)
        at_least_one(self, "batch_size", "max_new_tokens")
        if not self.scores:
            raise ValueError("scores is empty; name at least one")
        if self.compressor is None:
            names = ("compress_layer", "ratio", "stages", "compress_text", "compress_seed")
            refuse_changed(self, "compressor is not set", *names)
            return
        if self.cache is not None:
            raise ValueError(
                "cache and compressor are both set, but pictures show the vision tokens before any "
                "are dropped; draw them in the evaluation without compressor"
            )
        if (self.ratio is None) != bool(self.stages):
            raise ValueError(
                f"compressor {self.compressor!r} needs a ratio (0.75 keeps a quarter of the vision "
                f"tokens) or stages, one of them; found ratio {self.ratio} and stages {self.stages}"
            )
        refuse_idle_choice(self, self.compressor)
        if self.stages:
            refuse_changed(self, "stages name their layers", "compress_layer")
        _ = self.compression

    @property
    def compression(self) -> CompressionSettings | None:
        """What is dropped inside the language model; ValueError for impossible stages."""
        if self.compressor is None:
            return None
        pairs = self.stages or (f"{self.compress_layer}:{self.ratio}",)
        return CompressionSettings(
            compressor=self.compressor,
            stages=tuple(_stage(pair) for pair in pairs),
            text=self.compress_text,
            seed=self.compress_seed,
        )


def _stage(pair: str) -> DropStage:
    layer, _, ratio = pair.partition(":")
    try:
        number, share = int(layer), float(ratio)
    except ValueError:
        raise ValueError(
            f"found the stage {pair!r}, expected LAYER:RATIO such as 8:0.5, half at layer 8"
        ) from None
    return DropStage(layer=number, ratio=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(StrictRecord):
    """Compare runs in one self-contained HTML page."""

    runs: tuple[Path, ...]
    out: Path = Path("report.html")

    def __post_init__(self) -> None:
        refuse_url_paths(self)
