"""Makes the teacher's signals from the records of a cached sample."""

from torch import Tensor

from student_train.config.compression import grid_ratio
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.teacher_output import TeacherOutput


def vision_signal(output: TeacherOutput, assets: TeacherAssets) -> Signal:
    """The teacher at its M vision positions; ValueError where a record or asset is missing."""
    if output.hidden is not None:
        return HiddenSignal(hidden=output.hidden.vision, head=_require_head(assets))
    if output.vision is None:
        raise ValueError("the cached sample was read without its part `vision` (or `hidden`)")
    sketch = None
    if output.sketch is not None:
        if assets.sketch is None:
            raise ValueError("sketch codes need the cache's basis: CacheReader.sketch_basis()")
        sketch = SketchCode(
            codes=output.sketch.codes,
            scale=output.sketch.scale,
            tail_shift=output.sketch.tail_shift,
            basis=assets.sketch,
        )
    template = None if assets.template is None else assets.template.vision
    return TopKSignal(record=output.vision, sketch=sketch, template=template)


def response_signal(output: TeacherOutput, assets: TeacherAssets) -> Signal:
    """The teacher over its R response tokens; ValueError where a record or asset is missing."""
    if output.hidden is not None:
        return HiddenSignal(hidden=output.hidden.predicting, head=_require_head(assets))
    if output.response is None:
        raise ValueError("the cached sample was read without its part `response` (or `hidden`)")
    return TopKSignal(record=output.response, template=_response_template(assets))


def teacher_response_at(output: TeacherOutput, assets: TeacherAssets, wanted: float) -> Signal:
    """The teacher over its R response tokens when it drops a share of its own vision tokens.

    The share is the largest ratio of the sample's grid that is at most `wanted` (`grid_ratio`).
    Without a grid it is 0, which drops nothing: `response_signal`. ValueError where a record or
    asset is missing.
    """
    grid = output.hidden_grid if output.hidden is not None else output.response_grid
    ratio = grid_ratio(grid or (), wanted)
    if ratio == 0:
        return response_signal(output, assets)
    if output.hidden is not None and output.hidden_grid is not None:
        return HiddenSignal(hidden=output.hidden_grid[ratio], head=_require_head(assets))
    assert output.response_grid is not None
    return TopKSignal(record=output.response_grid[ratio], template=_response_template(assets))


def _response_template(assets: TeacherAssets) -> Tensor | None:
    return None if assets.template is None else assets.template.response


def _require_head(assets: TeacherAssets) -> LmHead:
    if assets.head is None:
        raise ValueError("hidden records need the cache's LM head: CacheReader.head()")
    return assets.head
