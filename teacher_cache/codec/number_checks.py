"""Compares the numbers of one row with what docs/format.md promises of them; used by `emkd verify`.

Checksums say that a number is the one that was written, not that a teacher can have meant it. Each
finding names column, position, what was found and what is promised.

Tolerances come from rounding: a log-sum-exp of V float32 logits is off by a few units in the last
place of its largest term (`_SLACK`), a cosine of D channels by at most D units, a logit of affine8
by the bound that the spec states.

Dimensions as in schema/teacher_output.py.
"""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from teacher_cache.codec.columns import top_k_records
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.teacher_output import TeacherOutput, TopKRecord

_EPS = torch.finfo(torch.float32).eps
_SLACK = 64.0
"""Units in the last place, beside those of the largest term: the sum's own rounding."""
_TOP_CODE, _CODE_LIMIT, _FLAGS = 255, 127, 3
_DTYPES = {
    "views": torch.int32,
    "content_ids": torch.int64,
    "content_flags": torch.uint8,
    "ids": torch.int32,
    "counts": torch.int32,
    "codes": torch.uint8,
    "lse": torch.float32,
    "tail": torch.float32,
    "least": torch.float16,
    "s_codes": torch.int8,
    "s_scale": torch.float32,
    "s_shift": torch.float32,
    "a_low": torch.float32,
    "a_high": torch.float32,
}
"""Dtype of a column, by its name or by the name without its prefix."""


def broken_forms(columns: Mapping[str, Shaped[Tensor, "..."]], spec: CacheSpec) -> list[str]:
    """Columns whose dtype or shape is not as promised: nothing else can be said of such a row."""
    return [*_dtypes(columns, spec), *_shapes(columns, spec)]


def broken_promises(
    columns: Mapping[str, Shaped[Tensor, "..."]], output: TeacherOutput, spec: CacheSpec
) -> Iterator[str]:
    """What of a row's numbers is not as promised; `output` is what its `columns` decode to."""
    yield from _tokens(columns, output, spec)
    for prefix, record in top_k_records(output).items():
        if len(record.ids):
            for finding in (*_entries(record, spec), *_probabilities(record, spec)):
                yield f"{prefix}_{finding}"
            yield from _ends(columns, prefix, record)
    yield from _cosines(columns, output, spec)
    yield from _codes(columns)


def _dtypes(columns: Mapping[str, Tensor], spec: CacheSpec) -> Iterator[str]:
    logits = getattr(torch, spec.logits_dtype)
    states = getattr(torch, spec.hidden_dtype or "float32")
    of_spec = {
        **dict.fromkeys(("logits", "low", "high"), logits),
        **dict.fromkeys(("h_vision", "h_text", "predicting"), states),
        **dict.fromkeys(("h_vision_scale", "h_text_scale", "predicting_scale"), torch.bfloat16),
        "a_cosine": getattr(torch, spec.affinity_dtype or "float32"),
    }
    known = _DTYPES | of_spec
    for name, values in columns.items():
        wanted = known.get(name) or known[name.partition("_")[2]]
        if values.dtype != wanted:
            yield f"{name} is {values.dtype}, promised is {wanted}"


def _shapes(columns: Mapping[str, Tensor], spec: CacheSpec) -> Iterator[str]:
    """Shapes that records do not check themselves; None where an axis has any length."""
    num_tokens, num_vision = len(columns["content_ids"]), len(columns.get("s_codes", ()))
    wanted: dict[str, tuple[int | None, ...]] = {
        "content_ids": (None,),
        "content_flags": (num_tokens,),
        "s_codes": (None, spec.sketch_rank),
        "s_scale": (num_vision,),
        "s_shift": (num_vision,),
    }
    for name in columns:
        if name in ("h_vision", "h_text") or name.endswith("predicting"):
            wanted[name] = (None, spec.hidden_size)
        if name.endswith("_ids") and name != "content_ids" and spec.top_p is None:
            wanted[name] = (None, spec.top_k)
    for name in wanted.keys() & columns.keys():
        found, promised = tuple(columns[name].shape), wanted[name]
        fits = len(found) == len(promised)
        if not fits or any(p not in (f, None) for f, p in zip(found, promised, strict=True)):
            shown = ", ".join("any" if size is None else str(size) for size in promised)
            yield f"{name} has shape {list(found)}, promised is [{shown}]"


