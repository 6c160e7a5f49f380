"""A micro-batch's matchings: what is logged of them, checks against all of V, dropped tokens."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import (
    MatchingConfig,
    MatchMetric,
    MatchScope,
    ObjectiveConfig,
    preset,
)
from student_train.config.recipe import TrainerSettings
from student_train.head.linear_head import LinearHead
from student_train.losses import batch_matching
from student_train.losses.batch_matching import start_batch_matching
from student_train.matching.assignment import Assignment, solve_assignment
from student_train.matching.matching import PendingMatching, match_tokens
from student_train.matching.quality import matching_quality
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.samples import ViewGrid
from tests.support.batches import (
    EQUAL_GRIDS,
    ONE_IMAGE,
    TEXT_ONLY,
    TWO_IMAGES,
    RandomBatch,
    RecordForm,
    Shape,
    View,
    normal,
    random_batch,
    views,
)

VOCAB = 11
METRICS: tuple[MatchMetric, ...] = get_args(MatchMetric)


def diagnostics(
    batch: RandomBatch,
    matching: MatchingConfig,
    form: RecordForm = "hidden",
    check: bool = True,
    head: LinearHead | None = None,
) -> dict[str, float]:
    objective = ObjectiveConfig(matching=matching)
    own = head or LinearHead(weight=batch.student_head.weight)
    outputs, assets = batch.outputs(form), batch.assets(form)
    pending = start_batch_matching(batch.states, outputs, own, objective, assets, check)
    pending.result()
    return pending.diagnostics


FEW = MatchingConfig(num_shared_ids=2)


@pytest.mark.parametrize(("form", "name"), [("hidden", "match"), ("topk+sketch", "match_sketch")])
def test_a_check_says_how_far_the_first_image_is_from_all_of_the_vocabulary(
    form: RecordForm, name: str
) -> None:
    regrets: list[float] = []
    for seed in range(12):
        batch = random_batch(seed, [TEXT_ONLY, TWO_IMAGES, ONE_IMAGE])
        found = diagnostics(batch, FEW, form)
        regret, agreement = found[f"{name}_regret"], found[f"{name}_agreement"]
        alone = replace(batch, states=batch.states[1:2], hidden_outputs=batch.hidden_outputs[1:2])
        if form == "hidden":
            assert diagnostics(alone, FEW)["match_regret"] == regret
        assert regret >= 0.0
        assert 0.0 <= agreement <= 1.0
        assert (regret > 0) <= (agreement < 1)
        regrets.append(regret)
        whole = diagnostics(batch, replace(FEW, num_shared_ids=None), form)
        assert (whole[f"{name}_regret"], whole[f"{name}_agreement"]) == (0.0, 1.0)
        unasked = diagnostics(batch, FEW, form, check=False)
        added = {f"{name}_regret", f"{name}_agreement"}
        assert unasked == {key: value for key, value in found.items() if key not in added}
    assert max(regrets) > 0, "two vocabulary rows are not enough"


def test_quality_is_the_excess_as_a_share_of_a_random_matchings() -> None:
    # Cost by all of V: 0 on the diagonal and 4 elsewhere; by row 0 alone the pairs are exchanged.
    teacher = torch.tensor([[0.0, 3.0], [0.5, 0.0]])
    student = torch.tensor([[0.5, 3.0], [0.0, 0.0]])

    def match(columns: int) -> Assignment:
        return match_tokens(
            student,
            student[:, :columns],
            views(2),
            DenseSignal(logits=teacher[:, :columns]),
            views(2),
            MatchingConfig(num_shared_ids=None),
        )

    few, exact = match(1), match(2)
    quality = matching_quality(few, exact)
    # exchanged: 3 + 3; least: 0.5 + 0.5; random: the mean cost of 1.75, twice
    assert quality.regret == pytest.approx((6 - 1) / (3.5 - 1))
    assert quality.agreement == 0.0
    same = matching_quality(exact, exact)
    assert (same.regret, same.agreement) == (0.0, 1.0)


def test_a_check_of_what_is_whole_already_is_refused() -> None:
    for objective in (
        ObjectiveConfig(matching=MatchingConfig(num_shared_ids=None)),
        ObjectiveConfig(matching=MatchingConfig(metric="prob_l1")),
        preset("rld"),
    ):
        with pytest.raises(ValueError, match=r"there is nothing to check; set match_check_steps"):
            TrainerSettings(objective=objective, match_check_steps=5)
        TrainerSettings(objective=objective)
    TrainerSettings(objective=preset("emkd"), match_check_steps=5)


def test_a_matching_close_to_arbitrary_is_counted_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch_matching._warn_of_arbitrary.cache_clear()  # pyright: ignore[reportPrivateUsage]
    batch = random_batch(3, [ONE_IMAGE, TWO_IMAGES], dtype=torch.float32)
    weight, width = batch.student_head.weight.detach(), batch.student_head.in_features
    with caplog.at_level(logging.WARNING):
        assert diagnostics(batch, MatchingConfig())["match_arbitrary"] == 0.0
        assert not caplog.messages
        # A constant, other for each token: it decides all costs, and no probability.
        moved = LinearHead(weight=weight + 1e4 * normal(4, 1, width).float())
        for _ in range(2):
            assert diagnostics(batch, MatchingConfig(), head=moved)["match_arbitrary"] == 1.0
    (message,) = caplog.messages
    assert "almost arbitrarily: by raw_l1" in message
    assert "match by centred_l1" in message
    centred = diagnostics(batch, MatchingConfig(metric="centred_l1"), head=moved)
    assert centred["match_arbitrary"] == 0.0


@pytest.mark.parametrize("metric", get_args(MatchMetric))
def test_the_warning_never_recommends_the_metric_in_use(
    metric: MatchMetric, caplog: pytest.LogCaptureFixture
) -> None:
    batch_matching._warn_of_arbitrary.cache_clear()  # pyright: ignore[reportPrivateUsage]
    batch_matching._warn_of_arbitrary(metric)  # pyright: ignore[reportPrivateUsage]
    (message,) = caplog.messages
    _, _, advice = message.partition("docs/method.md). ")
    assert metric not in advice
    assert "centred_l1" in advice or "prob_l1" in advice


def test_a_problem_of_one_token_says_nothing_of_separability() -> None:
    single = Shape(views=[View(0, (1, 1), (2, 2))])
    alone = diagnostics(random_batch(1, [single]), MatchingConfig())
    assert "match_hubness" in alone
    assert not {"match_separability", "match_arbitrary"} & alone.keys()
    batch = random_batch(1, [EQUAL_GRIDS, single])
    both = diagnostics(batch, MatchingConfig())
    first = replace(batch, states=batch.states[:1], hidden_outputs=batch.hidden_outputs[:1])
    several = diagnostics(first, MatchingConfig())
    assert 0 < several["match_separability"] < 1
    assert both["match_separability"] == pytest.approx(several["match_separability"], rel=1e-5)


def test_the_spread_of_the_constants_is_that_of_the_compared_columns() -> None:
    batch = random_batch(5, [ONE_IMAGE, TWO_IMAGES])
    every = MatchingConfig(num_shared_ids=None)
    logits = torch.cat(
        [batch.student_head(state.vision).detach()[:, :VOCAB] for state in batch.states]
    )
    expected = float(logits.mean(dim=1).std())
    found = diagnostics(batch, every)
    assert found["student_row_mean_spread"] == pytest.approx(expected)
    states = diagnostics(
        random_batch(5, [ONE_IMAGE], student_width=6), MatchingConfig(metric="hidden_l2")
    )
    assert "student_row_mean_spread" not in states


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    scope=st.sampled_from(["view", "global"]),
    data=st.data(),
)
def test_kept_tokens_are_matched_as_if_the_others_had_never_been(
    seed: int, sizes: list[tuple[int, int]], scope: MatchScope, data: st.DataObject
) -> None:
    num_student, num_teacher = (sum(side) for side in zip(*sizes, strict=True))
    student, teacher = normal(seed, num_student, VOCAB), normal(seed + 1, num_teacher, VOCAB)
    kept = sorted(data.draw(st.sets(st.integers(0, num_student - 1), min_size=1)))
    own = views(*[n for n, _ in sizes])
    theirs = views(*[m for _, m in sizes])
    config = MatchingConfig(scope=scope)
    found = match_tokens(
        student[kept][:, :1],
        student[kept],
        own,
        DenseSignal(logits=teacher),
        theirs,
        config,
        torch.tensor(kept),
    )
    expected = by_hand(student, teacher, own, theirs, kept, scope)
    assert list(zip(found.student.tolist(), found.teacher.tolist(), strict=True)) == expected
    assert found.num_student == len(kept)
    left = set(range(len(kept))) - {row for row, _ in expected}
    assert set(found.unmatched_students.tolist()) == left


def by_hand(
    student: Tensor,
    teacher: Tensor,
    own: Sequence[ViewGrid],
    theirs: Sequence[ViewGrid],
    kept: list[int],
    scope: MatchScope,
) -> list[tuple[int, int]]:
    """Each view's kept rows matched alone, or all together; views without any left out."""
    pairs: list[tuple[int, int]] = []
    if scope == "global":
        own = views(sum(view.num_tokens for view in own))
        theirs = views(sum(view.num_tokens for view in theirs))
    own_start = their_start = 0
    for mine, other in zip(own, theirs, strict=True):
        here = [i for i, k in enumerate(kept) if own_start <= k < own_start + mine.num_tokens]
        rows = student[[kept[i] for i in here]]
        block = teacher[their_start : their_start + other.num_tokens]
        if here:
            found = match_tokens(
                rows[:, :1],
                rows,
                views(len(here)),
                DenseSignal(logits=block),
                views(len(block)),
                MatchingConfig(),
            )
            matched = zip(found.student.tolist(), found.teacher.tolist(), strict=True)
            pairs += [(here[i], their_start + j) for i, j in matched]
        own_start += mine.num_tokens
        their_start += other.num_tokens
    return sorted(pairs)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(METRICS),
    more_students=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_transposed_problem_has_the_transposed_solution_and_inputs_stay(
    seed: int, metric: MatchMetric, more_students: bool, dtype: torch.dtype
) -> None:
    num_students, num_teachers = (5, 3) if more_students else (3, 5)
    states = normal(seed, num_students, 6).to(dtype)
    hidden = normal(seed + 1, num_teachers, 6).to(dtype)
    weight = normal(seed + 2, VOCAB, 6).to(dtype)
    before = states.clone(), hidden.clone(), weight.clone()
    found = match_tokens(
        states,
        LinearHead(weight=weight),
        views(num_students),
        HiddenSignal(hidden=hidden, head=LmHead(weight=weight)),
        views(num_teachers),
        MatchingConfig(metric=metric),
    )
    columns, rows = solve_assignment(found.problems[0].cost.T)
    pairs = set(zip(found.student.tolist(), found.teacher.tolist(), strict=True))
    assert pairs == set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found.num_pairs == 3
    assert len(found.unmatched_students) == (2 if more_students else 0)
    assert len(set(found.teacher.tolist())) == 3
    assert found.problems[0].cost.dtype == torch.promote_types(dtype, torch.float32)
    for now, then in zip((states, hidden, weight), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_costs_are_the_same_in_their_own_thread_and_in_the_callers(
    metric: MatchMetric, autocast: torch.dtype | None
) -> None:
    shapes = [TEXT_ONLY, TWO_IMAGES, ONE_IMAGE]
    batch = random_batch(3, shapes, student_width=6, dtype=torch.float32)
    outputs, assets = batch.outputs("hidden"), batch.assets("hidden")
    objective = ObjectiveConfig(matching=MatchingConfig(metric=metric))
    threads: list[str] = []
    start = batch_matching.start_matching

    def watched(*arguments: Any) -> PendingMatching:
        threads.append(threading.current_thread().name)
        return start(*arguments)

    def costs() -> list[Tensor]:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            head = LinearHead(weight=batch.student_head.weight.detach())
            pending = start_batch_matching(batch.states, outputs, head, objective, assets)
        found = [sample for sample in pending.result() if sample is not None]
        return [problem.cost for sample in found for problem in sample.pairs.problems]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_matching, "start_matching", watched)
        apart = costs()
        patch.setattr(batch_matching, "LinearHead", type("NoHead", (), {}))
        here = costs()
    assert [name.startswith("matching-costs") for name in threads] == [True, False]
    assert all(torch.equal(*pair) for pair in zip(apart, here, strict=True))
    rounded = autocast is not None and not metric.startswith("hidden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda _kind: False)
        assert rounded != all(torch.equal(*pair) for pair in zip(apart, costs(), strict=True))


def test_what_costs_refuse_in_their_thread_comes_with_the_result() -> None:
    batch = random_batch(3, [ONE_IMAGE])
    head = LinearHead(weight=batch.student_head.weight.detach())
    objective = ObjectiveConfig(matching=MatchingConfig(num_shared_ids=3, certify=True))
    outputs, assets = batch.outputs("hidden"), batch.assets("hidden")
    pending = start_batch_matching(batch.states, outputs, head, objective, assets)
    with pytest.raises(ValueError, match="no bound is known for the error of raw_l1"):
        pending.result()
