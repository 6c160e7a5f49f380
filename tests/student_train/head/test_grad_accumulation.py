"""A later micro-batch's gradient of the head: added where one waits, and only there."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from student_train.head import chunked_pass
from student_train.head.chunked_pass import HeadRows
from student_train.head.fused_loss import head_loss
from student_train.head.grad_accumulation import empty_gradient, existing_gradient
from student_train.head.linear_head import LinearHead
from tests.support import children
from tests.support.head_rows import (
    VOCAB,
    WIDTH,
    Made,
    assert_close,
    block,
    leaves,
    naive,
    normal,
    relative,
    small_chunks,
    sum_of,
)

Way = Callable[[LinearHead, Sequence[HeadRows]], Tensor]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


def fused(head: LinearHead, blocks: Sequence[HeadRows]) -> Tensor:
    return head_loss(head, blocks).total


def plain(head: LinearHead, blocks: Sequence[HeadRows]) -> Tensor:
    return sum_of([naive(head, rows)[0] for rows in blocks])


WAYS: tuple[Way, Way] = (fused, plain)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=2, max_size=3),
    saved_share=st.sampled_from([0.0, 1.0, 2.0, 9.0]),  # none, 4, 8 or all rows
    factor=st.sampled_from([1.0, 0.3, -2.0]),
    bias=st.booleans(),
    tied=st.booleans(),
    zeroed=st.sampled_from(["never", "to none", "to zero", "to none before backward"]),
)
def test_micro_batches_add_up_to_what_autograd_makes_of_them(
    sizes: list[tuple[int, int]],
    saved_share: float,
    factor: float,
    bias: bool,
    tied: bool,
    zeroed: Literal["never", "to none", "to zero", "to none before backward"],
) -> None:
    def sums(way: Way) -> list[Tensor]:
        _, weight, bias_W = leaves()
        trained = [weight, bias_W] if bias else [weight]
        optimizer = torch.optim.SGD(trained)
        head = LinearHead(weight=weight, bias=bias_W if bias else None, softcap=3.0)
        found: list[Tensor] = []
        for step, (first, second) in enumerate(sizes):
            if step == len(sizes) - 1 and zeroed in ("to none", "to zero"):
                optimizer.zero_grad(set_to_none=zeroed == "to none")
            states = [normal(n, WIDTH, seed=7 * step + n).requires_grad_() for n in (first, second)]
            shown = functional.embedding(torch.arange(second) % VOCAB, weight) if tied else 0.0
            total = way(head, [block(states[0], seed=step), block(states[1] + shown)])
            if step == len(sizes) - 1 and zeroed == "to none before backward":
                optimizer.zero_grad()
            (factor * total).backward()
            found += [grad_of(tensor).clone() for tensor in (*states, *trained)]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_pass, "SAVED_SHARE", saved_share)
        assert_close(sums(fused), sums(plain))


@pytest.mark.parametrize("saved_share", [0.0, 1.0])
def test_a_later_micro_batch_makes_no_tensor_of_the_weights_size(
    saved_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_pass, "SAVED_SHARE", saved_share)
    hidden, weight, _ = leaves()
    weight.grad = torch.ones_like(weight)
    before, waiting = weight.grad.clone(), weight.grad.data_ptr()
    with Made(weight, weight.grad) as made:
        fused(LinearHead(weight=weight), [block(hidden)]).backward()
    assert not made.num_weights
    assert grad_of(weight).data_ptr() == waiting
    assert not torch.equal(grad_of(weight), before)


def test_what_is_no_backward_pass_to_this_weight_leaves_no_mark() -> None:
    hidden, weight, bias = leaves()
    weight.grad = torch.ones_like(weight)
    before = weight.grad.clone()
    head, wanted = LinearHead(weight=weight, bias=bias), [hidden, weight, bias]
    found = head_loss(head, [block(hidden)])
    expected, values = naive(head, block(hidden))
    pairs = [(found.total, expected)]
    pairs += [(found.values[0][name].sum(), values[name].sum()) for name in ("first", "divergence")]
    for one, other in pairs:
        ours, theirs = (torch.autograd.grad(t, wanted, retain_graph=True) for t in (one, other))
        assert_close(list(ours), list(theirs))
    (ours,) = torch.autograd.grad(found.total, [weight], retain_graph=True)
    assert_close([ours], list(torch.autograd.grad(expected, [weight], retain_graph=True)))
    found.total.backward(inputs=[hidden], retain_graph=True)
    assert torch.equal(grad_of(weight), before)
    found.total.backward(inputs=[weight])
    assert_close([grad_of(weight) - before], [ours])
    assert_close([grad_of(hidden)], list(torch.autograd.grad(expected, [hidden])))


def test_a_second_backward_pass_adds_a_second_time_and_values_add_their_own() -> None:
    def passes(total: Tensor, first: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        total.backward(retain_graph=True)
        (3 * total).backward(retain_graph=True)
        first.square().sum().backward(retain_graph=True)
        (total - first.sum()).backward()
        return [grad_of(tensor).clone() for tensor in tensors]

    hidden, weight, bias = leaves()
    weight.grad = torch.ones_like(weight)
    head, tensors = LinearHead(weight=weight, bias=bias), [hidden, weight, bias]
    found = head_loss(head, [block(hidden)])
    ours = passes(found.total, found.values[0]["first"], tensors)
    expected, values = naive(head, block(hidden))
    assert_close(ours, passes(expected, values["first"], tensors))


def test_gradients_that_come_after_the_forward_pass_are_added_to() -> None:
    """Both forward passes before both backward ones: the second finds the first one's gradient."""
    hidden, weight, _ = leaves()
    head, other = LinearHead(weight=weight), normal(6, WIDTH, seed=5).requires_grad_()
    totals = [fused(head, [block(hidden)]), fused(head, [block(other, seed=1)])]
    for total in totals:
        total.backward()
    ours = grad_of(weight)
    expected = plain(head, [block(hidden), block(other, seed=1)])
    assert_close([ours], list(torch.autograd.grad(expected, [weight])))


