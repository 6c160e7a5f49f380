"""Random micro-batches for tests of the losses: ragged, in float64, in every form of a signal.

A batch holds the states of both models; a record form (`outputs`) is derived from them with the
real recording functions, and `reference` says the same in lists for `tests/support/references.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from student_train.config.objective import MatchingConfig, ObjectiveConfig
from student_train.data.sample_states import SampleStates
from student_train.head.linear_head import LogitsOf
from student_train.losses.objective_loss import LossTerms, distillation_loss
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import encode_sketch, fit_basis
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import AffinityRecord, HiddenRecord, TeacherOutput
from tests.support.references import ReferenceSample, ReferenceSide

RecordForm = Literal["hidden", "topk", "topk+sketch"]
EMKD = ObjectiveConfig(matching=MatchingConfig(num_shared_ids=None))
"""Matches by all of V, as the page of equations does."""


def views(*sizes: int) -> list[ViewGrid]:
    """Views of one image, each one row of `size` tokens."""
    return [ViewGrid(image=0, view=i, rows=1, cols=size) for i, size in enumerate(sizes)]


class View(NamedTuple):
    """One view of an image, as (rows, columns) of vision tokens on either side."""

    image: int
    student: tuple[int, int]
    teacher: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sample: its views and its numbers of text tokens."""

    views: Sequence[View]
    before_image: int = 1
    instruction: int = 2
    response: int = 2


