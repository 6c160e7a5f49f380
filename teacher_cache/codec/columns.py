"""Turns a teacher's records into named columns, and back; chooses each column's byte layout.

A column is one tensor, stored as one frame (frames.py). The spec of a cache fixes its columns
(`columns_of`); every row has the same ones, empty or not. Columns restore records exactly, unless
the spec asks for 8-bit numbers (quantize.py). With `top_p` only the kept entries are stored. The
names of the columns say which form is stored. Layouts are those that benchmarks/cache/codec.py
found best. Refuses columns that do not fit together, before it allocates what they claim.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Literal, TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from teacher_cache.codec.frames import encode_frame
from teacher_cache.codec.quantize import from_int8, from_scale, to_int8, to_scale
from teacher_cache.codec.ragged import flatten, lengths_by_rank, unflatten
from teacher_cache.codec.transforms import (
    BYTE_STREAM_SPLIT,
    DELTA_BY_RANK,
    DICTIONARY,
    MAX_RANKS,
    PLAIN,
    Transform,
    ragged_delta,
)
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import MAX_RATIOS, RecordKind
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)

Part = Literal["vision", "sketch", "affinity", "response", "hidden", "response_grid", "hidden_grid"]
GRID = tuple(f"g{number}" for number in range(1, MAX_RATIOS + 1))
"""Prefixes of a grid's columns: g1 for the spec's first ratio, g2 for the second, ..."""
T = TypeVar("T")

_IS_RESPONSE, _AFTER_IMAGE = 1, 2  # bits of the column content_flags

_SPAN_COLUMNS = ("views", "content_ids", "content_flags")


def _top_k_names(prefix: str) -> tuple[str, ...]:
    names = ("ids", "counts", "logits", "codes", "low", "high", "lse", "tail", "least")
    return tuple(f"{prefix}_{name}" for name in names)


PART_COLUMNS: dict[Part, tuple[str, ...]] = {
    "vision": _top_k_names("v"),
    "sketch": ("s_codes", "s_scale", "s_shift"),
    "affinity": ("a_cosine", "a_codes", "a_low", "a_high"),
    "response": _top_k_names("r"),
    "hidden": (
        *("h_vision", "h_text", "h_predicting"),
        *("h_vision_scale", "h_text_scale", "h_predicting_scale"),
    ),
    "response_grid": tuple(chain.from_iterable(_top_k_names(prefix) for prefix in GRID)),
    "hidden_grid": tuple(
        f"{prefix}_{name}" for prefix in GRID for name in ("predicting", "predicting_scale")
    ),
}
"""Every column that a part can have; `columns_of` gives those of one cache."""
VISION_COLUMNS = frozenset(
    name
    for name in (*_SPAN_COLUMNS, *chain.from_iterable(PART_COLUMNS.values()))
    if name == "views" or name.startswith(("v_", "s_", "h_vision"))
)
"""Columns of a sample's vision record. With causal attention they depend on nothing after the
images, so samples with equal input up to there may share them (teacher/vision_sharing.py)."""
TIER_PARTS: dict[RecordKind, frozenset[Part]] = {
    "topk": frozenset({"vision", "affinity", "response"}),
    "topk+sketch": frozenset({"vision", "sketch", "affinity", "response"}),
    "hidden": frozenset({"hidden"}),
    "topk+hidden": frozenset({"vision", "affinity", "response", "hidden"}),
    "topk+sketch+hidden": frozenset({"vision", "sketch", "affinity", "response", "hidden"}),
}


_TRANSFORMS: dict[str, tuple[Transform, ...]] = {
    **dict.fromkeys(("v_ids", "r_ids"), (PLAIN, DICTIONARY)),
    **dict.fromkeys(("v_logits", "r_logits", "v_codes", "r_codes"), (DELTA_BY_RANK,)),
    # Bytes have one stream only; codes of a sketch or a state are nearly noise in any order.
    **dict.fromkeys(("s_codes", "a_codes", "content_flags"), (PLAIN,)),
}
"""Candidates by column; a grid's columns have those of the response."""

_SMALL_BYTES = 4096
"""Smaller columns are stored plain: other transforms save nothing and are slower to read."""


def encode_column(
    name: str, values: Shaped[Tensor, "..."], counts: Int[Tensor, " N"] | None = None
) -> bytes:
    """The frame of a column, by the transform of the column's candidates with the fewest bytes.

    `counts` has the number of entries per position, where they differ.
    """
    listed = _TRANSFORMS.get(f"r{name[2:]}" if name.startswith(GRID) else name)
    small = values.numel() * values.dtype.itemsize < _SMALL_BYTES
    transforms = listed or ((PLAIN,) if small else (BYTE_STREAM_SPLIT,))
    if counts is not None and DELTA_BY_RANK in transforms:
        lengths = lengths_by_rank(counts)
        transforms = (ragged_delta(lengths) if len(lengths) <= MAX_RANKS else BYTE_STREAM_SPLIT,)
    return encode_frame(values, transforms)


