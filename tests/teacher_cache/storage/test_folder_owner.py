"""Promises of storage/folder_owner.py: the process that came last writes, the others stop."""

import os
import socket
from pathlib import Path

import pytest

from teacher_cache.schema.errors import FolderTakenError
from teacher_cache.storage.folder_owner import OWNER_FILE, FolderOwner


def _made(owner: FolderOwner, text: str) -> Path:
    made = owner.private / "thing"
    made.mkdir(parents=True)
    (made / "file").write_text(text)
    return made


def test_the_last_process_publishes_and_an_overtaken_one_is_told_by_whom(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = FolderOwner.take(folder)
    first.require()
    made = _made(first, "first")
    second = FolderOwner.take(folder)
    assert not made.exists(), "what an overtaken process made is removed"
    for act in (first.require, lambda: first.publish(made, "thing")):
        with pytest.raises(FolderTakenError, match="writes to this folder since") as refused:
            act()
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    late = _made(first, "late")
    with pytest.raises(FolderTakenError):
        first.require()
    assert not late.exists(), "what it makes later it removes itself"
    assert second.publish(_made(second, "second"), "thing")
    assert (folder / "thing" / "file").read_text() == "second"
    second.release()
    assert sorted(path.name for path in folder.iterdir()) == [OWNER_FILE, "thing"]


def test_an_error_that_follows_from_being_overtaken_is_said_so(tmp_path: Path) -> None:
    """The later process removes the private folder while the other writes into it."""
    first = FolderOwner.take(tmp_path)
    made = _made(first, "first")
    FolderOwner.take(tmp_path)
    with pytest.raises(FolderTakenError, match="writes to this folder since"), first.while_owned():
        (made / "more").write_text("x")
    last = FolderOwner.take(tmp_path)
    with pytest.raises(FileNotFoundError), last.while_owned():
        (tmp_path / "absent").read_text()


def test_what_is_published_is_never_replaced(tmp_path: Path) -> None:
    owner = FolderOwner.take(tmp_path)
    assert owner.publish(_made(owner, "one"), "thing")
    made = _made(owner, "two")
    assert not owner.publish(made, "thing")
    assert not made.exists()
    assert (tmp_path / "thing" / "file").read_text() == "one"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", None])
def test_an_unreadable_owner_is_another_process(tmp_path: Path, damage: bytes | None) -> None:
    owner = FolderOwner.take(tmp_path)
    path = tmp_path / OWNER_FILE
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(FolderTakenError, match="unreadable"):
        owner.require()
    FolderOwner.take(tmp_path).require()
