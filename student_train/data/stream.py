"""Streams training micro-batches from a sealed cache, resumable at any position.

Promise: the order is a pure function of (cache fingerprint, seed, position), see sample_order.py.
World size, micro-batch size and threads do not change which samples form a step (batch_plan.py).
The whole state is one integer: the samples consumed by optimizer steps, not those read ahead. Only
the columns that the objective needs are read. Refuses samples whose tokens, images or views differ
between student and teacher (same_text.py).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from student_train.config.objective import MatchScope, ObjectiveConfig
from student_train.data.batch_plan import BatchPlan
from student_train.data.prefetch import read_ahead
from student_train.data.same_text import check_against_teacher
from student_train.data.sample_order import SampleOrder, SkippedSamples, skipped_samples
from teacher_cache.codec.columns import Part
from teacher_cache.encoding.collate import EncodedSample, ModelBatch, collate
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.manifest import require_equal
from teacher_cache.schema.options import GridSettings, TierName
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.strict_json import StrictRecord
from teacher_cache.schema.teacher_output import TeacherOutput

Encoder = Callable[[Sample], EncodedSample]

ORDER_VERSION = 1
"""Goes up by one whenever a change gives a seed another order of the same rows."""
SHUFFLE_WINDOW = 16
"""Shards whose rows are shuffled together; part of the order."""
READ_AHEAD = 2
"""Micro-batches that loader threads may be ahead of the training loop.

Together with the one in use and the one being collated, a rank holds at most (READ_AHEAD + 2) *
micro_batch_size decoded samples; docs/performance.md has the bytes.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentBatch:
    """One micro-batch of one rank: the student's inputs and, row by row, the teacher's outputs."""

    model: ModelBatch
    outputs: tuple[TeacherOutput, ...]

    def __post_init__(self) -> None:
        if len(self.outputs) != len(self.model.samples):
            raise ValueError(
                f"{len(self.model.samples)} encoded samples for {len(self.outputs)} teacher outputs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState(StrictRecord):
    """A stream's order, and how many of its samples were consumed."""

    cache: str
    """Fingerprint of the cache."""
    order_version: int
    seed: int
    batch_size: int
    position: int
    skipped: SkippedSamples | None = None
    """Samples that are left out; absent in earlier versions, which left out none."""


class TrainingStream:
    """Yields micro-batches of one rank without end, from `position` on (`seek` sets it).

    `encode` is called from several threads at once unless `num_threads` is 0. `tier` is the tier to
    learn from, one that the cache holds. `skipped` numbers the samples to leave out.
    """

    def __init__(
        self,
        reader: CacheReader,
        encode: Encoder,
        *,
        objective: ObjectiveConfig,
        tier: TierName,
        pad_token_id: int,
        seed: int,
        plan: BatchPlan,
        num_threads: int = 0,
        skipped: Collection[int] = (),
    ) -> None:
        self.plan = plan
        self.position = 0
        self._reader = reader
        self._encode = encode
        self._parts = parts_needed(objective, tier, has_grid=reader.spec.grid is not None)
        self._scope: MatchScope | None = matching_scope(objective)
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._num_threads = num_threads
        self._order = SampleOrder(reader.shard_sizes, seed, SHUFFLE_WINDOW, skipped)
        self._skipped = skipped_samples([reader.keys[index] for index in sorted(skipped)])

    @property
    def grid(self) -> GridSettings | None:
        """Settings of the response grid that the cache's teacher was run on; None without one."""
        return self._reader.spec.grid

    @property
    def num_rows(self) -> int:
        """Samples of one epoch."""
        return self._order.num_rows

    def state(self, position: int) -> StreamState:
        """Return the state after optimizer steps have used `position` samples, over all ranks."""
        return StreamState(
            cache=self._reader.fingerprint,
            order_version=ORDER_VERSION,
            seed=self._seed,
            batch_size=self.plan.batch_size,
            position=position,
            skipped=self._skipped,
        )

    def seek(self, state: StreamState) -> None:
        """Start at a stored state; CacheMismatchError names what differs from this stream."""
        remedy = "A stream resumes only in the order that it began with"
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


def matching_scope(objective: ObjectiveConfig) -> MatchScope | None:
    """The scope of the matching; None for an objective that matches no vision tokens."""
    return objective.matching.scope if objective.needs_vision else None


def parts_needed(
    objective: ObjectiveConfig, tier: TierName, has_grid: bool = False
) -> frozenset[Part]:
    """The parts of a cached sample that the objective reads of a tier; only KD reads a grid."""
    parts: set[Part] = set()
    if objective.kd_from_cache and has_grid:
        parts.add("hidden_grid" if tier == "hidden" else "response_grid")
    compares_response = objective.rld_weight > 0 or objective.kd_from_cache
    distils = objective.needs_vision or compares_response
    if tier == "hidden":
        return frozenset({"hidden", *parts} if distils else parts)
    if compares_response:
        parts.add("response")
    if objective.vlad_weight > 0:
        parts.add("affinity")
    if objective.needs_vision:  # also VLAD's pairs come from matching vision logits
        parts |= {"vision", "sketch"} if tier == "topk+sketch" else {"vision"}
    return frozenset(parts)
