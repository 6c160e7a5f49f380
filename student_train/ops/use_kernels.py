"""For which tensors Triton kernels of ours stand in for torch's, and how one gets torch's back.

Kernels serve float32, bfloat16 and float16 on NVIDIA GPUs of compute capability 8.0 or higher where
`triton` can be imported (CUDA builds of torch bring it along); everything else is torch's, as is
float64. The environment variable EMKD_KERNELS=0 leaves everything to torch. Promise: where the
choice falls changes no result beyond the rounding that the function states; nothing here imports
triton. docs/gpu.md says what each kernel moves.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

SWITCH = "EMKD_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(rows: Tensor) -> bool:
    """Whether kernels of ours compute with these rows. ValueError for a switch not 0 or 1."""
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(
            f"{SWITCH}={switch}: set it to 0 for torch's ways on GPUs too, or to 1 (or leave it "
            "unset) for Triton kernels where they can run"
        )
    return switch == "1" and rows.dtype in _DTYPES and rows.is_cuda and _runs_on(rows.device)


@cache
def _runs_on(device: torch.device) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
