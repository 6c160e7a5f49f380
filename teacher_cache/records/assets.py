"""What a cache stores once for all of its records."""

from dataclasses import dataclass

import torch

from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAssets:
    """The LM head of tier `hidden`, the basis of tier `topk+sketch`, the tail template of both
    top-k tiers. Caches written before templates existed have none."""

    head: LmHead | None = None
    sketch: SketchBasis | None = None
    template: TailTemplate | None = None

    def to(self, device: torch.device) -> "TeacherAssets":
        """The same assets on another device."""
        return TeacherAssets(
            head=None if self.head is None else self.head.to(device),
            sketch=None if self.sketch is None else self.sketch.to(device),
            template=None if self.template is None else self.template.to(device),
        )
