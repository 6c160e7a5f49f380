"""Promises of fidelity/shard_quality.py: plain loops find the same, whoever builds a shard."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.build.build import CacheBuilder, build
from pipeline.build.extend_records import extend_records
from pipeline.build.shard_builder import missing_shards
from pipeline.config.build import BuildConfig
from pipeline.config.extend import ExtendConfig
from pipeline.fidelity.shard_quality import measure_shard, sampled_rows
from pipeline.fidelity.tier_loss import proxy_student
from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import merge_caches
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.encoding.collate import collate
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.make_records import make_output
from teacher_cache.records.sketch import decode_codes
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import RecordKind, RecordSettings, holds
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.shard_quality import SampledLoss, ShardQuality
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.storage.open_store import open_store
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.teacher.vision_sharing import VisionOwners
from tests.support.changed import changed
from tests.support.llava_json import shard_bytes, small_build
from tests.support.present import present
from tests.support.references import (
    Matrix,
    Row,
    best_assignment,
    cosine,
    l1,
    linear,
    log_softmax,
    log_sum_exp,
    probabilities,
    probabilities_with_uniform_tail,
    top_ids,
)
from tests.support.tiny import ask, tiny_samples

TOP_K, RANK, BLEND = 8, 6, 0.5


@pytest.fixture(scope="module")
def teacher(llava: Path) -> Teacher:
    teacher = Teacher.load(str(llava), device="cpu", dtype="float32")
    teacher.calibrate([tiny_samples(10)], _settings("topk+sketch"))
    return teacher


def _settings(records: RecordKind) -> RecordSettings:
    return RecordSettings(records=records, top_k=TOP_K, sketch_rank=RANK)


def _rows(
    teacher: Teacher, samples: Sequence[Sample], settings: RecordSettings
) -> list[CachedSample]:
    owners: VisionOwners = {}
    outputs = teacher.outputs(samples, settings, owners)
    rows: list[CachedSample] = []
    for sample, output in zip(samples, outputs, strict=True):
        assert isinstance(output, TeacherOutput)
        rows.append(CachedSample(sample=sample, output=output))
    return rows


def _measured(
    teacher: Teacher, samples: Sequence[Sample], settings: RecordSettings, num_samples: int
) -> ShardQuality:
    spec = teacher.spec(settings, batch_size=1)
    return present(measure_shard(teacher, _rows(teacher, samples, settings), spec, num_samples))


def _gradient(student: Row, log_p: Row, log_tail: float | None, kept: Sequence[int]) -> list[float]:
    """q (a - L) of a row: a = log q - log p, and outside `kept` half bucket, half `log_p`.

    `log_tail` None: every logit is known.
    """
    log_q = log_softmax(student)
    outside = set(range(len(student))) - set(kept)
    if log_tail is None or not outside:
        ratios = [q - p for q, p in zip(log_q, log_p, strict=True)]
    else:
        bucket = log_sum_exp([log_q[v] for v in outside]) - log_tail
        ratios = [log_q[v] - log_p[v] for v in range(len(student))]
        for v in outside:
            ratios[v] = (1 - BLEND) * bucket + BLEND * ratios[v]
    value = sum(math.exp(q) * ratio for q, ratio in zip(log_q, ratios, strict=True))
    return [math.exp(q) * (ratio - value) for q, ratio in zip(log_q, ratios, strict=True)]


def _by_states(gradients: Matrix, weight: Matrix) -> list[float]:
    """Gradient by the states, all rows one after the other."""
    columns = list(zip(*weight, strict=True))
    return [value for row in gradients for value in linear([row], columns)[0]]


def _expected(teacher: Teacher, sample: Sample, settings: RecordSettings) -> SampledLoss:
    """One sample with one view, in plain loops."""
    encoded = teacher.encoder.encode(sample)
    states = teacher.hidden_states(collate([encoded], 0, "right"))[0]
    (view,) = encoded.spans.views
    output = make_output(encoded.spans, states, teacher.head, settings, teacher.sketch)
    weight = teacher.head.weight.tolist()
    vision = states[encoded.spans.vision]
    exact = linear(vision.tolist(), weight)
    student = linear(proxy_student(vision, view).tolist(), weight)
    sketched = output.sketch is not None
    if output.sketch is not None:
        assert teacher.sketch is not None
        estimate = decode_codes(teacher.sketch, output.sketch.codes, output.sketch.scale).tolist()
        for row, logits in zip(estimate, exact, strict=True):
            for v in top_ids(logits, TOP_K):
                row[v] = logits[v]  # kept entries are known
        true_cost = [[l1(s, t) for t in exact] for s in student]
        guess = [[l1(s, t) for t in estimate] for s in student]
    else:
        assert teacher.template is not None
        estimate = [present(teacher.template.vision).tolist()] * len(exact)
        ours = [probabilities(s) for s in student]
        true_cost = [[l1(q, probabilities(t)) for t in exact] for q in ours]
        tails = [probabilities_with_uniform_tail(t, TOP_K) for t in exact]
        guess = [[l1(q, t) for t in tails] for q in ours]
    least, pairs = best_assignment(true_cost)
    _, chosen = best_assignment(guess)
    spent = sum(true_cost[i][j] for i, j in chosen)
    random = statistics.fmean(value for row in true_cost for value in row) * len(pairs)
    true_rows: list[list[float]] = []
    guessed: list[list[float]] = []
    for i, j in pairs:
        log_p, kept = log_softmax(exact[j]), top_ids(exact[j], TOP_K)
        true_rows.append(_gradient(student[i], log_p, None, kept))
        outside = [v for v in range(len(log_p)) if v not in kept]
        tail = log_sum_exp([log_p[v] for v in outside])
        shape = log_sum_exp([estimate[j][v] for v in outside])
        for v in outside:
            log_p[v] = estimate[j][v] - shape + tail
        guessed.append(_gradient(student[i], log_p, tail, kept))
    energy = None
    if sketched:
        assert teacher.sketch is not None
        mean = teacher.sketch.mean_logits.tolist()
        total = sum((t - m) ** 2 for row in exact for t, m in zip(row, mean, strict=True))
        codes = ((vision - teacher.sketch.hidden_mean) @ teacher.sketch.projection).tolist()
        energy = sum(code**2 for row in codes for code in row) / total
    return SampledLoss(
        num_samples=1,
        num_pairs=len(pairs),
        metric="raw_l1" if sketched else "prob_l1",
        regret=(spent - least) / (random - least),
        agreement=statistics.fmean(pair in pairs for pair in chosen),
        gradient_cosine=cosine(_by_states(true_rows, weight), _by_states(guessed, weight)),
        energy=energy,
        row_mean_spread=statistics.stdev(statistics.fmean(row) for row in exact),
    )


@pytest.mark.parametrize("records", ["topk", "topk+sketch"])
@pytest.mark.parametrize("seed", [1, 2])
def test_plain_loops_find_the_same(teacher: Teacher, records: RecordKind, seed: int) -> None:
    sample, settings = ask("<image>\nwhat?", seeds=[seed]), _settings(records)
    found = present(_measured(teacher, [sample], settings, 1).sampled)
    expected = _expected(teacher, sample, settings)
    for field in dataclasses.fields(SampledLoss):
        value, wanted = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(wanted, float):
            assert value == pytest.approx(wanted, rel=2e-3, abs=2e-5), field.name
        else:
            assert value == wanted, field.name


def test_tails_are_those_of_the_stored_records(teacher: Teacher) -> None:
    samples = [
        ask("<image>\nwhat?", seeds=[1], source_id="a"),
        ask("<image>\nhow many?", seeds=[1], source_id="b"),  # shares the vision record
        ask("<image>\nwhat?", seeds=[2], source_id="c"),
    ]
    settings = _settings("topk")
    found = _measured(teacher, samples, settings, 1)
    rows = _rows(teacher, samples, settings)
    assert [row.output.shared_from is None for row in rows] == [True, False, True]
    for tail, part, used in (
        (found.vision_tail, "vision", rows[::2]),
        (found.response_tail, "response", rows),
    ):
        records = [getattr(row.output, part) for row in used]
        masses = sorted(math.exp(value) for record in records for value in record.log_tail.tolist())
        assert tail is not None
        assert tail.num_positions == len(masses)
        assert tail.max == pytest.approx(masses[-1], rel=1e-3)
        for value, share in ((tail.median, 0.5), (tail.p90, 0.9), (tail.p99, 0.99)):
            place = math.ceil(share * (len(masses) - 1))
            assert value == pytest.approx(masses[place], rel=1e-3)


def test_samples_are_spread_over_those_with_images(teacher: Teacher) -> None:
    rows = _rows(teacher, tiny_samples(10), _settings("topk"))  # numbers 2 and 7 are text alone
    chosen = [sample.source_id for sample in sampled_rows(rows, 2)]
    assert chosen == ["tiny-3", "tiny-8"]
    assert [s.source_id for s in sampled_rows(rows[:4], 9)] == ["tiny-0", "tiny-1", "tiny-3"]
    assert sampled_rows(rows[2:3], 2) == []


def test_where_there_is_nothing_to_measure_nothing_is_said(teacher: Teacher) -> None:
    samples = tiny_samples(3)
    text = _measured(teacher, samples[2:], _settings("topk+sketch"), 2)
    assert (text.vision_tail, text.sampled) == (None, None)
    assert text.response_tail is not None
    for settings, count in ((_settings("hidden"), 2), (_settings("topk"), 0)):
        spec = teacher.spec(settings, batch_size=1)
        assert measure_shard(teacher, _rows(teacher, samples, settings), spec, count) is None


def test_every_logit_kept_loses_nothing_and_a_codec_something(llava: Path) -> None:
    teacher = Teacher.load(str(llava), device="cpu", dtype="float32")
    teacher.head = LmHead(weight=20 * teacher.head.weight)  # logits far apart: codes are coarse
    everything = RecordSettings(records="topk", top_k=teacher.head.vocab_size)
    found = present(_measured(teacher, tiny_samples(4), everything, 2).sampled)
    assert (found.regret, found.agreement, found.gradient_cosine) == (0, 1, 1)
    coarse = dataclasses.replace(everything, logits_codec="affine8", logits_max_error=9.0)
    lossy = present(_measured(teacher, tiny_samples(4), coarse, 2).sampled)
    assert lossy.gradient_cosine < 1  # what is stored is what is measured


def test_of_combined_records_the_top_k_is_measured(teacher: Teacher) -> None:
    samples = tiny_samples(5)
    alone = _measured(teacher, samples, _settings("topk+sketch"), 2)
    assert _measured(teacher, samples, _settings("topk+sketch+hidden"), 2) == alone


@pytest.fixture
def config(tmp_path: Path, llava: Path) -> BuildConfig:
    settings = RecordSettings(top_k=TOP_K, sketch_rank=RANK)
    return small_build(tmp_path, tiny_samples(10), llava, settings, 4)


def _qualities(seal: Seal) -> list[ShardQuality | None]:
    return [commit.quality for commit in seal.shards]


def test_whoever_builds_a_shard_says_the_same_of_it(config: BuildConfig, tmp_path: Path) -> None:
    seal = build(config)
    assert all(quality is not None for quality in _qualities(seal))
    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    CacheBuilder(other).prepare()
    for index in reversed(missing_shards(open_store(other.out))):
        CacheBuilder(other).build_shard(index)
    assert _qualities(build(other)) == _qualities(seal)


def test_measuring_changes_no_byte_of_the_shards(config: BuildConfig, tmp_path: Path) -> None:
    seal = build(config)
    off = dataclasses.replace(config, out=str(tmp_path / "off"), quality_samples=0)
    without = build(off)
    assert _qualities(without) == [None] * 3
    assert shard_bytes(off.out) == shard_bytes(config.out)
    assert without.fingerprint == seal.fingerprint


def test_caches_from_caches_keep_what_is_said_of_whole_shards(
    config: BuildConfig, tmp_path: Path
) -> None:
    said = _qualities(build(config))
    tar = export_cache(config.out, tmp_path / "tar", "webdataset")
    assert _qualities(tar) == said
    keys = [sample.key for sample in tiny_samples(10)]
    part = subset_cache(config.out, tmp_path / "part", Selection(keys=tuple(keys[:3])))
    assert _qualities(part) == [None]  # nobody has measured these rows alone
    both = merge_caches(
        [tmp_path / "part", config.out], tmp_path / "both", on_duplicate="first", form="arrow"
    )
    assert _qualities(both) == [None, None, *said[1:]]


@pytest.mark.parametrize("held", ["hidden", "topk"])
def test_new_records_are_measured_as_a_build_would(
    config: BuildConfig, tmp_path: Path, held: RecordKind
) -> None:
    top_k = TOP_K if holds(held, "topk") else 64
    base = changed(config, records=held, top_k=top_k, sketch_rank=128)
    build(base)
    more = ExtendConfig(
        cache=base.out,
        out=str(tmp_path / "more"),
        teacher=config.teacher,
        device="cpu",
        settings=RecordSettings(
            records="topk+sketch", sketch_rank=RANK, top_k=64 if holds(held, "topk") else TOP_K
        ),
    )
    found = _qualities(extend_records(more))
    at_once = build(dataclasses.replace(config, out=str(tmp_path / "once")))
    assert found == _qualities(at_once)
    settings = RecordSettings(records="hidden")
    hidden = dataclasses.replace(more, cache=more.out, out=f"{more.out}-all", settings=settings)
    if not holds(held, "hidden"):
        assert _qualities(extend_records(hidden)) == found


def test_no_more_logits_than_allowed_are_held(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings("topk+sketch")
    whole = _measured(teacher, tiny_samples(4), settings, 2)
    most, logits = 0, type(teacher.head).logits

    def watch(self: object, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal most
        found = logits(teacher.head, hidden)
        most = max(most, found.numel())
        return found

    monkeypatch.setattr("teacher_cache.records.lm_head.MAX_LOGITS", 3 * teacher.head.vocab_size)
    rows, spec = _rows(teacher, tiny_samples(4), settings), teacher.spec(settings, batch_size=1)
    monkeypatch.setattr(type(teacher.head), "logits", watch)
    cut = measure_shard(teacher, rows, spec, 2)
    assert most == 3 * teacher.head.vocab_size
    assert cut is not None
    assert cut.sampled is not None
    assert whole.sampled is not None
    assert cut.sampled.regret == pytest.approx(whole.sampled.regret, rel=1e-3)
    assert cut.sampled.gradient_cosine == pytest.approx(whole.sampled.gradient_cosine, rel=1e-3)
    assert cut.sampled.row_mean_spread == pytest.approx(whole.sampled.row_mean_spread, rel=1e-3)
