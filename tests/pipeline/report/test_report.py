"""Promises of pipeline/report/report.py and of the comparison behind it."""

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.stages import ReportConfig
from pipeline.report.comparison import compare, group_runs, measured_as
from pipeline.report.run_folders import collect
from student_train.config.objective import ObjectiveName, UsedTail
from teacher_cache.schema.shard_quality import SampledLoss, ShardQuality, TailMass
from tests.support.lazy import write_report
from tests.support.run_fakes import fake_cache, fake_evaluation, fake_pictures, fake_run, write_json

NUM = 40


def _right(seed: int, share: float) -> list[bool]:
    return (np.random.default_rng(seed).random(NUM) < share).tolist()


def _study(root: Path) -> list[Path]:
    """Two seeds of three objectives, a teacher, their cache; EM-KD loses."""
    cache = fake_cache(root / "cache")
    runs = [fake_evaluation(root / "teacher", _right(9, 0.9))]
    shares: dict[ObjectiveName, float] = {"supervised": 0.6, "rld": 0.7, "emkd": 0.2}
    for seed in (0, 1):
        for name, share in shares.items():
            folder = fake_run(root / f"{name}-{seed}", name, seed, cache=cache)
            runs.append(fake_evaluation(folder, _right(seed, share), pictures=True))
    return runs


