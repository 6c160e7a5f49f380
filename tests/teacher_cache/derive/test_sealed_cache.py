"""Laws of caches that are made from caches, on disks and in object stores."""

import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import merge_caches
from teacher_cache.derive.sealed_cache import SealedCache
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, flip, published
from tests.support.children import run_script
from tests.support.derived import HEAD, TOOLS, base_cache, content_of, rows_of, shards_from
from tests.support.s3_server import BUCKET, S3Server
from tests.support.strategies import make_cached, make_spec

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
EVERYTHING = Selection()


def _sound(out: Path) -> SealedCache:
    assert verify_cache(out).problems == ()
    return SealedCache.open(out)


@pytest.mark.parametrize("form", FORMATS)
def test_a_subset_of_everything_has_the_same_rows(tmp_path: Path, form: ShardFormatName) -> None:
    base = base_cache(tmp_path / "a")
    subset_cache(tmp_path / "a", tmp_path / "all", EVERYTHING, form=form, samples_per_shard=4)
    found = _sound(tmp_path / "all")
    assert content_of(found) == content_of(base)
    assert [len(shard) for shard in found.plan.shards] == [4, 4, 2]
    assert (found.spec, found.seal.format) == (base.spec, form)


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chosen=st.sets(st.integers(0, 9), min_size=1, max_size=9), size=st.integers(1, 5))
def test_a_part_and_the_rest_merged_have_all_rows(chosen: set[int], size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_cache(folder / "a")
        keys = [row.key for row in rows_of(base)]
        for part, numbers in (("some", chosen), ("rest", set(range(10)) - chosen)):
            wanted = Selection(keys=tuple(keys[number] for number in numbers))
            subset_cache(folder / "a", folder / part, wanted, samples_per_shard=size)
            _sound(folder / part)
        merge_caches([folder / "some", folder / "rest"], folder / "both")
        both = {row[0]: row for row in content_of(_sound(folder / "both"))}
        assert [both[key] for key in keys] == content_of(base)
        assert len(both) == len(keys)


def test_the_first_that_stays_stores_what_was_shared(tmp_path: Path) -> None:
    base = base_cache(tmp_path / "a")
    keys = [row.key for row in rows_of(base)]
    subset_cache(tmp_path / "a", tmp_path / "s", Selection(keys=tuple(keys[1:4])))
    found = rows_of(_sound(tmp_path / "s"))
    assert [row.shared_from for row in found] == [None, keys[1], keys[1]]
    assert [row.images for row in found] == [row.images for row in rows_of(base)[1:4]]


def test_a_share_is_drawn_by_seed_and_counts_are_bounds(tmp_path: Path) -> None:
    base_cache(tmp_path / "a")
    reader = CacheReader.open(tmp_path / "a")
    drawn: list[tuple[str, ...]] = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        subset_cache(tmp_path / "a", out, Selection(fraction=0.4, seed=seed))
        drawn.append(CacheReader.open(out).keys)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4
    outputs = [reader.read(index, ()).output for index in range(len(reader))]
    counts = [int(output.is_response.sum()) for output in outputs]
    chosen = Selection(min_response_tokens=2, max_response_tokens=3, max_vision_tokens=4)
    subset_cache(tmp_path / "a", tmp_path / "counted", chosen)
    expected = [key for key, count in zip(reader.keys, counts, strict=True) if 2 <= count <= 3]
    assert list(CacheReader.open(tmp_path / "counted").keys) == expected
    assert 0 < len(expected) < len(reader)


def test_choices_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    base_cache(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no samples f{32} \(1 of 1 keys\)"):
        subset_cache(tmp_path / "a", tmp_path / "s", Selection(keys=("f" * 32,)))
    with pytest.raises(ValueError, match="none of 10 samples passes --min-vision-tokens 1000000;"):
        subset_cache(tmp_path / "a", tmp_path / "s", Selection(min_vision_tokens=10**6))
    with pytest.raises(ValueError, match="fraction is 0"):
        Selection(fraction=0.0)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_exported_there_and_back_are_the_same_bytes(tmp_path: Path, form: ShardFormatName) -> None:
    base = base_cache(tmp_path / "a", form=form)
    other: ShardFormatName = "webdataset" if form == "arrow" else "arrow"
    export_cache(tmp_path / "a", tmp_path / "there", other)
    there = _sound(tmp_path / "there")
    assert there.seal.fingerprint == base.seal.fingerprint
    assert rows_of(there) == rows_of(base)
    export_cache(tmp_path / "there", tmp_path / "back", form)
    assert published(tmp_path / "back") == published(tmp_path / "a")


def test_merged_files_are_linked_and_say_where_they_come_from(tmp_path: Path) -> None:
    first, second = base_cache(tmp_path / "a"), base_cache(tmp_path / "b", 100)
    merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    merged = _sound(tmp_path / "m")
    assert content_of(merged) == content_of(first) + content_of(second)
    spec = make_spec("hidden", head_digest=HEAD.digest)
    at_once = build(tmp_path / "once", shards_from(0) + shards_from(100), spec=spec, head=HEAD)
    assert merged.seal.fingerprint == at_once.fingerprint
    sources = [
        (cache, file) for cache in (first, second) for c in cache.seal.shards for file in c.files
    ]
    files = [file for commit in merged.seal.shards for file in commit.files]
    for (cache, old), new in zip(sources, files, strict=True):
        assert (new.cache, new.index, new.sha256) == (cache.plan.fingerprint, old.index, old.sha256)
        assert isinstance(cache.store, LocalStore)
        assert (cache.store.folder / old.file).samefile(tmp_path / "m" / new.file)
    # A cache of merged files is an ordinary one: merge it again, take a part, export it and back.
    export_cache(tmp_path / "m", tmp_path / "there", "webdataset")
    export_cache(tmp_path / "there", tmp_path / "back", "arrow")
    assert published(tmp_path / "back") == published(tmp_path / "m")
    subset_cache(tmp_path / "m", tmp_path / "s", EVERYTHING)
    assert content_of(_sound(tmp_path / "s")) == content_of(merged)


def test_caches_of_two_formats_are_merged_into_one(tmp_path: Path) -> None:
    first = base_cache(tmp_path / "a", form="webdataset")
    second = base_cache(tmp_path / "b", 100, form="arrow")
    for form in FORMATS:
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / form, form=form)
        merged = _sound(tmp_path / form)
        assert merged.seal.format == form
        assert content_of(merged) == content_of(first) + content_of(second)


def test_repeated_samples_are_refused_or_the_first_is_taken(tmp_path: Path) -> None:
    base = base_cache(tmp_path / "a")
    keys = [row.key for row in rows_of(base)]
    base_cache(tmp_path / "b", 100)
    subset_cache(
        tmp_path / "a", tmp_path / "s", Selection(keys=(keys[0], keys[4], keys[5], keys[6]))
    )
    merge_caches([tmp_path / "b", tmp_path / "s"], tmp_path / "left")
    with pytest.raises(ValueError, match=f"4 samples are in several .*{min(keys[4:7])}"):
        merge_caches([tmp_path / "left", tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merge_caches([tmp_path / "left", tmp_path / "a"], tmp_path / "m", on_duplicate="first")
    merged, left = _sound(tmp_path / "m"), SealedCache.open(tmp_path / "left")
    known = {row[0] for row in content_of(left)}
    rest = [row for row in content_of(base) if row[0] not in known]
    assert content_of(merged) == content_of(left) + rest
    # Of the last cache one shard was left whole, one was written anew, one had nothing new.
    own = [commit.files[0].cache == merged.plan.fingerprint for commit in merged.seal.shards]
    assert own == [False] * (len(own) - 2) + [True, False]
    assert rows_of(merged)[-6].shared_from is None  # its owner was among the repeated ones


def test_other_specs_are_refused_with_a_table(tmp_path: Path) -> None:
    base_cache(tmp_path / "a")
    build(tmp_path / "b", [[make_cached(50)]], spec=make_spec())
    with pytest.raises(CacheMismatchError, match=r"(?s)its spec differs.*records: stored 'topk'"):
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    with pytest.raises(ValueError, match="at least two"):
        merge_caches([tmp_path / "a"], tmp_path / "m")


def test_inputs_must_be_sealed_and_intact_and_another_out_is_refused(tmp_path: Path) -> None:
    base = base_cache(tmp_path / "a")
    subset_cache(tmp_path / "a", tmp_path / "s", Selection(fraction=0.5))
    with pytest.raises(CacheMismatchError, match="begun with another plan"):
        subset_cache(tmp_path / "a", tmp_path / "s", Selection(fraction=0.5, seed=1))
    with pytest.raises(CacheMismatchError, match="begun with another plan"):
        subset_cache(tmp_path / "a", tmp_path / "a", Selection(fraction=0.5))
    with pytest.raises(ValueError, match="lies inside"):
        export_cache(tmp_path / "a", tmp_path / "a" / "inside", "webdataset")
    path = tmp_path / "a" / base.seal.shards[0].files[0].file
    flip(path)
    with pytest.raises(ShardCorruptError, match=path.name):
        export_cache(tmp_path / "a", tmp_path / "e", "webdataset")
    (tmp_path / "a" / "SEALED.json").unlink()
    with pytest.raises(IncompleteCacheError):
        export_cache(tmp_path / "a", tmp_path / "e", "webdataset")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_is_killed_anywhere_and_run_again_leaves_the_same_bytes(
    memory_folder: Path, tool: str, record_property: Callable[[str, object], None]
) -> None:
    num_kills = int(run_script("derived", tool, memory_folder))
    assert num_kills > 60
    record_property("tried", f"{num_kills} kills in emkd {tool}")


def test_an_exchanged_shard_is_not_translated(tmp_path: Path) -> None:
    base = base_cache(tmp_path / "a")
    one, _, other = (tmp_path / "a" / commit.files[0].file for commit in base.seal.shards)
    data = other.read_bytes()
    one.write_bytes(data + bytes(one.stat().st_size - len(data)))  # as long as the record says
    with pytest.raises(ShardCorruptError, match=f"{one.name} is not the file that was committed"):
        export_cache(tmp_path / "a", tmp_path / "e", "webdataset")


def test_every_tool_reads_and_writes_object_stores(tmp_path: Path, s3: S3Server) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    first = base_cache(f"{url}/a", num_shards=2)
    second = base_cache(tmp_path / "b", 100)
    base_cache(f"{url}/c", 200, num_shards=1)
    merge_caches([f"{url}/a", tmp_path / "b"], f"{url}/m")
    s3.requests.clear()
    merge_caches([f"{url}/m", f"{url}/c"], f"{url}/all")
    moved = [request for request in s3.requests if ".arrow" in request and "GET" in request]
    assert moved == []  # the server copies; no byte of a shard comes here
    assert len(CacheReader.open(f"{url}/all")) == 22
    merge_caches([f"{url}/a", tmp_path / "b"], tmp_path / "m")
    for place in (f"{url}/m", tmp_path / "m"):
        assert verify_cache(place).problems == ()
        assert content_of(SealedCache.open(place)) == content_of(first) + content_of(second)
    export_cache(f"{url}/m", f"{url}/there", "webdataset")
    export_cache(f"{url}/there", tmp_path / "back", "arrow")
    assert published(tmp_path / "back") == published(tmp_path / "m")
    subset_cache(f"{url}/there", f"{url}/s", Selection(fraction=0.5))
    assert verify_cache(f"{url}/s").problems == ()
    assert len(CacheReader.open(f"{url}/s")) == 8
