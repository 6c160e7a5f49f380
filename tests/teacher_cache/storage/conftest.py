"""A place on the S3 server for each test."""

import uuid

import pytest

from teacher_cache.storage import object_store
from tests.support.lazy import s3fs
from tests.support.s3_server import BUCKET, S3Server


@pytest.fixture
def url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of its own on the server, and no long waits."""
    monkeypatch.setattr(object_store, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
