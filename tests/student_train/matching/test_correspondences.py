"""Promises of matching/correspondences: each equals plain loops, and the laws between them."""

import itertools
import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import CorrespondenceName, MatchingConfig, ObjectiveConfig
from student_train.config.recipe import TrainerSettings
from student_train.losses.batch_matching import start_batch_matching
from student_train.matching.correspondences.pairing import PairingProblem
from student_train.matching.correspondences.table import CORRESPONDENCES
from student_train.matching.geometry import TokenPlaces, view_geometry
from student_train.matching.matching import match_tokens
from student_train.matching.quality import assignment_stats
from student_train.signals.teacher_signal import DenseSignal
from teacher_cache.schema.samples import ViewGrid
from tests.support.batches import EQUAL_GRIDS, ONE_IMAGE, TWO_IMAGES, normal, random_batch

NAMES: tuple[CorrespondenceName, ...] = get_args(CorrespondenceName)
SMALL_GRIDS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1), (1, 5), (2, 3)])

Pairs = list[tuple[int, int]]


def grid(rows: int, cols: int, view: int = 0) -> ViewGrid:
    return ViewGrid(image=0, view=view, rows=rows, cols=cols)


def problem(
    seed: int, student: tuple[int, int], teacher: tuple[int, int], place_weight: float = 0.0
) -> PairingProblem:
    cost = normal(seed, math.prod(student), math.prod(teacher)).abs() + 0.1
    return PairingProblem(
        cost, view_geometry(grid(*student), grid(*teacher)), seed, place_weight=place_weight
    )


def paired(asked: PairingProblem, name: CorrespondenceName) -> Pairs:
    students, teachers = CORRESPONDENCES[name](asked)
    return list(zip(students.tolist(), teachers.tolist(), strict=True))


# Plain loops.


def centre(number: int, rows: int, cols: int) -> tuple[float, float]:
    return (number // cols + 0.5) / rows, (number % cols + 0.5) / cols


def window(number: int, student: tuple[int, int], teacher: tuple[int, int]) -> set[int]:
    """The teacher tokens whose centres a student token's cell holds, else the nearest ones."""
    down, across = centre(number, *student)
    found, distances = set[int](), dict[int, float]()
    for other in range(math.prod(teacher)):
        there = centre(other, *teacher)
        distances[other] = math.dist((down, across), there)
        in_rows = abs(there[0] - down) <= 0.5 / student[0] + 1e-9
        if in_rows and abs(there[1] - across) <= 0.5 / student[1] + 1e-9:
            found.add(other)
    least = min(distances.values())
    return found or {other for other, value in distances.items() if value <= least + 1e-9}


def all_maps(num_students: int, num_teachers: int) -> Sequence[Pairs]:
    """All injective maps of as many tokens as can be paired."""
    if num_students <= num_teachers:
        chosen = itertools.permutations(range(num_teachers), num_students)
        return [list(enumerate(each)) for each in chosen]
    swapped = all_maps(num_teachers, num_students)
    return [sorted((student, teacher) for teacher, student in pairs) for pairs in swapped]


def least(cost: list[list[float]]) -> Pairs:
    return min(
        all_maps(len(cost), len(cost[0])), key=lambda pairs: sum(cost[j][i] for j, i in pairs)
    )


def greedily(cost: list[list[float]]) -> Pairs:
    left = [(value, j, i) for j, row in enumerate(cost) for i, value in enumerate(row)]
    pairs: Pairs = []
    while left:
        _, j, i = min(left)
        pairs.append((j, i))
        left = [each for each in left if each[1] != j and each[2] != i]
    return sorted(pairs)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), student=SMALL_GRIDS, teacher=SMALL_GRIDS)
