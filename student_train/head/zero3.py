"""A parameter that DeepSpeed ZeRO-3 keeps in pieces, whole for one pass over the head.

ZeRO-3 gathers what a module needs around the module's own forward and backward pass. The head is
used outside of both, once for all rows of a micro-batch. Promise: the parameter is in pieces again
when `gathered` returns, the whole of it lives as long as whoever holds it, and its gradient reaches
DeepSpeed, which averages, cuts and clears it as any other. Every rank must gather equally often.
"""

import importlib
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from student_train.head.grad_accumulation import is_added_to


def is_in_pieces(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps this parameter."""
    return hasattr(parameter, "ds_id")


def gathered(parameter: Tensor) -> Tensor:
    """All of a parameter that `is_in_pieces`, with gradient. A collective of all ranks."""
    with _whole(parameter):  # also while the graph notes the shape of the gradient
        return _Whole.apply(parameter)  # pyright: ignore[reportReturnType]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter  # not saved: in the backward pass its shape is another
        return parameter.data

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, gradient: Tensor
    ) -> Tensor:
        parameter: Any = ctx.parameter
        if is_added_to(parameter):
            # Autograd lays the gradient out like the parameter, which has to be whole for that.
            # DeepSpeed's hook, which is older than ours, has taken the gradient when ours runs.
            stack = ExitStack()

            def gather(_: object) -> None:
                if parameter.shape != parameter.ds_shape:
                    stack.enter_context(_whole(parameter))

            before = get_gradient_edge(parameter).node.register_prehook(gather)
            after = parameter.register_post_accumulate_grad_hook(lambda _: stack.close())
            stack.callback(before.remove)
            stack.callback(after.remove)
        return gradient


def _whole(parameter: Tensor) -> Any:
    return importlib.import_module("deepspeed").zero.GatheredParameters([parameter])
