"""Reads rows of logits once with kernels, and writes the gradient of their losses in place.

Cross-entropy and a divergence from a top-k teacher depend on a row of logits z through few numbers:
z at the label and at the kept entries, log sum exp over the other columns and, with an estimate e
of the teacher's tail, the tail's mean of z - e. `KernelRows` has these numbers as autograd leaves,
from which divergences compute as from dense rows. A second pass over the logits spreads the leaves'
gradients over the columns. Needs triton. Dimensions as in teacher_output.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.divergence.student_rows import StudentRows, Summands
from student_train.divergence.tail_policies import TeacherLogProbs
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """What a term needs from its rows of logits."""

    labels: Int[Tensor, " N"] | None = None
    teacher: TopKSignal | None = None
    """At most one term of a block may have a teacher; all its rows have a tail."""
    known: TeacherLogProbs | None = None
    """The teacher's log-probabilities; estimates of the tail are for the reverse KL alone."""


class KernelRows(StudentRows):
    """Rows of logits over W columns after one pass over them."""

    def __init__(self, logits: Float[Tensor, "N W"], requests: Sequence[RowRequest]) -> None:
        from student_train.ops.logit_rows_triton import kept_bits, read_parts

        self._logits, self._vocab_size = logits, logits.shape[1]
        self._ids, self._mask = logits.new_empty(len(logits), 0, dtype=torch.int64), None
        self._labels = self._ids.new_full((len(logits),), -1)
        self._estimate: Tensor | None = None
        for request in requests:
            if request.labels is not None:
                self._labels = request.labels.long()
            if request.teacher is not None:
                self._ids = request.teacher.record.ids.long()
                self._mask = request.teacher.kept_mask
                self._vocab_size = request.teacher.vocab_size
            if request.known is not None:
                self._estimate = request.known.tail_entries
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

    def tail_sum(self, summands: Summands, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """Of the reverse KL, with the estimate that the kernel read."""
        assert log_p is self._estimate
        return self.log_q_mass.exp() * (self._gap - self._log_sum)

    @torch.no_grad()
    def tail_largest(self, most: int) -> Float[Tensor, "P C"]:
        """See `StudentRows`, as below."""
        from student_train.ops.logit_rows_triton import largest_of_tail

        maxima = self._parts.group_maxima
        found = largest_of_tail(self._logits, self._bits, self._vocab_size, maxima, most)
        return found - self._log_sum[:, None]

    @torch.no_grad()
    def min_log_q(self) -> Float[Tensor, " P"]:
        """The smaller of the tail's and the kept entries' minimum."""
        kept = self._leaves[0].amin(dim=1)
        return torch.minimum(kept, self._parts.least) - self._log_sum

    @torch.no_grad()
    def tail_neg_entropy(self) -> Float[Tensor, " P"]:
        """From the tail's mean logit."""
        return self.log_q_mass.exp() * (self._parts.tail_mean - self._log_sum)

    def replace_logits(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Replace the logits by the gradient of the weighted sum of values made from these rows."""
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
        if self._mask is not None:  # padding repeats a row's first entry
            kept = torch.where(self._mask, kept, kept[:, :1])
        replace_by_gradient(
            self._logits, self._bits, self._vocab_size, self._parts,
            TailWeights(log_tail, log_extra, gap, label), self._labels, self._estimate,
        )  # fmt: skip
        self._logits.scatter_(1, self._ids, kept.to(self._logits.dtype))
