"""Makes top-k records: the largest logits of each position, and the mass outside of them.

Entries descend; ties go to the smaller id. The log of the mass outside is computed from the
discarded logits themselves, because 1 minus the kept mass is inexact when little is left. The
smallest log-probability of a position is rounded down to 16 bits. All positions keep k entries, or
each keeps the fewest of its k largest that hold a given probability. No more than `MAX_LOGITS`
logits exist at once. Refuses k outside 1..V and logits that are not finite.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.schema.options import require_cut
from teacher_cache.schema.teacher_output import TopKRecord


def top_k_from_hidden(
    hidden: Float[Tensor, "N D"], head: LmHead, k: int, top_p: float | None = None, min_k: int = 1
) -> TopKRecord:
    """Record of the logits that `head` gives to final hidden states; results stay on the device.

    `top_p` and `min_k` as for `top_k_record`.
    """
    chunks = list(row_chunks(len(hidden), head.vocab_size)) or [slice(0)]
    records = [top_k_record(head.logits(hidden[rows]), k, top_p, min_k) for rows in chunks]
    most = max(record.ids.shape[1] for record in records)
    return TopKRecord(
        ids=torch.cat([_widened(record.ids, most) for record in records]),
        logits=torch.cat([_widened(record.logits, most) for record in records]),
        logsumexp=torch.cat([record.logsumexp for record in records]),
        log_tail=torch.cat([record.log_tail for record in records]),
        vocab_size=head.vocab_size,
        num_kept=None if top_p is None else torch.cat([record.counts for record in records]),
        log_least=torch.cat([r.log_least for r in records if r.log_least is not None]),
    )


def top_k_record(
    logits: Float[Tensor, "N V"], k: int, top_p: float | None = None, min_k: int = 1
) -> TopKRecord:
    """Record of raw logits; `ids` int32, `logits` in the dtype given, normalisers in float32.

    With `top_p`, a position keeps the fewest of its k largest logits whose probabilities sum to
    `top_p`, at least `min_k`, or all k; K is the largest number kept. Float64 logits (of tests)
    give float64 normalisers.
    """
    num_rows, vocab_size = logits.shape
    if not 1 <= k <= vocab_size:
        raise ValueError(
            f"top_k is {k}, expected 1..{vocab_size}: the teacher and its tokenizer share "
            f"{vocab_size} vocabulary rows; lower top_k"
        )
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).any(dim=1).sum())
        raise ValueError(f"the logits of {bad} of {num_rows} positions are NaN or infinite")
    ids = _largest_ids(logits, k)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsumexp = wide.logsumexp(dim=1)
    num_kept = None
    if top_p is not None:
        require_cut(k, top_p, min_k)
        num_kept = _smallest_cut(wide.gather(1, ids), logsumexp, top_p, min_k)
        most = int(num_kept.max()) if num_rows else 1
        kept = torch.arange(most, device=ids.device) < num_kept[:, None]
        ids = ids[:, :most].where(kept, ids[:, :1])
    tail = wide.scatter(1, ids, -torch.inf).logsumexp(dim=1) - logsumexp
    return TopKRecord(
        ids=ids.to(torch.int32),
        logits=logits.gather(1, ids),
        logsumexp=logsumexp,
        log_tail=tail,
        vocab_size=vocab_size,
        num_kept=num_kept,
        log_least=_rounded_down(wide.amin(dim=1) - logsumexp),
    )


def _rounded_down(log_probs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Float16 numbers that are no larger: half precision errs by one part in 2,048 at most."""
    return (log_probs * (1 + 2**-10) - 2**-20).to(torch.float16)


def _smallest_cut(
    kept: Float[Tensor, "N K"], logsumexp: Float[Tensor, " N"], top_p: float, min_k: int
) -> Int[Tensor, " N"]:
    """How many of each row's descending logits hold `top_p`, within `min_k`..K; int32."""
    share = (kept.to(torch.float64) - logsumexp.to(torch.float64)[:, None]).exp().cumsum(dim=1)
    too_few = (share < top_p).sum(dim=1)
    return (too_few + 1).clamp(min_k, kept.shape[1]).to(torch.int32)


def _widened(values: Shaped[Tensor, "N K"], num_columns: int) -> Shaped[Tensor, "N columns"]:
    """The same with more columns, which repeat the first."""
    more = num_columns - values.shape[1]
    return torch.cat([values, values[:, :1].expand(-1, more)], dim=1) if more else values


def _largest_ids(logits: Float[Tensor, "N V"], k: int) -> Int[Tensor, "N K"]:
    """Ids of the k largest, descending, ties by smaller id (torch.topk promises no tie order)."""
    num_rows, vocab_size = logits.shape
    if k == vocab_size or num_rows == 0:
        ids = torch.arange(k, device=logits.device).expand(num_rows, k)
    else:
        smallest_kept = logits.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        kept = logits >= smallest_kept
        crowded = kept.sum(dim=1) > k
        if bool(crowded.any()):
            kept[crowded] = _first_ties(logits[crowded], smallest_kept[crowded], k)
        ids = kept.nonzero()[:, 1].reshape(num_rows, k)
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _first_ties(logits: Tensor, smallest_kept: Tensor, k: int) -> Tensor:
    """Mask of exactly k entries per row where more than k reach the smallest kept value."""
    above = logits > smallest_kept
    equal = logits == smallest_kept
    room = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= room))
