"""Finds the samples of a source that a model cannot be asked, before any answer is generated.

The source has decoded their images; their sizes decide the views (size_encoder.py). What fails so
is confirmed with the encoder of the evaluation. The samples that an evaluation leaves out are
listed in its folder:

    skipped.jsonl    key, source_id and reason of one sample per line; absent where none is skipped
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.sources.source import SampleSource, ScannedSample
from student_train.data.misfits import why_unusable
from student_train.data.prefetch import read_ahead
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.size_encoder import SizeEncoder
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.storage.durable_files import write_atomic

SKIPPED_FILE = "skipped.jsonl"
_NUM_THREADS, _READ_AHEAD = 2, 16


def find_unusable(
    encoder: SampleEncoder, source: SampleSource, scanned: Sequence[ScannedSample]
) -> list[RejectedSample]:
    """The samples whose prompt cannot be encoded, in order, with their reasons."""
    fast = SizeEncoder(encoder)

    def check(each: ScannedSample) -> RejectedSample | None:
        sample = source[each.index]
        reason = why_unusable(lambda: fast.encode_prompt(sample))
        reason = reason and why_unusable(lambda: encoder.encode_prompt(sample))
        if reason is None:
            return None
        return RejectedSample(key=each.key, source_id=sample.source_id, reason=reason)

    found = read_ahead(check, iter(scanned), _NUM_THREADS, _READ_AHEAD)
    return [misfit for misfit in found if misfit is not None]


def write_skipped(out: Path, skipped: Sequence[RejectedSample]) -> None:
    """List the samples that are left out, if there are any."""
    if skipped:
        lines = "".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in skipped)
        write_atomic(out / SKIPPED_FILE, lines.encode())
