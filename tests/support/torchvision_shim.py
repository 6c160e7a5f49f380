"""Declares the two operators that torchvision misses beside a CPU build of torch.

A plugin of pytest for `make test-torchvision`: torchvision's wheel is built for CUDA, and refuses
to be imported where its operators are not registered. No test calls them.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
