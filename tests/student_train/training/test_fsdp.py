"""Promises of sharding: what is cut and what stays whole, that nothing is lost on the way."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from student_train.compression.decoder import decoder_of
from student_train.models.forward import output_head
from tests.support.lazy import (
    DTensor,
    average_gradients,
    gathered_head,
    gradient_norm,
    load_weights,
    scatter_head,
    shard,
    vanilla_student,
    whole_weights,
)
from tests.support.paths import TinyFolder
from tests.support.runs import on_ranks

NUM_RANKS = 3  # which divides no number of rows here: parts differ in length


def joined() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def cut_and_put_together(folder: Path) -> None:
    rank = joined()
    model, _ = vanilla_student(str(folder), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head, decoder = output_head(model), decoder_of(model)
    tied = head.weight is decoder.embed_tokens.weight
    shard(model, torch.device("cpu"), torch.float32)
    assert (head.weight is decoder.embed_tokens.weight) == tied
    units = (decoder.layers, decoder.embed_tokens, head)
    language = {p for unit in units for p in unit.parameters()}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (parameter in language and parameter.ndim > 1), (
            name
        )
        if isinstance(parameter, DTensor):
            assert parameter.to_local().numel() <= -(-len(parameter) // NUM_RANKS) * (
                parameter.numel() // len(parameter)
            )
    assert_gathered(model, before, rank)
    doubled = {name: 2 * tensor for name, tensor in before.items()}
    load_weights(model, doubled)
    assert_gathered(model, doubled, rank)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(model, dict(islice(doubled.items(), 3)))
    dist.destroy_process_group()


def assert_gathered(model: nn.Module, expected: dict[str, torch.Tensor], rank: int) -> None:
    found = whole_weights(model)
    assert found.keys() == (expected.keys() if rank == 0 else set())
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_matrices_of_the_language_model_are_cut_and_can_be_put_together(
    family: str, tiny_folder: TinyFolder
) -> None:
    """A tied head and one of its own."""
    on_ranks(NUM_RANKS, cut_and_put_together, tiny_folder(family))


def mean_of_ranks(folder: Path) -> None:
    """Gradients of the head and of what is whole, where some ranks have none."""
    rank = joined()
    model, _ = vanilla_student(str(folder), dtype=torch.float32)
    shard(model, torch.device("cpu"), torch.float32)
    head, norm = gathered_head(model), decoder_of(model).norm.weight
    unused = decoder_of(model).layers[0].input_layernorm.weight
    if rank == 1:
        (3.0 * head.weight.sum() + 6.0 * norm.sum()).backward()
    for _ in range(2):  # as in two micro-batches
        scatter_head(model, head)
    average_gradients(model.parameters())
    home = output_head(model).get_parameter("weight").grad
    assert isinstance(home, DTensor)
    assert torch.equal(home.full_tensor(), torch.ones(home.shape))
    assert torch.equal(norm.grad, torch.full_like(norm, 2.0))
    assert unused.grad is None
    expected = (home.numel() + 4.0 * norm.numel()) ** 0.5
    assert gradient_norm(model.parameters()) == pytest.approx(expected)
    dist.destroy_process_group()


def test_gradients_are_means_also_where_some_ranks_have_none(llava: Path) -> None:
    on_ranks(NUM_RANKS, mean_of_ranks, llava)