def test_hooks_of_the_gradient_see_all_of_it_and_hooks_after_it_the_sum() -> None:
    hidden, weight, _ = leaves()
    head = LinearHead(weight=weight)
    (whole,) = torch.autograd.grad(plain(head, [block(hidden)]), weight)
    weight.grad = torch.ones_like(weight)
    sums: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda p: sums.append(grad_of(p).clone()))
    fused(head, [block(hidden)]).backward()
    assert_close(sums, [1 + whole])
    seen: list[Tensor] = []
    handle = weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    assert existing_gradient(weight) is None
    fused(head, [block(hidden)]).backward()
    assert_close([*seen, grad_of(weight)], [whole, 1 + 3 * whole])
    handle.remove()
    assert existing_gradient(weight) is weight.grad


def test_an_optimizer_in_the_backward_pass_steps_once_with_the_sum() -> None:
    def trained(way: Way) -> Tensor:
        hidden, weight, _ = leaves()
        optimizer, num_passes = torch.optim.SGD([weight], lr=0.1), [0]

        def step(_: Tensor) -> None:
            num_passes[0] += 1
            if num_passes[0] == 2:
                optimizer.step()

        weight.register_post_accumulate_grad_hook(step)
        for seed in range(2):
            way(LinearHead(weight=weight), [block(hidden, seed=seed)]).backward()
        assert num_passes == [2]
        return weight.detach()

    assert_close([trained(fused)], [trained(plain)])


