"""Computes the exact L1 of probabilities against top-k records, in one pass over the student.

Without a sketch a record is K exact probabilities p_v and a uniform tail, c = tau / (V - K) each.
All but K entries of a row are one number. With F(c) = sum_v |q_v - c| (ops/l1_to_constants.py)

    C = F(c) + sum over the K kept of ( |q_v - p_v| - |q_v - c| )

No teacher row of V entries is built, and only a few student rows of V probabilities at a time. No
gradient. Dimensions as in teacher_output.py, U distinct kept ids, n students at a time.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.ops.l1_to_constants import ConstantDistances
from student_train.ops.precision import at_least_float32
from student_train.signals.top_k import TopKSignal

_GATHERED = 2**18
"""Most gathered probabilities held at once: 1 MiB in float32, the size of an L2 cache."""


@torch.no_grad()
def sparse_probability_l1(student_logits: Float[Tensor, "N V"], teacher: TopKSignal) -> Tensor:
    """Return costs [N, M] of softmax(student) against the records' distributions.

    Float32 or wider. A sketch is not used. Equals the dense L1 of filled-in rows up to rounding.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    kept_MK = teacher.kept_log_probs().exp().to(dtype)
    num_outside = (teacher.vocab_size - teacher.counts).clamp(min=1)
    share_M = (at_least_float32(teacher.record.log_tail).exp() / num_outside).to(dtype)
    num_students = len(student_logits)
    cost_NM = share_M.new_empty(num_students, len(share_M))
    if not cost_NM.numel():
        return cost_NM
    to_shares = ConstantDistances.of(share_M, teacher.vocab_size)
    used_U, place_MK = teacher.record.ids.long().unique(return_inverse=True)
    used_NU = share_M.new_empty(num_students, len(used_U))
    for start in range(0, num_students, to_shares.rows_at_once):
        rows = slice(start, start + to_shares.rows_at_once)
        student_nV = student_logits[rows].to(dtype).softmax(dim=1)
        torch.index_select(student_nV, 1, used_U, out=used_NU[rows])
        cost_NM[rows] = to_shares(student_nV)
    used_UN = used_NU.T.contiguous()
    kept_MN = _kept_correction(used_UN, place_MK, kept_MK, share_M, teacher.kept_mask)
    return cost_NM.add_(kept_MN.T)


def _kept_correction(
    used_UN: Float[Tensor, "U N"],
    place_MK: Int[Tensor, "M K"],
    kept_MK: Float[Tensor, "M K"],
    share_M: Float[Tensor, " M"],
    kept_mask: Tensor | None,
) -> Float[Tensor, "M N"]:
    """Sum over the kept entries.

    |q - p| - |q - c| is (p - c) - 2 clamp(q - c, 0, p - c) where p >= c, else its negative with p
    and c exchanged. A matrix product does the sum; `sign` is 0 at entries that only pad a row.
    """
    share_MK = share_M[:, None].expand_as(kept_MK)
    low_MK, span_MK = torch.minimum(kept_MK, share_MK), (kept_MK - share_MK).abs()
    sign_MK = (kept_MK - share_MK).sign()
    if kept_mask is not None:
        sign_MK = sign_MK * kept_mask
    apart_M = (sign_MK * span_MK).sum(dim=1)
    num_kept, num_students = kept_MK.shape[1], used_UN.shape[1]
    step = max(1, _GATHERED // max(1, num_kept * num_students))
    between_MN = torch.empty(len(kept_MK), num_students, dtype=kept_MK.dtype, device=kept_MK.device)
    for start in range(0, len(kept_MK), step):
        rows = slice(start, start + step)
        gathered = used_UN.index_select(0, place_MK[rows].flatten())
        above = gathered.view(-1, num_kept, num_students).sub_(low_MK[rows, :, None])
        span = span_MK[rows, :, None]
        above.clamp_(torch.zeros_like(span), span)
        between_MN[rows] = torch.bmm(sign_MK[rows, None], above)[:, 0]
    return apart_M[:, None] - 2 * between_MN