def _tokens(columns: Mapping[str, Tensor], output: TeacherOutput, spec: CacheSpec) -> Iterator[str]:
    ids, flags = output.content_ids, columns["content_flags"]
    yield from _at("content_ids", (ids < 0) | (ids >= spec.vocab_size), ids, "a vocabulary row")
    yield from _at("content_flags", flags > _FLAGS, flags, "bits 0 and 1 alone")
    after = output.after_image
    if bool((after[:-1] & ~after[1:]).any()):
        yield "content_flags: a token before the first image stands behind one that follows it"
    if not output.views and bool(after.any()):
        yield "content_flags: tokens follow an image, but there is no view"
    seen = [(view.image, view.view) for view in output.views]
    if len(set(seen)) < len(seen):
        yield f"views names a view twice: {seen}"


def _entries(record: TopKRecord, spec: CacheSpec) -> Iterator[str]:
    """The kept entries: how many, which, in which order."""
    ids, logits, kept = record.ids, record.logits, record.kept_mask
    padding = record.vocab_size + torch.arange(ids.shape[1], dtype=ids.dtype)
    apart = ids.where(kept, padding) if record.num_kept is not None else ids
    ordered = apart.sort(dim=1).values
    yield from _at("ids", (ordered[:, 1:] == ordered[:, :-1]).any(dim=1), ids, "distinct entries")
    rises = logits[:, 1:] > logits[:, :-1]
    if spec.logits_codec != "affine8":
        rises |= (logits[:, 1:] == logits[:, :-1]) & (ids[:, 1:] < ids[:, :-1])
    rises = (rises & kept[:, 1:]).any(dim=1)
    yield from _at("logits", rises, logits, "descending entries, ties by smaller id")


def _probabilities(record: TopKRecord, spec: CacheSpec) -> Iterator[str]:
    """Normaliser, tail and least probability against the kept logits."""
    lse, tail = record.logsumexp.double(), record.log_tail.double()
    log_p = record.logits.double() - lse[:, None]
    kept, counts = record.kept_mask, record.counts
    if spec.logits_max_error is not None:  # codes are rounded to the nearest
        span = record.logits[:, 0] - record.logits.gather(1, (counts.long() - 1)[:, None])[:, 0]
        lossy = (span.double() / (2 * _TOP_CODE)).clamp(0, spec.logits_max_error)
    else:
        lossy = torch.zeros_like(lse)
    largest = torch.maximum(lse.abs(), record.logits.double().abs().amax(dim=1))
    error = _EPS * (largest + tail.abs().where(tail.isfinite(), 0.0) + _SLACK) + lossy
    slack = error.expm1()
    shares = log_p.exp() * kept
    mass = shares.sum(dim=1) + tail.exp()
    yield from _at("lse, tail", ~((mass - 1).abs() <= slack), mass, "a mass of 1")
    last = log_p.gather(1, (counts.long() - 1)[:, None])[:, 0]
    outside = record.vocab_size - counts
    most = last + outside.double().log()
    wrong = (outside > 0) & (tail > most + 2 * error)
    yield from _at("tail", wrong, tail, "no entry outside above the smallest kept one")
    if record.log_least is not None:
        least = record.log_least.double()
        wrong = least > last + 2 * error
        wrong |= (outside > 0) & (least + outside.double().log() > tail + 2 * error)
        yield from _at("least", wrong, least, "no more than any log p")
    if record.num_kept is not None:
        held = shares.cumsum(dim=1)
        at = counts.long()[:, None] - 1
        before = (held - shares).gather(1, at)[:, 0]
        yield from _cut(counts, before, held.gather(1, at)[:, 0], slack, spec)


def _cut(
    counts: Tensor,
    before: Float[Tensor, " N"],
    held: Float[Tensor, " N"],
    slack: Float[Tensor, " N"],
    spec: CacheSpec,
) -> Iterator[str]:
    """Positions that keep different numbers of entries keep the fewest that hold `top_p`."""
    top_p, most = spec.top_p or 1.0, spec.top_k or 1
    least = min(spec.min_k or 1, most)
    yield from _at("counts", (counts < least) | (counts > most), counts, f"{least}..{most}")
    many = (counts > least) & (before > top_p + slack)
    yield from _at("counts", many, counts, f"the fewest entries that hold {top_p}")
    few = (counts < most) & (held < top_p - slack)
    yield from _at("counts", few, counts, f"as many entries as hold {top_p}")


