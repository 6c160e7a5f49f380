"""What a cache stores once for all of its records."""

from dataclasses import dataclass

from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.tensor_record import TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAssets(TensorRecord):
    """The LM head of tier `hidden`, the basis of tier `topk+sketch`, the tail template of both
    top-k tiers. Caches written before templates existed have none."""

    head: LmHead | None = None
    sketch: SketchBasis | None = None
    template: TailTemplate | None = None
