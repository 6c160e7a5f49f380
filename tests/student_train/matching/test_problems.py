"""A micro-batch matched together is its samples matched alone, however its problems are grouped."""

from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchMetric, MatchScope
from student_train.head.linear_head import LinearHead
from student_train.matching import cost, matching
from student_train.matching.assignment import Assignment
from student_train.matching.cost import problems_at_once
from student_train.matching.matching import match_tokens, start_matching
from student_train.matching.problems import VisionTokens, find_problems, rows_of
from student_train.matching.quality import certified_pairs
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import DenseSignal, Signal, concatenate
from teacher_cache.schema.samples import ViewGrid
from tests.support.batches import RandomBatch, RecordForm, Shape, View, random_batch

VOCAB, WIDTH = 11, 6
METRICS: tuple[MatchMetric, ...] = get_args(MatchMetric)
SIDES = st.tuples(st.integers(1, 2), st.integers(1, 3))


class Case(NamedTuple):
    """Samples to match, some of whose tokens were dropped, and the signals of their teachers."""

    tokens: list[VisionTokens]
    states: list[Tensor]
    signals: list[Signal]
    head: LinearHead


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    sizes = draw(st.lists(st.tuples(st.integers(0, 1), SIDES, SIDES), min_size=1, max_size=3))
    return Shape(views=[View(*size) for size in sorted(sizes, key=lambda size: size[0])])


def make_case(
    data: st.DataObject, batch: RandomBatch, form: RecordForm | None, k: int, mass: float | None
) -> Case:
    tokens: list[VisionTokens] = []
    states: list[Tensor] = []
    signals: list[Signal] = []
    num_teachers = sum(view.num_tokens for o in batch.hidden_outputs for view in o.views)
    assume(form != "topk+sketch" or num_teachers > 1)  # a basis is fitted to two states at least
    outputs = batch.outputs(form or "hidden", k, mass)
    for state, output in zip(batch.states, outputs, strict=True):
        signal = vision_signal(output, batch.assets(form or "hidden"))
        signals.append(signal if form else DenseSignal(logits=signal.dense_logits()))
        vision, kept = state.vision.detach(), None
        if data.draw(st.booleans(), label="dropped"):
            rows = st.sets(st.integers(0, len(vision) - 1), min_size=1)
            kept = torch.tensor(sorted(data.draw(rows, label="kept")))
            vision = vision[kept]
        states.append(vision)
        tokens.append(VisionTokens(state.views, output.views, kept))
    weight = batch.student_head.weight.detach()
    return Case(tokens, states, signals, LinearHead(weight=weight))


def together(case: Case, config: MatchingConfig) -> list[Assignment]:
    teacher = concatenate(case.signals)
    pending = start_matching(case.tokens, torch.cat(case.states), case.head, teacher, config)
    found, teacher_rows, _ = pending.result()
    starts = torch.tensor([0, *[signal.num_rows for signal in case.signals]]).cumsum(0)
    expected = [start + each.teacher for start, each in zip(starts, found, strict=False)]
    assert torch.equal(teacher_rows, torch.cat(expected))
    return found


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    samples=st.lists(shapes(), min_size=1, max_size=5),
    metric=st.sampled_from(METRICS),
    form=st.sampled_from(["hidden", "topk", "topk+sketch", None]),
    num_kept=st.sampled_from([(4, None), (VOCAB, None), (6, 0.8), (VOCAB, 0.999)]),
    scope=st.sampled_from(get_args(MatchScope)),
    num_ids=st.sampled_from([5, None]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    most=st.sampled_from([(1, 1), (400, 20), (2**21, 2**16)]),
    data=st.data(),
)
def test_a_batch_is_matched_as_its_samples_are_alone(
    seed: int,
    samples: list[Shape],
    metric: MatchMetric,
    form: RecordForm | None,
    num_kept: tuple[int, float | None],
    scope: MatchScope,
    num_ids: int | None,
    dtype: torch.dtype,
    most: tuple[int, int],
    data: st.DataObject,
) -> None:
    batch = random_batch(seed, samples, student_width=WIDTH, teacher_width=WIDTH, dtype=dtype)
    num_teacher = sum(view.num_tokens for of in batch.hidden_outputs for view in of.views)
    assume(form != "topk+sketch" or num_teacher > 1)  # a sketch is not fitted to one token
    case = make_case(data, batch, form, *num_kept)
    config = MatchingConfig(metric=metric, scope=scope, num_shared_ids=num_ids)
    try:
        alone = [
            match_tokens(own, case.head, of.student_views, theirs, of.teacher_views, config, of[2])
            for of, own, theirs in zip(case.tokens, case.states, case.signals, strict=True)
        ]
    except ValueError:
        with pytest.raises(ValueError, match=r"needs (logits outside|the teacher's states)"):
            together(case, config)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_TOGETHER", most[0])
        patch.setattr(matching, "_SOLVED_AT_ONCE", most[1])
        found = together(case, config)
    wide = dtype == torch.float64 and form != "topk+sketch"
    for own, expected in zip(found, alone, strict=True):
        require_equal(own, expected, 1e-9 if wide else 1e-4)


