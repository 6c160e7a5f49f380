"""Distances to constants are plain sums of |q - c|, whether rows are counted or sorted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.ops import l1_to_constants
from student_train.ops.l1_to_constants import ConstantDistances

VOCAB = 10_000


def random_rows(seed: int, sharpness: float, vocab_size: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab_size, generator=generator) * sharpness
    return logits.softmax(dim=1)


def plain(rows: Tensor, constants: Tensor) -> Tensor:
    """The sums, constant by constant."""
    wide = rows.double()
    return torch.stack([(wide - float(c)).abs().sum(dim=1) for c in constants.double()], dim=1)


def distances(rows: Tensor, constants: Tensor) -> Tensor:
    return ConstantDistances.of(constants, rows.shape[1])(rows)


def known(rows: Tensor, constants: Tensor) -> list[bool]:
    """Which rows need no sorting."""
    bins = l1_to_constants._Bins.of(constants, rows.shape[1])  # pyright: ignore[reportPrivateUsage]
    assert bins is not None
    return l1_to_constants._under_by_counting(rows, bins)[1].tolist()  # pyright: ignore[reportPrivateUsage]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.0, 0.01, 1.0, 3.0, 10.0, 40.0]),
    magnitudes=st.lists(st.floats(-45, 0), min_size=1, max_size=20),
    with_zero=st.booleans(),
)
def test_counted_rows_have_the_plain_sums(
    seed: int, sharpness: float, magnitudes: list[float], with_zero: bool
) -> None:
    rows = random_rows(seed, sharpness)
    constants = torch.tensor([2.0**m / 100 for m in magnitudes] + [0.0] * with_zero)
    found = distances(rows, constants)
    torch.testing.assert_close(found, plain(rows, constants), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorted_rows_have_the_plain_sums(dtype: torch.dtype) -> None:
    rows = random_rows(0, 2.0, 500).to(dtype)
    constants = torch.tensor([0, 1e-30, 1e-4, 2e-3, 0.5, 1], dtype=dtype)
    bound = 1e-13 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(
        distances(rows, constants), plain(rows, constants), rtol=bound, atol=bound
    )


def test_constants_that_are_themselves_probabilities_are_counted() -> None:
    rows = random_rows(1, 1.0)
    constants = rows[0, :50].contiguous()
    assert known(rows, constants) == [True] * 3
    torch.testing.assert_close(
        distances(rows, constants), plain(rows, constants), rtol=3e-7, atol=3e-7
    )


def test_only_a_row_that_crowds_a_bin_is_sorted() -> None:
    rows = random_rows(2, 1.0)
    rows[1] = torch.linspace(0.9999e-4, 1.0001e-4, VOCAB)
    constants = torch.tensor([1e-5, 1e-4, 3e-4])
    assert known(rows, constants) == [True, False, True]
    found = distances(rows, constants)
    torch.testing.assert_close(found, plain(rows, constants), rtol=3e-7, atol=3e-7)
    assert torch.equal(found[::2], distances(rows[::2], constants))


def test_probabilities_may_all_be_one_number() -> None:
    rows = torch.full((2, VOCAB), 1 / VOCAB)
    constants = torch.tensor([0.0, 0.5, 1.0, 2.0]) / VOCAB
    torch.testing.assert_close(
        distances(rows, constants), plain(rows, constants), rtol=3e-7, atol=3e-7
    )


@pytest.mark.parametrize("vocab_size", [l1_to_constants._LEAST_COUNTED - 1, 400_000])  # pyright: ignore[reportPrivateUsage]
def test_vocabularies_that_are_small_or_that_bits_cannot_count_are_sorted(vocab_size: int) -> None:
    rows, constants = random_rows(3, 1.0, vocab_size), torch.tensor([0.0, 1e-12])
    assert ConstantDistances.of(constants, vocab_size).bins is None
    torch.testing.assert_close(
        distances(rows, constants), plain(rows, constants), rtol=3e-7, atol=3e-7
    )


@pytest.mark.parametrize("vocab_size", [100, VOCAB])
def test_a_row_with_nan_is_nan(vocab_size: int) -> None:
    rows, constants = random_rows(4, 1.0, vocab_size), torch.tensor([1e-5, 1e-3])
    rows[1, ::7] = torch.tensor([-float("nan")])
    found = distances(rows, constants)
    assert bool(found[1].isnan().all())
    torch.testing.assert_close(found[::2], plain(rows[::2], constants), rtol=3e-7, atol=3e-7)
