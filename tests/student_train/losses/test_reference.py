"""The page of equations: equal to the plain loops, and the fast objective equal to it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from student_train.config.objective import preset
from student_train.head.linear_head import LogitsOf
from student_train.losses.objective_loss import distillation_loss
from teacher_cache.schema.samples import ViewGrid
from tests.support import references
from tests.support.batches import (
    EMKD,
    SHAPES,
    TEXT_ONLY,
    RandomBatch,
    RecordForm,
    Shape,
    random_batch,
)
from tests.support.lazy import ModelOutputs, reference

VOCAB = 11


def page_inputs(batch: RandomBatch) -> tuple[list[ModelOutputs], list[ModelOutputs], list[Tensor]]:
    """Every logit of both models, and the labels."""

    def outputs(
        head: LogitsOf, vision: Tensor, views: Sequence[ViewGrid], text: Tensor, predicting: Tensor
    ) -> ModelOutputs:
        states = [rows for rows in vision.split([view.num_tokens for view in views]) if len(rows)]
        return ModelOutputs(
            response_logits=head(predicting),
            vision_logits=[head(rows) for rows in states],
            vision_states=states,
            text_states=text,
        )

    students: list[ModelOutputs] = []
    teachers: list[ModelOutputs] = []
    for state, output in zip(batch.states, batch.hidden_outputs, strict=True):
        record, head, teacher_head = output.hidden, batch.student_head, batch.teacher_head.logits
        assert record is not None
        students.append(outputs(head, state.vision, state.views, state.text, state.predicting))
        teachers.append(
            outputs(teacher_head, record.vision, output.views, record.text, record.predicting)
        )
    return students, teachers, [state.response_ids for state in batch.states]


@pytest.mark.parametrize("seed", range(3))
def test_the_page_is_what_the_loops_say(seed: int) -> None:
    batch = random_batch(seed)
    expected = references.emkd(
        batch.reference(), batch.student_head.weight.tolist(), batch.teacher_head.weight.tolist()
    )
    found = reference.emkd(*page_inputs(batch))
    weighted = 0.5 * expected["supervised"] + 0.5 * expected["rld"]
    weighted += 0.25 * expected["vsd"] + 25 * expected["vlad"]
    values = {name: term.item() for name, term in found.items()}
    assert values == pytest.approx({**expected, "total": weighted}, abs=1e-9)


def test_the_pages_kd_is_the_loops_forward_kl_and_gives_its_teacher_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    own, theirs = torch.randn(2, 4, VOCAB, generator=generator, dtype=torch.float64)
    own.requires_grad_()
    theirs.requires_grad_()
    found = reference.epic(own, theirs, torch.tensor([0, 3, 3, 10]))
    kls = [references.reverse_kl(t, s) for s, t in zip(own.tolist(), theirs.tolist(), strict=True)]
    assert found["kd"].item() == pytest.approx(sum(kls) / 4)
    total = 0.3 * found["supervised"].item() + 0.7 * found["kd"].item()
    assert found["total"].item() == pytest.approx(total)
    assert torch.autograd.grad(found["total"], theirs, allow_unused=True) == (None,)


@pytest.mark.parametrize("shapes", [SHAPES, [TEXT_ONLY, TEXT_ONLY], SHAPES[::-1][:3]])
@pytest.mark.parametrize("k", [None, VOCAB])
def test_the_fast_objective_is_the_page_in_values_and_gradients(
    shapes: Sequence[Shape], k: int | None
) -> None:
    """From states and from records of all V logits; samples of every kind and size."""
    batch = random_batch(5, shapes)
    form: RecordForm = "hidden" if k is None else "topk"
    found = batch.loss(EMKD, form, k or 4)
    expected = reference.emkd(*page_inputs(batch))
    for name, term in {**found.terms, "total": found.total}.items():
        torch.testing.assert_close(term, expected[name].to(term.dtype), rtol=1e-6, atol=1e-6)
    pairs = zip(batch.gradients(found.total), batch.gradients(expected["total"]), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_fast_epic_objective_is_the_page_in_values_and_gradients() -> None:
    batch = random_batch(6)
    states = torch.cat([state.predicting for state in batch.states])
    more = (states + torch.randn_like(states)).detach()
    found = distillation_loss(
        batch.states, batch.hidden_outputs, batch.student_head, preset("epic-tcd"), None, more
    )
    head, labels = batch.student_head, [state.response_ids for state in batch.states]
    expected = reference.epic(head(states), head(more), torch.cat(labels))
    for name, term in {**found.terms, "total": found.total}.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-10)
    pairs = zip(batch.gradients(found.total), batch.gradients(expected["total"]), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
