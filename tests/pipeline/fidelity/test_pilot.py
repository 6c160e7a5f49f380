"""Promises of the pilot: what it measures are facts of the cache that a build would write."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.build.build import build
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.plan import PlanConfig
from pipeline.demo.config import DigitsConfig
from pipeline.fidelity.pilot import run_pilot
from pipeline.fidelity.recommend import (
    PROXY_STUDENT,
    PilotReport,
    TierMeasure,
    recommend,
    render_pilot,
)
from pipeline.fidelity.sizes import Tier, TierSize
from teacher_cache.folder.reader import CacheReader
from tests.support.lazy import write_digits
from tests.support.llava_json import write_llava_json
from tests.support.published_templates import VICUNA
from tests.support.tiny import ask, tiny_samples


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llava: Path) -> PlanConfig:
    source = write_llava_json(tmp_path_factory.mktemp("pilot"), tiny_samples(10))
    teacher = str(llava)
    return PlanConfig(pilot=10, source=str(source), teacher=teacher, device="cpu")


@pytest.fixture(scope="module")
def report(config: PlanConfig) -> PilotReport:
    return run_pilot(config)


def _of(report: PilotReport, records: str) -> list[TierMeasure]:
    return [item for item in report.tiers if item.tier.records == records]


def test_every_logit_kept_loses_nothing(report: PilotReport) -> None:
    exact = next(i for i in _of(report, "hidden") if i.tier.hidden_dtype == "float32")
    assert exact.regret == pytest.approx(0, abs=1e-6)
    assert exact.agreement == 1
    assert exact.gradient_cosine == pytest.approx(1, abs=1e-5)


def test_a_pilot_measures_what_a_build_would_write(config: PlanConfig, tmp_path: Path) -> None:
    template = tmp_path / "vicuna.jinja"
    template.write_text(VICUNA)
    given = dataclasses.replace(config, chat_template=template)
    without = run_pilot(dataclasses.replace(given, append_eos=False))
    measured = tiny_samples(10)[1::2]  # the others calibrate
    answers = [m for s in measured for m in s.messages if m.role == "assistant"]
    assert run_pilot(given).response_tokens == without.response_tokens + len(answers)


def test_bare_top_k_cannot_match_by_raw_logits(report: PilotReport) -> None:
    assert all(item.regret is None for item in _of(report, "topk"))


def test_tails_shrink_and_energy_grows(report: PilotReport) -> None:
    medians = [tail.vision_median for tail in report.tails]
    assert medians == sorted(medians, reverse=True)
    energy = [report.energy[rank] for rank in sorted(report.energy)]
    assert energy == sorted(energy)
    assert all(0 <= held <= 1 + 1e-6 for held in energy)


def test_the_recommended_tier_can_be_built(
    config: PlanConfig, report: PilotReport, tmp_path: Path
) -> None:
    chosen = next(i for i in report.tiers if i.tier.name == report.recommendation.tier)
    tier = chosen.tier
    changes: dict[str, object] = {"records": tier.records}
    changes |= {} if tier.top_k is None else {"top_k": tier.top_k}
    changes |= {} if tier.sketch_rank is None else {"sketch_rank": tier.sketch_rank}
    changes |= {} if tier.hidden_dtype is None else {"hidden_dtype": tier.hidden_dtype}
    assert config.source is not None
    assert config.teacher is not None
    base = BuildConfig(
        source=SourceConfig(path=config.source),
        teacher=config.teacher,
        out=str(tmp_path / "cache"),
        device="cpu",
    )
    build(base.with_settings(**changes))
    assert len(CacheReader.open(tmp_path / "cache")) == 10


def test_bytes_are_those_of_a_build_that_follows(
    llava: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data = write_digits(DigitsConfig(out=tmp_path / "digits", num_train=80, num_heldout=1))
    source, teacher = str(data / "train.json"), str(llava)
    report = run_pilot(PlanConfig(pilot=40, source=source, teacher=teacher, device="cpu"))
    names = ("topk k=64", "topk+sketch k=64 r=32", "hidden bfloat16")
    for measured in (item for item in report.tiers if item.tier.name in names):
        out = tmp_path / measured.tier.name
        changes = {f: v for f, v in asdict(measured.tier).items() if v is not None}
        base = BuildConfig(
            source=SourceConfig(path=source), teacher=teacher, out=str(out), device="cpu"
        )
        seal = build(base.with_settings(**changes))
        found = seal.num_bytes + sum(f.stat().st_size for f in out.glob("*.safetensors"))
        off = measured.size.in_all / found - 1
        record_property("tried", f"plan --pilot, {measured.tier.name}: {off:+.2%} of the bytes")
        assert abs(off) <= 0.02, measured.tier.name


def test_the_report_says_what_was_measured_on_what(report: PilotReport) -> None:
    text = render_pilot(report)
    assert report.recommendation.flags in text
    assert PROXY_STUDENT in text
    assert report.samples == 5  # the other half fitted the sketch


def test_questions_about_one_image_are_counted_and_planned_for(
    config: PlanConfig, tmp_path: Path
) -> None:
    words = ("what?", "how many?", "a square?", "red?", "in the picture?", "digits?")
    samples = [
        ask(f"<image>\n{text}", seeds=[number // 3], source_id=f"{number}")
        for number, text in enumerate(words)
    ]
    samples.append(ask("what?", seeds=[], source_id="text"))
    source = str(write_llava_json(tmp_path, samples))
    found = run_pilot(replace(config, pilot=7, source=source))
    alone = run_pilot(replace(config, pilot=7, source=source, samples_per_image=1.0))
    assert (found.samples_per_image, alone.samples_per_image) == (3.0, 1.0)
    assert "3 samples with images share a vision record" in render_pilot(found)
    for shared, apart in zip(found.tiers, alone.tiers, strict=True):
        assert shared.size.per_vision_token == apart.size.per_vision_token
        assert shared.size.per_sample < apart.size.per_sample


def _measure(tier: Tier, in_all: float, regret: float | None, cosine: float = 1.0) -> TierMeasure:
    size = TierSize(tier=tier, per_vision_token=1.0, per_sample=1.0, once=0, in_all=in_all)
    return TierMeasure(
        size=size,
        layout_per_vision_token=1.0,
        regret=regret,
        agreement=None if regret is None else 1.0,
        gradient_cosine=cosine,
        tail_p90=0.0,
    )


TOP_K = Tier(records="topk", top_k=16)
SKETCH = Tier(records="topk+sketch", top_k=64, sketch_rank=128)
HIDDEN = Tier(records="hidden", hidden_dtype="bfloat16")


@pytest.mark.parametrize(
    ("hidden_bytes", "sketch_regret", "cosine", "wanted"),
    [
        (1000.0, 0.01, 0.95, SKETCH),  # the cheapest that will do
        (1000.0, 0.03, 0.95, HIDDEN),  # the sketch's matching is too far off
        (1000.0, 0.01, 0.80, HIDDEN),  # its gradient is
        (240.0, 0.01, 0.95, HIDDEN),  # everything, for a fifth more
    ],
)
def test_the_rule(hidden_bytes: float, sketch_regret: float, cosine: float, wanted: Tier) -> None:
    measured = [
        _measure(TOP_K, 100.0, None),
        _measure(SKETCH, 200.0, sketch_regret, cosine),
        _measure(HIDDEN, hidden_bytes, 0.0),
    ]
    assert recommend(measured).tier == wanted.name


def test_where_no_tier_will_do_nothing_is_left_out() -> None:
    chosen = recommend([_measure(TOP_K, 100.0, None), _measure(HIDDEN, 900.0, 0.5)])
    assert chosen.flags == "--records hidden --hidden-dtype float32"
    assert "no tier passes" in chosen.reason
