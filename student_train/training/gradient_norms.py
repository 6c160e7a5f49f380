"""The gradient norm of each term of the objective."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def term_gradient_norms(
    terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, float]:
    """Norm of each term's own gradient over the trainable parameters, unweighted.

    Costs one backward pass per term and keeps the graph, so call it before the real backward.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    norms: dict[str, float] = {}
    for name, term in terms.items():
        if not term.requires_grad:
            norms[name] = 0.0
            continue
        gradients = torch.autograd.grad(
            term, trainable, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        squares = [float(gradient.to(torch.float64).square().sum()) for gradient in gradients]
        norms[name] = sum(squares) ** 0.5
    return norms
