"""Fixtures of the tests that train: one tiny cache, and one run that nothing disturbed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from teacher_cache.folder.reader import CacheReader
from tests.support.runs import tiny_cache, train


@pytest.fixture(scope="module")
def vanilla(llava: Path) -> Path:
    return llava


@pytest.fixture(scope="module")
def reader(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return tiny_cache(tmp_path_factory.mktemp("trainer") / "cache", vanilla)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(
    reader: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, reader, vanilla)
    return run
