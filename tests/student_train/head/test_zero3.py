"""A head that DeepSpeed ZeRO-3 has cut up trains as one that is whole. Needs DeepSpeed.

Run with deepspeed 0.19.8 on its CPU accelerator; it is no dependency, and skipped where absent.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from student_train.head.fused_loss import head_loss
from student_train.head.linear_head import LinearHead, as_linear, without_gradient
from student_train.head.zero3 import is_in_pieces
from tests.support import children
from tests.support.head_rows import VOCAB, WIDTH, assert_close, block, naive, normal, sum_of

NUM_STEPS, NUM_MICRO, RATE = 2, 2, 0.1


class Student(nn.Module):
    """Embedding and layer; its head is beside, used outside of `forward`."""

    def __init__(self, tied: bool, trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied).requires_grad_(trained)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(ids).tanh())


def micro_batches(step: int) -> Iterator[list[Tensor]]:
    """Token ids of both ranks, other ones in each micro-batch."""
    for micro in range(NUM_MICRO):
        yield [
            (normal(rank + 3, seed=9 * step + 3 * micro + rank).abs() * 3).long() % VOCAB
            for rank in range(2)
        ]


def expected_weights(tied: bool, trained: bool) -> list[Tensor]:
    """Plain gradient descent on the mean over ranks and micro-batches, by autograd."""
    student = Student(tied, trained)
    parameters = [p for p in student.parameters() if p.requires_grad]
    for step in range(NUM_STEPS):
        totals = [
            naive(student.head, block(student(ids)))[0]
            for both in micro_batches(step)
            for ids in both
        ]
        mean = sum_of(totals) / len(totals)
        with torch.no_grad():
            for parameter, by in zip(
                parameters, torch.autograd.grad(mean, parameters), strict=True
            ):
                parameter -= RATE * by.to(parameter.dtype)
    return [parameter.detach() for parameter in student.parameters()]


def zero3_rank(rank: int, meeting: Path, tied: bool, trained: bool, persistent: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo")
    student = Student(tied, trained)
    chosen = [p for p in student.parameters() if p.requires_grad]
    zero = {"stage": 3, "stage3_param_persistence_threshold": persistent}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": NUM_MICRO,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    optimizer = torch.optim.SGD(chosen, lr=RATE)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    assert is_in_pieces(student.head.weight)
    for step in range(NUM_STEPS):
        for both in micro_batches(step):
            states = engine(both[rank])
            head = as_linear(student.head)
            assert head is not None
            assert head.weight.shape == (VOCAB, WIDTH)
            assert not student.head.weight.numel(), "in pieces again"
            _teacher_is_the_head_itself(head, states)
            found = head_loss(head, [block(states)])
            engine.backward(found.total.float())
            assert not student.head.weight.numel() or persistent, "in pieces again"
            engine.step()
    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        weights = [parameter.detach().clone() for parameter in student.parameters()]
    assert_close(weights, expected_weights(tied, trained), tolerance=1e-5)
    with pytest.raises(ValueError, match="only a plain linear head can be gathered"):
        as_linear(nn.Sequential(student.head))
    dist.destroy_process_group()


def _teacher_is_the_head_itself(head: LinearHead, states: Tensor) -> None:
    expected = functional.linear(states, head.weight, head.bias)
    assert torch.equal(without_gradient(head)(states), expected.detach())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize(
    ("tied", "trained", "persistent"),
    [(False, True, 0), (True, True, 0), (False, False, 0), (False, True, 100), (True, True, 100)],
)
def test_a_head_in_pieces_trains_as_a_whole_one(
    tied: bool, trained: bool, persistent: int, tmp_path: Path
) -> None:
    started = [
        children.start(
            zero3_rank,
            rank,
            tmp_path / "meeting",
            tied,
            trained,
            persistent,
            environment={
                **dict(os.environ),
                "DS_ACCELERATOR": "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
                "LOCAL_SIZE": "2",
            },
        )
        for rank in range(2)
    ]
    assert children.finish(*started) == [0, 0]