def encode_columns(
    columns: Mapping[str, Tensor], without: Collection[str] = ()
) -> dict[str, bytes]:
    """The frames of a sample's columns, except those named in `without`."""
    return {
        name: encode_column(name, values, columns.get(f"{name.split('_')[0]}_counts"))
        for name, values in columns.items()
        if name not in without
    }


def columns_of(parts: Collection[Part], spec: CacheSpec | None = None) -> frozenset[str]:
    """Names of the columns that hold these parts; always includes those of the token spans.

    In the spec's form; without a spec, in the records' own form (nothing quantised).
    """
    exact_logits = spec is None or spec.logits_codec != "affine8"
    absent = {"codes", "low", "high"} if exact_logits else {"logits"}
    if spec is None or spec.top_p is None:
        absent.add("counts")
    if spec is None or not spec.least_logits:
        absent.add("least")
    without = {f"{prefix}_{name}" for prefix in ("v", "r", *GRID) for name in absent}
    int8_cosine = spec is not None and spec.affinity_dtype == "int8"
    without |= {"a_cosine"} if int8_cosine else {"a_codes", "a_low", "a_high"}
    if spec is None or spec.hidden_dtype != "int8":
        without |= {"h_vision_scale", "h_text_scale", "h_predicting_scale"}
        without |= {f"{prefix}_predicting_scale" for prefix in GRID}
    names = frozenset(_SPAN_COLUMNS).union(*(PART_COLUMNS[part] for part in parts)) - without
    unused = GRID if spec is None else GRID[len(spec.ratios) :]
    return frozenset(name for name in names if not name.startswith(unused))


def parts_in(output: TeacherOutput) -> frozenset[Part]:
    """The parts of an output that are not None."""
    return frozenset(part for part in PART_COLUMNS if getattr(output, part) is not None)


def top_k_records(output: TeacherOutput) -> dict[str, TopKRecord]:
    """The top-k records of an output, by the prefix of their columns."""
    found = {"v": output.vision, "r": output.response, **_numbered(output.response_grid)}
    return {prefix: record for prefix, record in found.items() if record is not None}


def state_columns(output: TeacherOutput) -> dict[str, Tensor]:
    """The hidden states of an output, by column name."""
    found = {f"{prefix}_predicting": at for prefix, at in _numbered(output.hidden_grid).items()}
    if output.hidden is not None:
        names = ("vision", "text", "predicting")
        found |= {f"h_{name}": getattr(output.hidden, name) for name in names}
    return found


def _numbered(grid: Mapping[float, T] | None) -> dict[str, T]:
    ratios = sorted(grid or {})
    return {f"g{number}": grid[ratio] for number, ratio in enumerate(ratios, 1)} if grid else {}


def output_columns(output: TeacherOutput, spec: CacheSpec | None = None) -> dict[str, Tensor]:
    """The tensors of an output by column name, in the spec's form.

    Without a spec nothing is quantised. Records whose positions keep different numbers of entries
    have a column `counts` and only the kept entries (ragged.py).
    """
    views = [[view.image, view.view, view.rows, view.cols] for view in output.views]
    flags = output.is_response * _IS_RESPONSE + output.after_image * _AFTER_IMAGE
    columns = {
        "views": torch.tensor(views, dtype=torch.int32).reshape(-1, 4),
        "content_ids": output.content_ids,
        "content_flags": flags.to(torch.uint8),
    }
    for prefix, record in top_k_records(output).items():
        of_record = _top_k_columns(record, spec)
        columns |= {f"{prefix}_{name}": values for name, values in of_record.items()}
    if output.sketch is not None:
        columns["s_codes"] = output.sketch.codes
        columns["s_scale"] = output.sketch.scale
        columns["s_shift"] = output.sketch.tail_shift
    if output.affinity is not None:
        if spec is not None and spec.affinity_dtype == "int8":
            names = ("a_codes", "a_low", "a_high")
            columns |= zip(names, to_scale(output.affinity.cosine), strict=True)
        else:
            columns["a_cosine"] = output.affinity.cosine
    for name, states in state_columns(output).items():
        if spec is not None and spec.hidden_dtype == "int8":
            group = spec.hidden_group or spec.hidden_size
            columns[name], columns[f"{name}_scale"] = to_int8(states, group)
        else:
            columns[name] = states
    return columns


