"""L1 of probabilities against top-k records, exactly, at the cost of reading the student once.

Without a sketch a record is K exact probabilities p_v and a uniform tail, c = tau / (V - K) each.
All but K entries of its row are one number, so with F(c) = sum_v |q_v - c|

    C = F(c) + sum over the K kept of ( |q_v - p_v| - |q_v - c| )

F is not interpolated: on a CPU probabilities are counted and summed in narrow bins, which bounds
the error of F, and where the bound is more than one rounding of 1 they are sorted instead. No
teacher row of V entries exists, and no gradient; positions may keep different numbers of entries.
Dimensions as in schema.py, U distinct kept ids.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from student_train.top_k_signal import TopKSignal, at_least_float32
from teacher_cache.topk import row_chunks

_GATHERED = 2**18
"""Most gathered probabilities held at once: a mebibyte in float32, a core's second cache."""
_NUM_BINS = 2**16


@torch.no_grad()
def sparse_probability_l1(student_logits: Float[Tensor, "N V"], teacher: TopKSignal) -> Tensor:
    """Costs [N, M] of softmax(student) against the records' distributions; float32 or wider.

    What a sketch knows is not used. Equal to the dense L1 of the filled-in rows but for rounding.
    """
    dtype = at_least_float32(student_logits).dtype
    kept_MK = teacher.kept_log_probs().exp().to(dtype)
    num_outside = (teacher.vocab_size - teacher.counts).clamp(min=1)
    share_M = (at_least_float32(teacher.log_tail).exp() / num_outside).to(dtype)
    used_U, place_MK = teacher.ids.long().unique(return_inverse=True)
    cost = torch.empty(
        len(student_logits), teacher.num_rows, dtype=dtype, device=student_logits.device
    )
    for rows in row_chunks(len(student_logits), teacher.vocab_size):
        student_NV = student_logits[rows].to(dtype).softmax(dim=1)
        used_UN = student_NV[:, used_U].T.contiguous()
        constant_NM = _distances_to_constants(student_NV, share_M)
        kept_MN = _kept_correction(used_UN, place_MK, kept_MK, share_M, teacher.kept_mask)
        cost[rows] = constant_NM + kept_MN.T
    return cost


def _kept_correction(
    used_UN: Float[Tensor, "U N"],
    place_MK: Int[Tensor, "M K"],
    kept_MK: Float[Tensor, "M K"],
    share_M: Float[Tensor, " M"],
    kept_mask: Tensor | None,
) -> Float[Tensor, "M N"]:
    """The sum over the kept entries.

    |q - p| - |q - c| is (p - c) - 2 clamp(q - c, 0, p - c) where p >= c, and its negative with p
    and c exchanged elsewhere. A product adds up, and leaves out the entries that only fill a row.
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


def _distances_to_constants(
    student_NV: Float[Tensor, "N V"], constants_M: Float[Tensor, " M"]
) -> Float[Tensor, "N M"]:
    """F of every row at every constant: `sum_v |student[n, v] - constants[m]|`, summed in float64.

    F(c) = sum q - V c + 2 sum over q < c of (c - q).
    """
    distances = student_NV.new_empty(len(student_NV), len(constants_M))
    if not len(constants_M):
        return distances
    wide_M = constants_M.double()
    for row, found in zip(student_NV, distances, strict=True):
        under = _under_by_counting(row, constants_M)
        if under is None:
            under = _under_by_sorting(row, constants_M)
        found.copy_(row.sum(dtype=torch.float64) - len(row) * wide_M + 2 * under)
    return distances


def _under_by_counting(row: Tensor, constants: Tensor) -> Tensor | None:
    """The sum over `row < c` of (c - row) for each constant; None where a bin is too full for that.

    Bins before that of c are summed exactly. In its own bin, of width w and n probabilities, the
    sum is at least n c less theirs and at least 0, and at most n w / 4 more than the greater of the
    two, which F doubles. A GPU adds up weighted counts in no fixed order, and sorts well.
    """
    least, reach = constants.min(), constants.max() - constants.min()
    if row.is_cuda or not bool(reach > 0):
        return None

    def bins(values: Tensor) -> Tensor:
        """0 below the least constant; then bins whose edges are squares: most lies near 0."""
        place = ((values - least) / reach).clamp_(0, 1).sqrt_().mul_(_NUM_BINS).long()
        return place.add_(values >= least)

    place_V, place_M = bins(row), bins(constants)
    count = torch.bincount(place_V, minlength=_NUM_BINS + 2)
    inside = place_M[place_M <= _NUM_BINS]  # no probability above the greatest is under it
    fullest = (count[inside] * (2 * inside - 1)).max() * reach / _NUM_BINS**2
    if bool(fullest / 2 > torch.finfo(row.dtype).eps):
        return None
    mass = torch.bincount(place_V, row.double(), minlength=_NUM_BINS + 2)
    wide = constants.double()
    num_before, mass_before = count.cumsum(0) - count, mass.cumsum(0) - mass
    own_bin = (count[place_M] * wide - mass[place_M]).clamp_(min=0)
    return num_before[place_M] * wide - mass_before[place_M] + own_bin


def _under_by_sorting(row: Tensor, constants: Tensor) -> Tensor:
    """The same for any row: what lies between the least and the greatest constant is sorted."""
    below = row <= constants.min()
    sum_below = (row * below).sum(dtype=torch.float64)
    inside = _sorted(row[~below & (row < constants.max())])
    prefix = functional.pad(inside.cumsum(0, dtype=torch.float64), (1, 0))
    position = torch.searchsorted(inside, constants)
    return (below.sum() + position) * constants.double() - sum_below - prefix[position]


def _sorted(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ascending. NumPy's vectorised sort is three times as fast on a CPU: it keeps no indices."""
    if values.is_cuda:
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))
