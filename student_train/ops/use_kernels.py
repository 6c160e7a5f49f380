"""Decides which tensors the project's Triton kernels compute with, in place of torch.

Kernels are off unless the environment variable EMKD_KERNELS=1 switches them on, because no GPU has
run them yet. They then serve float32, bfloat16 and float16 on NVIDIA GPUs of compute capability 8.0
or higher where `triton` can be imported. The choice changes no result beyond the rounding that each
function states. Nothing here imports triton. docs/gpu.md says what each kernel moves.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

SWITCH = "EMKD_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(rows: Tensor) -> bool:
    """Whether kernels compute with these rows; ValueError for a switch that is not 0 or 1."""
    switch = os.environ.get(SWITCH, "0")
    if switch not in ("0", "1"):
        raise ValueError(
            f"{SWITCH}={switch}: set it to 1 for Triton kernels where they can run, or to 0 (or "
            "leave it unset) for torch"
        )
    return switch == "1" and rows.dtype in _DTYPES and rows.is_cuda and _runs_on(rows.device)


@cache
def _runs_on(device: torch.device) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
