"""Compares what 8-bit columns lose of a sample with the bounds that the cache's spec states.

A lossy codec that is good on average can be wrong where it matters. So the writer decodes every
sample as readers do and compares it with the teacher's numbers. A sample that exceeds a bound of
the spec raises `CodecError`, which names sample, column, error, bound and remedy; the build stops.
Nothing is clipped and nothing only warned about.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from teacher_cache.codec.columns import output_from_columns, state_columns, top_k_records
from teacher_cache.codec.quantize import largest_error, largest_relative_error
from teacher_cache.schema.errors import EmkdError
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.teacher_output import TeacherOutput


class CodecError(EmkdError, ValueError):
    """Raised when a lossy codec loses more of a sample than the cache's spec allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The largest error of one 8-bit column of a sample, and the bound of the spec."""

    column: str
    found: float
    bound: float
    setting: str
    """Name of the bound in the spec."""
    remedy: str


def losses(
    output: TeacherOutput, columns: Mapping[str, Tensor], spec: CacheSpec
) -> tuple[Loss, ...]:
    """The largest error of every lossy column of a sample; decodes `columns` to find it."""
    lossy = (spec.logits_max_error, spec.affinity_max_error, spec.hidden_max_error)
    if lossy == (None, None, None):
        return ()
    back = output_from_columns(columns, spec.vocab_size, ratios=spec.ratios)
    found: list[Loss] = []
    if spec.logits_max_error is not None:
        stored = top_k_records(back)
        for prefix, record in top_k_records(output).items():
            width = stored[prefix].logits.shape[1]  # repeated entries follow
            error = largest_error(record.logits[:, :width], stored[prefix].logits)
            found.append(
                Loss(
                    column=f"{prefix}_codes",
                    found=error,
                    bound=spec.logits_max_error,
                    setting="logits_max_error",
                    remedy="choose logits_codec exact, or a smaller top_k (a position's largest "
                    "error is the range of its logits / 510)",
                )
            )
    if spec.affinity_max_error is not None and output.affinity is not None:
        assert back.affinity is not None
        found.append(
            Loss(
                column="a_codes",
                found=largest_error(output.affinity.cosine, back.affinity.cosine),
                bound=spec.affinity_max_error,
                setting="affinity_max_error",
                remedy="choose affinity_dtype float16",
            )
        )
    if spec.hidden_max_error is not None:
        read_back = state_columns(back)
        for name, states in state_columns(output).items():
            found.append(
                Loss(
                    column=name,
                    found=largest_relative_error(states, read_back[name]),
                    bound=spec.hidden_max_error,
                    setting="hidden_max_error",
                    remedy="choose a smaller hidden_group (channels that share a scale), or "
                    "hidden_dtype bfloat16",
                )
            )
    return tuple(found)


def require_within_bounds(
    sample: str, output: TeacherOutput, columns: Mapping[str, Tensor], spec: CacheSpec
) -> None:
    """Raise `CodecError` where a column of the sample exceeds a bound of the spec."""
    for loss in losses(output, columns, spec):
        if not loss.found <= loss.bound:  # NaN passes no bound
            raise CodecError(
                f"sample {sample}: column {loss.column} has an error of {loss.found:.3g}, "
                f"{loss.setting} is {loss.bound:.3g}. The settings cause this, not the sample, so "
                f"--on-bad-sample does not skip it: {loss.remedy}, or set a larger bound, and "
                "build into a new folder: the bound is part of the cache's identity"
            )
