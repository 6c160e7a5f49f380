"""Computes the loss of one micro-batch: the student's passes, then the objective."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from student_train.config.objective import ObjectiveConfig
from student_train.data.stream import StudentBatch
from student_train.epic.step_passes import student_pass
from student_train.epic.step_plan import StepPlan
from student_train.head.linear_head import LogitsOf
from student_train.losses.objective_loss import LossTerms, distillation_loss
from student_train.losses.step_counts import StepCounts
from student_train.models.forward import output_head
from teacher_cache.records.assets import TeacherAssets


def student_loss(
    model: nn.Module,
    batch: StudentBatch,
    objective: ObjectiveConfig,
    assets: TeacherAssets,
    plan: StepPlan | None = None,
    check_matching: bool = False,
    head_of: Callable[[nn.Module], LogitsOf] = output_head,
    *,
    counts: StepCounts | None = None,
) -> LossTerms:
    """Run one micro-batch and return its loss terms; the head runs at needed rows only.

    `counts` are those of the whole step; None: this micro-batch is the step.
    """
    teach = objective.kd_weight > 0 and not objective.kd_from_cache
    found = student_pass(model, batch.model, plan, teach=teach)
    cached_ratio = 0.0 if plan is None else plan.cached_ratio
    loss = distillation_loss(
        found.states,
        batch.outputs,
        head_of(model),
        objective,
        assets,
        found.consistency_teacher_states,
        cached_ratio,
        counts=counts,
        check_matching=check_matching,
    )
    notes = {**loss.diagnostics, **found.diagnostics}
    if plan is not None and objective.kd_weight > 0:
        notes["teacher_ratio"] = plan.difficulty.teacher_ratio
    if objective.kd_from_cache:
        notes["cached_ratio"] = cached_ratio
    return replace(loss, diagnostics=notes)
