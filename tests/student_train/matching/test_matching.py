"""Matching: costs equal the loops, the assignment is optimal, and permutations only relabel it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchMetric
from student_train.matching.assignment import Assignment
from student_train.matching.cost import cost_matrix, shared_ids
from student_train.matching.matching import match_tokens
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.samples import ViewGrid
from tests.support import references
from tests.support.batches import ONE_IMAGE, normal, random_batch

VOCAB = 11


def grid(tokens: int, image: int = 0, view: int = 0) -> ViewGrid:
    return ViewGrid(image=image, view=view, rows=1, cols=tokens)


def match(
    student: Tensor,
    teacher: Signal,
    views: tuple[list[ViewGrid], list[ViewGrid]] | None = None,
    **config: Any,
) -> Assignment:
    """Match all tokens as one view, or those of the student's and the teacher's `views`."""
    own, theirs = views or ([grid(len(student))], [grid(teacher.num_rows)])
    return match_tokens(student[:, :1], student, own, teacher, theirs, MatchingConfig(**config))


def looped(cost: str, student: Tensor, teacher: Tensor) -> list[list[float]]:
    change = {
        "raw_l1": lambda row: row,
        "centred_l1": references.centred,
        "prob_l1": references.probabilities,
    }[cost]
    return [
        [references.l1(change(s), change(t)) for t in teacher.tolist()] for s in student.tolist()
    ]


def test_costs_over_no_vocabulary_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_shared_ids must be >= 1, or None"):
        MatchingConfig(num_shared_ids=0)


@pytest.mark.parametrize("metric", ["raw_l1", "centred_l1", "prob_l1"])
def test_the_cost_of_every_exact_signal_is_that_of_the_loops(metric: MatchMetric) -> None:
    head = LmHead(weight=normal(1, VOCAB, 4))
    hidden, student = normal(2, 5, 4), normal(3, 3, VOCAB + 2)
    expected = torch.tensor(looped(metric, student[:, :VOCAB], head.logits(hidden))).double()
    config = MatchingConfig(metric=metric, num_shared_ids=None)
    for teacher in (
        DenseSignal(logits=head.logits(hidden)),
        HiddenSignal(hidden=hidden, head=head),
    ):
        found = cost_matrix(normal(4, 3, 2), student, teacher, config)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_cosine_cost_compares_states_of_one_width() -> None:
    hidden, student = normal(5, 4, 6), normal(6, 3, 6)
    teacher = HiddenSignal(hidden=hidden, head=LmHead(weight=normal(7, VOCAB, 6)))
    config = MatchingConfig(metric="hidden_cosine")
    expected = [[1 - references.cosine(s, t) for t in hidden.tolist()] for s in student.tolist()]
    found = cost_matrix(student, None, teacher, config)
    torch.testing.assert_close(found, torch.tensor(expected).double())
    with pytest.raises(ValueError, match="student 5 and teacher 6"):
        cost_matrix(student[:, :5], None, teacher, config)
    with pytest.raises(ValueError, match="records `hidden`"):
        cost_matrix(student, None, DenseSignal(logits=normal(8, 4, VOCAB)), config)


def test_probabilities_of_a_top_k_record_have_a_uniform_tail() -> None:
    batch = random_batch(9, [ONE_IMAGE])
    student = normal(10, 2, VOCAB)
    teacher = vision_signal(batch.outputs("topk", 4)[0], TeacherAssets())
    dense = vision_signal(batch.hidden_outputs[0], batch.assets("hidden")).dense_logits()
    expected = [
        [
            references.l1(
                references.probabilities(s), references.probabilities_with_uniform_tail(t, 4)
            )
            for t in dense.tolist()
        ]
        for s in student.tolist()
    ]
    config = MatchingConfig(metric="prob_l1")
    found = cost_matrix(student[:, :1], student, teacher, config)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    exact = cost_matrix(student[:, :1], student, DenseSignal(logits=dense), config)
    kept = dense.log_softmax(1).topk(4).values.exp().sum(1)
    assert bool(((found - exact).abs() <= 2 * (1 - kept) + 1e-6).all())


def test_a_sketch_matches_like_the_states_it_codes() -> None:
    batch = random_batch(11, [ONE_IMAGE], teacher_width=4)
    student = normal(12, 2, VOCAB)
    sketched = vision_signal(batch.outputs("topk+sketch")[0], batch.assets("topk+sketch"))
    states = vision_signal(batch.hidden_outputs[0], batch.assets("hidden"))
    for metric in ("raw_l1", "centred_l1", "prob_l1"):
        config = MatchingConfig(metric=metric, num_shared_ids=None)
        approximate = cost_matrix(student[:, :1], student, sketched, config)
        exact = cost_matrix(student[:, :1], student, states, config)
        torch.testing.assert_close(approximate.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("metric", ["raw_l1", "centred_l1"])
def test_raw_distances_are_refused_on_a_bare_top_k_record(metric: MatchMetric) -> None:
    teacher = vision_signal(random_batch(13, [ONE_IMAGE]).outputs("topk", 4)[0], TeacherAssets())
    with pytest.raises(ValueError, match=r"outside the top 4.*or match by prob_l1"):
        match(normal(14, 2, VOCAB), teacher, metric=metric)


def test_centred_costs_are_blind_to_a_constant_that_moves_raw_ones() -> None:
    student, teacher = normal(15, 3, VOCAB), DenseSignal(logits=normal(16, 5, VOCAB))
    moved = student + torch.tensor([[3.0], [-2.0], [10.0]])
    costs = {
        metric: [
            cost_matrix(student[:, :1], rows, teacher, MatchingConfig(metric=metric))
            for rows in (student, moved)
        ]
        for metric in ("raw_l1", "centred_l1", "prob_l1")
    }
    torch.testing.assert_close(*costs["centred_l1"])
    torch.testing.assert_close(*costs["prob_l1"])
    assert float((costs["raw_l1"][0] - costs["raw_l1"][1]).abs().min()) > 0.1


def test_shared_ids_are_the_same_everywhere_and_all_where_there_are_few() -> None:
    chosen = shared_ids(1000, 10)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 10
    assert chosen.tolist() == [87, 103, 260, 304, 443, 563, 744, 747, 750, 825]
    assert shared_ids(7, 10).tolist() == shared_ids(7, None).tolist() == list(range(7))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_permuting_either_side_permutes_the_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = normal(seed, 4, VOCAB), normal(seed + 1, 6, VOCAB)
    plain = match(student, DenseSignal(logits=teacher))
    own = torch.randperm(4, generator=generator)
    theirs = torch.randperm(6, generator=generator)
    moved = match(student[own], DenseSignal(logits=teacher[theirs]))
    pairs = {
        (int(own[i]), int(theirs[j])) for i, j in zip(moved.student, moved.teacher, strict=True)
    }
    assert pairs == set(zip(plain.student.tolist(), plain.teacher.tolist(), strict=True))
    assert moved.total_cost == pytest.approx(plain.total_cost)


def test_a_student_equal_to_its_teacher_is_matched_to_itself_at_no_cost() -> None:
    logits = normal(17, 6, VOCAB)
    pairs = match(logits, DenseSignal(logits=logits))
    assert pairs.student.tolist() == pairs.teacher.tolist() == list(range(6))
    assert pairs.total_cost == 0.0


def test_students_beyond_the_teachers_number_stay_unmatched() -> None:
    pairs = match(normal(18, 5, VOCAB), DenseSignal(logits=normal(19, 3, VOCAB)))
    assert pairs.num_pairs == 3
    assert sorted(pairs.teacher.tolist()) == [0, 1, 2]
    assert sorted([*pairs.student.tolist(), *pairs.unmatched_students.tolist()]) == list(range(5))


def test_views_are_matched_apart_and_images_whole() -> None:
    student, teacher = normal(20, 6, VOCAB), normal(21, 9, VOCAB)
    own, theirs = ([grid(n), grid(n, view=1), grid(n, image=1)] for n in (2, 3))
    signal = DenseSignal(logits=teacher)
    by_view = match(student, signal, (own, theirs), scope="view")
    assert (by_view.teacher // 3).tolist() == (by_view.student // 2).tolist()
    assert [tuple(each.cost.shape) for each in by_view.problems] == [(2, 3)] * 3
    whole = match(student, signal, (own, theirs), scope="global")
    assert [tuple(each.cost.shape) for each in whole.problems] == [(4, 6), (2, 3)]
    cost = [[references.l1(s, t) for t in teacher[:6].tolist()] for s in student[:4].tolist()]
    last = [[references.l1(s, t) for t in teacher[6:].tolist()] for s in student[4:].tolist()]
    best = references.best_assignment(cost)[0] + references.best_assignment(last)[0]
    assert whole.total_cost == pytest.approx(best)
    assert by_view.total_cost >= whole.total_cost


def test_other_views_and_other_images_are_refused_with_the_remedy() -> None:
    student, teacher = normal(22, 2, VOCAB), DenseSignal(logits=normal(23, 4, VOCAB))
    tiles = [grid(2), grid(2, view=1)]
    with pytest.raises(ValueError, match=r"only the teacher \[\(0, 1\)\]; use scope=global"):
        match(student, teacher, ([grid(2)], tiles))
    assert match(student, teacher, ([grid(2)], tiles), scope="global").num_pairs == 2
    with pytest.raises(ValueError, match=r"only the teacher \[\(1,\)\]"):
        match(student, teacher, ([grid(2)], [grid(2), grid(2, image=1)]), scope="global")


def test_matching_gives_no_gradient_and_refuses_overflow() -> None:
    student = normal(24, 2, VOCAB).requires_grad_()
    teacher = DenseSignal(logits=normal(25, 3, VOCAB))
    pairs = match(student, teacher)
    assert not any(each.cost.requires_grad for each in pairs.problems)
    broken = student.detach().clone()
    broken[0, 0] = math.nan
    with pytest.raises(ValueError, match="3 of 6 matching costs are NaN"):
        match(broken, teacher)


def test_a_student_with_fewer_vocabulary_rows_is_refused() -> None:
    teacher = DenseSignal(logits=normal(26, 3, VOCAB))
    with pytest.raises(ValueError, match="10 vocabulary rows, the teacher's cache 11"):
        match(normal(27, 2, VOCAB - 1), teacher)
    with pytest.raises(ValueError, match="needs the student's vision logits"):
        cost_matrix(normal(28, 2, 3), None, teacher, MatchingConfig())
