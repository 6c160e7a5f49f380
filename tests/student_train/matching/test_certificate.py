"""A certified pair is in every optimal assignment of every cost in the bound, by brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.matching.assignment import solve_assignment
from student_train.matching.certificate import prove_pairs

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))


def whole_numbers(seed: int, shape: tuple[int, int], most: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, shape, generator=generator).double()


def pairs_of_every_optimum(cost: Tensor) -> set[tuple[int, int]]:
    """The pairs that no optimal assignment does without: all of them are tried."""
    if cost.shape[0] > cost.shape[1]:
        return {(row, column) for column, row in pairs_of_every_optimum(cost.T)}
    values = cost.tolist()
    found: dict[float, list[set[tuple[int, int]]]] = {}
    for columns in itertools.permutations(range(cost.shape[1]), cost.shape[0]):
        pairs = set(enumerate(columns))
        found.setdefault(sum(values[i][j] for i, j in pairs), []).append(pairs)
    return set.intersection(*found[min(found)])


def certified(cost: Tensor, error: Tensor) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    rows, columns = solve_assignment(cost)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    sure = prove_pairs(cost, error, rows, columns).tolist()
    return {pair for pair, held in zip(pairs, sure, strict=True) if held}, set(pairs)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    shape=SIZES,
    most=st.integers(1, 30),
    widest=st.integers(0, 4),
    uneven=st.booleans(),
)
def test_it_is_never_wrong(
    seed: int, shape: tuple[int, int], most: int, widest: int, uneven: bool
) -> None:
    cost = whole_numbers(seed, shape, most)
    error = whole_numbers(seed + 1, shape, widest) if uneven else torch.full_like(cost, widest)
    sure, pairs = certified(cost, error)
    corners = [
        2.0 * whole_numbers(seed + draw, shape, 1) - 1 if draw else torch.zeros_like(cost)
        for draw in range(8)
    ]
    chosen = torch.tensor([[(i, j) in pairs for j in range(shape[1])] for i in range(shape[0])])
    corners.append(torch.where(chosen, 1.0, -1.0).double())  # the worst for what was chosen
    for corner in corners:
        assert sure <= pairs_of_every_optimum(cost + corner * error)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), shape=SIZES, most=st.integers(1, 30))
def test_without_error_it_finds_all_that_there_is_to_find(
    seed: int, shape: tuple[int, int], most: int
) -> None:
    cost = whole_numbers(seed, shape, most)
    sure, _ = certified(cost, torch.zeros_like(cost))
    assert sure == pairs_of_every_optimum(cost)


def test_an_uncertain_corner_leaves_the_rest_certified() -> None:
    cost = torch.full((4, 6), 100.0).double()
    cost[:2, :2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    cost[2, 2] = cost[3, 3] = 1.0
    sure, pairs = certified(cost, torch.full_like(cost, 3.0))
    assert pairs == {(0, 0), (1, 1), (2, 2), (3, 3)}
    assert sure == {(2, 2), (3, 3)}
    assert certified(cost, torch.full_like(cost, 0.4))[0] == pairs


def test_any_assignment_may_be_asked_about_and_bad_pairs_are_not_certified() -> None:
    cost = torch.tensor([[0.0, 5.0, 9.0], [5.0, 0.0, 9.0], [9.0, 9.0, 0.0]]).double()
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([2, 1, 0])
    found = prove_pairs(cost, torch.zeros_like(cost), rows, columns)
    assert found.tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_no_pairs_need_no_certificate(shape: tuple[int, int]) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert prove_pairs(torch.zeros(shape), torch.zeros(shape), none, none).shape == (0,)
