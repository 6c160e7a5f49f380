"""Head and loss in one: equal to autograd over whole logits, which never exist."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student_train.head import chunked_pass
from student_train.head.chunked_pass import HeadRows
from student_train.head.fused_loss import IncrementalHeadLoss, head_loss
from student_train.head.linear_head import LinearHead
from tests.support.head_rows import (
    VOCAB,
    WIDTH,
    Made,
    assert_close,
    block,
    gradients,
    leaves,
    naive,
    normal,
    relative,
    small_chunks,
    sum_of,
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(0, 9),
    rows=st.integers(1, 10),
    step=st.integers(1, 10),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 3.0]),
    trained=st.sets(st.sampled_from(["hidden", "weight", "bias"]), min_size=1),
)
def test_values_and_gradients_are_those_of_autograd_over_whole_logits(
    num_rows: int, rows: int, step: int, bias: bool, softcap: float | None, trained: set[str]
) -> None:
    tensors = {
        "hidden": normal(num_rows, WIDTH),
        "weight": normal(VOCAB, WIDTH, seed=1),
        **({"bias": normal(VOCAB, seed=2)} if bias else {}),
    }
    if not (wanted := [t.requires_grad_() for name, t in tensors.items() if name in trained]):
        return
    before = [tensor.detach().clone() for tensor in tensors.values()]
    head = LinearHead(weight=tensors["weight"], bias=tensors.get("bias"), softcap=softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_pass, "CHUNK_ROWS", rows)
        patch.setattr(chunked_pass, "STEP_BYTES", 4 * VOCAB * step)
        found = head_loss(head, [block(tensors["hidden"])])
        expected, values = naive(head, block(tensors["hidden"]))
        assert_close([found.total], [expected])
        assert_close(list(found.values[0].values()), list(values.values()))
        assert [v.requires_grad for v in found.values[0].values()] == [True, True, False]
        assert_close(gradients(found.total, wanted), gradients(expected, wanted))
    assert all(map(torch.equal, tensors.values(), before)), "inputs were edited"


def test_gradients_are_finite_differences() -> None:
    hidden, weight, bias = leaves()

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = LinearHead(weight=weight, bias=bias, softcap=2.0)
        return head_loss(head, [block(hidden)]).total

    def one_value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = LinearHead(weight=weight, bias=bias)
        return head_loss(head, [block(hidden)]).values[0]["first"]

    assert torch.autograd.gradcheck(total, (hidden, weight, bias))
    assert torch.autograd.gradcheck(one_value, (hidden, weight, bias))


def test_any_use_of_the_values_has_its_gradient_again_and_again() -> None:
    tensors = list(leaves())
    head = LinearHead(weight=tensors[1], bias=tensors[2])
    found = head_loss(head, [block(tensors[0])])
    expected, values = naive(head, block(tensors[0]))
    for _ in range(2):  # the second time the gradients of the total are used up
        assert_close(gradients(3 * found.total, tensors), gradients(3 * expected, tensors))
    own, theirs = found.values[0]["first"].square(), values["first"].square()
    assert_close(gradients(own.mean(), tensors), gradients(theirs.mean(), tensors))
    mixed, same = own.mean() - 2 * found.total, theirs.mean() - 2 * expected
    assert_close(gradients(mixed, tensors), gradients(same, tensors))


def test_blocks_and_an_embedding_share_one_weight() -> None:
    _, weight, _ = leaves()
    ids, other = torch.arange(5), normal(6, WIDTH, seed=5).requires_grad_()

    def total(compute: Callable[[LinearHead, list[HeadRows]], Tensor]) -> list[Tensor]:
        embedded = nn.functional.embedding(ids, weight).tanh()
        blocks = [block(embedded), block(other, seed=1)]
        return gradients(compute(LinearHead(weight=weight), blocks), [weight, other])

    fused = total(lambda head, blocks: head_loss(head, blocks).total)
    assert_close(fused, total(lambda head, bs: sum_of([naive(head, b)[0] for b in bs])))


def test_it_goes_through_checkpointed_layers() -> None:
    hidden, weight, _ = leaves()
    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    head, wanted = LinearHead(weight=weight), [hidden, weight, layer.weight]
    for reentrant in (False, True):
        states: Any = checkpoint(layer, hidden, use_reentrant=reentrant)
        head_loss(head, [block(states)]).total.backward()
        found = [tensor.grad for tensor in wanted]
        assert_close(
            [g for g in found if g is not None],
            gradients(naive(head, block(layer(hidden)))[0], wanted),
        )
        for tensor in wanted:
            tensor.grad = None


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_logits_than_a_chunk_and_no_gradient_of_a_frozen_head(trained: bool) -> None:
    hidden, weight, _ = leaves()
    head, rows = LinearHead(weight=weight.detach().requires_grad_(trained)), block(hidden)
    with Made(head.weight) as made:
        found = head_loss(head, [rows])
        (found.total + found.values[0]["first"].sum()).backward()
    logits = {shape for shape in made.shapes if shape[-1:] == (VOCAB,) and len(shape) == 2}
    assert max(num_rows for num_rows, _ in logits) == 4
    assert ((VOCAB, WIDTH) in made.shapes) == trained


def test_blocks_that_come_one_by_one_share_one_gradient_of_the_head() -> None:
    hidden, weight, bias = leaves()
    head, other = LinearHead(weight=weight, bias=bias), normal(6, WIDTH, seed=5).requires_grad_()
    rows = [block(hidden), block(other, seed=1)]
    run = IncrementalHeadLoss(head)
    with Made(weight) as made:
        run.add(rows[0])
        run.add(rows[1])
        found = run.finish()
        found.total.backward()
    assert made.products == 1, "one new tensor of the weight's size, then sums in place"
    expected = head_loss(head, rows)
    assert torch.equal(found.total, expected.total)
    wanted = [hidden, weight, bias, other]
    ours = [tensor.grad for tensor in wanted if tensor.grad is not None]
    assert_close(ours, gradients(expected.total, wanted), tolerance=0)
    one = expected.values[1]["first"].sum()
    (zero,) = torch.autograd.grad(one, hidden, retain_graph=True)
    assert not zero.any(), "no part of the other block"
    expected_one = naive(head, rows[1])[1]["first"].sum()
    assert_close(gradients(one, [weight, other]), gradients(expected_one, [weight, other]))


def test_without_autograd_there_are_values_only() -> None:
    hidden, weight, bias = leaves()
    head = LinearHead(weight=weight, bias=bias)
    with torch.no_grad():
        found = head_loss(head, [block(hidden)])
    assert not found.total.requires_grad
    assert not any(value.requires_grad for value in found.values[0].values())
    assert_close([found.total], [naive(head, block(hidden))[0]])
    frozen = LinearHead(weight=weight.detach())
    assert not head_loss(frozen, [block(hidden.detach())]).total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_exact_as_autograd_in_it(dtype: torch.dtype, autocast: bool) -> None:
    exact = [t.detach().to(torch.float32).requires_grad_() for t in leaves(dtype)]
    cast = autocast and dtype != torch.float32
    tensors = exact if cast else [t.detach().to(dtype).requires_grad_() for t in exact]
    head = LinearHead(weight=tensors[1], bias=tensors[2])
    with torch.autocast("cpu", dtype=dtype if cast else torch.bfloat16, enabled=cast):
        found = head_loss(head, [block(tensors[0])])
        total, _ = naive(head, block(tensors[0]))
    true, _ = naive(LinearHead(weight=exact[1], bias=exact[2]), block(exact[0]))
    assert found.total.dtype == torch.float64  # as the weights of the rows
    expected = gradients(true, exact)
    theirs = gradients(total, tensors)
    for one, other, wide in zip(gradients(found.total, tensors), theirs, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, wide) <= 2 * relative(other, wide) + 4 * torch.finfo(dtype).eps


def test_float16_keeps_gradients_that_it_could_not_hold() -> None:
    """1e-7 of a gradient would be zero in float16 before it reaches the head's weight."""
    hidden, weight, _ = leaves(torch.float32)
    head = LinearHead(weight=weight)
    small = block(hidden)
    small = HeadRows(
        hidden=hidden,
        losses=small.losses,
        weights={name: w * 1e-7 for name, w in small.weights.items()},
    )
    with torch.autocast("cpu", dtype=torch.float16):
        found = gradients(head_loss(head, [small]).total, [hidden, weight])
    expected = gradients(naive(head, small)[0], [hidden, weight])
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 0.01


