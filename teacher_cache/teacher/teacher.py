"""Runs the teacher over samples and makes their records, for every model family.

Hidden states are the backbone's output after the final norm; logits are computed at the needed rows
only. The model runs in eval mode, without gradients and with right padding. Equal batches give
equal bits. In another batch the last bits of a sample may differ, because kernels sum in another
order; so the batch size is part of the cache's spec. An unusable sample becomes a `RejectedSample`.
Refuses models whose logits are not head(hidden), and a top k larger than the vocabulary.

Models of one family pad their LM heads to different numbers of rows. Rows are cut to the ids that
the tokenizer can emit, so that teacher and student normalise over the same vocabulary.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.encoding.collate import EncodedSample, ModelBatch, collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.models.checkpoint import load_model, require_one_encodes, resolve_device
from teacher_cache.models.digests import (
    chat_template_digest,
    config_digest,
    image_processor_digest,
    tokenizer_digest,
    vocabulary_digest,
    weights_digest,
)
from teacher_cache.records.calibration import Calibration
from teacher_cache.records.make_records import DTYPES_BY_NAME, make_output
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.errors import SampleError, first_causes
from teacher_cache.schema.manifest import LAYOUT_VERSION, CacheSpec
from teacher_cache.schema.options import (
    PICTURE_RULE,
    GridSettings,
    PictureRule,
    RecordSettings,
    TextRules,
    holds,
)
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import RejectedSample, Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.teacher.plain_head import require_plain_head, shared_head
from teacher_cache.teacher.vision_sharing import VisionOwners, vision_digest

logger = logging.getLogger(__name__)


PredictingStates = Mapping[float, Float[Tensor, "R D"]]
"""By ratio, a sample's final hidden states that predict its response tokens."""


class GridPasses(Protocol):
    """Runs a batch whole, and once more for each ratio of dropped vision tokens."""

    def __call__(
        self, grid: GridSettings, batch: ModelBatch, whole: Callable[[], Tensor]
    ) -> tuple[Float[Tensor, "B L D"], Sequence[PredictingStates]]:
        """The states that `whole`, the pass over the batch, gives; each sample's at every ratio."""
        ...


