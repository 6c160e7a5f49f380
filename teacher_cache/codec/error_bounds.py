"""The writer's error gate: what eight bits cost a sample, against what the cache's spec allows.

A lossy codec that is right on average can be wrong where it matters, and nobody reads a README
while a run goes astray: every sample is decoded as readers will and compared with what the teacher
said. One that passes a bound of the spec is a `CodecError` that names sample, column, error, bound
and remedy, and the build stops; nothing is clipped, nothing is let through with a warning.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from teacher_cache.codec.columns import output_from_columns, state_columns, top_k_records
from teacher_cache.codec.quantize import largest_error, largest_relative_error
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.teacher_output import TeacherOutput


class CodecError(ValueError):
    """A lossy codec would lose more of a sample than the cache's spec allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What eight bits cost one part of one sample, beside what the spec allows."""

    column: str
    found: float
    bound: float
    setting: str
    """Name of the bound in the spec."""
    remedy: str


def losses(
    output: TeacherOutput, columns: Mapping[str, Tensor], spec: CacheSpec
) -> tuple[Loss, ...]:
    """The largest error of every lossy column of a sample, from reading `columns` back."""
    lossy = (spec.logits_max_error, spec.affinity_max_error, spec.hidden_max_error)
    if lossy == (None, None, None):
        return ()
    back = output_from_columns(columns, spec.vocab_size, ratios=spec.ratios)
    found: list[Loss] = []
    if spec.logits_max_error is not None:
        stored = top_k_records(back)
        for prefix, record in top_k_records(output).items():
            width = stored[prefix].logits.shape[1]  # beyond it are repetitions
            error = largest_error(record.logits[:, :width], stored[prefix].logits)
            found.append(
                Loss(
                    column=f"{prefix}_codes",
                    found=error,
                    bound=spec.logits_max_error,
                    setting="logits_max_error",
                    remedy="choose logits_codec exact, or a smaller top_k (the range of a "
                    "position's logits / 510 is its largest error)",
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
    """Raise `CodecError` where a column of the sample has lost more than the spec allows."""
    for loss in losses(output, columns, spec):
        if not loss.found <= loss.bound:  # NaN passes no bound
            raise CodecError(
                f"sample {sample}: column {loss.column} has an error of {loss.found:.3g}, "
                f"{loss.setting} is {loss.bound:.3g}. That is the settings' fault, not the "
                "sample's (--on-bad-sample does not pass over it): "
                f"{loss.remedy}, or state a larger bound, in a new folder: it is part of what a "
                "cache is"
            )
