"""What the settings of compression refuse by themselves, and that they are read strictly."""

import pytest

from student_train.config.compression import CompressionSettings, DropStage
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.strict_json import decode_json


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio of the stage at layer 2"):
        DropStage(layer=2, ratio=ratio)


def test_a_stage_at_the_first_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layer below it decides"):
        DropStage(layer=0, ratio=0.5)


@pytest.mark.parametrize("layers", [(2, 2), (3, 2)])
def test_stages_ascend(layers: tuple[int, int]) -> None:
    stages = tuple(DropStage(layer=layer, ratio=0.5) for layer in layers)
    with pytest.raises(ValueError, match="expected ascending"):
        CompressionSettings(stages=stages)


def test_a_pyramid_is_read_from_json() -> None:
    stages = '[{"layer": 8, "ratio": 0.5}, {"layer": 16, "ratio": 0.5}]'
    text = f'{{"compressor": "fastv", "stages": {stages}}}'
    settings = decode_json(CompressionSettings, text, "here")
    assert settings.stages == (DropStage(layer=8, ratio=0.5), DropStage(layer=16, ratio=0.5))
    with pytest.raises(DecodeError, match="did you mean 'stages'"):
        decode_json(CompressionSettings, '{"stage": []}', "here")