class Teacher:
    """A model and its processor, on the model's device, ready to make records.

    `head` is the LM head cut to the shared vocabulary, `encoder` turns samples into model inputs.
    Records of a grid need `grid_passes` (pipeline/build/response_grid.py).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        system_prompt: str | None = None,
        text: TextRules | None = None,
        pictures: PictureRule = PICTURE_RULE,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.encoder = SampleEncoder(processor, model.config, system_prompt, text, pictures)
        self.device: torch.device = model.device
        self.head = shared_head(model, processor.tokenizer)
        self.grid_passes: GridPasses | None = None
        self._sketch: SketchBasis | None = None
        self.plugins: tuple[str, ...] = ()
        """Name and digest of each module that was imported before the model was loaded."""
        self.template: TailTemplate | None = None
        """The tail template: fitted by `calibrate`, or set to the one a cache stores."""
        require_plain_head(model, processor.tokenizer)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: str = "auto",
        dtype: str | None = None,
        attention: str = "sdpa",
        system_prompt: str | None = None,
        text: TextRules | None = None,
        pictures: PictureRule = PICTURE_RULE,
        samples: Iterable[Sample] = (),
    ) -> "Teacher":
        """Load an image-text-to-text model and its processor from a folder or a hub id.

        `dtype` None is the checkpoint's own, device "auto" is CUDA where available, `text` None is
        today's rules. Code in a checkpoint is not run. ValueError for what cannot be loaded whole,
        and, before a weight is opened, where the processor can encode none of `samples`.
        """
        place = resolve_device(device)

        def check(processor: Any, config: Any) -> None:
            encoder = SampleEncoder(processor, config, system_prompt, text, pictures)
            require_one_encodes(encoder.encode, samples, path)

        wanted = None if dtype is None else DTYPES_BY_NAME[dtype]
        loaded: Any = load_model(path, wanted, attention, check)
        model, processor = loaded
        teacher = cls(model.to(place), processor, system_prompt, text, pictures)
        logger.info("teacher %s on %s in %s", path, teacher.device, model.dtype)
        return teacher

    @property
    def sketch(self) -> SketchBasis | None:
        """Basis of the sketch tier: fitted by `calibrate`, or set to the one a cache stores."""
        return self._sketch

    @sketch.setter
    def sketch(self, basis: SketchBasis | None) -> None:
        if basis is not None:
            found = (basis.vocab_size, len(basis.hidden_mean))
            if found != tuple(self.head.weight.shape):
                raise ValueError(
                    f"the sketch's basis has {found[0]} vocabulary rows and width {found[1]}, "
                    f"this teacher's head {tuple(self.head.weight.shape)}; refit it"
                )
            basis = basis.to(self.device)
        self._sketch = basis

    def calibrate(
        self,
        batches: Iterable[Sequence[Sample]],
        settings: RecordSettings,
        num_tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> list[RejectedSample]:
        """Fit sketch basis and tail template (records/calibration.py) and keep them.

        Takes batches until they have `num_tokens` vision tokens (response tokens without images),
        or all batches (None). Holds the states of one batch at a time; `progress` counts tokens.
        Returns the samples that cannot be used; ValueError with the first causes if no other one
        gives what is fitted.
        """
        found, num_samples = Calibration(self.head, settings), 0
        rejected: list[RejectedSample] = []
        for samples in batches:
            num_samples += len(samples)
            items = [self._encode(sample) for sample in samples]
            rejected += [item for item in items if isinstance(item, RejectedSample)]
            encoded = [item for item in items if isinstance(item, EncodedSample)]
            for item, (states, _) in zip(encoded, self._states(encoded), strict=True):
                vision, predicting = states[item.spans.vision], states[item.spans.predicting]
                if bool(vision.isfinite().all()) and bool(predicting.isfinite().all()):
                    found.add(vision, predicting)
                    continue
                reason = "the teacher's states: NaN or infinite"
                rejected.append(
                    RejectedSample(key=item.key, source_id=item.source_id, reason=reason)
                )
            done, total = found.num_tokens, num_tokens or found.num_tokens
            progress("calibrate", min(done, total), total)
            if num_tokens is not None and found.num_tokens >= num_tokens:
                break
        if num_tokens is not None and 0 < found.num_tokens < num_tokens:
            progress("calibrate", found.num_tokens, found.num_tokens)  # the source had no more
        causes = first_causes([f"{r.source_id}: {r.reason}" for r in rejected], num_samples)
        if causes and not found.num_tokens:
            raise ValueError(f"calibration found no tokens{causes}")
        try:
            self.sketch, self.template = found.sketch(), found.template()
        except ValueError as error:
            raise ValueError(f"{error}{causes}") from error
        return rejected

    def run_over(self, samples: Sequence[Sample]) -> int:
        """Run the model over a batch as calibration does; returns the tokens that it would take."""
        items = [self._encode(sample) for sample in samples]
        encoded = [item for item in items if isinstance(item, EncodedSample)]
        self._states(encoded)
        return sum(len(item.spans.vision) or len(item.spans.predicting) for item in encoded)

    def hidden_states(self, batch: ModelBatch) -> Float[Tensor, "B L D"]:
        """Last hidden states of a batch, after the final norm; no gradients."""
        inputs = {
            name: values.to(self.model.dtype) if values.is_floating_point() else values
            for name, values in batch.to(self.device).inputs.items()
        }
        with torch.no_grad():
            return self.model.model(**inputs, use_cache=False).last_hidden_state

    def outputs(
        self,
        samples: Sequence[Sample],
        settings: RecordSettings,
        owners: VisionOwners | None = None,
    ) -> list[TeacherOutput | RejectedSample]:
        """Records of samples, in their order; the samples are one batch.

        A sample that equals one of the `owners` up to its last vision token gets that owner's
        vision record; others become owners. None: each has its own. ValueError for settings that
        cannot work: `top_k` beyond the vocabulary, a sketch without a basis, a grid without passes.
        """
        self._require(settings)
        items = [self._encode(sample) for sample in samples]
        encoded = [item for item in items if isinstance(item, EncodedSample)]
        rest = iter(self._states(encoded, settings.grid))
        return [
            self._record(sample, item, *next(rest), settings, owners)
            if isinstance(item, EncodedSample)
            else item
            for sample, item in zip(samples, items, strict=True)
        ]

    def spec(
        self, settings: RecordSettings, *, batch_size: int, share_vision: bool = False
    ) -> CacheSpec:
        """Everything that the stored numbers depend on, as digests and settings."""
        self._require(settings)
        basis = self.sketch if holds(settings.records, "sketch") else None
        has_hidden, has_top_k = holds(settings.records, "hidden"), holds(settings.records, "topk")
        processor = self.encoder.processor
        width = self.head.weight.shape[1]
        resolved = dataclasses.replace(
            settings,
            sketch_rank=settings.sketch_rank if basis is None else basis.rank,
            hidden_group=min(settings.hidden_group or width, width),
        )
        return CacheSpec(
            **resolved.for_spec(),
            layout_version=LAYOUT_VERSION,
            sketch_digest=None if basis is None else basis.digest,
            head_digest=self.head.digest if has_hidden else None,
            vocab_size=self.head.vocab_size,
            hidden_size=width,
            logits_dtype=_name(self.head.weight.dtype),
            teacher_class=type(self.model).__name__,
            teacher_weights=self._weights_digest,
            teacher_config=config_digest(self.model.config),
            compute_dtype=_name(self.model.dtype),
            attention=self.model.config._attn_implementation,
            tokenizer=tokenizer_digest(processor.tokenizer),
            vocabulary=vocabulary_digest(processor.tokenizer, self.head.vocab_size),
            chat_template=chat_template_digest(processor),
            image_processor=image_processor_digest(processor),
            system_prompt=self.encoder.system_prompt,
            batch_size=batch_size,
            share_vision=share_vision,
            template_digest=self.template.digest if has_top_k and self.template else None,
            text=self.encoder.rules,
            pictures=self.encoder.pictures,
            plugins=self.plugins,
        )

    @cached_property
    def _weights_digest(self) -> str:
        return weights_digest(self.model)

    def _require(self, settings: RecordSettings) -> None:
        if settings.grid is not None and self.grid_passes is None:
            raise ValueError("a grid needs passes that drop vision tokens; set grid_passes first")
        if not holds(settings.records, "topk"):
            return
        if not 1 <= settings.top_k <= self.head.vocab_size:
            raise ValueError(
                f"top_k is {settings.top_k}, but the teacher and its tokenizer share "
                f"{self.head.vocab_size} vocabulary rows; lower top_k"
            )
        if holds(settings.records, "sketch") and self.sketch is None:
            raise ValueError("the topk+sketch tier needs a basis; calibrate first")

    def _encode(self, sample: Sample) -> EncodedSample | RejectedSample:
        try:
            return self.encoder.encode(sample)
        except SampleError as error:
            return RejectedSample(key=sample.key, source_id=sample.source_id, reason=error.reason)

    def _states(
        self, encoded: Sequence[EncodedSample], grid: GridSettings | None = None
    ) -> list[tuple[Tensor, PredictingStates | None]]:
        """States [L, D] of each sample, padding last; with a grid, predicting states by ratio."""
        if not encoded:
            return []
        batch = collate(encoded, self.encoder.pad_token_id, "right")
        if grid is None or self.grid_passes is None:
            return [(states, None) for states in self.hidden_states(batch)]
        whole, at_ratios = self.grid_passes(grid, batch, partial(self.hidden_states, batch))
        return list(zip(whole, at_ratios, strict=True))

    def _record(
        self,
        sample: Sample,
        encoded: EncodedSample,
        states: Tensor,
        grid: PredictingStates | None,
        settings: RecordSettings,
        owners: VisionOwners | None,
    ) -> TeacherOutput | RejectedSample:
        seen = None if owners is None else vision_digest(sample, encoded)
        owner = None if owners is None or seen is None else owners.get(seen)
        try:
            output = make_output(
                encoded.spans, states, self.head, settings, self.sketch, owner, grid
            )
        except ValueError as error:
            return RejectedSample(
                key=sample.key, source_id=sample.source_id, reason=f"the teacher's output: {error}"
            )
        if owners is not None and seen is not None:
            owners.setdefault(seen, CachedSample(sample=sample, output=output))
        return output


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
