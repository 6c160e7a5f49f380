"""Measures what stored signals lose of the teacher: their matchings and gradients, view by view.

Pilot and build both use it. Costs, assignments and divergences are those of training; the reference
is the head's logits at every vocabulary row. No student exists yet: `proxy_student` makes one that
is close to its teacher. So the numbers compare tiers; they do not predict a run. At most
`lm_head.MAX_LOGITS` student logits are held at a time. Dimensions: see teacher_output.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import MatchingConfig
from student_train.divergence.divergence import reverse_kl
from student_train.matching.assignment import solve_assignment
from student_train.matching.cost import cost_matrix
from student_train.signals.teacher_signal import HiddenSignal, Signal, TopKSignal
from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.shard_quality import MatchName


@dataclass(slots=True)
class SignalLoss:
    """Sums over the views of one signal, and the means that follow."""

    exact_cost: float = 0.0
    chosen_cost: float = 0.0
    random_cost: float = 0.0
    equal_pairs: int = 0
    num_pairs: int = 0
    cosines: list[float] = field(default_factory=list[float])

    @property
    def regret(self) -> float | None:
        """Excess of the exact cost under this signal's matchings, as a share of random ones'.

        None where the signal cannot match; 0 where all matchings cost the same.
        """
        if not self.num_pairs:
            return None
        random = self.random_cost - self.exact_cost
        excess = max(0.0, self.chosen_cost - self.exact_cost)  # negative by rounding only
        return excess / random if random > 0 else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of the exact matchings' pairs that this signal finds; None if it cannot match."""
        return self.equal_pairs / self.num_pairs if self.num_pairs else None

    @property
    def gradient_cosine(self) -> float:
        """Mean over views."""
        return sum(self.cosines) / len(self.cosines)


