"""A store that denies access says so, at once and by name; nothing is called damaged."""

from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from teacher_cache.folder.reader import CacheReader
from tests.support.builders import build, make_shards
from tests.support.s3_server import S3Server, at_first


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("403 Forbidden", "AccessDenied"),
        ("403 Forbidden", "InvalidAccessKeyId"),
        ("403 Forbidden", "SignatureDoesNotMatch"),
        ("401 Unauthorized", "Unauthorized"),
    ],
)
def test_a_store_that_denies_access_says_so_at_once(
    status: str, code: str, s3: S3Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build(url, make_shards(1))
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    s3.requests.clear()
    s3.faults.append(at_first(1000, (status, body)))
    with pytest.raises(
        PermissionError, match=r"SEALED\.json could not be read, the store denies it"
    ):
        CacheReader.open(url)
    assert len(s3.requests) == 1
    assert main(["verify", url]) == 2
    assert "check the credentials" in capsys.readouterr().err


def test_missing_credentials_are_named(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=r"the store denies it .*redential"):
        CacheReader.open(url)