def test_each_equals_plain_loops_on_unlike_grids(
    seed: int, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    asked = problem(seed, student, teacher)
    cost: list[list[float]] = asked.cost.tolist()
    windows = [window(j, student, teacher) for j in range(len(cost))]
    found = asked.places()
    for j, row in enumerate(cost):
        assert set(found.inside[j].nonzero()[:, 0].tolist()) == windows[j]
        for i in range(len(row)):
            apart = math.dist(centre(j, *student), centre(i, *teacher))
            assert found.distance[j, i].item() == pytest.approx(apart)
    assert paired(asked, "hungarian") == least(cost)
    assert paired(asked, "greedy") == greedily(cost)
    assert paired(asked, "nearest") == [
        (j, min(range(len(row)), key=row.__getitem__)) for j, row in enumerate(cost)
    ]
    maps = all_maps(len(cost), len(cost[0]))
    kept = [sum(i in windows[j] for j, i in pairs) for pairs in maps]
    most = [pairs for pairs, number in zip(maps, kept, strict=True) if number == max(kept)]
    best = min(most, key=lambda pairs: sum(cost[j][i] for j, i in pairs))
    assert paired(asked, "local") == best


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    student=SMALL_GRIDS,
    teacher=SMALL_GRIDS,
    weight=st.floats(0.01, 100.0),
)
def test_spatial_is_the_least_of_costs_and_squared_distances(
    seed: int, student: tuple[int, int], teacher: tuple[int, int], weight: float
) -> None:
    asked = problem(seed, student, teacher, weight)
    cost: list[list[float]] = asked.cost.tolist()
    mean = sum(map(sum, cost)) / sum(map(len, cost))
    total = [
        [
            value / mean + weight * math.dist(centre(j, *student), centre(i, *teacher)) ** 2
            for i, value in enumerate(row)
        ]
        for j, row in enumerate(cost)
    ]
    assert paired(asked, "spatial") == least(total)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), side=st.integers(2, 6), finer=st.integers(1, 3))
def test_spatial_goes_from_the_paper_to_nearest_places(seed: int, side: int, finer: int) -> None:
    asked = problem(seed, (side, side), (side * finer, side * finer))
    assert paired(asked, "spatial") == paired(asked, "hungarian")
    far = asked._replace(place_weight=1e9)
    places = asked._replace(cost=asked.places().distance.square())
    found, wanted = (
        sum(places.cost[j, i].item() for j, i in pairs)
        for pairs in (paired(far, "spatial"), paired(places, "hungarian"))
    )
    assert found == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), name=st.sampled_from([n for n in NAMES if n != "random"]))
