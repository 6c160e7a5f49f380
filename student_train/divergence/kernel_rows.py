"""Losses of rows whose logits kernels read once, and whose gradients they write in their place.

Cross-entropy and a divergence from a top-k teacher depend on a row of logits z through few numbers:
z at the label and at the kept entries, log sum exp over the other columns and, with an estimate e
of the teacher's tail, the tail's mean of z - e. `ReadRows` has these numbers as leaves of autograd;
divergences are computed of them by the very functions that serve dense rows, and what the leaves
get is spread over the columns in a second pass over the logits. Refuses nothing: `logit_terms.py`
knows which terms can be read so. Needs triton (kernels_rows.py). Dimensions as in schema.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.divergence.student_rows import StudentRows, Terms
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a term wants of its rows, and what it makes of that."""

    values: Callable[["ReadRows"], Mapping[str, Tensor]]
    labels: Int[Tensor, " N"] | None = None
    teacher: TopKSignal | None = None
    """Of the terms of a block one may have a teacher, all of whose rows have a tail."""
    estimate: Float[Tensor, "N V"] | None = None
    """Of log p in the teacher's tail, for the reverse KL alone."""


class ReadRows(StudentRows):
    """Rows of logits over W columns after one pass over them."""

    def __init__(self, logits: Float[Tensor, "N W"], readings: Sequence[Reading]) -> None:
        from student_train.ops.logit_rows_triton import kept_bits, read_parts

        labels = [each.labels for each in readings if each.labels is not None]
        teachers = [each.teacher for each in readings if each.teacher is not None]
        self._logits, self._vocab_size = logits, logits.shape[1]
        self._ids, self._mask = logits.new_empty(len(logits), 0, dtype=torch.int64), None
        for teacher in teachers:
            self._ids, self._mask = teacher.ids.long(), teacher.kept_mask
            self._vocab_size = teacher.vocab_size
        self._estimate = next((e.estimate for e in readings if e.estimate is not None), None)
        self._labels = self._ids.new_full((len(logits),), -1)
        for label in labels:
            self._labels = label.long()
        self._bits = kept_bits(self._ids, self._mask, self._vocab_size)
        self._parts = read_parts(logits, self._bits, self._vocab_size, self._estimate)
        label = logits.gather(1, self._labels.clamp(min=0)[:, None])[:, 0]
        own = (logits.gather(1, self._ids), label, *self._parts[:3])
        leaves = [value.detach().float().requires_grad_(torch.is_grad_enabled()) for value in own]
        self._leaves = leaves
        kept, self._label, log_tail, log_extra, self._gap = leaves
        counted = kept if self._mask is None else kept.masked_fill(~self._mask, -torch.inf)
        self._log_sum = torch.logaddexp(log_tail, counted.logsumexp(dim=1))
        self._log_sum_of_all = torch.logaddexp(self._log_sum, log_extra)
        self.log_q_kept = kept - self._log_sum[:, None]
        self.log_q_mass = log_tail - self._log_sum

    def cross_entropy(self) -> Float[Tensor, " N"]:
        """With the labels, over all W columns."""
        return self._log_sum_of_all - self._label

    def outside(self, terms: Terms, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """The reverse KL's, and of the estimate that was read."""
        assert log_p is self._estimate
        return self.log_q_mass.exp() * (self._gap - self._log_sum)

    @torch.no_grad()
    def largest(self, most: int) -> Float[Tensor, "P C"]:
        """See `StudentRows`, as below."""
        from student_train.ops.logit_rows_triton import largest_of_tail

        maxima = self._parts.group_maxima
        found = largest_of_tail(self._logits, self._bits, self._vocab_size, maxima, most)
        return found - self._log_sum[:, None]

    @torch.no_grad()
    def least(self) -> Float[Tensor, " P"]:
        """Of the tail, or of what is kept."""
        kept = self._leaves[0].amin(dim=1)
        return torch.minimum(kept, self._parts.least) - self._log_sum

    @torch.no_grad()
    def surprise(self) -> Float[Tensor, " P"]:
        """From the tail's mean logit."""
        return self.log_q_mass.exp() * (self._parts.tail_mean - self._log_sum)

    def replace(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Logits become the gradient of the weighted sum of values that are made of these rows."""
        from student_train.ops.logit_rows_triton import TailWeights, replace_by_gradient

        weighted = [values[name] for name in weights]
        incoming = [weight.to(torch.float32) for weight in weights.values()]
        kept, label, log_tail, log_extra, gap = torch.autograd.grad(
            weighted, self._leaves, incoming, allow_unused=True, materialize_grads=True
        )
        is_label = self._ids == self._labels[:, None]
        if self._mask is not None:
            is_label &= self._mask
        kept = kept + is_label * label[:, None]
        if self._mask is not None:  # what fills a row repeats its first entry
            kept = torch.where(self._mask, kept, kept[:, :1])
        replace_by_gradient(
            self._logits, self._bits, self._vocab_size, self._parts,
            TailWeights(log_tail, log_extra, gap, label), self._labels, self._estimate,
        )  # fmt: skip
        self._logits.scatter_(1, self._ids, kept.to(self._logits.dtype))


def losses_in_place(
    logits: Float[Tensor, "N W"], readings: Sequence[Reading], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values of some rows, which follow from the readings by name.

    If there are weights, logits become the gradient of the weighted sum.
    """
    with torch.set_grad_enabled(bool(weights)):
        rows = ReadRows(logits, readings)
        values = {name: v for each in readings for name, v in each.values(rows).items()}
    if weights:
        rows.replace(values, weights)
    return {name: value.detach() for name, value in values.items()}
