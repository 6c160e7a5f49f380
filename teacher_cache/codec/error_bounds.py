"""Compares what 8-bit columns lose of a sample with the bounds that the cache's spec states.

A lossy codec that is good on average can be wrong where it matters. So the writer decodes every
sample as readers do and compares it with the teacher's numbers. A sample that exceeds a bound of
the spec raises `CodecError`, which names sample, column, error, bound and remedy; the build stops.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from teacher_cache.codec.columns import output_from_columns, state_columns, top_k_records
from teacher_cache.codec.quantize import largest_error, largest_relative_error
from teacher_cache.schema.errors import EmkdError
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.teacher_output import TeacherOutput

_REMEDIES = {
    "logits_max_error": "choose logits_codec exact, or a smaller top_k (a position's largest error "
    "is the range of its logits / 510)",
    "affinity_max_error": "choose affinity_dtype float16",
    "hidden_max_error": "choose a smaller hidden_group (channels that share a scale), or "
    "hidden_dtype bfloat16",
}
"""A bound of the spec -> what to do where a sample exceeds it."""


class CodecError(EmkdError, ValueError):
    """Raised when a lossy codec loses more of a sample than the cache's spec allows."""


def require_within_bounds(
    sample: str, output: TeacherOutput, columns: Mapping[str, Tensor], spec: CacheSpec
) -> None:
    """Raise `CodecError` where a column of the sample exceeds a bound of the spec."""
    bounds = {name: getattr(spec, name) for name in _REMEDIES if getattr(spec, name) is not None}
    if not bounds:
        return
    back = output_from_columns(columns, spec.vocab_size, ratios=spec.ratios)
    for name, bound in bounds.items():
        for column, error in _errors(name, output, back):
            if not error <= bound:  # NaN passes no bound
                raise CodecError(
                    f"sample {sample}: column {column} has an error of {error:.3g}, {name} is "
                    f"{bound:.3g}. The settings cause this, not the sample, so --on-bad-sample "
                    f"does not skip it: {_REMEDIES[name]}, or set a larger bound, and build into "
                    "a new folder: the bound is part of the cache's identity"
                )


def _errors(name: str, output: TeacherOutput, back: TeacherOutput) -> Iterator[tuple[str, float]]:
    """The columns that a bound is about, and the largest error of each in what was read `back`."""
    if name == "logits_max_error":
        stored = top_k_records(back)
        for prefix, record in top_k_records(output).items():
            logits = stored[prefix].logits
            exact = record.logits[:, : logits.shape[1]]  # repeated entries follow
            yield f"{prefix}_codes", largest_error(exact, logits)
    if name == "affinity_max_error" and output.affinity is not None:
        assert back.affinity is not None
        yield "a_codes", largest_error(output.affinity.cosine, back.affinity.cosine)
    if name == "hidden_max_error":
        read_back = state_columns(back)
        for column, states in state_columns(output).items():
            yield column, largest_relative_error(states, read_back[column])
