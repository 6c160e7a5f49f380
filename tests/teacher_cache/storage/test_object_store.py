"""A cache on a real S3 server keeps every promise of one on a disk, in bad weather too."""

import os
import pickle
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from jobs.cli.__main__ import main
from teacher_cache.folder.garbage import collect_garbage
from teacher_cache.folder.layout import read_seal
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import write_plan, write_shard
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage.local_store import LocalStore
from teacher_cache.storage.object_store import ObjectStore
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Store
from tests.support.builders import build, exit_status, forked, make_shards, published
from tests.support.s3_server import NOT_FOUND, SLOW_DOWN, S3Server, at_first
from tests.support.strategies import assert_same, make_plan

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")


def objects(url: str) -> dict[str, bytes]:
    """Every object of a cache that has a public name, with its bytes."""
    store = open_store(url)
    names = [name for folder in ("", "commits", "shards") for name in store.names(folder)]
    return {name: store.read(name) for name in names if not name.split("/")[-1].startswith(".")}


@pytest.mark.parametrize("form", FORMATS)
def test_the_objects_are_the_files_of_a_build_on_a_disk(
    url: str, tmp_path: Path, form: ShardFormatName
) -> None:
    shards = make_shards()
    assert build(url, shards, form) == build(tmp_path / "disk", shards, form)
    assert objects(url) == published(tmp_path / "disk")
    reader = CacheReader.open(url)
    rows = [row for shard in shards for row in shard]
    for index, row in enumerate(rows):
        assert_same(reader.read(index, reader.parts), row)
    assert verify_cache(url).problems == ()
    assert build(url, shards, form) == reader.seal  # again changes nothing
    assert objects(url) == published(tmp_path / "disk")


def test_a_killed_build_goes_on_and_racing_ones_end_in_the_same_objects(
    url: str, tmp_path: Path
) -> None:
    shards = make_shards()
    build(tmp_path, shards)
    store = open_store(url)
    for num_commits in (0, 1, 2):
        child = forked(lambda: build(url, shards))
        while len(store.names("commits")) <= num_commits:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        exit_status(child)
    children = [forked(lambda: build(url, shards)) for _ in range(3)]
    assert [exit_status(child) for child in children] == [0] * 3
    assert objects(url) == published(tmp_path)


def test_one_of_many_creators_wins(url: str) -> None:
    stores = [open_store(url) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(lambda n: stores[n % 4].create_exclusive("record", b"%d" % n), range(16))
        )
    assert sum(won) == 1
    assert stores[0].read("record") == b"%d" % won.index(True)


def test_a_zombie_that_wakes_after_the_seal_changes_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(1)
    plan = write_plan(open_store(url), make_plan(shards))
    store = open_store(url)
    create = store.create_exclusive
    awake: list[dict[str, bytes]] = []

    def late(name: str, data: bytes) -> bool:
        seal = build(url, shards)  # another builder does everything while this one sleeps
        assert seal.num_samples == 2
        awake.append(objects(url))
        return create(name, data)

    monkeypatch.setattr(store, "create_exclusive", late)
    seconds = 5.0  # tells its record from the winner's
    record = write_shard(store, plan, 0, shards[0], [], seconds)
    seal = read_seal(store)
    assert seal is not None
    assert record == seal.shards[0]
    assert record.seconds == 0.0
    assert awake == [objects(url)]


def test_throttling_that_passes_is_waited_for(url: str, s3: S3Server) -> None:
    shards = make_shards(1)
    for method in ("PUT", "GET", "HEAD"):
        s3.faults.append(at_first(1, SLOW_DOWN, method))
    seal = build(url, shards)
    s3.faults[:] = [at_first(2, SLOW_DOWN, "GET", seal.shards[0].files[0].file)]
    assert CacheReader.open(url).read(0, ()).sample == shards[0][0].sample