def output_from_columns(
    columns: Mapping[str, Tensor],
    vocab_size: int,
    top_k: int | None = None,
    ratios: Sequence[float] = (),
) -> TeacherOutput:
    """The inverse of `output_columns`; a part without columns is None.

    8-bit numbers become float32. No position may keep more than `top_k` entries (None: than the
    vocabulary has). `ratios` are the grid's, ascending. Raises KeyError where columns of a part
    are missing, ValueError where columns do not fit together.
    """
    flags = columns["content_flags"]
    has = {part: not columns.keys().isdisjoint(names) for part, names in PART_COLUMNS.items()}
    limit = vocab_size if top_k is None else top_k

    def states(name: str) -> Tensor:
        values = columns[name]
        quantised = values.dtype == torch.int8
        return from_int8(values, columns[f"{name}_scale"]) if quantised else values

    def top_k_of(prefix: str) -> TopKRecord:
        return _top_k_from(columns, prefix, vocab_size, limit)

    numbered = dict(zip(ratios, GRID, strict=False))
    beyond = [name for name in columns if name.startswith(GRID[len(ratios) :])]
    if beyond:
        raise ValueError(f"columns {beyond} belong to no ratio: the grid has {len(ratios)}")
    sketch = affinity = hidden = None
    if has["sketch"]:
        sketch = SketchRecord(
            codes=columns["s_codes"], scale=columns["s_scale"], tail_shift=columns["s_shift"]
        )
    if "a_codes" in columns:
        cosine = from_scale(columns["a_codes"], columns["a_low"], columns["a_high"])
        affinity = AffinityRecord(cosine=cosine)
    elif has["affinity"]:
        affinity = AffinityRecord(cosine=columns["a_cosine"])
    if has["hidden"]:
        hidden = HiddenRecord(
            vision=states("h_vision"), text=states("h_text"), predicting=states("h_predicting")
        )
    return TeacherOutput(
        views=tuple(
            ViewGrid(image=image, view=view, rows=rows, cols=cols)
            for image, view, rows, cols in columns["views"].tolist()
        ),
        content_ids=columns["content_ids"],
        is_response=(flags & _IS_RESPONSE).bool(),
        after_image=(flags & _AFTER_IMAGE).bool(),
        vision=top_k_of("v") if has["vision"] else None,
        sketch=sketch,
        affinity=affinity,
        response=top_k_of("r") if has["response"] else None,
        hidden=hidden,
        response_grid={ratio: top_k_of(prefix) for ratio, prefix in numbered.items()}
        if has["response_grid"]
        else None,
        hidden_grid={ratio: states(f"{prefix}_predicting") for ratio, prefix in numbered.items()}
        if has["hidden_grid"]
        else None,
    )


def _top_k_columns(record: TopKRecord, spec: CacheSpec | None) -> dict[str, Tensor]:
    columns = {"ids": record.ids, "lse": record.logsumexp, "tail": record.log_tail}
    if spec is not None and spec.logits_codec == "affine8":
        columns["codes"], columns["low"], columns["high"] = to_scale(record.logits)
    else:
        columns["logits"] = record.logits
    if record.log_least is not None and (spec is None or spec.least_logits):
        columns["least"] = record.log_least
    if record.num_kept is not None:
        columns["counts"] = record.num_kept.to(torch.int32)
        for name in {"ids", "logits", "codes"} & columns.keys():
            columns[name] = flatten(columns[name], record.num_kept)
    return columns


def _top_k_from(
    columns: Mapping[str, Tensor], prefix: str, vocab_size: int, limit: int
) -> TopKRecord:
    counts = columns.get(f"{prefix}_counts")

    def rows(name: str) -> Tensor:
        values = columns[f"{prefix}_{name}"]
        return values if counts is None else unflatten(values, counts, limit)

    if f"{prefix}_codes" in columns:
        low, high = columns[f"{prefix}_low"], columns[f"{prefix}_high"]
        logits = from_scale(rows("codes"), low, high)
    else:
        logits = rows("logits")
    ids, logsumexp, log_tail = rows("ids"), columns[f"{prefix}_lse"], columns[f"{prefix}_tail"]
    log_least = columns.get(f"{prefix}_least")
    numbers = (logsumexp, log_tail, *([] if log_least is None else [log_least]))
    if ids.shape != logits.shape or any(each.shape != ids.shape[:1] for each in numbers):
        shapes = [list(each.shape) for each in (ids, logits, *numbers)]
        raise ValueError(f"ids, logits, lse, tail and least have shapes {shapes}")
    return TopKRecord(
        ids=ids,
        logits=logits,
        logsumexp=logsumexp,
        log_tail=log_tail,
        vocab_size=vocab_size,
        num_kept=counts,
        log_least=log_least,
    )