class Lora(nn.Module):
    """A linear layer and a low-rank one on top; `weight` is the base alone, as peft has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, VOCAB, bias=False, dtype=torch.float64)
        self.most_rows = 0

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, len(hidden))
        return self.base(hidden) + self.up(self.down(hidden))


def test_a_head_with_an_adapter_is_called_chunk_by_chunk() -> None:
    hidden, lora = leaves()[0], Lora()
    wanted = [hidden, lora.down.weight, lora.up.weight]
    found = head_loss(lora, [block(hidden), block(hidden, seed=1)])
    own = found.total + found.values[0]["first"].sum()
    fused = gradients(own, wanted)
    assert lora.most_rows == 4
    first, values = naive(lora, block(hidden))
    expected = first + naive(lora, block(hidden, seed=1))[0]
    assert_close([found.total], [expected])
    assert_close(fused, gradients(expected + values["first"].sum(), wanted))
    assert not found.values[0]["told"].requires_grad


def test_what_cannot_be_right_is_refused() -> None:
    hidden, weight, _ = leaves()
    head = LinearHead(weight=weight)
    with pytest.raises(ValueError, match="at least one block"):
        head_loss(head, [])
    squared = head_loss(head, [block(hidden)]).total.square()
    (first,) = torch.autograd.grad(squared, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    found = head_loss(head, [block(hidden)])
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.values[0]["first"].sum().backward()
