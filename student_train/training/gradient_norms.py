"""Measures the gradient norm of each loss term."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def term_gradient_norms(
    terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, float]:
    """Return the norm of each unweighted term's gradient over the trainable parameters.

    Runs one backward pass per term, keeps the graph and changes no `.grad`: call it before the
    step's own backward.
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
