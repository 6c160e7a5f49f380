"""A file that may not be read is named with its owner, and never called damaged."""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jobs.cli.__main__ import main
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.options import ShardFormatName
from tests.support.builders import build, make_shards
from tests.support.strategies import VOCAB_SIZE, WIDTH, make_spec

NOBODY = 65534


@pytest.fixture
def cache() -> Iterator[Path]:
    """A folder that other users reach, which pytest's own they do not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "cache"
    shutil.rmtree(folder)


def refusal(work: Callable[[], object]) -> str:
    """What a user without rights gets from `work`."""
    user = os.geteuid()
    if user == 0:  # may read everything
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError) as caught:
            work()
    finally:
        os.seteuid(user)
    return str(caught.value)


def read_all(cache: Path) -> None:
    reader = CacheReader.open(cache)
    reader.head()
    for index in range(len(reader)):
        reader.read(index, reader.parts)


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
@pytest.mark.parametrize(
    "name", ["SEALED.json", "plan.json", "commits/00001.json", "head.safetensors", "shards", "."]
)
def test_permission_denied_names_file_and_owner(
    name: str, form: ShardFormatName, cache: Path
) -> None:
    head = LmHead(weight=torch.ones(VOCAB_SIZE, WIDTH))
    seal = build(cache, make_shards(), form, make_spec(head_digest=head.digest), head)
    closed = cache / (seal.shards[1].files[0].file if name == "shards" else name)
    closed.chmod(0)
    works: list[Callable[[], object]] = [lambda: verify_cache(cache)]
    if name != "commits/00001.json":  # readers need the seal alone
        works.append(lambda: read_all(cache))
    for work in works:
        said = refusal(work)
        assert f"{closed} belongs to" in said
        assert "mode 0000" in said
        assert "not damaged" in said
        assert "delete" not in said
    closed.chmod(0o755)
    assert not verify_cache(cache).problems
    read_all(cache)


def test_the_command_says_it_in_one_line(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(cache, make_shards(1))
    (cache / "SEALED.json").chmod(0)
    monkeypatch.setenv("EMKD_DEBUG", "")
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        assert main(["verify", str(cache)]) == 2
    finally:
        os.seteuid(user)
    (line,) = capsys.readouterr().err.splitlines()
    assert "SEALED.json: permission denied" in line


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_published_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    head = LmHead(weight=torch.ones(VOCAB_SIZE, WIDTH))
    before = os.umask(umask)
    try:
        build(
            tmp_path / "cache", make_shards(1), spec=make_spec(head_digest=head.digest), head=head
        )
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
