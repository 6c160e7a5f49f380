"""Promises of fidelity/cache_quality.py: means of what shards say, and no praise without reason."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from pipeline.config.build import BuildConfig
from pipeline.fidelity.cache_quality import is_unknown, render_quality, summarise, warning_text
from teacher_cache.folder.layout import read_seal
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.schema.shard_quality import SampledLoss, ShardQuality, TailMass
from teacher_cache.storage.open_store import open_store
from tests.support.builders import build, make_shards
from tests.support.llava_json import small_build
from tests.support.present import present
from tests.support.strategies import make_cached, make_spec
from tests.support.tiny import tiny_samples
from tests.whole.test_golden import GOLDEN

GOOD = SampledLoss(
    num_samples=2,
    num_pairs=100,
    metric="raw_l1",
    regret=0.002,
    agreement=0.9,
    gradient_cosine=0.98,
    energy=0.9,
    row_mean_spread=1.0,
)
COSINE_FAULT = "gradient cosine 0.74, expected at least 0.9"
TAIL = TailMass(num_positions=1000, median=0.001, p90=0.01, p99=0.1, max=0.2)


def _quality(tail: TailMass | None = TAIL, **changes: object) -> ShardQuality:
    loss = dataclasses.replace(GOOD, **changes)  # pyright: ignore[reportArgumentType]
    return ShardQuality(vision_tail=tail, response_tail=TAIL, sampled=loss)


def _seal(
    folder: Path,
    qualities: Sequence[ShardQuality | None],
    records: RecordKind = "topk+sketch",
) -> Seal:
    """A seal whose shards say this of themselves."""
    rows = [[make_cached(2 * shard + row, records) for row in range(2)] for shard in range(3)]
    seal = build(folder, rows[: len(qualities)], spec=make_spec(records))
    shards = tuple(
        dataclasses.replace(commit, quality=quality)
        for commit, quality in zip(seal.shards, qualities, strict=True)
    )
    return dataclasses.replace(seal, shards=shards)


def test_a_cache_is_the_mean_of_its_shards(tmp_path: Path) -> None:
    wide = dataclasses.replace(TAIL, num_positions=3000, median=0.005, max=0.9)
    text = ShardQuality(vision_tail=None, response_tail=TAIL, sampled=None)
    seal = _seal(tmp_path, [_quality(), _quality(wide, num_pairs=300, regret=0.006), text])
    found = present(summarise(seal))
    assert found.mean.sampled is not None
    assert (found.mean.sampled.regret, found.mean.sampled.num_pairs) == (0.005, 400)
    assert found.mean.vision_tail is not None
    assert (found.mean.vision_tail.median, found.mean.vision_tail.max) == (0.004, 0.9)
    assert (found.faults, found.num_missing, found.worst) == ((), 0, 1)
    assert warning_text(found, "here") is None
    assert "1, the worst" in render_quality(found)


@pytest.mark.parametrize(
    ("records", "changes", "p90", "fault"),
    [
        ("topk+sketch", {"regret": 0.04}, 0.01, "regret 2.1%, expected at most 1%"),
        ("topk+sketch", {"gradient_cosine": 0.5}, 0.01, COSINE_FAULT),
        ("topk", {}, 0.5, "tail mass 0.26 (90 %), expected at most 0.02"),
    ],
)
def test_what_misses_is_said_with_the_worst_shard_and_another_tier(
    tmp_path: Path, records: RecordKind, changes: dict[str, object], p90: float, fault: str
) -> None:
    tail = dataclasses.replace(TAIL, p90=p90)
    found = present(summarise(_seal(tmp_path, [_quality(), _quality(tail, **changes)], records)))
    assert [line[: len(fault)] for line in found.faults] == [fault]
    assert (found.worst, found.num_missing) == (1, 1)
    said = present(warning_text(found, "here"))
    assert "1 of 2 shards miss it individually; the worst is shard 1" in said
    assert "Build into a new folder, with --records hidden --hidden-dtype " in said
    assert "here" in said


def test_tails_of_records_with_a_sketch_are_shown_and_not_judged(tmp_path: Path) -> None:
    found = present(summarise(_seal(tmp_path, [_quality(dataclasses.replace(TAIL, p90=0.9))])))
    assert found.faults == ()


def test_hidden_states_are_never_judged_by_what_lies_beside_them(tmp_path: Path) -> None:
    bad = _quality(regret=0.5)
    found = present(summarise(_seal(tmp_path / "both", [bad], "topk+sketch+hidden")))
    assert (found.faults, found.num_missing, found.instead) == ((), 0, None)
    alone = _seal(tmp_path / "hidden", [None], "hidden")
    assert summarise(alone) is None
    assert not is_unknown(alone)


def test_shards_that_nobody_has_measured_are_counted(tmp_path: Path) -> None:
    some = _seal(tmp_path / "some", [_quality(), None])
    found = present(summarise(some))
    assert "1 shards were not measured" in render_quality(found)
    assert not is_unknown(some)
    assert is_unknown(_seal(tmp_path / "none", [None, None]))


def test_caches_written_before_quality_was_recorded_have_none() -> None:
    for place in sorted(GOLDEN.rglob("SEALED.json")):
        seal = present(read_seal(open_store(place.parent)))
        assert summarise(seal) is None


def test_records_keep_their_text_where_nothing_is_said(tmp_path: Path) -> None:
    build(tmp_path, make_shards(1))
    for name in ("SEALED.json", "commits/00000.json"):
        assert "quality" not in (tmp_path / name).read_text()


@pytest.fixture
def config(tmp_path: Path, llava: Path) -> BuildConfig:
    return small_build(tmp_path, tiny_samples(6), llava, RecordSettings())


def _build(config: BuildConfig, *flags: str) -> int:
    source, teacher = ["--source", config.source.path], ["--teacher", config.teacher]
    where = ["--out", config.out, "--no-ray", "--device", "cpu", "--samples-per-shard", "3"]
    return main(["build", *source, *teacher, *where, *flags])


def test_a_bad_tier_is_complained_of_and_a_good_one_not(
    config: BuildConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = ["--records", "topk", "--top-k", "1"]  # of a teacher that is nearly flat
    assert _build(config, *bare) == 0
    said = capsys.readouterr()
    assert "What topk k=1 keeps of the teacher" in said.out
    for text in ("!!!!", "miss their stated quality", "tail mass 0.9", "--records hidden"):
        assert text in said.err
    assert _build(config, *bare, "--require-quality") == 4  # and nothing is built again
    assert "calibrate" not in capsys.readouterr().err
    good = dataclasses.replace(config, out=str(tmp_path / "good"))
    assert _build(good, "--require-quality") == 0
    said = capsys.readouterr()
    assert "What topk+sketch k=64 r=32 keeps of the teacher" in said.out
    assert "!!!!" not in said.err
    off = dataclasses.replace(config, out=str(tmp_path / "off"))
    assert _build(off, "--quality-samples", "0") == 0
    said = capsys.readouterr().err
    assert "losses of its records were not measured" in said
    assert "build into a new folder with --quality-samples" in said
    assert _build(off, "--quality-samples", "0", "--require-quality") == 2
    assert "--require-quality needs" in capsys.readouterr().err


def test_inspect_shows_the_table_and_all_shards_as_json(
    config: BuildConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _build(config, "--records", "topk", "--top-k", "1") == 0
    capsys.readouterr()
    assert main(["inspect", config.out]) == 0
    said = capsys.readouterr()
    assert "the worst" in said.out
    assert "!!!!" in said.err
    assert main(["inspect", config.out, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["quality"]
    seal = present(read_seal(open_store(config.out)))
    wanted = [dataclasses.asdict(c.quality) for c in seal.shards if c.quality is not None]
    assert shown["shards"] == wanted
    assert shown["instead"]["flags"].startswith("--records hidden")