class LossMeter:
    """Compares signals, by name, with every logit of the teacher; adds up sample after sample."""

    def __init__(
        self, head: LmHead, metric: MatchName, names: Iterable[str], basis: SketchBasis | None
    ) -> None:
        self.losses = {name: SignalLoss() for name in names}
        self._head, self._basis = head, basis
        self._metric: MatchName = metric
        self._spreads: list[float] = []
        self._held: Tensor | float = 0.0
        self._total = 0.0

    def add(
        self, states: Float[Tensor, "M D"], views: Sequence[ViewGrid], signals: Mapping[str, Signal]
    ) -> None:
        """Add one sample: the teacher's vision states, and the same tokens as each signal."""
        start = 0
        for view in views:
            rows = torch.arange(start, start + view.num_tokens, device=states.device)
            start += view.num_tokens
            if view.num_tokens > 1:  # of one token the proxy student would be the teacher itself
                here = {name: signal.rows(rows) for name, signal in signals.items()}
                self._compare(states[rows], view, here)
                self._add_logits(states[rows])

    def energy(self, rank: int | None = None) -> float:
        """Share of the logits' variance that `rank` directions of the basis, or all, hold."""
        if not self._total or self._basis is None:
            return 1.0
        assert isinstance(self._held, Tensor)
        return float(self._held[-1 if rank is None else rank - 1]) / self._total

    @property
    def row_mean_spread(self) -> float | None:
        """Standard deviation over a view's tokens of the mean logit; None without a view."""
        return sum(self._spreads) / len(self._spreads) if self._spreads else None

    def _compare(
        self, states: Float[Tensor, "M D"], view: ViewGrid, signals: Mapping[str, Signal]
    ) -> None:
        """Match one view by each signal; compare gradients on the exact pairs."""
        student, exact = proxy_student(states, view), HiddenSignal(hidden=states, head=self._head)
        true_cost, guesses = self._costs(student, exact, signals)
        rows, columns = (index.to(states.device) for index in solve_assignment(true_cost))
        true_gradient = _gradient(student[rows], exact.rows(columns), self._head)
        for name, signal in signals.items():
            gradient = _gradient(student[rows], signal.rows(columns), self._head)
            cosine = functional.cosine_similarity(true_gradient, gradient, dim=0)
            self.losses[name].cosines.append(float(cosine))
        for name, guess in guesses.items():
            loss = self.losses[name]
            chosen_rows, chosen = (index.to(states.device) for index in solve_assignment(guess))
            loss.exact_cost += float(true_cost[rows, columns].sum(dtype=torch.float64))
            loss.chosen_cost += float(true_cost[chosen_rows, chosen].sum(dtype=torch.float64))
            loss.random_cost += float(true_cost.mean(dtype=torch.float64)) * len(columns)
            loss.equal_pairs += int(((chosen_rows == rows) & (chosen == columns)).sum())
            loss.num_pairs += len(columns)

    def _costs(
        self, student: Tensor, exact: Signal, signals: Mapping[str, Signal]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Costs over every vocabulary row, and those of training by each signal that can match."""
        every_id = MatchingConfig(metric=self._metric, num_shared_ids=None)
        as_trained = MatchingConfig(metric=self._metric)
        able = {
            name: signal
            for name, signal in signals.items()
            if self._metric != "raw_l1" or not _knows_only_top_k(signal)  # cost_matrix refuses it
        }
        true_cost: list[Tensor] = []
        guesses: dict[str, list[Tensor]] = {name: [] for name in able}
        for rows in row_chunks(len(student), self._head.vocab_size):
            logits = self._head.logits(student[rows])
            true_cost.append(cost_matrix(student[rows], logits, exact, every_id))
            for name, signal in able.items():
                guesses[name].append(cost_matrix(student[rows], logits, signal, as_trained))
        return torch.cat(true_cost), {name: torch.cat(costs) for name, costs in guesses.items()}

    def _add_logits(self, states: Float[Tensor, "M D"]) -> None:
        """Add the energy of a view's logits and the spread of their means."""
        means: list[Tensor] = []
        for rows in row_chunks(len(states), self._head.vocab_size):
            logits = self._head.logits(states[rows]).to(torch.float32)
            means.append(logits.mean(dim=1))
            if self._basis is not None:
                held, total = _energy(states[rows], logits, self._basis)
                self._held = self._held + held
                self._total += total
        self._spreads.append(float(torch.cat(means).std()))


def proxy_student(states: Float[Tensor, "M D"], view: ViewGrid) -> Float[Tensor, "N D"]:
    """Vision states of one view, average-pooled 2 x 2 (odd sides: adaptively), in float32."""
    grid = states.to(torch.float32).T.reshape(1, -1, view.rows, view.cols)
    pooled = functional.adaptive_avg_pool2d(grid, (max(1, view.rows // 2), max(1, view.cols // 2)))
    return pooled[0].flatten(1).T.contiguous()


def _energy(
    states: Float[Tensor, "M D"], logits: Float[Tensor, "M V"], basis: SketchBasis
) -> tuple[Float[Tensor, " S"], float]:
    """Squared logits about their calibrated mean: along the first 1 ... S directions, and in all.

    Codes are coordinates along orthonormal directions of the space of logits (sketch.py).
    """
    codes = (states.to(torch.float32) - basis.hidden_mean) @ basis.projection
    held = codes.to(torch.float64).square().sum(dim=0).cumsum(dim=0)
    centred = logits - basis.mean_logits
    return held, float(centred.square().sum(dtype=torch.float64))


def _gradient(student: Tensor, teacher: Signal, head: LmHead) -> Tensor:
    """Gradient of the reverse KL, under its default policy, by the student's states; flat."""
    index = torch.arange(len(student), device=student.device)
    chunks: list[Tensor] = []
    for rows in row_chunks(len(student), head.vocab_size):
        states = student[rows].detach().clone().requires_grad_()
        value = reverse_kl(head.logits(states), teacher.rows(index[rows])).value.sum()
        chunks.append(torch.autograd.grad(value, states)[0].flatten().to(torch.float64))
    return torch.cat(chunks)


def _knows_only_top_k(signal: Signal) -> bool:
    return isinstance(signal, TopKSignal) and not signal.exact and signal.sketch is None
