"""What one tier of a cache takes and loses: a sample's row is weighed, a view's signal compared.

Rows are encoded by `rows.encode_row`, costs, assignments and divergences are those of training:
nothing is computed here but differences. The reference is always the head's logits at every
vocabulary row. No student exists yet; `stand_in` makes one that is close to its teacher, so the
numbers say how tiers compare, not what a run will reach. Student logits are held a chunk of rows
at a time. Dimensions as in schema.py.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pipeline.fidelity.sizes import is_vision_column
from student_train.config.objective import MatchingConfig
from student_train.divergence.divergence import reverse_kl
from student_train.matching.assignment import solve_assignment
from student_train.matching.cost import cost_matrix
from student_train.signals.teacher_signal import Signal, TopKSignal
from teacher_cache.codec.columns import VISION_COLUMNS, columns_of, output_columns
from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.schema.manifest import CacheSpec, to_json
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.shard_quality import MatchName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.arrow import ArrowFormat
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_row, tier_parts


@dataclass(slots=True)
class TierSums:
    """What is added up for one tier, sample after sample and view after view."""

    layout_vision: int = 0
    stored_vision: int = 0
    stored: int = 0
    shareable: int = 0
    exact_cost: float = 0.0
    chosen_cost: float = 0.0
    random_cost: float = 0.0
    equal_pairs: int = 0
    num_pairs: int = 0
    cosines: list[float] = field(default_factory=list[float])

    def weigh(self, cached: CachedSample, spec: CacheSpec) -> None:
        """Add the bytes of a sample as a row of a shard (its structure aside: `shard_structure`).

        `shareable` are those that another row may store for it (vision_sharing.py).
        """
        columns = output_columns(cached.output)
        row = encode_row(cached, spec)
        vision = [name for name in columns if is_vision_column(name)]
        self.layout_vision += sum(columns[name].nbytes for name in vision)
        self.stored_vision += sum(len(row.frames[name]) for name in vision)
        self.stored += sum(map(len, row.frames.values())) + sum(map(len, row.images))
        if row.images:
            shared = sum(len(row.frames[name]) for name in VISION_COLUMNS & row.frames.keys())
            self.shareable += shared + sum(map(len, row.images))
        self.stored += sum(len(text.encode()) for text in _texts(row))

    @property
    def regret(self) -> float | None:
        """Excess of the exact cost under this tier's matchings, as a share of random ones' excess.

        None where it cannot match; 0 where any matching costs the same.
        """
        if not self.num_pairs:
            return None
        random = self.random_cost - self.exact_cost
        excess = max(0.0, self.chosen_cost - self.exact_cost)  # rounding aside, it never is less
        return excess / random if random > 0 else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of the exact matchings' pairs that this tier finds; None where it cannot match."""
        return self.equal_pairs / self.num_pairs if self.num_pairs else None

    @property
    def gradient_cosine(self) -> float:
        """Mean over views."""
        return sum(self.cosines) / len(self.cosines)


