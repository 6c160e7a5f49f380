"""Names never hold half a file; of several creators one wins."""

import errno
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from teacher_cache.folder import writer
from teacher_cache.records.lm_head import LmHead
from teacher_cache.shards.arrow import ArrowFormat
from teacher_cache.storage import durable_files
from teacher_cache.storage.durable_files import (
    create_exclusive,
    make_folder,
    private_path,
    publish,
    sha256_file,
    write_atomic,
    write_durable,
)
from teacher_cache.storage.local_store import LocalStore
from teacher_cache.storage.open_store import open_store
from tests.support.builders import build, make_shards
from tests.support.strategies import VOCAB_SIZE, WIDTH, make_spec


def test_exactly_one_of_many_creators_wins_and_its_bytes_stay(tmp_path: Path) -> None:
    path = tmp_path / "commits" / "00000.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: create_exclusive(path, b"%d" % n), range(32)))
    assert sum(won) == 1
    assert path.read_bytes() == b"%d" % won.index(True)
    assert list(path.parent.iterdir()) == [path]


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_bytes_and_no_private_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()  # a folder in the place of the file cannot be replaced
    with pytest.raises(OSError, match="file"):
        write_atomic(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_durable_writing_never_overwrites(tmp_path: Path) -> None:
    write_durable(tmp_path / "file", b"old")
    with pytest.raises(FileExistsError):
        write_durable(tmp_path / "file", b"new")


def test_private_names_are_hidden_and_all_different(tmp_path: Path) -> None:
    names = {private_path(tmp_path / "00000.arrow").name for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith(".00000.arrow.") for name in names)


def test_publishing_moves_the_bytes(tmp_path: Path) -> None:
    attempt = private_path(tmp_path / "shard")
    attempt.write_bytes(b"content")
    publish(attempt, tmp_path / "shard")
    assert not attempt.exists()
    assert sha256_file(tmp_path / "shard") == hashlib.sha256(b"content").hexdigest()


def test_making_a_folder_that_is_there_is_no_error(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_location_is_a_folder_a_url_or_a_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert open_store(store) is store
    assert str(store) == str(open_store(str(tmp_path))) == str(open_store(f"file://{tmp_path}"))
    with pytest.raises(ValueError, match="give it as text"):
        open_store(Path("s3://bucket/cache"))


def test_a_store_at_a_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="file is not a folder"):
        LocalStore(tmp_path / "file").read("plan.json")


def test_a_copy_on_one_disk_is_a_second_name_and_elsewhere_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "other")
    one.write_atomic("shards/a", b"content")
    other.copy_from(one, "shards/a", "shards/b")
    other.copy_from(one, "shards/a", "shards/b")
    assert (tmp_path / "one/shards/a").samefile(tmp_path / "other/shards/b")

    def refused(_path: Path, _name: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(durable_files, "link", refused)
    other.copy_from(one, "shards/a", "shards/b")
    assert not (tmp_path / "one/shards/a").samefile(tmp_path / "other/shards/b")
    assert other.read("shards/b") == b"content"
    assert other.names("shards") == ["shards/b"]


def test_a_damaged_file_is_replaced_by_the_copy(tmp_path: Path) -> None:
    one, other = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "other")
    one.write_atomic("a", b"content")
    other.write_atomic("a", b"cont")
    other.copy_from(one, "a", "a")
    assert other.read("a") == b"content"


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        LocalStore(tmp_path / "file" / "cache").require_writable()
    LocalStore(tmp_path / "new").require_writable()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_file_that_did_not_fit(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "as the system says it, without a name")

    monkeypatch.setattr(durable_files, "sync_file", full)
    for write in (write_atomic, create_exclusive):
        with pytest.raises(OSError, match=r"free some, or .* run the same command again") as caught:
            write(tmp_path / "file", b"data")
        assert caught.value.errno == number
        assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_shard_and_an_asset_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = LmHead(weight=torch.ones(VOCAB_SIZE, WIDTH))
    spec = make_spec(head_digest=head.digest)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*_: object) -> None:
        raise SafetensorError("Error while serializing: IoError(Os { kind: StorageFull })")

    for place, name, fail in (
        (ArrowFormat, "write", full),
        (writer, "save_file", full_in_rust),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(OSError, match="free some, or move it") as caught:
                build(tmp_path / "cache", make_shards(1), spec=spec, head=head)
        assert caught.value.errno == errno.ENOSPC
        assert ("00000.arrow" if name == "write" else "head.") in str(caught.value.filename)
    assert build(tmp_path / "cache", make_shards(1), spec=spec, head=head).num_samples == 2
