"""Matching in the background: the same bits as at once, whatever happens meanwhile; proofs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.matching.assignment import Assignment, solve_assignment
from student_train.matching.cost import cost_matrix
from student_train.matching.cost_error import cost_error
from student_train.matching.matching import match_tokens, start_matching
from student_train.matching.problems import VisionTokens
from student_train.matching.quality import assignment_stats, certified_pairs
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from tests.support import references
from tests.support.batches import ONE_IMAGE, normal, random_batch, views

VOCAB = 11
CERTIFY_ALL = MatchingConfig(num_shared_ids=None, certify=True)
CERTIFY_PROB = MatchingConfig(metric="prob_l1", certify=True)


def proven(found: Assignment) -> Tensor:
    pairs = certified_pairs([found])
    assert pairs is not None
    return pairs


def test_it_gives_the_bits_of_waiting_whatever_becomes_of_the_inputs() -> None:
    student_views, teacher_views = views(*[3, 5] * 8), views(*[7, 4] * 8)
    student, teacher = normal(0, 64, VOCAB), normal(1, 88, VOCAB)
    plain = match_tokens(
        student[:, :1],
        student.clone(),
        student_views,
        DenseSignal(logits=teacher.clone()),
        teacher_views,
        CERTIFY_ALL,
    )
    tokens = [VisionTokens(student_views, teacher_views)]
    signal = DenseSignal(logits=teacher)
    pending = start_matching(tokens, student[:, :1], student, signal, CERTIFY_ALL)
    student.zero_()
    teacher.zero_()
    for (found,), _, _ in (pending.result(), pending.result()):
        assert torch.equal(found.student, plain.student)
        assert torch.equal(found.teacher, plain.teacher)
        assert found.total_cost == plain.total_cost
        assert torch.equal(proven(found), proven(plain))
        for own, other in zip(found.problems, plain.problems, strict=True):
            assert torch.equal(own.cost, other.cost)
    costs = [problem.cost for problem in plain.problems]
    by_hand = sum(float(cost[solve_assignment(cost)].sum()) for cost in costs)
    assert plain.total_cost == pytest.approx(by_hand)
    assert plain.num_pairs == 8 * (3 + 4)
    assert len(plain.unmatched_students) == 8


def test_costs_that_are_not_finite_are_refused_with_the_result() -> None:
    student = normal(2, 2, VOCAB)
    student[0, 0] = torch.inf
    teacher = DenseSignal(logits=normal(3, 3, VOCAB))
    tokens = [VisionTokens(views(2), views(3))]
    pending = start_matching(tokens, student[:, 1:2], student, teacher, MatchingConfig())
    with pytest.raises(ValueError, match="3 of 6 matching costs are NaN"):
        pending.result()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), kept=st.integers(2, VOCAB), sharpness=st.floats(0.5, 8.0))
def test_pairs_certified_from_top_k_records_are_those_of_the_exact_costs(
    seed: int, kept: int, sharpness: float
) -> None:
    batch = random_batch(seed, [ONE_IMAGE])
    signal = vision_signal(batch.outputs("topk", kept)[0], TeacherAssets())
    exact = vision_signal(batch.hidden_outputs[0], batch.assets("hidden"))
    student = (normal(seed + 1, 2, VOCAB) * sharpness).float()
    found = match_tokens(
        student[:, :1],
        student,
        views(2),
        signal,
        views(signal.num_rows),
        CERTIFY_PROB,
    )
    true_cost = cost_matrix(student[:, :1], student, exact, CERTIFY_PROB)
    bound = cost_error(signal, CERTIFY_PROB, torch.float32).of(found.problems[0].cost)
    assert bool(((found.problems[0].cost - true_cost).abs() <= bound).all())
    least, pairs = references.best_assignment(true_cost.tolist())
    for i, j, held in zip(found.student, found.teacher, proven(found), strict=True):
        assert (int(i), int(j)) in pairs or not held
        other_cost = true_cost.clone()
        other_cost[i, j] = 1e6
        others, _ = references.best_assignment(other_cost.tolist())
        # Pairs that move: a cycle of two students and a free teacher at most.
        assert held or others - least <= 6 * float(bound.max()), "it could have been certified"
    assert assignment_stats([found]).certified == float(proven(found).double().mean())


def test_a_certificate_is_given_where_a_bound_is_known_and_refused_elsewhere() -> None:
    batch = random_batch(4, [ONE_IMAGE], teacher_width=4)
    student = normal(5, 2, VOCAB).float()
    bare = vision_signal(batch.outputs("topk", 4)[0], TeacherAssets())
    sketched = vision_signal(batch.outputs("topk+sketch")[0], batch.assets("topk+sketch"))
    hidden = HiddenSignal(hidden=normal(6, 3, 4), head=LmHead(weight=normal(7, VOCAB, 4)))
    for metric in ("raw_l1", "centred_l1", "prob_l1"):
        with pytest.raises(ValueError, match=r"no bound is known.*set certify=False"):
            cost_error(sketched, replace(CERTIFY_ALL, metric=metric), torch.float32)
    with pytest.raises(ValueError, match="the error of raw_l1"):
        cost_error(hidden, replace(CERTIFY_ALL, num_shared_ids=VOCAB - 1), torch.float32)
    assert isinstance(bare, TopKSignal)
    tail = cost_error(bare, CERTIFY_PROB, torch.float32).absolute
    assert bool((tail >= 2 * bare.record.log_tail.exp()).all())
    found = match_tokens(student[:, :1], student, views(2), hidden, views(3), CERTIFY_ALL)
    assert bool(proven(found).all())
    unasked = replace(CERTIFY_ALL, certify=False)
    found = match_tokens(student[:, :1], student, views(2), hidden, views(3), unasked)
    assert assignment_stats([found]).certified is None
