"""Reduces aligned tensors to the terms of EM-KD.

Row i of the student faces row i of the teacher. Every reduction is a mean: the paper's weights make
sense with means only (docs/method.md). `count` is the number that the mean is over in the whole
step; the result is this part's share of it (step_counts.py). A mean over nothing is a zero that
still has a gradient (of zero). Dimensions as in teacher_output.py.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from student_train.ops.precision import at_least_float32


def supervised_rows(
    logits: Float[Tensor, "R W"], response_ids: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """Cross-entropy of each response token over the student's whole vocabulary."""
    return functional.cross_entropy(at_least_float32(logits), response_ids.long(), reduction="none")


def token_mean(values: Float[Tensor, " R"], count: int | None = None) -> Float[Tensor, ""]:
    """Mean over response tokens: of cross-entropies (supervised) or divergences (EM-KD: RLD)."""
    return values.sum() / max(1, len(values) if count is None else count)


def vsd_loss(
    values: Float[Tensor, " P"],
    pairs_per_sample: Sequence[int],
    zero: Float[Tensor, ""],
    count: int | None = None,
) -> Float[Tensor, ""]:
    """Vision semantic distillation (EM-KD: VSD): mean over a sample's pairs, then over samples.

    The rows are the matched pairs, sample by sample; samples without pairs do not count.
    """
    parts = values.split(list(pairs_per_sample))
    means = [part.mean() for part in parts if len(part)]
    return torch.stack(means).sum() / (len(means) if count is None else count) if means else zero


def vlad_means(
    student: Float[Tensor, "B X P"],
    teacher: Float[Tensor, "B X P"],
    counted: Bool[Tensor, "B X P"],
    beta: float = 1.0,
) -> Float[Tensor, " B"]:
    """Affinity distillation (EM-KD: VLAD): smooth L1, mean over each sample's counted entries.

    Other entries get no gradient. A sample without counted entries has a mean of 0.
    """
    entries = functional.smooth_l1_loss(
        student, teacher.to(student.dtype).detach(), beta=beta, reduction="none"
    )
    sums = entries.where(counted, 0.0).sum(dim=(1, 2))
    return sums / counted.sum(dim=(1, 2)).clamp(min=1)
