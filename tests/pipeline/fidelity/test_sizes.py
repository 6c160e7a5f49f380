"""Promises of fidelity/sizes.py: sizes are those that the code writes, and time is arithmetic."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.response_grid import with_grid
from pipeline.config.plan import PlanConfig
from pipeline.fidelity.sizes import SampleShape, Tier, column_bytes, plan, render_plan, tiers
from teacher_cache.codec.columns import output_columns
from teacher_cache.schema.options import GridSettings, RecordSettings
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.teacher.teacher import Teacher
from tests.support.paths import ROOT
from tests.support.tiny import tiny_samples

GRID = GridSettings(compressor="random", layer=1, ratios=(0.3, 0.6))


@pytest.mark.parametrize(
    ("tier", "changes"),
    [
        (Tier(records="topk", top_k=7), {}),
        (Tier(records="topk", top_k=30), {"top_p": 0.5, "min_k": 2}),
        (Tier(records="topk", top_k=7), {"logits_codec": "affine8", "affinity_dtype": "int8"}),
        (Tier(records="topk", top_k=30), {"logits_codec": "affine8", "top_p": 0.5}),
        (Tier(records="topk+sketch", top_k=7, sketch_rank=5), {"affinity_dtype": "float32"}),
        (Tier(records="hidden", hidden_dtype="bfloat16"), {}),
        (Tier(records="hidden", hidden_dtype="float32"), {}),
        (Tier(records="hidden", hidden_dtype="int8", hidden_group=7), {}),
        (Tier(records="hidden", hidden_dtype="int8"), {}),
        (Tier(records="topk+hidden", top_k=7, hidden_dtype="float32"), {}),
        (Tier(records="topk+hidden", top_k=7, hidden_dtype="bfloat16"), {"grid": GRID}),
        (Tier(records="hidden", hidden_dtype="int8", hidden_group=7), {"grid": GRID}),
        (Tier(records="topk", top_k=30), {"top_p": 0.5, "min_k": 2, "grid": GRID}),
        (Tier(records="topk", top_k=7), {"logits_codec": "affine8", "grid": GRID}),
    ],
)
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_columns_have_the_bytes_that_are_planned(
    tier: Tier, changes: dict[str, Any], number: int, llava: Path
) -> None:
    """Samples 0..3: one image; several turns; text alone; two images."""
    teacher = Teacher.load(str(llava), device="cpu")
    with_grid(teacher, changes.get("grid"))
    samples = tiny_samples(4)
    settings = RecordSettings(
        records=tier.records,
        top_k=tier.top_k or 64,
        sketch_rank=tier.sketch_rank or 128,
        hidden_dtype=tier.hidden_dtype or "bfloat16",
        hidden_group=tier.hidden_group,
        **changes,
    )
    if tier.records == "topk+sketch":
        teacher.calibrate([samples], settings)
    output = teacher.outputs([samples[number]], settings)[0]
    assert isinstance(output, TeacherOutput)
    varies = "top_p" in changes and output.vision is not None and output.response is not None
    shape = SampleShape(
        num_views=len(output.views),
        num_vision=sum(view.num_tokens for view in output.views),
        num_content=len(output.content_ids),
        num_text=int(output.after_image.sum()),
        num_response=int(output.is_response.sum()),
        hidden_size=teacher.head.weight.shape[1],
        logits_dtype="float32",
        logits_codec=changes.get("logits_codec", "exact"),
        affinity_dtype=changes.get("affinity_dtype", "float16"),
        kept_vision=int(output.vision.counts.sum()) if varies and output.vision else None,
        kept_response=int(output.response.counts.sum()) if varies and output.response else None,
        num_ratios=len(output.response_grid or output.hidden_grid or ()),
        kept_grid=tuple(int(each.counts.sum()) for each in (output.response_grid or {}).values())
        if varies
        else None,
    )
    columns = output_columns(output, teacher.spec(settings, batch_size=1))
    found = {name: values.numel() * values.element_size() for name, values in columns.items()}
    assert column_bytes(shape, tier) == found


def test_tiers_are_capped_at_vocabulary_and_width() -> None:
    found = tiers(vocab_size=100, hidden_size=96)
    assert [tier.top_k for tier in found if tier.records == "topk"] == [16, 32, 64, 100]
    assert [tier.sketch_rank for tier in found if tier.records == "topk+sketch"] == [64, 96]


def test_each_ratio_takes_as_much_as_the_response_itself() -> None:
    shape = SampleShape(
        num_views=1, num_vision=4, num_content=9, num_text=9, num_response=5, hidden_size=8
    )
    tier = Tier(records="topk", top_k=3)
    without, with_three = (column_bytes(replace(shape, num_ratios=n), tier) for n in (0, 3))
    response = sum(size for name, size in without.items() if name.startswith("r_"))
    assert sum(with_three.values()) - sum(without.values()) == 3 * response
    small, large = (plan(PlanConfig(ratios=ratios)).tiers for ratios in ((), (0.25, 0.5, 0.75)))
    for one, other in zip(small, large, strict=True):
        assert other.per_sample > one.per_sample
        assert other.per_vision_token == one.per_vision_token
    with pytest.raises(ValueError, match="expected ascending"):
        PlanConfig(ratios=(0.5, 0.25))
    with pytest.raises(ValueError, match="ratios would have no effect"):
        PlanConfig(ratios=(0.5,), pilot=8, source="a.json", teacher="b")


def test_sizes_add_up() -> None:
    config = PlanConfig(samples=10, image_bytes=1000, vocab_size=500, hidden_size=64)
    for size in plan(config).tiers:
        assert size.in_all == pytest.approx(size.once + 10 * size.per_sample)
        assert size.per_sample > 1000


def test_what_images_take_is_divided_by_the_samples_that_share_them() -> None:
    alone = plan(PlanConfig(image_bytes=1000)).tiers
    shared = plan(PlanConfig(image_bytes=1000, samples_per_image=4.0)).tiers
    text = plan(PlanConfig(images_per_sample=0.0)).tiers
    for one, four, none in zip(alone, shared, text, strict=True):
        # Affinities and text states belong to each sample: 128 text and 576 vision tokens.
        states = {"float32": 4 * 4096, "bfloat16": 2 * 4096, "int8": 4096 + 2 * 64}
        rows = 576 * 2 if one.tier.top_k else states[one.tier.hidden_dtype or ""]
        own = none.per_sample + 128 * rows
        assert one.per_sample - own == pytest.approx(4 * (four.per_sample - own))


def test_codecs_and_fewer_entries_make_top_k_tiers_smaller() -> None:
    whole = {size.tier: size.per_sample for size in plan(PlanConfig()).tiers}
    config = PlanConfig(logits_codec="affine8", affinity_dtype="int8", mean_kept=20.0)
    for size in plan(config).tiers:
        if size.tier.top_k is None:
            assert size.per_sample == whole[size.tier]
        else:
            assert size.per_sample < whole[size.tier]


def test_the_cache_pays_when_runs_of_live_teachers_would_take_longer() -> None:
    config = PlanConfig(
        samples=1000,
        teacher_seconds_per_sample=0.5,
        online_teacher_seconds_per_step=0.1,
        steps_per_run=2000,
    )
    spent = plan(config).cost
    assert spent.build_seconds == 500
    assert spent.online_seconds_per_run == pytest.approx(200)
    assert spent.break_even_runs == 3  # 2 runs: 400 s, less than the build; 3 runs: 600 s
    assert "from student run 3 on" in render_plan(plan(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"response_tokens": 200}, "response_tokens is 200"),
        ({"steps_per_run": 5}, "needs both"),
        ({"teacher": "somewhere"}, "teacher would have no effect"),
        ({"append_eos": False}, "append_eos would have no effect"),
        ({"chat_template": Path("a.jinja")}, "chat_template would have no effect"),
        ({"pilot": 8}, "a pilot needs source, teacher"),
        ({"views": 0}, "views must be >= 1"),
        ({"mean_kept": 0.5}, "mean_kept must be >= 1"),
        ({"samples_per_image": 0.5}, "samples_per_image must be >= 1"),
        ({"samples": 0}, "samples must be >= 1"),
        ({"samples": -5}, "samples must be >= 0 and finite, found -5"),
        ({"image_bytes": -4}, "image_bytes must be >= 0"),
        ({"teacher_seconds_per_sample": float("nan")}, "must be >= 0 and finite, found nan"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_the_command_answers_without_torch() -> None:
    code = (
        "import sys; from jobs.cli.__main__ import main; assert main(['plan']) == 0;"
        "print([m for m in ('torch', 'transformers', 'ray', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "779,000 samples" in done.stdout
