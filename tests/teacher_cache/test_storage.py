"""Names never hold half a file; of several creators one wins."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from teacher_cache.storage import (
    create_exclusive,
    make_folder,
    private_path,
    publish,
    sha256_file,
    write_atomic,
    write_durable,
)


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
