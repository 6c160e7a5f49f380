"""Counts what a commit record says of its rows: samples, tokens and vision records."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from teacher_cache.codec.columns import columns_of, output_from_columns
from teacher_cache.codec.frames import decode_frame
from teacher_cache.schema.manifest import ShardCommit
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.shards.encoded_row import EncodedRow

COUNTS = (
    "num_rows",
    "num_vision_tokens",
    "num_response_tokens",
    "num_with_images",
    "num_vision_records",
    "num_stored_vision_tokens",
)
"""The counts of a `ShardCommit`, by the names of its fields."""


def counted_rows(rows: Iterable[EncodedRow], counts: Counter[str]) -> Iterator[EncodedRow]:
    """Pass encoded rows on and add them up."""
    spans = columns_of(())
    for row in rows:
        output = output_from_columns({name: decode_frame(row.frames[name]) for name in spans}, 1)
        count_row(output, row.shared_from, counts)
        yield row


def count_row(output: TeacherOutput, shared_from: str | None, counts: Counter[str]) -> None:
    """Add one row."""
    num_vision = sum(view.num_tokens for view in output.views)
    counts["num_rows"] += 1
    counts["num_vision_tokens"] += num_vision
    counts["num_with_images"] += num_vision > 0
    if shared_from is None:
        counts["num_vision_records"] += num_vision > 0
        counts["num_stored_vision_tokens"] += num_vision
    counts["num_response_tokens"] += int(output.is_response.sum())


def counts_differ(commit: ShardCommit, counts: Mapping[str, int]) -> str | None:
    """Which counts of a commit record its rows do not have; None where all agree."""
    stored = {name: getattr(commit, name) for name in COUNTS}
    differ = [name for name in COUNTS if stored[name] != counts[name]]
    return "; ".join(f"{n} {stored[n]}, its rows have {counts[n]}" for n in differ) or None
