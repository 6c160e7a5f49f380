"""Floating-point precision of sums."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Widen half precision before anything is summed; float32 and float64 pass unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