def test_throttling_that_stays_is_an_error_and_the_same_build_then_finishes(
    url: str, s3: S3Server, tmp_path: Path
) -> None:
    shards = make_shards(2)
    for name in ("commits/00000", "shards/00001", "SEALED"):
        s3.requests.clear()
        s3.faults[:] = [at_first(-1, SLOW_DOWN, "PUT", name)]
        with pytest.raises(OSError, match=rf"{url}/{name}.*reduce your request rate.*run the same"):
            build(url, shards)
        tries = [request for request in s3.requests if f"/{name}" in request and "PUT" in request]
        assert len(tries) == 3
        s3.faults.clear()
    build(url, shards)
    build(tmp_path, shards)
    assert objects(url) == published(tmp_path)


def test_a_creation_whose_answer_was_lost_is_settled_by_reading(url: str, s3: S3Server) -> None:
    store = open_store(url)
    store.require_writable()
    s3.lost_answers = 1
    assert store.create_exclusive("record", b"mine")
    assert sum("PUT" in request and "/record" in request for request in s3.requests) == 2
    assert not store.create_exclusive("record", b"another's")
    assert store.read("record") == b"mine"


def test_a_server_that_ignores_the_condition_is_refused_before_a_build(
    url: str, s3: S3Server
) -> None:
    def forget(request: dict[str, Any]) -> None:
        request.pop("HTTP_IF_NONE_MATCH", None)

    s3.faults.append(forget)
    with pytest.raises(ValueError, match="could overwrite each other"):
        build(url, make_shards(1))
    assert objects(url) == {}
    assert open_store(url).names("") == []


class LooksFirst(AbstractFileSystem):
    """A library whose conditional creation is fsspec's own."""


def test_a_library_that_looks_first_and_writes_then_is_refused() -> None:
    fsspec.register_implementation("looksfirst", LooksFirst, clobber=True)
    with pytest.raises(ValueError, match="looks first, then writes"):
        open_store("looksfirst://place")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nosuch://b.*[Pp]rotocol"):
        open_store("nosuch://b")

    def missing(_: str) -> type:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"s3fs.*pip install 'emkd\[s3\]'"):
        open_store("s3://b/c")


def test_a_bad_local_copy_is_fetched_again(url: str, tmp_path: Path) -> None:
    shards = make_shards(1)
    build(url, shards)
    reader = CacheReader.open(url)
    assert_same(reader.read(1, reader.parts), shards[0][1])
    (copy,) = (path for path in (tmp_path / "downloads").rglob("*") if path.is_file())
    intact = copy.read_bytes()
    flipped = bytearray(intact)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (bytes(flipped), intact[:-1], b""):
        copy.write_bytes(damaged)
        again = CacheReader.open(url)
        assert_same(again.read(1, again.parts), shards[0][1])
        assert copy.read_bytes() == intact


def test_an_object_that_is_not_the_committed_one_is_refused(url: str, tmp_path: Path) -> None:
    seal = build(url, make_shards(1))
    file, store = seal.shards[0].files[0], open_store(url)
    data = bytearray(store.read(file.file))
    data[len(data) // 2] ^= 1
    store.write_atomic(file.file, bytes(data))
    with pytest.raises(ShardCorruptError, match=rf"{file.file}: fetched .*{file.sha256}"):
        CacheReader.open(url).read(0, ())
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]
    assert any(file.sha256 in problem for problem in verify_cache(url).problems)
    store.write_atomic(file.file, bytes(data[:-1]))
    with pytest.raises(ShardCorruptError, match="bytes"):
        CacheReader.open(url)


def test_verification_looks_at_the_objects_and_not_at_local_copies(url: str) -> None:
    seal = build(url, make_shards(1))
    CacheReader.open(url).read(0, ())
    store, file = open_store(url), seal.shards[0].files[0]
    store.write_atomic(file.file, bytes(file.num_bytes))
    assert verify_cache(url).problems


def test_shards_that_appear_late_are_waited_for_but_not_for_ever(url: str, s3: S3Server) -> None:
    shards = make_shards(1)
    seal = build(url, shards)
    name = seal.shards[0].files[0].file
    s3.faults[:] = [at_first(2, NOT_FOUND, "HEAD", name)]
    reader = CacheReader.open(url)
    s3.faults[:] = [at_first(2, NOT_FOUND, "GET", name)]
    assert_same(reader.read(0, reader.parts), shards[0][0])
    open_store(url).remove(name)
    s3.faults.clear()
    with pytest.raises(ShardCorruptError, match=f"{name} is missing"):
        CacheReader.open(url)


