"""The student's head as data: only what is a plain linear layer, and only whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

from student_train.head.chunked_pass import HeadRows
from student_train.head.fused_loss import head_loss
from student_train.head.linear_head import LinearHead, as_linear, without_gradient
from student_train.models.forward import output_head
from tests.support import children
from tests.support.head_rows import FirstLogProb
from tests.support.lazy import DTensor, fully_shard, student_from_vanilla
from tests.support.paths import TinyFolder


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 11, dtype=torch.float64)


def test_a_plain_layer_is_its_weight_and_bias() -> None:
    layer = linear()
    head = as_linear(layer)
    assert head is not None
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert as_linear(head) is head
    hidden = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(head(hidden), layer(hidden))
    capped = LinearHead(weight=layer.weight, bias=layer.bias, softcap=0.1)
    assert torch.equal(capped(hidden), 0.1 * torch.tanh(layer(hidden) / 0.1))


def test_the_head_of_a_student_is_a_plain_layer(tiny_folder: TinyFolder) -> None:
    student, _ = student_from_vanilla(str(tiny_folder("llava_next")))
    head = as_linear(output_head(student))
    assert head is not None
    assert head.weight is student.get_parameter("lm_head.weight")


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_whatever_does_more_than_multiply_stays_a_function() -> None:
    hooked, offloaded = linear(), linear()
    hooked.register_forward_hook(lambda *_: None)
    offloaded.forward = lambda input: input  # what offloading does
    normed = parametrizations.weight_norm(linear())
    for head in (OwnForward(6, 11), hooked, offloaded, normed, lambda hidden: hidden):
        assert as_linear(head) is None


def test_a_head_that_is_not_all_there_is_refused() -> None:
    layer = linear()
    layer.weight = nn.Parameter(torch.empty(0))  # FSDP1 between forward passes
    with pytest.raises(ValueError, match=r"shape \(0,\), expected \(11, 6\): FSDP1 or DeepSpeed"):
        as_linear(layer)
    wrapped = nn.Sequential(layer)
    with pytest.raises(ValueError, match="Sequential whose weights are sharded; only a plain"):
        as_linear(wrapped)
    with pytest.raises(ValueError, match="softcap must be > 0"):
        LinearHead(weight=linear().weight, softcap=0.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_as_a_teacher_it_gives_the_bits_that_losses_see_and_no_gradient(
    softcap: float | None, dtype: torch.dtype | None
) -> None:
    layer = linear().float()
    hidden = torch.randn(5, 6)
    seen: list[Tensor] = []

    class Look(FirstLogProb):
        def chunk(self, rows: slice) -> "Look":
            return self

        def values(self, logits: Tensor, rows: slice) -> dict[str, Tensor]:
            seen.append(logits.detach().clone())
            return {"first": logits[:, 0]}

    block = HeadRows(hidden=hidden, losses=Look(), weights={"first": torch.ones(5)})
    fused = LinearHead(weight=layer.weight, bias=layer.bias, softcap=softcap)
    for head in (fused, lambda states: fused(states)):
        seen.clear()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            teacher = without_gradient(head)
            head_loss(head, [block])
        found = teacher(hidden.requires_grad_())  # outside, as in a backward pass
        assert torch.equal(found, seen[0])
        assert found.dtype == torch.float32
        assert not found.requires_grad
        hidden = hidden.detach()


def rows(hidden: Tensor) -> list[HeadRows]:
    weights = {"first": torch.full((len(hidden),), 0.2, dtype=hidden.dtype)}
    return [HeadRows(hidden=hidden, losses=FirstLogProb(), weights=weights)]


def sharded_rank(rank: int, meeting: Path) -> None:
    """One of two processes: gradients of the sharded head are the mean of both ranks' own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    layer = linear()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    parameters = [layer.weight, layer.bias]
    each = [torch.autograd.grad(head_loss(layer, rows(h)).total, parameters) for h in hidden]
    value = head_loss(layer, rows(hidden[rank])).total
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    found = head_loss(layer, rows(hidden[rank])).total
    found.backward()
    assert torch.equal(found, value)
    for parameter, one, other in zip(layer.parameters(), *each, strict=True):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), (one + other) / 2)
    adapter = nn.Sequential(layer)
    with pytest.raises(ValueError, match="only a plain linear head can be gathered"):
        as_linear(adapter)
    dist.destroy_process_group()


def test_a_head_that_fsdp2_has_sharded_is_gathered(tmp_path: Path) -> None:
    started = [children.start(sharded_rank, rank, tmp_path / "meeting") for rank in range(2)]
    assert children.finish(*started) == [0, 0]
