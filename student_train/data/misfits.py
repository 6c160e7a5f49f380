"""Finds the samples of a cache that a student cannot be trained on, and says why.

A sample is a misfit where encoding it for the student fails, where its text, images or views are
not the teacher's (same_text.py), or where a token has no row in the student's embeddings or head.
These are all errors that one sample can raise in the stream or in the losses.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from student_train.config.objective import MatchScope
from student_train.data.prefetch import read_ahead
from student_train.data.same_text import check_against_teacher
from student_train.data.stream import Encoder
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import RejectedSample

NUM_NAMED = 3
"""Samples that a message names for each cause."""
NUM_CAUSES = 10
"""Causes that a message lists."""
_READ_AHEAD = 16
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\d+(?:\.\d+)?")
"""What differs between samples with one cause: quotations, lists and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentLimits:
    """What a sample must keep to, besides the teacher's tokens."""

    scope: MatchScope | None
    """The scope of the matching; None: the objective matches no vision tokens."""
    num_embeddings: int
    """Rows of the student's input embeddings."""
    num_rows: int
    """Rows of its language-model head."""


def why_unusable(encode: Callable[[], object]) -> str | None:
    """The reason why `encode` fails for its sample; None where it does not.

    Processors raise any error for an image that they cannot take; those are named by type.
    """
    try:
        encode()
    except SampleError as error:
        return error.reason
    except MemoryError:
        raise
    except Exception as error:
        return f"the processor fails with {type(error).__name__}: {error}"
    return None


def find_misfits(
    reader: CacheReader,
    indices: Iterable[int],
    encode: Encoder,
    confirm: Encoder,
    limits: StudentLimits,
    num_threads: int = 0,
    done: Callable[[int], None] = lambda _count: None,
) -> list[tuple[int, RejectedSample]]:
    """The misfits among samples of the cache, by their numbers, in the order of `indices`.

    `encode` need not read pixels. What fails with it counts only if it fails with `confirm` too,
    the encoder of the training. `done` is called with the number of samples checked so far.
    """

    def check(index: int) -> tuple[int, RejectedSample] | None:
        cached = reader.read(index, ())
        sample, output = cached.sample, cached.output

        def fits(encoder: Encoder) -> None:
            encoded = encoder(sample)
            check_against_teacher(encoded, output, limits.scope)
            _require_rows(encoded, limits)

        reason = why_unusable(lambda: fits(encode)) and why_unusable(lambda: fits(confirm))
        if reason is None:
            return None
        return index, RejectedSample(key=sample.key, source_id=sample.source_id, reason=reason)

    found: list[tuple[int, RejectedSample]] = []
    for count, misfit in enumerate(read_ahead(check, iter(indices), num_threads, _READ_AHEAD), 1):
        if misfit is not None:
            found.append(misfit)
        done(count)
    return found


def describe_misfits(misfits: Sequence[RejectedSample]) -> str:
    """A list of the causes, most frequent first: each with its count and its first samples."""
    causes: dict[str, list[RejectedSample]] = {}
    for misfit in misfits:
        causes.setdefault(_PARTICULARS.sub("#", misfit.reason), []).append(misfit)
    ordered = sorted(causes.values(), key=len, reverse=True)
    lines: list[str] = []
    for each in ordered[:NUM_CAUSES]:
        names = ", ".join(repr(misfit.source_id) for misfit in each[:NUM_NAMED])
        more = ", ..." if len(each) > NUM_NAMED else ""
        lines.append(f"  {len(each)} x {each[0].reason} ({names}{more})")
    if len(ordered) > NUM_CAUSES:
        rest = sum(map(len, ordered[NUM_CAUSES:]))
        lines.append(f"  {rest} x {len(ordered) - NUM_CAUSES} other causes")
    return "\n".join(lines)


def _require_rows(encoded: EncodedSample, limits: StudentLimits) -> None:
    """Raise SampleError for a token that the student has no weights for."""
    spans = encoded.spans
    for ids, num_rows, weights in (
        (encoded.inputs["input_ids"], limits.num_embeddings, "input embeddings have"),
        (spans.content_ids[spans.is_response], limits.num_rows, "head has"),
    ):
        if len(ids) and int(ids.max()) >= num_rows:
            raise SampleError(
                encoded.source_id,
                f"it has the token id {int(ids.max())}, but the student's {weights} "
                f"{num_rows} rows; use the tokenizer that belongs to the model",
            )
