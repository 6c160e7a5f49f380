"""Adding to the gradient that a weight holds already, from inside a backward pass, without a copy.

Autograd wants a gradient returned, as large as the weight (at V = 151,936 and D = 3,584: 2 GiB),
and adds it to `weight.grad`. A node that knows all of it may add its parts there itself and return
`nothing`: hooks of the parameter still run after it (DistributedDataParallel's, optimizers in the
backward pass) and find the whole sum.

Promise: only where autograd would have added to this very tensor in this very backward pass. Not
for `torch.autograd.grad`, other `inputs`, hooks that look at the gradient itself, or sums that half
precision would round: there `gradient_to_add_to` is None and the gradient has to be returned.
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def gradient_that_waits(weight: Tensor) -> Tensor | None:
    """What a weight holds in `.grad`, if parts may be added to it as far as can be known now."""
    # Of a tensor that is no leaf (gathered, cast, inside torch.func) torch keeps none.
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_leaf:
        return None
    hooks = weight._backward_hooks  # pyright: ignore[reportPrivateUsage] (are given the gradient)
    found = weight.grad
    if hooks or found is None or type(found) is not Tensor or found.layout != torch.strided:
        return None
    exact = found.dtype == weight.dtype and weight.dtype in (torch.float32, torch.float64)
    return found if exact and not found.requires_grad else None


def gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """The same in a backward pass, if it is one that adds to this weight's `.grad`; else None."""
    found = gradient_that_waits(weight) if weight.requires_grad else None
    return found if found is not None and is_added_to(weight) else None


def nothing(like: Tensor) -> Tensor:
    """A gradient of zeros that takes no memory, not even where autograd adds it to another.

    Sparse and empty. An expanded zero would be made whole in a sum with a tied embedding's.
    """
    places = torch.empty(like.dim(), 0, dtype=torch.int64, device=like.device)
    return torch.sparse_coo_tensor(places, like.new_empty(0), like.shape, check_invariants=False)


def is_added_to(weight: Tensor) -> bool:
    """Whether the backward pass that runs adds to this leaf's `.grad`."""
    node = get_gradient_edge(weight).node
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:  # torch.autograd.grad hands the leaf's gradient to its caller instead
        return False