ONE_IMAGE = Shape(views=[View(0, (1, 2), (2, 2))])
TEXT_ONLY = Shape(views=[], instruction=3)
NO_TEXT_AFTER_IMAGE = Shape(
    views=[View(0, (1, 2), (1, 3))], before_image=3, instruction=0, response=0
)
TWO_IMAGES = Shape(views=[View(0, (1, 2), (2, 2)), View(1, (1, 1), (1, 3))], response=3)
EQUAL_GRIDS = Shape(views=[View(0, (2, 2), (2, 2))])
STUDENT_HAS_MORE = Shape(views=[View(0, (2, 2), (1, 3))])
TILES = Shape(views=[View(0, (1, 2), (2, 2)), View(0, (1, 3), (2, 3)), View(0, (2, 1), (2, 1))])
SHAPES = (
    ONE_IMAGE,
    TEXT_ONLY,
    NO_TEXT_AFTER_IMAGE,
    TWO_IMAGES,
    EQUAL_GRIDS,
    STUDENT_HAS_MORE,
    TILES,
)


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64, the same for a seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RandomBatch:
    states: list[SampleStates]
    hidden_outputs: list[TeacherOutput]
    student_head: nn.Linear
    teacher_head: LmHead

    @property
    def parameters(self) -> list[Tensor]:
        """Everything of the student that a loss can move."""
        tensors = [t for s in self.states for t in (s.vision, s.text, s.predicting)]
        return [*tensors, self.student_head.weight]

    def assets(self, form: RecordForm) -> TeacherAssets:
        if form == "hidden":
            return TeacherAssets(head=self.teacher_head)
        if form == "topk":
            return TeacherAssets()
        hidden = [o.hidden.vision for o in self.hidden_outputs if o.hidden is not None]
        return TeacherAssets(sketch=fit_basis(torch.cat(hidden), self.teacher_head, 3))

    def outputs(
        self, form: RecordForm, k: int = 4, mass: float | None = None, floor: int = 1
    ) -> list[TeacherOutput]:
        if form == "hidden":
            return self.hidden_outputs
        basis = self.assets(form).sketch
        outputs: list[TeacherOutput] = []
        for output in self.hidden_outputs:
            assert output.hidden is not None
            head, predicting = self.teacher_head, output.hidden.predicting
            vision = top_k_from_hidden(output.hidden.vision, head, k, mass, floor)
            affinity = cosine_affinity(output.hidden.text, output.hidden.vision)
            outputs.append(
                replace(
                    output,
                    hidden=None,
                    vision=vision,
                    sketch=basis and encode_sketch(basis, output.hidden.vision, vision),
                    affinity=AffinityRecord(cosine=affinity),
                    response=top_k_from_hidden(predicting, head, k, mass, floor),
                )
            )
        return outputs

    def gradients(self, term: Tensor) -> list[Tensor]:
        """Of all parameters; zeros where the term does not depend on them."""
        return list(
            torch.autograd.grad(
                term, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def loss(
        self,
        objective: ObjectiveConfig = EMKD,
        form: RecordForm = "hidden",
        k: int = 4,
        head: LogitsOf | None = None,
    ) -> LossTerms:
        outputs, assets = self.outputs(form, k), self.assets(form)
        return distillation_loss(self.states, outputs, head or self.student_head, objective, assets)

    def reference(self) -> list[ReferenceSample]:
        samples: list[ReferenceSample] = []
        for state, output in zip(self.states, self.hidden_outputs, strict=True):
            assert output.hidden is not None
            student = ReferenceSide(
                vision=_blocks(state.vision, state.views),
                text=state.text.tolist(),
                predicting=state.predicting.tolist(),
            )
            teacher = ReferenceSide(
                vision=_blocks(output.hidden.vision, output.views),
                text=output.hidden.text.tolist(),
                predicting=output.hidden.predicting.tolist(),
            )
            labels = state.response_ids.tolist()
            samples.append(ReferenceSample(student=student, teacher=teacher, response_ids=labels))
        return samples


def random_batch(
    seed: int,
    shapes: Sequence[Shape] = SHAPES,
    *,
    vocab_size: int = 11,
    student_vocab_size: int = 13,
    student_width: int = 5,
    teacher_width: int = 6,
    dtype: torch.dtype = torch.float64,
) -> RandomBatch:
    """Normal states and heads; the student's head has a few rows more than the teacher's."""
    generator = torch.Generator().manual_seed(seed)

    def next_normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    states: list[SampleStates] = []
    outputs: list[TeacherOutput] = []
    for shape in shapes:
        student_views = _views(shape, "student")
        teacher_views = _views(shape, "teacher")
        num_student = sum(view.num_tokens for view in student_views)
        num_teacher = sum(view.num_tokens for view in teacher_views)
        num_after = shape.instruction + shape.response
        content_ids = torch.randint(
            0, vocab_size, (shape.before_image + num_after,), generator=generator
        )
        position = torch.arange(len(content_ids))
        is_response = position >= len(content_ids) - shape.response
        after_image = (position >= shape.before_image) & bool(shape.views)
        num_text = int(after_image.sum())
        states.append(
            SampleStates(
                views=student_views,
                vision=next_normal(num_student, student_width).requires_grad_(),
                text=next_normal(num_text, student_width).requires_grad_(),
                predicting=next_normal(shape.response, student_width).requires_grad_(),
                text_is_response=is_response[after_image],
                response_ids=content_ids[is_response],
                content_ids=content_ids,
            )
        )
        outputs.append(
            TeacherOutput(
                views=teacher_views,
                content_ids=content_ids,
                is_response=is_response,
                after_image=after_image,
                hidden=HiddenRecord(
                    vision=next_normal(num_teacher, teacher_width),
                    text=next_normal(num_text, teacher_width),
                    predicting=next_normal(shape.response, teacher_width),
                ),
            )
        )
    student_head = nn.Linear(student_width, student_vocab_size, bias=False, dtype=dtype)
    with torch.no_grad():
        student_head.weight.copy_(next_normal(student_vocab_size, student_width))
    return RandomBatch(
        states=states,
        hidden_outputs=outputs,
        student_head=student_head,
        teacher_head=LmHead(weight=next_normal(vocab_size, teacher_width)),
    )


def _views(shape: Shape, side: Literal["student", "teacher"]) -> tuple[ViewGrid, ...]:
    views: list[ViewGrid] = []
    for view in shape.views:
        index = sum(other.image == view.image for other in views)
        rows, cols = view.student if side == "student" else view.teacher
        views.append(ViewGrid(image=view.image, view=index, rows=rows, cols=cols))
    return tuple(views)


def _blocks(rows: Tensor, views: Sequence[ViewGrid]) -> list[list[list[float]]]:
    return [block.tolist() for block in rows.split([view.num_tokens for view in views])]
