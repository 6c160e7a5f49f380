"""Tell what FSDP2 has sharded without importing it: the import costs seconds.

Nothing is sharded in a process that has never imported FSDP2's modules.
"""

import sys

from torch import Tensor, nn


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this tensor is a `DTensor`."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)