def stand_in(states: Float[Tensor, "M D"], view: ViewGrid) -> Float[Tensor, "N D"]:
    """Vision states of one view, average-pooled 2 x 2 (odd sides: adaptively), in float32."""
    grid = states.to(torch.float32).T.reshape(1, -1, view.rows, view.cols)
    pooled = functional.adaptive_avg_pool2d(grid, (max(1, view.rows // 2), max(1, view.cols // 2)))
    return pooled[0].flatten(1).T.contiguous()


def compare(
    states: Float[Tensor, "M D"],
    exact: Signal,
    view: ViewGrid,
    head: LmHead,
    metric: MatchName,
    signals: Mapping[str, Signal],
    sums: Mapping[str, TierSums],
) -> None:
    """Match and differentiate one view by each signal, and add the differences to its sums.

    `states` are the teacher's and `exact` tells every logit of theirs; gradients are compared on
    the exact pairs.
    """
    student = stand_in(states, view)
    able = {
        name: signal
        for name, signal in signals.items()
        if metric != "raw_l1" or not _knows_only_top_k(signal)  # cost_matrix refuses those
    }
    true_cost, guesses = _costs(student, exact, able, head, metric)
    rows, columns = (index.to(states.device) for index in solve_assignment(true_cost))
    true_gradient = _gradient(student[rows], exact.rows(columns), head)
    for name, signal in signals.items():
        gradient = _gradient(student[rows], signal.rows(columns), head)
        cosine = functional.cosine_similarity(true_gradient, gradient, dim=0)
        sums[name].cosines.append(float(cosine))
    for name, guess in guesses.items():
        total = sums[name]
        chosen_rows, chosen = (index.to(states.device) for index in solve_assignment(guess))
        total.exact_cost += float(true_cost[rows, columns].sum(dtype=torch.float64))
        total.chosen_cost += float(true_cost[chosen_rows, chosen].sum(dtype=torch.float64))
        total.random_cost += float(true_cost.mean(dtype=torch.float64)) * len(columns)
        equal = (chosen_rows == rows) & (chosen == columns)
        total.equal_pairs += int(equal.sum())
        total.num_pairs += len(columns)


def _costs(
    student: Tensor,
    exact: Signal,
    signals: Mapping[str, Signal],
    head: LmHead,
    metric: MatchName,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Costs over every vocabulary row, and those of training by each signal."""
    every_id = MatchingConfig(metric=metric, num_shared_ids=None)
    as_trained = MatchingConfig(metric=metric)
    true_cost: list[Tensor] = []
    guesses: dict[str, list[Tensor]] = {name: [] for name in signals}
    for rows in row_chunks(len(student), head.vocab_size):
        logits = head.logits(student[rows])
        true_cost.append(cost_matrix(student[rows], logits, exact, every_id))
        for name, signal in signals.items():
            guesses[name].append(cost_matrix(student[rows], logits, signal, as_trained))
    return torch.cat(true_cost), {name: torch.cat(parts) for name, parts in guesses.items()}


def logit_energy(
    states: Float[Tensor, "M D"], logits: Float[Tensor, "M V"], basis: SketchBasis
) -> tuple[Float[Tensor, " S"], float]:
    """Squared logits about their calibrated mean: along the first 1 ... S directions, and in all.

    Codes are coordinates along orthonormal directions of the space of logits (sketch.py).
    """
    codes = (states.to(torch.float32) - basis.hidden_mean) @ basis.projection
    held = codes.to(torch.float64).square().sum(dim=0).cumsum(dim=0)
    centred = logits.to(torch.float32) - basis.mean_logits
    return held, float(centred.square().sum(dtype=torch.float64))


def _texts(row: EncodedRow) -> tuple[str, ...]:
    return (row.key, row.source_id, row.messages, row.checks)


def shard_structure(spec: CacheSpec) -> tuple[float, float]:
    """Bytes of an Arrow shard beyond what its rows are made of: for each row, and for the file.

    Measured on shards of one row and of several, whose pieces have one size.
    """
    columns = columns_of(tier_parts(spec), spec)
    piece = bytes(100)
    row = EncodedRow(
        key="0" * 32,
        source_id="a sample",
        messages="[]",
        images=(piece,),
        frames=dict.fromkeys(columns, piece),
    )
    content = len("".join(_texts(row))) + len(piece) * (1 + len(columns))
    sizes: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 9):
            path = Path(folder) / str(count)
            ArrowFormat().write(path, [row] * count, columns, {"emkd.spec": to_json(spec)})
            sizes[count] = path.stat().st_size - count * content
    each = (sizes[9] - sizes[1]) / 8
    return each, sizes[1] - each


def shortened(basis: SketchBasis, rank: int) -> SketchBasis:
    """The basis that the same states would give at a smaller rank: axes come by their energy."""
    return SketchBasis(
        hidden_mean=basis.hidden_mean,
        projection=basis.projection[:, :rank],
        mean_logits=basis.mean_logits,
        directions=basis.directions[:, :rank],
    )


def _gradient(student: Tensor, teacher: Signal, head: LmHead) -> Tensor:
    """Gradient of the reverse KL, under its default policy, by the student's states; flat."""
    index = torch.arange(len(student), device=student.device)
    parts: list[Tensor] = []
    for rows in row_chunks(len(student), head.vocab_size):
        states = student[rows].detach().clone().requires_grad_()
        value = reverse_kl(head.logits(states), teacher.rows(index[rows])).value.sum()
        parts.append(torch.autograd.grad(value, states)[0].flatten().to(torch.float64))
    return torch.cat(parts)


def _knows_only_top_k(signal: Signal) -> bool:
    return isinstance(signal, TopKSignal) and not signal.exact and signal.sketch is None
