"""Triton's kernels compute what torch's functions do: through its interpreter, without any GPU."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.ops import l1, use_kernels
from student_train.ops.l1 import l1_distances, l1_rounding
from tests.support.batches import normal
from tests.support.lazy import l1_triton

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which a small problem fills several; the interpreter takes its time."""
    monkeypatch.setattr("student_train.ops.l1_triton.TILE", {"TILE_N": 4, "TILE_M": 2, "LANES": 8})
    monkeypatch.setattr("student_train.ops.l1_triton.SPAN", 16)
    monkeypatch.setattr("student_train.ops.l1_triton.BLOCK_SPANS", 2)


def exact_l1(left: Tensor, right: Tensor) -> Tensor:
    return (left.double()[..., :, None, :] - right.double()[..., None, :, :]).abs().sum(dim=-1)


@pytest.mark.usefixtures("small_tiles")
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 5), st.integers(0, 70)),
    dtype=st.sampled_from(DTYPES),
)
def test_distances_by_tiles_are_the_distances(
    seed: int, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    num_problems, num_left, num_right, num_columns = sizes
    left = normal(seed, num_problems, num_left, num_columns).to(dtype)
    right = normal(seed + 1, num_problems, num_right, num_columns).to(dtype)
    before = left.clone(), right.clone()
    found = l1_triton.tiled_l1(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact_l1(left, right), rtol=1e-6, atol=0)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_in_the_tiles_of_a_gpu_stay_within_the_bound(dtype: torch.dtype) -> None:
    left, right = normal(0, 1, 33, 1027).to(dtype), normal(1, 1, 5, 1027).to(dtype)
    exact = exact_l1(left, right)
    error = (l1_triton.tiled_l1(left, right) - exact).abs()
    assert bool((error <= l1_rounding(1027, torch.float32) * exact).all())


def test_the_stated_bound_covers_the_additions_of_the_kernel() -> None:
    in_a_lane = l1_triton.SPAN // l1_triton.TILE["LANES"]
    for num_columns in (1, 8192, 151_936, 10**7):
        blocks = -(-num_columns // (l1_triton.SPAN * l1_triton.BLOCK_SPANS))
        additions = in_a_lane + l1_triton.TILE["LANES"] + l1_triton.BLOCK_SPANS + 1 + blocks
        least = additions * torch.finfo(torch.float32).eps
        assert least <= l1_rounding(num_columns, torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_a_pair_has_the_same_bits_beside_any_others_and_in_any_layout() -> None:
    left, right = normal(2, 2, 9, 50).float(), normal(3, 2, 7, 50).float()
    whole = l1_triton.tiled_l1(left, right)
    assert torch.equal(whole[1:, 4:6, 1:3], l1_triton.tiled_l1(left[1:, 4:6], right[1:, 1:3]))
    wide = torch.cat([left, left], dim=2)[..., 50:]
    turned = right.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(whole, l1_triton.tiled_l1(wide, turned))


@pytest.mark.usefixtures("small_tiles")
def test_distances_go_through_the_kernel_where_kernels_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, right = normal(4, 2, 3, 5, 20).float(), normal(5, 2, 3, 4, 20).float()
    expected = l1_distances(left, right)
    launched: list[int] = []
    kernel = l1_triton.tiled_l1

    def counted(student: Tensor, teacher: Tensor) -> Tensor:
        launched.append(len(student))
        return kernel(student, teacher)

    monkeypatch.setattr("student_train.ops.l1_triton.tiled_l1", counted)
    monkeypatch.setattr(l1, "use_kernels", lambda rows: True)
    torch.testing.assert_close(l1_distances(left, right), expected)
    assert launched == [6]


def test_nothing_on_a_cpu_and_no_float64_is_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(use_kernels.SWITCH, "1")
    assert not use_kernels.use_kernels(torch.zeros(2, 2))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(use_kernels, "_runs_on", lambda device: True)
    assert all(use_kernels.use_kernels(torch.zeros(2, 2, dtype=dtype)) for dtype in DTYPES)
    assert not use_kernels.use_kernels(torch.zeros(2, 2, dtype=torch.float64))
    monkeypatch.setenv(use_kernels.SWITCH, "0")
    assert not use_kernels.use_kernels(torch.zeros(2, 2))
    monkeypatch.delenv(use_kernels.SWITCH)
    assert not use_kernels.use_kernels(torch.zeros(2, 2)), "off unless asked for"
    monkeypatch.setenv(use_kernels.SWITCH, "no")
    with pytest.raises(ValueError, match="EMKD_KERNELS=no: set it to 1"):
        use_kernels.use_kernels(torch.zeros(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_on_a_gpu_are_the_distances(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(use_kernels.SWITCH, "1")
    left, right = normal(6, 2, 145, 9001).to(dtype), normal(7, 2, 730, 9001).to(dtype)
    assert use_kernels.use_kernels(left.cuda())
    found = l1_distances(left.cuda(), right.cuda()).cpu().double()
    torch.testing.assert_close(found, torch.cdist(left.double(), right.double(), p=1))
