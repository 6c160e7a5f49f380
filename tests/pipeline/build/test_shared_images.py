"""A build stores what the teacher says of an image once for all questions about it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.build.build import CacheBuilder, build
from pipeline.build.shard_builder import missing_shards
from pipeline.config.build import BuildConfig
from pipeline.inspection.verify_teacher import verify_teacher
from teacher_cache.codec.columns import VISION_COLUMNS, encode_column, output_columns
from teacher_cache.folder.layout import require_plan
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.errors import CacheMismatchError, ShardCorruptError
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.storage.open_store import open_store
from tests.support.changed import changed
from tests.support.llava_json import shard_bytes, small_build, write_llava_json
from tests.support.strategies import assert_same_bits
from tests.support.tiny import ask

QUESTIONS = [
    ask("<image>\nwhat is in the picture?", seeds=[1], source_id="a0"),
    ask("<image>\nwhat?", seeds=[2], source_id="b0"),
    ask("how many digits?", seeds=[], source_id="text"),
    ask("<image>\nhow many digits do you see?", seeds=[1], source_id="a1"),
    ask("<image> and\n<image> both?", seeds=[1, 2], source_id="ab0"),
    ask("what is <image>?", seeds=[1], source_id="a2"),
    ask("<image>\nwhat circle?", seeds=[2], source_id="b1"),
    ask("<image>\nwhat?", seeds=[1], system="describe the picture", source_id="a3"),
    ask("<image> and\n<image> images?", seeds=[1, 2], source_id="ab1"),
    ask("<image>\nthree?", seeds=[1], source_id="a4"),
    ask("<image> or\n<image> images?", seeds=[1, 2], source_id="ab2"),
]
"""Five of the questions about one or two images are the same as another up to the last image."""

ORDER = ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "text", "ab0", "ab1", "ab2"]
OWNERS = {"a1": "a0", "a4": "a0", "b1": "b0", "ab1": "ab0"}


@pytest.fixture
def config(tmp_path: Path, llava: Path) -> BuildConfig:
    settings = RecordSettings(records="topk+sketch", top_k=8, sketch_rank=8)
    return small_build(tmp_path, QUESTIONS, llava, settings, samples_per_shard=6)


def into(config: BuildConfig, **changes: object) -> BuildConfig:
    """The same build in a folder of its own."""
    name = "-".join(map(str, changes.values()))
    return changed(config, out=str(Path(config.out).parent / name), **changes)


def rows(config: BuildConfig) -> dict[str, CachedSample]:
    """Every sample of a cache by its source's id."""
    reader = CacheReader.open(config.out)
    read = [reader.read(index, reader.parts) for index in range(len(reader))]
    return {cached.sample.source_id: cached for cached in read}


def owners(cached: dict[str, CachedSample]) -> dict[str, str]:
    """Who shares whose vision record, by the source's ids."""
    names = {each.sample.key: name for name, each in cached.items()}
    shared = {name: each.output.shared_from for name, each in cached.items()}
    return {name: names[key] for name, key in shared.items() if key is not None}


def counts(seal: Seal) -> tuple[int, int, int]:
    """Samples, those with images, stored vision records."""
    with_images = sum(shard.num_with_images for shard in seal.shards)
    return seal.num_samples, with_images, sum(shard.num_vision_records for shard in seal.shards)


@pytest.mark.parametrize(("form", "records"), [("arrow", "topk+sketch"), ("webdataset", "hidden")])
def test_questions_about_one_image_share_what_the_teacher_says_of_it(
    config: BuildConfig, form: str, records: str
) -> None:
    if records == "hidden":
        config = changed(config, records="hidden", top_k=64, sketch_rank=128)
    shared = into(config, format=form, records=records)
    apart = into(config, format=form, records=records, share_vision=False)
    assert counts(build(shared)) == (11, 10, 6)
    assert counts(build(apart)) == (11, 10, 10)
    found, alone = rows(shared), rows(apart)
    assert owners(found) == OWNERS
    assert owners(alone) == {}
    assert found.keys() == alone.keys() == {sample.source_id for sample in QUESTIONS}
    for sample in QUESTIONS:
        cached = found[sample.source_id]
        assert cached.sample == alone[sample.source_id].sample == sample
        ours, theirs = output_columns(cached.output), output_columns(alone[sample.source_id].output)
        for name, values in ours.items():
            if name not in ("v_ids", "r_ids", "s_codes"):  # neighbours change the last bits
                torch.testing.assert_close(values, theirs[name], atol=0.02, rtol=0.02)
        if sample.source_id in OWNERS:
            owner = output_columns(found[OWNERS[sample.source_id]].output)
            for name in VISION_COLUMNS & ours.keys():
                assert_same_bits(ours[name], owner[name])


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_bytes_shrink_by_what_is_shared(config: BuildConfig, form: str) -> None:
    saved = build(into(config, format=form, share_vision=False)).num_bytes
    shared = into(config, format=form)
    saved -= build(shared).num_bytes
    found = rows(shared)
    guests = [found[name] for name in OWNERS]
    columns = [output_columns(guest.output) for guest in guests]
    frames = [
        encode_column(name, each[name]) for each in columns for name in VISION_COLUMNS & each.keys()
    ]
    bare = sum(map(len, frames)) + sum(len(i) for guest in guests for i in guest.sample.images)
    assert saved > 0.9 * bare  # owners' names take some