def require_equal(found: Assignment, expected: Assignment, tolerance: float) -> None:
    """The same pairs, except where others cost the same; costs to the rounding."""
    assert (found.num_student, found.num_teacher) == (expected.num_student, expected.num_teacher)
    assert found.total_cost == pytest.approx(expected.total_cost, rel=tolerance, abs=tolerance)
    for own, other in zip(found.problems, expected.problems, strict=True):
        torch.testing.assert_close(own.cost, other.cost, rtol=tolerance, atol=tolerance)
        here = float(other.cost[own.rows, own.columns].sum())
        assert here == pytest.approx(other.total_cost, rel=tolerance, abs=tolerance)
        near = max(tolerance, 1e-7)
        assert own.separability == pytest.approx(other.separability, rel=near, abs=near)
    columns = ([each.columns.tolist() for each in side.problems] for side in (found, expected))
    if next(columns) == next(columns):
        assert torch.equal(found.student, expected.student)
        assert torch.equal(found.teacher, expected.teacher)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    samples=st.lists(shapes(), min_size=1, max_size=4),
    form=st.sampled_from(["hidden", "topk", None]),
    metric=st.sampled_from(["raw_l1", "prob_l1"]),
    data=st.data(),
)
def test_what_is_certified_together_is_what_is_certified_alone(
    seed: int,
    samples: list[Shape],
    form: RecordForm | None,
    metric: MatchMetric,
    data: st.DataObject,
) -> None:
    assume(form != "topk" or metric == "prob_l1")
    batch = random_batch(seed, samples, student_width=WIDTH, teacher_width=WIDTH)
    case = make_case(data, batch, form, 8, None)
    config = MatchingConfig(metric=metric, num_shared_ids=None, certify=True)
    found = together(case, config)
    for own, of, states, signal in zip(found, case.tokens, case.states, case.signals, strict=True):
        expected = match_tokens(
            states, case.head, of.student_views, signal, of.teacher_views, config, of.student_kept
        )
        proven, alone = certified_pairs([own]), certified_pairs([expected])
        assert proven is not None
        assert alone is not None
        assert torch.equal(proven, alone)


def alike(num_samples: int, num_student: int, num_teacher: int) -> list[VisionTokens]:
    own, theirs = (
        [ViewGrid(image=0, view=0, rows=1, cols=size)] for size in (num_student, num_teacher)
    )
    return [VisionTokens(own, theirs)] * num_samples


def test_small_problems_ask_the_head_once_and_one_thread_and_large_ones_go_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    asked: list[int] = []

    class Counting(LinearHead):
        def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
            asked.append(len(hidden))
            return super().logits_at(hidden, ids)

    head = Counting(weight=weight)
    hidden = torch.randn(32 * 3, WIDTH, generator=generator)
    teacher = DenseSignal(logits=torch.randn(32 * 5, VOCAB, generator=generator))
    pending = start_matching(alike(32, 3, 5), hidden, head, teacher, MatchingConfig())
    assert asked == [32 * 3]
    assert len(pending.solutions) == 1
    assert len(pending.result().samples) == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_TOGETHER", 3 * (8 * VOCAB + 60))
        patch.setattr(matching, "_SOLVED_AT_ONCE", 15)
        pending = start_matching(alike(32, 3, 5), hidden, head, teacher, MatchingConfig())
    assert asked[1:] == [9] * 10 + [6]
    assert len(pending.solutions) == 32


@settings(deadline=None, max_examples=100)
@given(
    num_student=st.integers(1, 600),
    num_teacher=st.integers(1, 3000),
    metric=st.sampled_from(["raw_l1", "centred_l1", "prob_l1"]),
    num_ids=st.sampled_from([1, 3072, None]),
    vocab_size=st.sampled_from([11, 32_064, 151_936]),
)
def test_problems_taken_together_stay_within_the_bound(
    num_student: int, num_teacher: int, metric: MatchMetric, num_ids: int | None, vocab_size: int
) -> None:
    config = MatchingConfig(metric=metric, num_shared_ids=num_ids)
    teacher = DenseSignal(logits=torch.zeros(1, 1).expand(num_teacher, vocab_size))
    size = problems_at_once(num_student, num_teacher, teacher, config)
    sampled = metric in ("raw_l1", "centred_l1") and num_ids
    columns = vocab_size if metric == "prob_l1" else min(vocab_size, 8192, sampled or vocab_size)
    numbers = size * (num_student + num_teacher) * columns
    assert size == 1 or numbers + size * num_student * num_teacher <= 2**21


def test_rows_that_follow_one_another_are_a_slice_and_others_an_index() -> None:
    assert rows_of([range(3, 5), range(5, 9)]) == slice(3, 9)
    assert rows_of([range(4, 4)]) == slice(4, 4)
    apart = rows_of([range(3, 5), range(7, 9)])
    assert isinstance(apart, Tensor)
    assert apart.tolist() == [3, 4, 7, 8]


def test_views_of_an_image_may_lie_apart() -> None:
    views = [ViewGrid(image=i, view=v, rows=1, cols=2) for i, v in ((0, 0), (1, 0), (0, 1))]
    samples = [VisionTokens(views, views), VisionTokens(views, views, torch.tensor([1, 3, 4]))]
    found = find_problems(samples, "global")
    assert (found.num_student, found.num_teacher) == ([6, 3], [6, 6])
    rows = [(each.sample, rows_of(each.student), rows_of(each.teacher)) for each in found.all]
    spelled = [
        (sample, *(torch.arange(20)[side].tolist() for side in sides)) for sample, *sides in rows
    ]
    assert spelled == [
        (0, [0, 1, 4, 5], [0, 1, 4, 5]),
        (0, [2, 3], [2, 3]),
        (1, [6, 8], [6, 7, 10, 11]),
        (1, [7], [8, 9]),
    ]
