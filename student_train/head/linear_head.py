"""Turns the student's LM head into weight and bias, where it can be fused with a loss.

    logits = hidden W^T + b,   soft-capped:  c tanh(logits / c)

If FSDP2 has sharded the layer, weight and bias are gathered, and their gradients averaged over the
ranks as FSDP2 would. Anything but a plain linear layer (LoRA, quantised, hooked, any other
function) stays a function, which `head_loss` calls chunk by chunk. Refuses a weight that another
sharding (FSDP1, DeepSpeed ZeRO-3) has left incomplete. Dimensions as in teacher_output.py, W >= V
the student's own vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from student_train.ops.precision import at_least_float32
from student_train.ops.sharded import is_dtensor, is_fsdp_module

LogitsOf = Callable[[Tensor], Tensor]
"""The student's LM head: final hidden states [n, D] to logits [n, W], with gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """Weight [W, D] and, where the model has them, bias [W] and soft-cap; trainable or frozen."""

    weight: Float[Tensor, "W D"]
    bias: Float[Tensor, " W"] | None = None
    softcap: float | None = None
    """transformers' `final_logit_softcapping`, which its models apply after the head's module."""

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be > 0, or None for no soft-cap, found {self.softcap}")

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N W"]:
        """The logits, with gradient; under autocast in its precision."""
        logits = functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def logits_at(
        self, hidden: Float[Tensor, "N D"], ids: Int[Tensor, " C"]
    ) -> Float[Tensor, "N C"]:
        """The logits at the vocabulary rows `ids`, by a copy of these rows of the weight alone."""
        bias = None if self.bias is None else self.bias[ids]
        return LinearHead(weight=self.weight[ids], bias=bias, softcap=self.softcap)(hidden)


def compute_dtype(head: LinearHead) -> torch.dtype:
    """The dtype in which the head multiplies now: autocast's, or its weight's own."""
    device_type, own = head.weight.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device_type) and own != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return own


def as_linear(head: LogitsOf) -> LinearHead | None:
    """The weight and bias of a plain linear head, gathered if sharded; None for other heads.

    All ranks must call this equally often, because gathering waits for all of them.
    ValueError for weights that are sharded in a way that cannot be gathered.
    """
    if isinstance(head, LinearHead):
        return head
    if not isinstance(head, nn.Module):
        return None
    if not _is_plain(head):
        _require_whole(head)
        return None
    linear = cast(nn.Linear, head)
    weight = _gathered(linear.weight)
    bias = cast(Tensor | None, linear.bias)  # declared a Parameter, None where there is none
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"the LM head's weight has shape {tuple(weight.shape)}, expected "
            f"{(linear.out_features, linear.in_features)}: FSDP1 or DeepSpeed ZeRO-3 has sharded "
            "it, and it cannot be gathered here; train with FSDP2 (fully_shard), to which PyTorch "
            "advises to migrate, or with DistributedDataParallel"
        )
    return LinearHead(weight=weight, bias=None if bias is None else _gathered(bias))


def without_gradient(head: LogitsOf) -> LogitsOf:
    """The head with its weights of now, without gradient; the same bits as in `head_loss`.

    It keeps the precision that is set now, wherever it is called later.
    """
    if isinstance(head, LinearHead):
        dtype = compute_dtype(head)
        weight = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        uncapped = LinearHead(weight=weight, bias=bias)
        softcap = head.softcap

        def linear_logits(hidden: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                logits = at_least_float32(uncapped(hidden.to(dtype)))
            return logits if softcap is None else (logits / softcap).tanh() * softcap

        return linear_logits
    autocasts = {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    }

    def called_logits(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = autocasts.get(device)
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            return at_least_float32(head(hidden))

    return called_logits


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module does nothing but `nn.Linear.forward`.

    LoRA, quantised and parametrised layers have their own classes. FSDP2's hooks gather the weight,
    which happens here instead. Offloading replaces `forward`.
    """
    sharded = is_fsdp_module(module)
    own_class = type(module).__mro__[2] if sharded else type(module)
    hooked = module._forward_hooks or module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    return own_class is nn.Linear and "forward" not in vars(module) and (sharded or not hooked)


def _gathered(parameter: Tensor) -> Tensor:
    """The whole of a sharded parameter; its gradient becomes the mean over the ranks."""
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sharded = cast(DTensor, parameter)
    mesh = sharded.device_mesh
    whole = sharded.redistribute(placements=[Replicate()] * mesh.ndim)
    local = whole.to_local(grad_placements=[Partial()] * mesh.ndim)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / mesh.size())
    return local


def _require_whole(module: nn.Module) -> None:
    parameters = list(module.parameters())
    sharded = any(is_dtensor(p) for p in parameters)
    if sharded or not all(p.numel() for p in parameters):
        raise ValueError(
            f"the LM head is a {type(module).__name__} whose weights are sharded; only a plain "
            "linear head can be gathered: leave the adapter off the head (LoRA: target_modules "
            "without lm_head), or do not shard the model"
        )
