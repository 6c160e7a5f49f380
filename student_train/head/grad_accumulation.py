"""Adds to the gradient that a weight already holds, inside a backward pass, without a copy.

Autograd expects a gradient as large as the weight (at V = 151,936 and D = 3,584: 2 GiB), and adds
it to `weight.grad`. A node that knows all of it may add its parts there itself and return
`empty_gradient`. Hooks of the parameter still run after it and find the whole sum.

Promise: used only where autograd would add to this same tensor in this same backward pass. Not for
`torch.autograd.grad`, other `inputs`, hooks that read the gradient itself, or sums that half
precision would round: there `gradient_to_add_to` is None and the gradient must be returned.
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def existing_gradient(weight: Tensor) -> Tensor | None:
    """The `.grad` of a weight, if parts may be added to it as far as is known before backward."""
    # A tensor that is no leaf (gathered, cast, inside torch.func) has no `.grad`.
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_leaf:
        return None
    hooks = weight._backward_hooks  # pyright: ignore[reportPrivateUsage] (are given the gradient)
    found = weight.grad
    if hooks or found is None or type(found) is not Tensor or found.layout != torch.strided:
        return None
    exact = found.dtype == weight.dtype and weight.dtype in (torch.float32, torch.float64)
    return found if exact and not found.requires_grad else None


def gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """The same inside a backward pass, if that pass adds to this weight's `.grad`; else None."""
    found = existing_gradient(weight) if weight.requires_grad else None
    return found if found is not None and _is_added_to(weight) else None


def empty_gradient(like: Tensor) -> Tensor:
    """A gradient of zeros that takes no memory, even where autograd adds it to another.

    Sparse and empty. An expanded zero would become dense in a sum with a tied embedding's gradient.
    """
    places = torch.empty(like.dim(), 0, dtype=torch.int64, device=like.device)
    return torch.sparse_coo_tensor(places, like.new_empty(0), like.shape, check_invariants=False)


def _is_added_to(weight: Tensor) -> bool:
    """Whether the running backward pass adds to this leaf's `.grad`."""
    node = get_gradient_edge(weight).node
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:  # torch.autograd.grad returns the leaf's gradient instead
        return False