def test_samples_of_one_image_stand_together_in_the_order_of_the_source(
    config: BuildConfig,
) -> None:
    builder = CacheBuilder(config)
    plan = builder.prepare()
    shards = [[QUESTIONS[at].source_id for _, at in shard] for shard in plan.shards]
    assert shards == [ORDER[:5], ORDER[5:]]
    assert require_plan(builder.cache) == plan
    alone = CacheBuilder(into(config, share_vision=False)).prepare()
    in_order = [at for shard in alone.shards for _, at in shard]
    assert in_order == list(range(len(QUESTIONS)))


def test_sharing_does_not_depend_on_who_builds_what_when(config: BuildConfig) -> None:
    build(config)
    other = into(config, samples_per_shard=6)
    CacheBuilder(other).prepare()
    for index in reversed(missing_shards(open_store(other.out))):
        CacheBuilder(other).build_shard(index)
    build(other)
    assert shard_bytes(Path(config.out)) == shard_bytes(Path(other.out))


def test_images_with_more_questions_than_a_shard_holds_have_a_record_in_each(
    config: BuildConfig,
) -> None:
    small = into(config, samples_per_shard=2, batch_size=1)
    assert counts(build(small)) == (11, 10, 7)
    assert owners(rows(small)) == {"a1": "a0", "b1": "b0", "ab1": "ab0"}


def test_where_an_owner_is_rejected_the_next_question_takes_its_place(config: BuildConfig) -> None:
    long = ask("<image>\n" + "how many digits? " * 400, seeds=[1], source_id="long")
    write_llava_json(Path(config.source.path).parent, [long, *QUESTIONS])
    recorded = into(config, on_bad_sample="record")
    seal = build(recorded)
    assert [rejected.source_id for rejected in seal.rejected] == ["long"]
    assert counts(seal) == (11, 10, 6)
    assert owners(rows(recorded)) == OWNERS


def test_a_cache_that_shares_is_not_one_that_does_not(config: BuildConfig) -> None:
    build(config)
    with pytest.raises(CacheMismatchError, match="share_vision"):
        build(dataclasses.replace(config, share_vision=False))


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_damage_to_an_owners_record_is_found_in_all_that_share_it(
    config: BuildConfig, form: str
) -> None:
    damaged = into(config, format=form)
    seal = build(damaged)
    found = rows(damaged)
    assert not verify_cache(open_store(damaged.out)).problems
    frame = encode_column("v_logits", output_columns(found["b0"].output)["v_logits"])
    [path] = [
        path
        for commit in seal.shards
        for path in (Path(damaged.out) / commit.files[0].file,)
        if frame in path.read_bytes()
    ]
    data = bytearray(path.read_bytes())
    assert data.count(frame) == 1
    data[data.index(frame) + len(frame) // 2] ^= 1
    path.write_bytes(data)
    reader = CacheReader.open(damaged.out)
    for name in ("b0", "b1"):
        with pytest.raises(ShardCorruptError, match=found[name].sample.key):
            reader.read(reader.find(found[name].sample.key), ["vision"])
    reader.read(reader.find(found["ab0"].sample.key), ["vision"])
    problems = "\n".join(verify_cache(open_store(damaged.out)).problems)
    keys = {name for name, cached in found.items() if cached.sample.key in problems}
    assert keys == {"b0", "b1"}


def test_the_teacher_run_again_says_what_is_shared(config: BuildConfig) -> None:
    build(config)
    report = verify_teacher(CacheReader.open(config.out), config.teacher, device="cpu")
    assert (report.samples, report.problems) == (11, ())