def test_the_order_of_the_teachers_tokens_changes_no_pair(
    seed: int, name: CorrespondenceName
) -> None:
    asked = problem(seed, (3, 3), (5, 4), 7.0 if name == "spatial" else 0.0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    there = asked.places()
    moved = asked._replace(
        cost=asked.cost[:, order],
        geometry=TokenPlaces(there.distance[:, order], there.inside[:, order]),
    )
    assert [(j, order[i].item()) for j, i in paired(moved, name)] == paired(asked, name)


def test_chance_is_drawn_by_seed_alone_and_leaves_no_token_out() -> None:
    counts = torch.zeros(3, 5)
    for seed in range(2000):
        asked = problem(seed, (1, 3), (1, 5))
        pairs = paired(asked, "random")
        assert pairs == paired(asked._replace(cost=asked.cost + 1), "random")
        assert [j for j, _ in pairs] == [0, 1, 2]
        assert len({i for _, i in pairs}) == 3
        for j, i in pairs:
            counts[j, i] += 1
    assert bool(((counts / 2000 - 0.2).abs() < 0.04).all()), "all pairs are equally likely"
    fewer = paired(problem(1, (1, 5), (1, 2)), "random")
    assert len(fewer) == 2
    assert sorted(i for _, i in fewer) == [0, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_costs_that_are_not_finite_are_refused(name: CorrespondenceName) -> None:
    asked = problem(0, (2, 2), (2, 2))
    asked.cost[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 16 matching costs are NaN or infinite"):
        CORRESPONDENCES[name](asked)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_matched_view_by_view_and_without_dropped_tokens(
    name: CorrespondenceName,
) -> None:
    """Two views of unlike grids, of which the student has dropped some tokens."""
    own = [grid(2, 2), grid(1, 3, view=1)]
    theirs = [grid(4, 4), grid(2, 6, view=1)]
    kept = torch.tensor([0, 2, 3, 4, 6])
    student, teacher = normal(3, 5, 7), normal(4, 28, 7)
    weight = 3.0 if name == "spatial" else 0.0
    config = MatchingConfig(correspondence=name, place_weight=weight, num_shared_ids=None)
    found = match_tokens(
        student[:, :1], student, own, DenseSignal(logits=teacher), theirs, config, kept
    )
    cost = torch.cdist(student, teacher, p=1)
    wanted: Pairs = []
    for rows, numbers, columns, views in (
        (slice(0, 3), [0, 2, 3], slice(0, 16), (own[0], theirs[0])),
        (slice(3, 5), [0, 2], slice(16, 28), (own[1], theirs[1])),
    ):
        places = view_geometry(*views).of_students(torch.tensor(numbers))
        problems = found.problems[len(wanted) > 0]
        asked = PairingProblem(cost[rows, columns], places, place_weight=weight)
        torch.testing.assert_close(problems.cost, asked.cost)
        if name == "random":
            pairs = list(zip(problems.rows.tolist(), problems.columns.tolist(), strict=True))
        else:
            pairs = paired(asked, name)
        wanted += [(rows.start + j, columns.start + i) for j, i in pairs]
        inside = [bool(places.inside[j, i]) for j, i in pairs]
        apart = [places.distance[j, i].item() for j, i in pairs]
        stated = problems.places
        assert stated is not None
        assert stated.inside == pytest.approx(sum(inside) / len(inside))
        assert stated.mean_distance == pytest.approx(sum(apart) / len(apart))
        agreeing = [pair in paired(asked, "local") for pair in pairs]
        assert stated.local == pytest.approx(sum(agreeing) / len(agreeing))
    assert list(zip(found.student.tolist(), found.teacher.tolist(), strict=True)) == wanted
    stats = assignment_stats([found])
    if name == "local":
        assert (stats.inside, stats.local) == (1.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_does_not_depend_on_the_samples_beside_it(name: CorrespondenceName) -> None:
    weight = 2.0 if name == "spatial" else 0.0
    matching = MatchingConfig(correspondence=name, place_weight=weight)
    objective = ObjectiveConfig(matching=matching)
    shapes = [ONE_IMAGE, EQUAL_GRIDS, TWO_IMAGES]
    batch = random_batch(5, shapes)

    def pairs(numbers: Sequence[int]) -> list[list[Tensor]]:
        pending = start_batch_matching(
            [batch.states[n] for n in numbers],
            [batch.outputs("hidden")[n] for n in numbers],
            batch.student_head,
            objective,
            batch.assets("hidden"),
        )
        found = [sample.pairs for sample in pending.result() if sample is not None]
        assert {"match_distance", "match_inside", "match_local"} <= pending.diagnostics.keys()
        return [[each.student, each.teacher] for each in found]

    together = pairs([0, 1, 2])
    for number, own in enumerate(together):
        (alone,) = pairs([number])
        assert all(torch.equal(*both) for both in zip(own, alone, strict=True))
    loss = batch.loss(objective)
    assert math.isfinite(loss.total.item())
    assert torch.autograd.grad(loss.terms["vsd"], batch.states[0].vision)[0].abs().sum() > 0


def test_settings_without_effect_or_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"place_weight would have no effect: .*local"):
        MatchingConfig(correspondence="local", place_weight=1.0)
    for name in ("local", "spatial"):
        with pytest.raises(ValueError, match=f"{name} needs the places .* take scope view"):
            MatchingConfig(correspondence=name, scope="global")
    with pytest.raises(ValueError, match=r"place_weight must be >= 0"):
        MatchingConfig(correspondence="spatial", place_weight=-1.0)
    with pytest.raises(ValueError, match=r"certify proves .* take hungarian"):
        MatchingConfig(correspondence="greedy", certify=True)
    greedy = ObjectiveConfig(matching=MatchingConfig(correspondence="greedy"))
    with pytest.raises(ValueError, match="set match_check_steps to 0"):
        TrainerSettings(objective=greedy, match_check_steps=5)
