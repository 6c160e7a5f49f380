"""The stream of training batches: which samples, in which order, resumable at any position.

Promise: the order is a pure function of (cache fingerprint, seed, position), see sharding.py. The
endless order is cut into steps of `batch_size` samples, steps into contiguous shares of ranks,
shares into micro-batches, so that neither world size, micro-batch size nor threads change which
samples form a step. The whole state is one integer: samples consumed by optimizer steps, never
what was read ahead. Only the parts that the objective needs are read.

Refuses, naming the sample: a student whose tokens of the messages' text differ from the teacher's,
and images or views that do not correspond. An error in a loader thread is raised where its sample
is due: no hang, no early end. Reaches neither transformers nor ray.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch

from student_train.config.objective import MatchScope, ObjectiveConfig
from student_train.data.prefetch import read_ahead
from student_train.data.sample_order import SampleOrder, micro_batches, owned_positions
from teacher_cache.codec.columns import Part
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.collate import EncodedSample, ModelBatch, collate
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.manifest import require_equal
from teacher_cache.schema.options import GridSettings, TierName, tier_to_learn_from
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.strict_json import Strict
from teacher_cache.schema.teacher_output import TeacherOutput

Encoder = Callable[[Sample], EncodedSample]

ORDER_VERSION = 1
"""Raised whenever one seed would come to mean another order of the same rows."""
SHUFFLE_WINDOW = 16
"""Shards whose rows are shuffled together; part of the order."""
READ_AHEAD = 2
"""Micro-batches that loader threads may be ahead of the training loop.

