"""A bad --config ends in one message with file, line and column, and exit code 2."""

import os
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from jobs.cli.config_file import read_config
from pipeline.config.build import SourceConfig
from pipeline.config.stages import ReportConfig

ANCHORS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))

BAD: list[tuple[str, bytes, str]] = [
    ("a.yaml", b"path: a.json\nlimit: [1\n", "line 3, column 1: "),
    ("a.yaml", b"path: a\n\tlimit: 3\n", "line 2, column 1: "),
    (
        "a.yaml",
        b"path: !!python/object/apply:os.system [ls]\n",
        "line 1, column 7: the tag .*python",
    ),
    ("a.yaml", b"path: !!binary aGk=\n", "line 1, column 7: the tag .*binary"),
    ("a.yaml", b"path: !x y\n", "line 1, column 7: the tag !x"),
    ("a.yaml", b"a0: &a0 x\n" + ANCHORS.encode(), r"line 2, column \d+: the alias \*a0"),
    ("a.yaml", b"a: &a [*a]\n", r"line 1, column 8: the alias \*a"),
    ("a.yaml", b"path: " + b"[" * 100_000, "line 1, column 26: nested deeper than 20"),
    ("a.yaml", b"path: " + b"{a: " * 5_000, r"line 1, column \d+: nested deeper than 20"),
    ("a.yaml", b"path: a\nlimit: 1\npath: b\n", "line 3, column 1: 'path' is there twice"),
    ("a.yaml", b"- path\n", "expected settings by name, found list"),
    ("a.yaml", b"path\n", "expected settings by name, found str"),
    ("a.yaml", b"", "expected settings by name, found nothing"),
    ("a.yaml", b"path: a\n---\npath: b\n", "line 2, column 1: "),
    ("a.yaml", b"path: a\nlimit: \x00\n", "line 2, column 8: the character 0x0 "),
    ("a.yaml", b"path: a\nb: caf\xe9\n", "line 2, column 7: byte 0xe9 is not UTF-8"),
    ("a.yaml", b"\xff\xfep\x00a\x00", "line 1, column 1: byte 0xff is not UTF-8"),
    ("a.yaml", b"? [a]\n: b\n", "line 1, column 3: "),
    ("a.yaml", b"path: a\n\x1b[31m: 3\n", "line 2, column 1: "),
    ("a.json", b'{"path": "a",\n "limit": }', "line 2, column 11: "),
    ("a.json", b'{"path": "a", "path": "b"}', "'path' is there twice"),
    ("a.json", b"[" * 100_000, "nested too deep"),
    ("a.json", b"[1]", "expected settings by name, found list"),
    ("a.json", b"\x89PNG\r\n", "line 1, column 1: byte 0x89 is not UTF-8"),
    ("a.yaml", b"path: a\nlimit: 2024-01-01\n", "limit: .*found '2024-01-01'"),
    ("a.yaml", b"path: 3\n", "path: .*found 3"),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD)
def test_a_bad_file_is_one_message_with_its_place(
    name: str, data: bytes, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s){name}.*{expected}"):
        read_config(SourceConfig, str(file))
    assert main(["build", "--config", str(file)]) == 2


def test_what_looks_like_a_date_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("path: 2024-01-01\nimage_root: null\nlimit: 5\n")
    found = read_config(SourceConfig, str(tmp_path / "a.yaml"))
    assert found == SourceConfig(path="2024-01-01", limit=5)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "path: a\n"), ("a.json", '{"path": "a"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_config(SourceConfig, str(tmp_path / name)) == SourceConfig(path="a")


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_pipe_a_device_and_a_folder_are_refused_unopened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
    (tmp_path / f"folder-{name}").mkdir()
    for prefix, kind in (("", "named pipe"), ("zero-", "character device"), ("folder-", "folder")):
        with pytest.raises(ValueError, match=rf"--config .*{prefix}{name}: cannot be .*{kind}"):
            read_config(ReportConfig, str(tmp_path / f"{prefix}{name}"))
