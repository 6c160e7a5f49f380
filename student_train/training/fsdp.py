"""Shards a student's language model over the ranks with PyTorch's FSDP2.

    sharded   matrices of every decoder layer, of the input embeddings and of the head: each rank
              keeps 1/n of them, of their gradients and of the optimizer's state
    whole     vision tower, projector, norms and biases; gradients averaged once a step

The vision tower is not sharded: ranks gather weights together, but a rank whose micro-batch has no
image does not run it. Promise: a step changes weights as under DistributedDataParallel, up to
rounding; stored files are those of an unsharded run. All ranks must call each function together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from student_train.compression.decoder import decoder_of
from student_train.head.linear_head import LinearHead, as_linear
from student_train.models.forward import output_head

ParameterGroup = Sequence[nn.Parameter]
"""The parameters of one optimizer group."""


def shard(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model in place, over all processes, and move it to the device.

    Layers are gathered in `dtype`, the one of autocast, which then keeps no second copy; gradients
    are averaged in float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers: Sequence[nn.Module] = decoder_of(model).layers
    embeddings, head = model.get_input_embeddings(), output_head(model)
    units = [*layers, embeddings, head]
    matrices = {p for unit in units for p in unit.parameters() if p.ndim > 1}
    whole = {p for p in model.parameters() if p not in matrices}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
    if head.get_parameter("weight") is not embeddings.get_parameter("weight"):
        for unit in (embeddings, head):
            fully_shard(unit, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # Marks a model that transformers has sharded: its Trainer neither wraps nor moves it.
    model._is_distributed_loading_by_transformers = True  # pyright: ignore[reportPrivateUsage]


def gathered_head(model: nn.Module) -> LinearHead:
    """Gather the whole head; `scatter_head` returns the gradient of its weight, a new leaf.

    So every rank gathers once and reduces once, whether its micro-batch uses the head or not.
    """
    head = as_linear(output_head(model))
    assert head is not None, "as_linear refuses to gather any other head"
    weight = head.weight.detach().requires_grad_(head.weight.requires_grad)
    return replace(head, weight=weight)


def scatter_head(model: nn.Module, head: LinearHead) -> None:
    """Add the ranks' mean gradient of a gathered head to the sharded head's gradient."""
    if not head.weight.requires_grad:
        return
    home = cast(DTensor, output_head(model).get_parameter("weight"))
    own = torch.zeros_like(head.weight) if head.weight.grad is None else head.weight.grad
    head.weight.grad = None
    mesh = home.device_mesh
    parts = DTensor.from_local(own.div_(mesh.size()), mesh, [Partial()])
    mean = parts.redistribute(placements=home.placements)
    home.grad = mean if home.grad is None else home.grad + mean


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of whole parameters, as FSDP2 does for sharded ones.

    Ranks that did not use a parameter count as zero; a parameter that no rank used gets no
    gradient, so that the optimizer skips it.
    """
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not whole:
        return
    used = torch.tensor([p.grad is not None for p in whole], device=whole[0].device).int()
    dist.all_reduce(used)
    for parameter, num_ranks in zip(whole, used.tolist(), strict=True):
        if num_ranks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= dist.get_world_size()
            dist.all_reduce(parameter.grad)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the norm of all gradients, after `average_gradients`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = get_total_norm([g for g in gradients if isinstance(g, DTensor)])
    whole = get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if isinstance(sharded, DTensor):
        sharded = sharded.full_tensor()
    return math.hypot(float(sharded), float(whole))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the model's state dict on the CPU of rank 0; empty elsewhere."""
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:  # tied weights stay one tensor
            gathered[id(tensor)] = _whole(tensor)
        weights[name] = gathered[id(tensor)]
    return weights if dist.get_rank() == 0 else {}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights, present on all ranks, into a sharded model; RuntimeError if any lack."""
    state = model.state_dict(keep_vars=True)
    model.load_state_dict({n: _shard_of(tensor, state.get(n)) for n, tensor in weights.items()})


def whole_optimizer(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]
) -> dict[str, Any]:
    """Return the optimizer's `state_dict` as of an unsharded model with these groups, on rank 0."""
    parameters = [p for group in groups for p in group]
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    numbers = iter(range(len(parameters)))
    return {
        "state": {
            number: {name: _whole(value) for name, value in optimizer.state[p].items()}
            for number, p in enumerate(parameters)
            if p in optimizer.state
        },
        "param_groups": [
            {
                **(settings[group[0]] if group else optimizer.param_groups[0]),
                "params": list(islice(numbers, len(group))),
            }
            for group in groups
        ],
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], stored: Mapping[str, Any]
) -> None:
    """Load the state of `whole_optimizer` or of an unsharded run, present on every rank."""
    parameters = [p for group in groups for p in group]
    number_of = {p: number for number, p in enumerate(parameters)}
    stored_groups: list[dict[str, Any]] = stored["param_groups"]
    settings = {p: of for group, of in zip(groups, stored_groups, strict=True) for p in group}
    own: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = iter(range(len(own)))
    state = {
        number: {n: _shard_of(value, p) for n, value in stored["state"][number_of[p]].items()}
        for number, p in enumerate(own)
        if number_of[p] in stored["state"]
    }
    param_groups = [
        {**settings[group["params"][0]], "params": list(islice(numbers, len(group["params"])))}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def _whole(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of rank 0, nothing elsewhere."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else torch.empty(0)


def _shard_of(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Return a copy of the rank's shard of a value, or of all of it for a whole parameter."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.clone()
    mesh = parameter.device_mesh
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, parameter.placements, src_data_rank=None).clone()