class _Page(HTMLParser):
    """Collects tags, text and everything that could be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(tmp_path: Path, runs: list[Path]) -> tuple[_Page, list[str], str]:
    out = tmp_path / "report.html"
    missing = write_report(ReportConfig(runs=tuple(runs), out=out))
    text = out.read_text()
    return _Page(text), missing, text


def test_the_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    page, missing, text = _report(tmp_path, _study(tmp_path))
    assert missing == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    headings = ("Results", "Settings", "Loss terms", "Gradient norms", "Cost")
    for heading in (*headings, "Matched vision tokens"):
        assert heading in page.text
    assert "Missing" not in page.text


def test_the_result_is_stated_where_emkd_loses(tmp_path: Path) -> None:
    page, _, _ = _report(tmp_path, _study(tmp_path))
    differences = [
        100 * (statistics.fmean(_right(seed, 0.2)) - statistics.fmean(_right(seed, 0.6)))
        for seed in (0, 1)
    ]
    expected = (
        f"emkd - supervised = {statistics.fmean(differences):+.1f} pp of word accuracy "
        f"(sd {statistics.stdev(differences):.1f}, n = 2 seeds; 95 % interval over {NUM} samples"
    )
    assert expected in page.text
    assert "emkd is worse on these samples." in page.text


def test_differences_equal_a_plain_loop_and_ignore_the_order_of_runs(tmp_path: Path) -> None:
    runs = collect(_study(tmp_path)).runs
    differences, missing = compare(group_runs(runs))
    assert missing == []
    backwards, _ = compare(group_runs(runs[::-1]))
    assert backwards == differences
    rld = next(d for d in differences if (d.label, d.score) == ("rld", "exact_match"))
    for seed, value in rld.by_seed:
        total = 0
        for ours, theirs in zip(_right(seed, 0.7), _right(seed, 0.6), strict=True):
            total += ours - theirs
        assert value == pytest.approx(total / NUM)
    assert rld.low <= rld.mean <= rld.high


def test_equal_answers_cannot_be_told_apart(tmp_path: Path) -> None:
    for name in ("supervised", "emkd"):
        fake_evaluation(fake_run(tmp_path / name, name, 0), _right(0, 0.5))
    found = collect([tmp_path / "supervised", tmp_path / "emkd"])
    differences, _ = compare(group_runs(found.runs))
    sentence = differences[0].sentence()
    assert sentence.startswith("emkd - supervised = +0.0 pp of exact match (n = 1 seed; ")
    assert sentence.endswith("no difference can be shown on these samples.")


def test_runs_with_other_settings_are_not_pooled_or_compared(tmp_path: Path) -> None:
    fake_evaluation(fake_run(tmp_path / "a", "supervised", 0), _right(0, 0.5))
    fake_evaluation(fake_run(tmp_path / "b", "emkd", 0), _right(0, 0.5))
    fake_evaluation(fake_run(tmp_path / "c", "emkd", 1, learning_rate=0.1), _right(0, 0.5))
    groups = group_runs(collect(tmp_path / name for name in "abc").runs)
    assert [(g.label, len(g.runs)) for g in groups] == [
        ("supervised", 1),
        ("emkd", 1),
        ("emkd #2", 1),
    ]
    differences, missing = compare(groups)
    assert {d.label for d in differences} == {"emkd"}
    assert (
        "emkd #2: no difference, since no supervised run differs in the objective alone"
        in missing[0]
    )


def test_runs_evaluated_on_other_samples_are_not_compared(tmp_path: Path) -> None:
    fake_evaluation(fake_run(tmp_path / "a", "supervised", 0), _right(0, 0.5), digest="x")
    fake_evaluation(fake_run(tmp_path / "b", "rld", 0), _right(0, 0.5), digest="y")
    differences, missing = compare(group_runs(collect([tmp_path / "a", tmp_path / "b"]).runs))
    assert differences == []
    assert (
        "rld: no difference, since no seed was evaluated on the same samples as supervised"
        in missing[0]
    )


def test_a_damaged_file_of_metrics_is_named(tmp_path: Path) -> None:
    place = fake_evaluation(fake_run(tmp_path / "a", "supervised", 0), _right(0, 0.5)) / "eval"
    (place / "metrics.json").write_text('{"scores": ')
    with pytest.raises(ValueError, match=rf"{place / 'metrics.json'} is damaged: .* again"):
        collect([tmp_path / "a"])


def test_every_missing_piece_is_named_on_the_page_and_returned(tmp_path: Path) -> None:
    runs = _study(tmp_path)
    (tmp_path / "emkd-0" / "eval" / "metrics.json").unlink()
    (tmp_path / "emkd-1" / "eval" / "pictures.json").unlink()
    (tmp_path / "rld-0" / "metrics.jsonl").unlink()
    (tmp_path / "rld-1" / "final" / "emkd_run.json").unlink()
    (tmp_path / "stray").mkdir()
    page, missing, _ = _report(tmp_path, [*runs, tmp_path / "stray"])
    assert len(missing) == 5
    for line, piece in zip(
        sorted(missing),
        [
            "emkd-0: eval/metrics.json is missing",
            "emkd-1: eval/pictures.json is missing",
            "rld-0: metrics.jsonl is missing",
            "rld-1: final/ is missing",
            "stray: is left out",
        ],
        strict=True,
    ):
        assert piece in line
        assert line in page.text


def test_a_cache_is_found_through_the_run_or_named_beside_it(tmp_path: Path) -> None:
    run = fake_evaluation(fake_run(tmp_path / "a", "rld", 0), [True], pictures=True)
    assert any("cache c0ffeec0ffee: its folder was not found" in m for m in collect([run]).missing)
    beside = collect([run, fake_cache(tmp_path / "cache")])
    assert [Path(cache.location).name for cache in beside.caches] == ["cache"]
    assert beside.missing == ()


@pytest.mark.parametrize(("regret", "missed"), [(0.001, False), (0.3, True)])
def test_the_page_says_what_a_cache_keeps_of_its_teacher(
    tmp_path: Path, regret: float, missed: bool
) -> None:
    tail = TailMass(num_positions=9, median=0.0015, p90=0.0123, p99=0.1, max=0.2)
    loss = SampledLoss(
        num_samples=2,
        num_pairs=18,
        metric="prob_l1",
        regret=regret,
        agreement=0.5,
        gradient_cosine=0.987,
        energy=None,
        row_mean_spread=1.25,
    )
    quality = ShardQuality(vision_tail=tail, response_tail=None, sampled=loss)
    cache = fake_cache(tmp_path / "cache", quality)
    run = fake_evaluation(fake_run(tmp_path / "a", "rld", 0, cache=cache), [True], pictures=True)
    page, _, _ = _report(tmp_path, [run])
    for text in ("Quality of the caches", "topk k=8", "0.987", "0.0015 / 0.0123", "worst shard: 0"):
        assert text in page.text, text
    assert ("missed" in page.text) == missed
    assert ("regret 30.0%, expected at most 1%" in page.text) == missed
    unsaid, _, _ = _report(tmp_path, [fake_evaluation(tmp_path / "b", [True])])
    assert "Quality of the caches" not in unsaid.text


def test_data_cannot_change_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    run = fake_run(tmp_path / "a", "emkd", 0, cache=fake_cache(tmp_path / "cache"))
    fake_evaluation(run, [False], answer=evil)
    pictures = fake_pictures(word=evil)
    pictures["samples"][0]["source_id"] = evil
    pictures["samples"][0]["messages"][0][1] = f"<image>{evil}"
    write_json(run / "eval" / "pictures.json", pictures)
    page, _, text = _report(tmp_path, [run])
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count(evil) >= 3


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no run in"):
        write_report(ReportConfig(runs=(tmp_path,), out=tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_answers_that_disagree_with_the_metrics_are_refused(tmp_path: Path) -> None:
    run = fake_evaluation(tmp_path / "a", [True, False])
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    write_json(run / "eval" / "metrics.json", metrics | {"num_samples": 3})
    with pytest.raises(ValueError, match=r"holds 2 answers, metrics.json counts 3"):
        collect([run])


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    runs = _study(tmp_path)
    _, _, first = _report(tmp_path, runs)
    _, _, second = _report(tmp_path, runs)
    assert first == second


def test_a_repeated_run_is_no_further_seed(tmp_path: Path) -> None:
    runs = _study(tmp_path)
    again = fake_run(tmp_path / "again", "emkd", 1, cache=tmp_path / "cache")
    fake_evaluation(again, _right(1, 0.2))
    found = collect([*runs, again, runs[0]])
    assert [run.path for run in found.runs] == runs
    assert f"{again}: is left out; it repeats {tmp_path / 'emkd-1'}" in "\n".join(found.missing)


def test_divergences_that_do_not_compare_are_not_drawn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails: dict[str, UsedTail] = {"vsd": "blend", "rld": "bucket"}
    shaped: dict[str, UsedTail] = {"vsd": "blend", "rld": "blend_template"}
    folders = [
        fake_run(tmp_path / "exact", "emkd", 0),
        fake_run(tmp_path / "sketched", "emkd", 0, learning_rate=2e-3, tails=tails),
        fake_run(tmp_path / "jsd", "emkd", 0, learning_rate=3e-3, divergence="jsd"),
        fake_run(tmp_path / "shaped", "emkd", 0, learning_rate=4e-3, tails=shaped),
    ]
    found = collect(folders).runs
    measures = {run.name: (measured_as(run, "vsd"), measured_as(run, "rld")) for run in found}
    assert measures == {
        "exact": ("reverse kl, exact", "reverse kl, exact"),
        "sketched": ("reverse kl, blend 0.5", "reverse kl, bucket"),
        "jsd": ("jsd, exact", "jsd, exact"),
        "shaped": ("reverse kl, blend 0.5", "reverse kl, blend_template 0.5"),
    }
    assert measured_as(found[0], "vlad") is None
    drawn: list[dict[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "pipeline.report.report.draw_curves", lambda _, panels, __: drawn.append(panels) or ""
    )
    _report(tmp_path, folders)
    panels = drawn[0]
    by_term = {title.partition("\n")[0]: 0 for title in panels}
    for title, groups in panels.items():
        by_term[title.partition("\n")[0]] += 1
        both = "VSD" in title and "blend" in title
        assert len(groups) == (4 if "\n" not in title else 2 if both else 1), title
    assert by_term == {
        "supervised": 1,
        "RLD (response)": 4,
        "VSD (vision)": 3,
        "VLAD (affinity)": 1,
    }