def test_leftovers_are_removed_and_nothing_else(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build(url, make_shards())
    wanted, store = objects(url), open_store(url)
    leftovers = (".probe.0123456789abcdef.tmp", "shards/00001-0123456789abcdef.arrow")
    for name in leftovers:
        store.write_atomic(name, b"left")
    assert collect_garbage(url).removed == ()  # too young
    assert main(["gc", url, "--grace-hours", "0"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: 4 bytes removed" in said for name in leftovers)
    assert objects(url) == wanted


def test_large_files_go_in_pieces_and_come_back(url: str, s3: S3Server, tmp_path: Path) -> None:
    store = open_store(url)
    data = os.urandom(2**20) * 20
    with store.attempt("shards/large") as attempt:
        attempt.write_bytes(data)
        store.publish(attempt, "shards/large")
    assert not attempt.exists()
    assert sum(request.startswith("PUT") for request in s3.requests) == 3  # pieces of 8 MiB
    with store.fetched("shards/large") as path:
        assert path.read_bytes() == data
    assert not path.exists()


@pytest.fixture
def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(params=["disk", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "disk":
        return LocalStore(tmp_path / "store")
    return open_store(request.getfixturevalue("url" if request.param == "s3" else "memory_url"))


def test_every_store_keeps_files_by_name(store: Store) -> None:
    assert (store.names(""), store.size("a"), store.exists("a")) == ([], None, False)
    with pytest.raises(FileNotFoundError, match="a"):
        store.read("a")
    store.remove("a")
    assert store.create_exclusive("folder/b", b"1")
    assert not store.create_exclusive("folder/b", b"2")
    store.write_atomic("a", b"old")
    store.write_atomic("a", b"new")
    store.write_atomic("folder/.c.0123456789abcdef.tmp", b"")
    assert store.names("") == ["a"]
    assert store.names("folder") == ["folder/.c.0123456789abcdef.tmp", "folder/b"]
    assert (store.read("a"), store.size("a")) == (b"new", 3)
    assert abs(store.modified("a") - time.time()) < 3600
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy.read("folder/b") == b"1"
    store.remove("a")
    assert not copy.exists("a")


@pytest.mark.parametrize("kind", ["disk", "s3", "memory"])
def test_files_are_copied_between_stores_of_any_kind(
    store: Store, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other: Store = LocalStore(tmp_path / "other")
    if kind != "disk":
        other = open_store(
            f"{request.getfixturevalue('url' if kind == 's3' else 'memory_url')}-other"
        )
    other.write_atomic("shards/a", b"content")
    store.copy_from(other, "shards/a", "shards/b")
    store.copy_from(other, "shards/a", "shards/b")  # again changes nothing
    assert store.read("shards/b") == b"content"
    assert store.names("shards") == ["shards/b"]
    with pytest.raises(OSError, match="shards/none"):
        store.copy_from(other, "shards/none", "shards/c")
    assert store.names("shards") == ["shards/b"]


def test_copies_within_one_server_move_no_bytes_past_us(url: str, s3: S3Server) -> None:
    one, other = open_store(f"{url}/one"), open_store(f"{url}/other")
    other.write_atomic("a", b"content")
    s3.requests.clear()
    one.copy_from(other, "a", "b")
    assert not [request for request in s3.requests if request.startswith("GET")]
    assert one.read("b") == b"content"


def test_a_store_that_was_used_works_in_a_forked_child(url: str) -> None:
    store = open_store(url)
    store.write_atomic("a", b"content")

    def look() -> None:
        assert store.read("a") == b"content"

    assert exit_status(forked(look)) == 0


def test_connections_are_made_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> object:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(MemoryFileSystem, "__init__", refused)
    assert pickle.loads(pickle.dumps(ObjectStore("memory://a/b/"))).url == "memory://a/b"
