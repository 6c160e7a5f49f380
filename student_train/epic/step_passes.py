"""Runs the passes of one micro-batch: the student's, and EPIC's teacher pass with more tokens.

    student   whole pass, tokens dropped at layer K at the student's ratio         with gradient
    teacher   layers K.. again, at the teacher's ratio (`rerun_from_layer`)        without gradient

The teacher is the student at this step. Where nothing is dropped both passes are the same and there
is no second one, unless the model is sharded and other ranks may drop. Dimensions as in
teacher_output.py.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student_train.compression.compression import compress
from student_train.data.sample_states import SampleStates, gather_states
from student_train.data.token_layout import TokenLayout, layout_of
from student_train.epic.partial_rerun import record_entry, rerun_from_layer
from student_train.epic.step_plan import StepPlan
from student_train.models.forward import final_hidden
from student_train.ops.sharded import is_fsdp_module
from teacher_cache.encoding.collate import ModelBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPass:
    """What the losses need of a micro-batch's forward passes."""

    states: list[SampleStates]
    consistency_teacher_states: Float[Tensor, "R D"] | None = None
    """States of the teacher pass that predict the batch's response tokens, in order; None without
    a teacher pass."""
    diagnostics: dict[str, float]


def student_pass(
    model: nn.Module, batch: ModelBatch, plan: StepPlan | None = None, *, teach: bool = False
) -> StudentPass:
    """Run the student over a batch, dropping tokens as `plan` says; `teach` adds EPIC's teacher.

    Goes through the `forward` of a model that may be wrapped. ValueError for what `compress`
    refuses.
    """
    if plan is None:
        hidden = final_hidden(model, batch.inputs)
        return StudentPass(states=_gather(hidden, batch, layout_of(batch)), diagnostics={})
    again = teach and plan.drops
    recording = record_entry(model, plan.difficulty.layer) if again else nullcontext()
    with recording as entry, compress(model, plan.student, batch, plan.student_draw) as found:
        hidden = final_hidden(model, batch.inputs)
    consistency_teacher_states = None
    # All ranks gather the layers of a sharded model together, or none does.
    if entry is not None and (is_fsdp_module(model) or _drops_any(found.layout, batch)):
        with torch.no_grad():
            theirs, layout = rerun_from_layer(model, entry, plan.teacher, batch, plan.teacher_draw)
        consistency_teacher_states = _predicting(theirs.to(hidden.dtype), batch, layout)
    states = _gather(hidden, batch, found.layout)
    return StudentPass(
        states=states,
        consistency_teacher_states=consistency_teacher_states,
        diagnostics=_diagnostics(states, plan),
    )


def _gather(hidden: Tensor, batch: ModelBatch, layout: TokenLayout) -> list[SampleStates]:
    return gather_states(hidden, [sample.spans for sample in batch.samples], layout)


def _predicting(hidden: Tensor, batch: ModelBatch, layout: TokenLayout) -> Tensor:
    rows = [
        hidden[row, layout.columns(row, sample.spans.predicting).to(hidden.device)]
        for row, sample in enumerate(batch.samples)
    ]
    return torch.cat(rows)


def _drops_any(layout: TokenLayout, batch: ModelBatch) -> bool:
    """Whether any sample lost a token. If none did, the teacher, which drops less, drops none."""
    pairs = zip(layout.rows, batch.samples, strict=True)
    return any(len(tokens) < sample.num_tokens for tokens, sample in pairs)


def _diagnostics(states: Sequence[SampleStates], plan: StepPlan) -> dict[str, float]:
    """The student's layer and ratio, and the mean vision tokens of samples with images."""
    notes = {
        "epic_layer": float(plan.difficulty.layer),
        "student_ratio": plan.difficulty.student_ratio,
    }
    shown = [state for state in states if state.views]
    if shown:
        num_tokens = sum(view.num_tokens for state in shown for view in state.views)
        notes["vision_tokens"] = num_tokens / len(shown)
        notes["vision_tokens_kept"] = sum(len(state.vision) for state in shown) / len(shown)
    return notes