def _ends(columns: Mapping[str, Tensor], prefix: str, record: TopKRecord) -> Iterator[str]:
    """The ends of a position's 8-bit scale are its largest and its smallest kept logit."""
    last = record.logits.gather(1, (record.counts.long() - 1)[:, None])
    for name, logit in (("high", record.logits[:, 0]), ("low", last[:, 0])):
        end = columns.get(f"{prefix}_{name}")
        if end is not None:
            wrong = end.to(logit.dtype) != logit
            yield from _at(f"{prefix}_{name}", wrong, end, "the first or the last kept logit")


def _cosines(
    columns: Mapping[str, Tensor], output: TeacherOutput, spec: CacheSpec
) -> Iterator[str]:
    if output.affinity is None or not output.affinity.cosine.numel():
        return
    most = 1 + spec.hidden_size * _EPS
    found = [("a_cosine", output.affinity.cosine)]
    if "a_codes" in columns:
        found = [("a_low", columns["a_low"]), ("a_high", columns["a_high"])]
        wrong = columns["a_low"] > columns["a_high"]
        yield from _at("a_low", wrong, columns["a_low"], "no more than a_high")
        yield from _scale("a_codes", columns["a_codes"], columns["a_low"] < columns["a_high"])
    for name, values in found:
        wrong = (values.float().abs() > most).reshape(len(values), -1).any(dim=1)
        yield from _at(name, wrong, values, "cosines in [-1, 1]")


def _scale(name: str, codes: Tensor, spread: Bool[Tensor, " N"]) -> Iterator[str]:
    """Codes of a row reach from 0 to 255, its smallest and its largest number."""
    low, high = codes.aminmax(dim=1)
    wrong = (low != 0) | (high != torch.where(spread, _TOP_CODE, 0))
    yield from _at(name, wrong, codes, "codes from 0 (the smallest) to 255 (the largest)")


def _codes(columns: Mapping[str, Tensor]) -> Iterator[str]:
    """Codes of sketches and of 8-bit states, and their scales."""
    for name, values in columns.items():
        if values.dtype == torch.int8 and values.numel():
            wrong = (values < -_CODE_LIMIT).any(dim=1)
            yield from _at(name, wrong, values, f"codes of at least -{_CODE_LIMIT}")
        if name.endswith("scale") and values.numel():
            wrong = ~(values.float() >= 0) | values.isinf()
            wrong = wrong.reshape(len(values), -1).any(dim=1)
            yield from _at(name, wrong, values, "finite scales of at least 0")


def broken_shares(log_shares: Float[Tensor, " V"]) -> str | None:
    """What of a tail template's log shares is not as promised."""
    total = float(log_shares.double().exp().sum())
    # A float32 log of the least share, 2**-126, is off by 87 units in the last place at most.
    if abs(total - 1) <= _EPS * (87 + _SLACK):
        return None
    return f"has shares that sum to {total:.6g}, promised is 1"


def same_text(ids: Sequence[int], text: str) -> bool:
    """Whether a text can be one token again and again, as equal ids say of it.

    Case and blanks do not count, since tokenizers change them.
    """
    if len(ids) < 2 or len(set(ids)) > 1:
        return True
    letters = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    size = len(letters)
    return not letters or any(
        size % period == 0 and letters[:period] * (size // period) == letters
        for period in range(1, size // 2 + 1)
    )


def _at(
    name: str, wrong: Bool[Tensor, " N"], values: Shaped[Tensor, "N ..."], promised: str
) -> Iterator[str]:
    """A finding, if any of the N positions is wrong: the first of them, and how many there are."""
    count = int(wrong.sum())
    if count:
        first = int(wrong.int().argmax())
        found = values[first].flatten()[:8].tolist()
        shown = ", ".join(f"{each:.6g}" if math.isfinite(each) else str(each) for each in found)
        yield (
            f"{name}: position {first} has {shown}, promised are {promised} "
            f"({count} of {len(wrong)} positions)"
        )