With the one in use and the one that is put together, a rank holds at most (READ_AHEAD + 2) *
micro_batch_size decoded samples; docs/performance.md says how many bytes that is.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentBatch:
    """One micro-batch of one rank: the student's inputs and, row for row, the teacher's outputs."""

    model: ModelBatch
    outputs: tuple[TeacherOutput, ...]

    def __post_init__(self) -> None:
        if len(self.outputs) != len(self.model.samples):
            raise ValueError(
                f"{len(self.model.samples)} encoded samples for {len(self.outputs)} teacher outputs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the endless order is cut: `batch_size` samples a step, over all ranks and micro-batches.

    ValueError unless every rank gets the same number of full micro-batches in every step: then a
    step's gradient, the mean over ranks and micro-batches, weighs all samples alike.
    """

    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} workers")
        if self.batch_size % (self.micro_batch_size * self.world_size):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} workers; choose a micro_batch_size "
                f"that divides {self.batch_size / self.world_size:g}"
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that one rank computes for one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, start: int) -> Iterator[range]:
        """Positions of this rank's micro-batches from position `start` on, endless.

        ValueError where `start` is not the beginning of a step.
        """
        if start < 0 or start % self.batch_size:
            raise ValueError(f"position {start} is not a multiple of batch_size {self.batch_size}")
        for begin in count(start, self.batch_size):
            share = owned_positions(begin, self.batch_size, self.rank, self.world_size)
            yield from micro_batches(share, self.micro_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState(Strict):
    """Where a stream stands: which order it runs through, and how many samples were consumed."""

    cache: str
    """Fingerprint of the cache."""
    order_version: int
    seed: int
    batch_size: int
    position: int


class TrainingStream:
    """Endless micro-batches of one rank from a sealed cache, from `position` on (`seek` sets it).

    `encode` is called from several threads at once unless `num_threads` is 0. `records` is the tier
    to learn from where the cache holds several, by default the most exact one.
    """

    def __init__(
        self,
        reader: CacheReader,
        encode: Encoder,
        *,
        objective: ObjectiveConfig,
        records: TierName | None = None,
        pad_token_id: int,
        seed: int,
        plan: BatchPlan,
        num_threads: int = 0,
    ) -> None:
        self.plan = plan
        self.position = 0
        self._reader = reader
        self._encode = encode
        self._parts = parts_needed(
            objective,
            tier_to_learn_from(reader.spec.records, records),
            has_grid=reader.spec.grid is not None,
        )
        self._scope: MatchScope | None = (
            objective.matching.scope if objective.needs_vision else None
        )
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._num_threads = num_threads
        self._order = SampleOrder(reader.shard_sizes, seed, SHUFFLE_WINDOW)

    @property
    def grid(self) -> GridSettings | None:
        """How the cache's teacher dropped vision tokens for further response records, if it did."""
        return self._reader.spec.grid

    @property
    def num_rows(self) -> int:
        """Samples of one epoch."""
        return len(self._reader)

    def state(self, position: int) -> StreamState:
        """The state after `position` samples, of all ranks, have been used by optimizer steps."""
        return StreamState(
            cache=self._reader.fingerprint,
            order_version=ORDER_VERSION,
            seed=self._seed,
            batch_size=self.plan.batch_size,
            position=position,
        )

    def seek(self, state: StreamState) -> None:
        """Begin at a stored state; CacheMismatchError names what differs from this stream."""
        remedy = "A stream resumes in the order that it began in, or not at all"
        require_equal(state, self.state(state.position), "The stored state of the stream", remedy)
        self.position = state.position

    def __iter__(self) -> Iterator[StudentBatch]:
        chunks = self.plan.positions(self.position)
        indices = (self._order.index_at(position) for chunk in chunks for position in chunk)
        samples = read_ahead(
            self._load, indices, self._num_threads, READ_AHEAD * self.plan.micro_batch_size
        )
        while True:
            loaded = list(islice(samples, self.plan.micro_batch_size))
            model = collate([encoded for encoded, _ in loaded], self._pad_token_id, "right")
            yield StudentBatch(model=model, outputs=tuple(output for _, output in loaded))

    def _load(self, index: int) -> tuple[EncodedSample, TeacherOutput]:
        cached = self._reader.read(index, self._parts)
        encoded = self._encode(cached.sample)
        check_against_teacher(encoded, cached.output, self._scope)
        return encoded, cached.output


def parts_needed(
    objective: ObjectiveConfig, records: TierName, has_grid: bool = False
) -> frozenset[Part]:
    """The parts of a cached sample that the objective reads of a tier; only KD reads a grid."""
    parts: set[Part] = set()
    if objective.kd_from_cache and has_grid:
        parts.add("hidden_grid" if records == "hidden" else "response_grid")
    compares_response = objective.rld_weight > 0 or objective.kd_from_cache
    distils = objective.needs_vision or compares_response
    if records == "hidden":
        return frozenset({"hidden", *parts} if distils else parts)
    if compares_response:
        parts.add("response")
    if objective.vlad_weight > 0:
        parts.add("affinity")
    if objective.needs_vision:  # also VLAD's pairs come from matching vision logits
        parts |= {"vision", "sketch"} if records == "topk+sketch" else {"vision"}
    return frozenset(parts)


def check_against_teacher(
    encoded: EncodedSample, output: TeacherOutput, scope: MatchScope | None
) -> None:
    """Refuse a sample whose student tokens do not correspond to the teacher's (SampleError).

    The text of the messages must be the same tokens, of the same roles, on the same side of the
    first image. `scope` is the matching's, None where no vision tokens are matched: a matching per
    view needs the same views in the same order, one per image the same images.
    """
    spans = encoded.spans
    if not torch.equal(spans.content_ids, output.content_ids):
        raise SampleError(encoded.source_id, _first_difference(spans.content_ids, output))
    for name in ("is_response", "after_image"):
        if not torch.equal(getattr(spans, name), getattr(output, name)):
            raise SampleError(
                encoded.source_id,
                f"student and teacher have the same text tokens but differ in which of them are "
                f"{name}; use the teacher's chat template for the student",
            )
    student = [(view.image, view.view) for view in spans.views]
    teacher = [(view.image, view.view) for view in output.views]
    if {image for image, _ in student} != {image for image, _ in teacher}:
        raise SampleError(
            encoded.source_id,
            f"the student sees {len({image for image, _ in student})} images, the teacher saw "
            f"{len({image for image, _ in teacher})}",
        )
    if scope == "view" and student != teacher:
        raise SampleError(
            encoded.source_id,
            f"the student sees the (image, view) pairs {student}, the teacher saw {teacher}; "
            "use matching scope `global`, or image settings that give equal views",
        )


def _first_difference(student_ids: torch.Tensor, output: TeacherOutput) -> str:
    common = min(len(student_ids), len(output.content_ids))
    differs = student_ids[:common] != output.content_ids[:common]
    where = int(differs.nonzero()[0]) if bool(differs.any()) else common
    found = student_ids[where : where + 5].tolist()
    expected = output.content_ids[where : where + 5].tolist()
    return (
        f"the student's tokenizer gives {len(student_ids)} text tokens, the teacher's gave "
        f"{len(output.content_ids)}; from token {where} on found ids {found}, expected {expected}; "
        "use a student with the tokenizer and chat template of the cache's teacher"
    )