def test_the_scaler_of_float16_scales_what_is_added_as_well() -> None:
    def unscaled(way: Way) -> Tensor:
        hidden, weight, _ = leaves(torch.float32)
        optimizer = torch.optim.SGD([weight])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for seed in range(2):
            with torch.autocast("cpu", dtype=torch.float16):
                total = way(LinearHead(weight=weight), [block(hidden, seed=seed)])
            scaler.scale(total.float()).backward()
        scaler.unscale_(optimizer)
        return grad_of(weight)

    assert relative(unscaled(fused), unscaled(plain)) < 0.005


@pytest.mark.parametrize("saved_share", [0.0, 9.0])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_mixed_precision_adds_in_float32(
    saved_share: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_pass, "SAVED_SHARE", saved_share)

    def sums(way: Way, dtype: torch.dtype | None) -> list[Tensor]:
        hidden, weight, bias = leaves(torch.float32)
        weight.grad = torch.zeros_like(weight)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            total = way(LinearHead(weight=weight, bias=bias), [block(hidden)])
        (factor * total).backward()
        return [grad_of(tensor) for tensor in (hidden, weight, bias)]

    exact = sums(plain, None)
    for one, other, true in zip(
        sums(fused, torch.bfloat16), sums(plain, torch.bfloat16), exact, strict=True
    ):
        slack = 4 * torch.finfo(torch.bfloat16).eps
        assert relative(one, true) <= 2 * relative(other, true) + slack


def test_what_would_be_rounded_or_is_nobodys_gradient_is_returned() -> None:
    _, weight, _ = leaves()
    assert existing_gradient(weight) is None, "there is none"
    weight.grad = torch.ones_like(weight)
    assert existing_gradient(weight) is weight.grad
    assert existing_gradient(2 * weight) is None, "no leaf"
    weight.grad = empty_gradient(weight)
    assert existing_gradient(weight) is None, "sparse"
    half = weight.detach().bfloat16().requires_grad_()
    half.grad = torch.ones_like(half)
    assert existing_gradient(half) is None, "every chunk's sum would be rounded"
    weight.grad = torch.ones_like(weight).requires_grad_()
    assert existing_gradient(weight) is None, "autograd looks at how it was made"


class OnHidden(nn.Module):
    """A model whose head is trained by its loss: states in, total out, as in a trainer's step."""

    def __init__(self, way: Way, tied: bool) -> None:
        super().__init__()
        self.way, self.tied = way, tied
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)

    def forward(self, hidden: Tensor, seed: int) -> Tensor:
        states = self.layer(hidden)
        if self.tied:
            ids = torch.arange(len(hidden)) % VOCAB
            states = states + functional.embedding(ids, self.head.weight)
        head = LinearHead(weight=self.head.weight, bias=self.head.bias)
        return self.way(head, [block(states, seed=seed)])


def parallel_rank(rank: int, meeting: Path) -> None:
    """One of two processes; both ways take the same steps of three micro-batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for tied, views in product((False, True), repeat=2):
        ours, theirs = (_steps(way, tied, views, set_to_none=tied == views) for way in WAYS)
        assert_close(ours, theirs)
    dist.destroy_process_group()


def _steps(way: Way, tied: bool, views: bool, *, set_to_none: bool) -> list[Tensor]:
    torch.manual_seed(0)
    inner = OnHidden(way, tied)
    model = DistributedDataParallel(
        inner, gradient_as_bucket_view=views, find_unused_parameters=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[Tensor] = []
    for step in range(2):
        for micro in range(3):
            with model.no_sync() if micro < 2 else nullcontext():
                seed = 6 * step + 2 * micro + dist.get_rank()
                (model(normal(5, WIDTH, seed=seed), seed) / 3).backward()
        found += [grad_of(parameter).clone() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found)
    assert all(map(torch.equal, *everyone)), "the ranks agree"
    return [*found, *(parameter.detach().clone() for parameter in inner.parameters())]


def test_data_parallel_training_reduces_the_sums(tmp_path: Path) -> None:
    started = [children.start(parallel_rank, rank, tmp_path / "meeting") for rank in range(2)]
    assert children.finish(*started) == [0, 0]
