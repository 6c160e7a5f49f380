"""Promises of inspection/sample.py: what is shown is what is stored, checked and in words."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.inspection.sample import describe_sample, find_sample, load_tokenizer
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.builders import build
from tests.support.caches import build_cache
from tests.support.present import present
from tests.support.strategies import (
    VOCAB_SIZE,
    WIDTH,
    make_cached,
    make_output,
    make_spec,
    with_least,
)
from tests.support.tiny import tiny_samples

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")


def _cache(folder: Path, records: RecordKind = "topk") -> CacheReader:
    head = LmHead(weight=torch.arange(VOCAB_SIZE * WIDTH).reshape(VOCAB_SIZE, WIDTH).sin())
    hidden = records == "hidden"
    spec = make_spec(records, head_digest=head.digest if hidden else None)
    shards = [[make_cached(number, records) for number in part] for part in ((0, 1), (2, 3))]
    build(folder, shards, spec=spec, head=head if hidden else None)
    return CacheReader.open(folder)


@pytest.mark.parametrize("records", TIERS)
def test_a_sample_shows_every_record_of_its_tier_and_no_other(
    tmp_path: Path, records: RecordKind
) -> None:
    reader = _cache(tmp_path, records)
    cached = make_cached(1, records)
    shown = json.loads(json.dumps(describe_sample(reader, cached.sample.key)))
    output = cached.output
    assert (shown["key"], shown["index"]) == (cached.sample.key, 1)
    assert shown["messages"] == [f"{m.role}: {m.text}" for m in cached.sample.messages]
    assert shown["image_bytes"] == [len(image) for image in cached.sample.images]
    assert len(shown["views"]) == len(output.views)
    for line, view in zip(shown["views"], output.views, strict=True):
        assert line == (
            f"image {view.image} view {view.view}: {view.rows} x {view.cols} vision tokens"
        )
    assert shown["content_tokens"] == len(output.content_ids)
    assert shown["response_tokens"] == int(output.is_response.sum())
    names = {"vision_top_k", "response_top_k", "affinity", "sketch", "hidden"} & shown.keys()
    top_k = {"vision_top_k", "response_top_k", "affinity"}
    assert (
        names == {"topk": top_k, "topk+sketch": {*top_k, "sketch"}, "hidden": {"hidden"}}[records]
    )


def test_least_probabilities_are_shown_where_there_are_any(tmp_path: Path) -> None:
    cached = make_cached(0)
    least = replace(cached, output=with_least(cached.output, 0))
    build(tmp_path, [[least]], spec=make_spec("topk", least_logits=True))
    shown = describe_sample(CacheReader.open(tmp_path), cached.sample.key)["vision_top_k"]
    record = present(least.output.vision)
    assert shown["least_log_probability"]["smallest"] == -math.inf
    assert shown["least_log_probability"]["median"] in present(record.log_least).tolist()
    build(tmp_path / "without", [[cached]])
    without = describe_sample(CacheReader.open(tmp_path / "without"), cached.sample.key)
    assert "least_log_probability" not in without["vision_top_k"]


def test_numbers_of_a_record_are_those_that_are_stored(tmp_path: Path) -> None:
    reader = _cache(tmp_path, "topk+sketch")
    cached = make_cached(2, "topk+sketch")
    shown = describe_sample(reader, cached.sample.key)
    vision, affinity = cached.output.vision, cached.output.affinity
    assert vision is not None
    assert affinity is not None
    found: dict[str, Any] = shown["vision_top_k"]
    assert (found["positions"], found["k"]) == tuple(vision.ids.shape)
    assert found["first_position_ids"] == vision.ids[0, :8].tolist()
    tails = sorted(math.exp(value) for value in vision.log_tail.tolist())
    assert found["tail_mass"]["largest"] == round(tails[-1], 5)
    assert tails[0] - 1e-5 <= found["tail_mass"]["median"] <= tails[-1] + 1e-5
    text, tokens = affinity.cosine.shape
    assert (shown["affinity"]["text_tokens"], shown["affinity"]["vision_tokens"]) == (text, tokens)
    values = [float(value) for value in affinity.cosine.flatten()]
    assert shown["affinity"]["range"] == [round(min(values), 4), round(max(values), 4)]


def test_entries_are_those_that_each_position_keeps(tmp_path: Path) -> None:
    output = make_output("topk", 3, ragged=True)
    cached = replace(make_cached(3), output=output)
    build(tmp_path, [[cached]], spec=make_spec(top_p=0.5, min_k=1))
    shown = describe_sample(CacheReader.open(tmp_path), cached.sample.key)
    record = present(output.vision)
    assert record.num_kept is not None
    counts = sorted(record.num_kept.tolist())
    found: dict[str, Any] = shown["vision_top_k"]
    assert (found["k_fewest"], found["k"]) == (counts[0], counts[-1])
    assert found["k_median"] == counts[len(counts) // 2]
    assert found["first_position_ids"] == record.ids[0, : int(record.num_kept[0])].tolist()
    assert int(record.num_kept[0]) < counts[-1], "the first position would show no cut"


def test_the_beginning_of_a_key_is_enough_if_it_names_one_sample(tmp_path: Path) -> None:
    reader = _cache(tmp_path)
    keys = reader.keys
    assert describe_sample(reader, keys[3][:12])["key"] == keys[3]
    with pytest.raises(ValueError, match=r"0 samples have .*first keys are") as caught:
        describe_sample(reader, "")
    assert all(key in str(caught.value) for key in keys)
    with pytest.raises(ValueError, match=f"0 samples have .*first keys are: {keys[0]}"):
        describe_sample(reader, "nothing")


def test_source_ids_and_repeated_samples_name_a_sample(tmp_path: Path) -> None:
    made = [make_cached(number) for number in range(2)]
    key = made[0].sample.key
    rows = [
        replace(made[number], sample=replace(made[number].sample, key=name, source_id=source_id))
        for number, name, source_id in (
            (0, key, "first"),
            (0, f"{key}-1", "second"),
            (0, f"{key}-2", "same"),
            (1, made[1].sample.key, "same"),
        )
    ]
    build(tmp_path, [rows])
    reader = CacheReader.open(tmp_path)
    for wanted in (key, f"{key}-1", f"{key}-2"):
        assert reader.keys[find_sample(reader, wanted)] == wanted
    assert find_sample(reader, "second") == 1
    with pytest.raises(ValueError, match=r"2 samples have the source id 'same'.*keys are") as found:
        find_sample(reader, "same")
    assert f"{key}-2, {made[1].sample.key}" in str(found.value)
    with pytest.raises(ValueError, match=f"3 samples .*{key}, {key}-1, {key}-2"):
        find_sample(reader, key[:9])


@pytest.mark.parametrize("records", TIERS)
def test_what_the_teacher_says_is_told_of_some_vision_tokens(
    tmp_path: Path, records: RecordKind
) -> None:
    reader = _cache(tmp_path, records)
    output = reader.read(1, reader.parts).output
    shown = describe_sample(reader, reader.keys[1])
    assert shown["prompt"] == output.content_ids[~output.is_response].tolist()
    assert shown["response"] == output.content_ids[output.is_response].tolist()
    places = [
        f"image {view.image} view {view.view} row {row} column {column}"
        for view in output.views
        for row in range(view.rows)
        for column in range(view.cols)
    ]
    assert len(shown["vision_says"]) == min(6, len(places))
    for told in shown["vision_says"]:
        at = places.index(told["at"])
        if output.vision is not None:
            ids = output.vision.ids[at]
            log_probs = output.vision.logits[at].float() - output.vision.logsumexp[at]
        else:
            every = reader.head().logits(present(output.hidden).vision[[at]])[0].log_softmax(0)
            log_probs, ids = every.sort(descending=True)
        assert [said[0] for said in told["says"]] == ids[:5].tolist()
        expected = [math.exp(value) for value in log_probs[:5].tolist()]
        assert [said[1] for said in told["says"]] == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_tokens_are_texts_where_the_teachers_tokenizer_is_given(
    tmp_path: Path, llava: Path
) -> None:
    folder = str(llava)
    settings = RecordSettings(records="topk", top_k=8)
    samples = tiny_samples(2)
    reader = build_cache(tmp_path, Teacher.load(folder, device="cpu"), samples, settings)
    tokenizer = load_tokenizer(folder, reader.spec)
    shown: dict[str, Any] = json.loads(
        json.dumps(describe_sample(reader, samples[0].key, tokenizer))
    )
    ids = describe_sample(reader, samples[0].key)["response"]
    assert shown["response"] == [tokenizer.decode([token]) for token in ids]
    assert "red" in "".join(shown["response"])
    assert [said["token"] for said in shown["response_says"]] == shown["response"][:8]
    assert all(isinstance(word, str) for said in shown["vision_says"] for word, _ in said["says"])


def test_another_models_tokenizer_is_refused(tmp_path: Path, llava: Path) -> None:
    spec = make_spec()
    with pytest.raises(ValueError, match=r"stand for other tokens .*the\s+teacher's folder"):
        load_tokenizer(str(llava), spec)
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path), spec)
