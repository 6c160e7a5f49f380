"""Encodes vision states as PCA sketches: S int8 codes that approximate all logits of a token.

Top-k records cannot give the L1 distance of raw logits, because nearly all of that sum lies outside
the top k (docs/method.md). A sketch has the coordinates of a hidden state along the directions that
change its logits most. With G = W'W = LL' and the principal axes Q of the states times L:

    code a = (h - mean) L Q        logits = W mean + bias + a (W inv(L)' Q)'

At full rank only rounding is lost: codes to int8, directions to float16. Refuses calibration
without states and ranks below 1. Dimensions as in schema/teacher_output.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.schema.teacher_output import SketchRecord, TopKRecord
from teacher_cache.schema.tensor_record import TensorRecord

_CODE_LIMIT = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchBasis(TensorRecord):
    """Matrices that turn states into codes and codes into logits; stored once per cache."""

    hidden_mean: Float[Tensor, " D"]
    projection: Float[Tensor, "D S"]
    mean_logits: Float[Tensor, " V"]
    directions: Float[Tensor, "V S"]

    @property
    def rank(self) -> int:
        """Number of codes per position."""
        return self.projection.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows that can be decoded."""
        return self.mean_logits.shape[0]


class HiddenMoments:
    """Mean and covariance of hidden states, accumulated batch by batch in float64 on the CPU."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, hidden: Float[Tensor, "N D"]) -> None:
        """Add states; the scatter is about the running mean (Chan et al. 1979)."""
        if not len(hidden):
            return
        states = hidden.detach().to("cpu", torch.float64)
        mean = states.mean(dim=0)
        centred = states - mean
        shift = mean - self.mean
        total = self.count + len(states)
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift) * (self.count * len(states) / total)
        self.mean = self.mean + shift * (len(states) / total)
        self.count = total

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Covariance (divided by the count) of all states seen."""
        return self._scatter / max(1, self.count)


def fit_basis(hidden: Float[Tensor, "N D"], head: LmHead, rank: int) -> SketchBasis:
    """Fit a basis to one tensor of calibration states; see `basis_from_moments`."""
    moments = HiddenMoments(hidden.shape[1])
    moments.update(hidden)
    return basis_from_moments(moments, head, rank)


def basis_from_moments(moments: HiddenMoments, head: LmHead, rank: int) -> SketchBasis:
    """Principal axes of the logit covariance, computed without a V x V matrix.

    Computed in float64 on the CPU; stored in float32, directions in float16. `rank` is capped at
    the width D. The sign of each axis is fixed, so equal input gives an equal digest. ValueError
    without calibration states.
    """
    if rank < 1:
        raise ValueError(f"sketch_rank is {rank}, expected at least 1")
    if moments.count < 2:
        raise ValueError(
            f"the sketch's basis is fitted to vision tokens, found {moments.count}; give a source "
            "with usable samples with images, or choose records topk"
        )
    rank = min(rank, len(moments.mean))
    weight = head.weight.detach().to("cpu", torch.float64)
    bias = 0.0 if head.bias is None else head.bias.detach().to("cpu", torch.float64)
    # L = E sqrt(lambda) is a square root of G; unlike Cholesky's, it exists for rank-deficient G.
    eigenvalues, eigenvectors = torch.linalg.eigh(weight.T @ weight)
    usable = eigenvalues > eigenvalues[-1] * 1e-12
    roots = torch.where(usable, eigenvalues, 0.0).sqrt()
    inverse_roots = torch.where(usable, eigenvalues, torch.inf).rsqrt()
    covariance = roots[:, None] * (eigenvectors.T @ moments.covariance @ eigenvectors) * roots
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :rank]
    projection = (eigenvectors * roots) @ axes
    unprojection = (eigenvectors * inverse_roots) @ axes
    largest = projection.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(projection.gather(0, largest) < 0, -1.0, 1.0)
    return SketchBasis(
        hidden_mean=moments.mean.to(torch.float32),
        projection=(projection * signs).to(torch.float32),
        mean_logits=(weight @ moments.mean + bias).to(torch.float32),
        directions=(weight @ (unprojection * signs)).to(torch.float16),
    )


def encode_sketch(
    basis: SketchBasis, hidden: Float[Tensor, "M D"], top_k: TopKRecord
) -> SketchRecord:
    """Codes of the states, and the shift that gives the decoded tail its true mass.

    `top_k` is the record of the same positions. `decoded logit[v] + tail_shift` estimates log p of
    a vocabulary row v outside the top k. Where every row is kept the shift is 0.
    """
    if len(hidden) != len(top_k.ids) or basis.vocab_size != top_k.vocab_size:
        raise ValueError(
            f"{len(hidden)} states over {basis.vocab_size} vocabulary rows do not belong to a "
            f"top-k record of {len(top_k.ids)} positions over {top_k.vocab_size} rows"
        )
    values = (hidden.to(torch.float32) - basis.hidden_mean) @ basis.projection
    peak = values.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / _CODE_LIMIT, 1.0)
    codes = (values / scale[:, None]).round().clamp(-_CODE_LIMIT, _CODE_LIMIT).to(torch.int8)
    shift = torch.zeros_like(scale)
    has_tail = top_k.counts < top_k.vocab_size
    if bool(has_tail.any()):
        for rows in row_chunks(len(hidden), basis.vocab_size):
            decoded = decode_codes(basis, codes[rows], scale[rows])
            outside = decoded.scatter(1, top_k.ids[rows].long(), -torch.inf).logsumexp(dim=1)
            shift[rows] = (top_k.log_tail[rows] - outside).to(torch.float32)
    return SketchRecord(codes=codes, scale=scale, tail_shift=shift.where(has_tail, 0.0))


def decode_codes(
    basis: SketchBasis,
    codes: Num[Tensor, "M S"],
    scale: Float[Tensor, " M"],
    ids: Int[Tensor, " K"] | None = None,
) -> Float[Tensor, "M columns"]:
    """Approximate raw logits [M, V], or [M, K] at the vocabulary rows `ids`, of a sketch record.

    Float32, on any device; no checks, so no device sync.
    """
    mean, directions = basis.mean_logits, basis.directions
    if ids is not None:
        mean, directions = mean[ids], directions[ids]
    values = codes.to(torch.float32) * scale[:, None]
    return torch.addmm(mean, values, directions.to(torch.float32).T)
