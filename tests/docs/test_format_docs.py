"""docs/format.md is true: strangers read our shards without our packages, and get our numbers.

Each reading runs in a process of its own, which fails if it has loaded anything of ours.
"""

import ast
import functools
import hashlib
import json
import re
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import xxhash
import zstandard

from teacher_cache.codec.columns import PART_COLUMNS, TIER_PARTS, output_columns
from teacher_cache.codec.frames import DTYPES
from teacher_cache.codec.transforms import RAGGED_DELTA, TRANSFORMS
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.manifest import LAYOUT_VERSION
from teacher_cache.schema.options import RecordKind, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.formats import shard_format
from tests.support.builders import build
from tests.support.paths import DOCS
from tests.support.strategies import TIERS, asked_again, make_cached, make_output, make_spec

OURS = ("teacher_cache", "student_train", "pipeline", "jobs")


def rows_of(records: RecordKind, dtype: torch.dtype) -> list[CachedSample]:
    """Four samples: large and small ones, without text, without image."""
    shapes = [(((12, 12), (8, 8)), 9), (((2, 3),), 5), (((1, 1),), 0), ((), 4)]
    return [
        CachedSample(
            sample=make_cached(number).sample,
            output=make_output(records, number, views, num_text, dtype=dtype),
        )
        for number, (views, num_text) in enumerate(shapes)
    ]


def small_cache(
    folder: Path,
    form: ShardFormatName,
    records: RecordKind,
    dtype: torch.dtype,
    share: bool = False,
) -> tuple[CacheReader, list[Path]]:
    """A sealed cache of two shards, and their files; `share`: row 2 has the record of row 0."""
    rows = rows_of(records, dtype)
    more = [asked_again(rows[0], 5, records)] if share else []
    build(folder, [[*rows[:2], *more], rows[2:]], form, make_spec(records))
    return CacheReader.open(folder), sorted((folder / "shards").iterdir())


def read(reader: CacheReader, index: int) -> CachedSample:
    """A whole sample."""
    return reader.read(index, TIER_PARTS[reader.spec.records])


def run_alone(code: str, *arguments: object, cwd: Path) -> Any:
    """What `code` prints as JSON in a bare process that must not load our packages."""
    guard = f"\nimport sys; assert not set({OURS!r}) & set(sys.modules), 'ours was loaded'"
    command = [sys.executable, "-P", "-W", "ignore", "-c", code + guard, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ_ARROW = f"""
import json, sys
sys.path.append({str(DOCS)!r})
from read_shard import read_shard
metadata, rows = read_shard(sys.argv[1])
print(json.dumps([metadata, [
    {{name: [str(v.dtype), list(v.shape), v.tobytes().hex()] if hasattr(v, "dtype") else str(v)
     for name, v in row.items()}} for row in rows]]))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("records", TIERS)
def test_the_script_in_the_docs_decodes_what_the_reader_decodes(
    tmp_path: Path, records: RecordKind, dtype: torch.dtype
) -> None:
    reader, files = small_cache(tmp_path / "cache", "arrow", records, dtype, share=True)
    shards = [run_alone(READ_ARROW, file, cwd=tmp_path) for file in files]
    assert json.loads(shards[0][0]["emkd.spec"])["records"] == records
    rows = [row for _, shard in shards for row in shard]
    assert [row["key"] for row in rows] == list(reader.keys)
    for index, row in enumerate(rows):
        for name, values in output_columns(read(reader, index).output).items():
            wide = values.float() if values.dtype == torch.bfloat16 else values
            shown = [str(wide.numpy().dtype), list(wide.shape), wide.numpy().tobytes().hex()]
            assert row[name] == shown, (index, name)
        assert row["images"] == str(list(read(reader, index).sample.images))


def test_names_and_sums_are_made_as_the_page_says(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader, files = small_cache(cache, "arrow", "topk", torch.float32, share=True)
    for number, file in enumerate(files):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert file.name == f"{number:05d}-{digest[:16]}.arrow"
        record = json.loads((cache / f"commits/{number:05d}.json").read_text())
        assert [each["sha256"] for each in record["files"]] == [digest]
    rows = [
        row
        for file in files
        for row in pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_pylist()
    ]
    by_key = {row["key"]: row for row in rows}
    for row in rows:
        lender = by_key.get(row["shared_from"], row)
        row["images"] = lender["images"]
        turns = [[turn["role"], turn["text"]] for turn in json.loads(row["messages"])]
        data = b"".join(hashlib.sha256(image).digest() for image in row["images"])
        data += json.dumps(turns, ensure_ascii=False).encode()
        assert hashlib.sha256(data).hexdigest()[:32] == row["key"]
        frames = {name: v or lender[name] for name, v in row.items() if isinstance(v, bytes)}
        images = [xxhash.xxh3_64_hexdigest(image) for image in row["images"]]
        sums = {name: xxhash.xxh3_64_hexdigest(frame) for name, frame in frames.items()}
        owner = row["shared_from"] or None
        texts = [row["key"], row["source_id"], owner, row["messages"], images, sorted(sums.items())]
        total = xxhash.xxh3_64_hexdigest(json.dumps(texts).encode())
        assert json.loads(row["checks"]) == {"images": images, "planes": sums, "row": total}
    stored = json.loads((cache / "plan.json").read_text())
    compact = functools.partial(
        json.dumps, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    spec = hashlib.sha256(compact(stored["spec"]).encode()).hexdigest()
    keys = [[key for key, _ in shard] for shard in stored["shards"]]
    fingerprint = hashlib.sha256(compact({"keys": keys, "spec": spec}).encode()).hexdigest()
    assert reader.seal.plan == reader.seal.fingerprint == fingerprint


def test_the_script_prints_a_summary(tmp_path: Path) -> None:
    reader, files = small_cache(tmp_path / "cache", "arrow", "topk+sketch", torch.float16)
    command = [sys.executable, "-P", str(DOCS / "read_shard.py"), str(files[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "shard 0: 2 samples, records topk+sketch"
    assert f"{reader.keys[0]} (sample-0), 1 images" in lines
    total = sum(read(reader, 0).output.content_ids.tolist())
    assert any(line.split() == f"content_ids int64 (9,) sum {total}".split() for line in lines)


def test_the_script_is_short_and_imports_three_libraries() -> None:
    text = (DOCS / "read_shard.py").read_text()
    assert len(text.splitlines()) <= 100
    nodes = list(ast.walk(ast.parse(text)))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules - sys.stdlib_module_names == {"numpy", "pyarrow", "zstandard"}


READ_TAR = """
import json, sys, tarfile
with tarfile.open(sys.argv[1]) as tar:
    print(json.dumps({m.name: tar.extractfile(m).read().hex() for m in tar.getmembers()}))
"""

READ_WEBDATASET = """
import json, sys
import webdataset as wds
data = wds.WebDataset(sys.argv[1], shardshuffle=False)
print(json.dumps([{name: value.hex() if isinstance(value, bytes) else value
                   for name, value in row.items()} for row in data]))
"""


def test_tarfile_opens_a_tar_shard(tmp_path: Path) -> None:
    reader, files = small_cache(tmp_path / "cache", "webdataset", "topk", torch.float32)
    members = run_alone(READ_TAR, files[0], cwd=tmp_path)
    metadata = json.loads(bytes.fromhex(members.pop("__shard__/metadata.json")))
    assert metadata["emkd.layout_version"] == str(LAYOUT_VERSION)
    for index in range(2):
        key, stored = reader.keys[index], read(reader, index)
        text = json.loads(bytes.fromhex(members.pop(f"{key}.sample.json")))
        assert text["source_id"] == stored.sample.source_id
        images = [name for name in members if name.startswith(key) and ".image." in name]
        assert [bytes.fromhex(members.pop(name)) for name in images] == list(stored.sample.images)
        for name in output_columns(stored.output):
            content = zstandard.decompress(bytes.fromhex(members.pop(f"{key}.{name}.zst")))
            shape = struct.unpack_from(f"<{content[2]}I", content, 3)
            assert (content[0] in DTYPES, content[1] in TRANSFORMS) == (True, True)
            assert shape == tuple(output_columns(stored.output)[name].shape)
    assert not members


def test_plain_webdataset_opens_a_tar_shard(tmp_path: Path) -> None:
    reader, files = small_cache(tmp_path / "cache", "webdataset", "topk", torch.float32)
    rows = [row for file in files for row in run_alone(READ_WEBDATASET, file, cwd=tmp_path)]
    assert [row["__key__"] for row in rows] == list(reader.keys)
    for index, row in enumerate(rows):
        messages = json.loads(json.loads(bytes.fromhex(row["sample.json"]))["messages"])
        assert messages[1]["text"] == read(reader, index).sample.messages[1].text
        assert bytes.fromhex(row["0.image.png"]) == read(reader, index).sample.images[0]


def test_a_tar_row_that_shares_names_the_row_with_its_images(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, files = small_cache(cache, "webdataset", "topk", torch.float32, share=True)
    owner, _, guest = run_alone(READ_WEBDATASET, files[0], cwd=tmp_path)
    text = json.loads(bytes.fromhex(guest["sample.json"]))
    assert text["shared_from"] == owner["__key__"]
    assert json.loads(bytes.fromhex(owner["sample.json"]))["shared_from"] is None
    left_out = {"0.image.png", "views.zst", "v_ids.zst", "v_logits.zst", "v_lse.zst", "v_tail.zst"}
    assert owner.keys() - guest.keys() == left_out
    assert guest.keys() <= owner.keys()
    sums = json.loads(text["checks"])["planes"]
    for name in ("views", "v_ids", "r_ids"):
        frame = bytes.fromhex((guest if name == "r_ids" else owner)[f"{name}.zst"])
        assert sums[name] == xxhash.xxh3_64_hexdigest(frame)


def test_every_transform_and_both_sizes_of_floats_occur_in_these_shards(tmp_path: Path) -> None:
    seen: set[tuple[str, int]] = set()
    for dtype in (torch.float32, torch.bfloat16):
        _, files = small_cache(tmp_path / str(dtype), "arrow", "topk+sketch", dtype)
        for file in files:
            shard = shard_format("arrow").open(file)
            for row in range(shard.num_rows):
                frames = shard.read(row, ["v_ids", "v_logits", "a_cosine", "s_codes"]).frames
                seen |= {(name, zstandard.decompress(each)[1]) for name, each in frames.items()}
    elsewhere = {RAGGED_DELTA.code}  # test_format_forms.py
    assert {code for _, code in seen} == set(TRANSFORMS) - elsewhere


def test_format_md_names_every_column_dtype_and_transform() -> None:
    text = (DOCS / "format.md").read_text()
    for name in chain.from_iterable(PART_COLUMNS.values()):
        assert f"`{re.sub('^g[1-9]', 'g<n>', name)}`" in text, name
    for code, dtype in DTYPES.items():
        assert f"| {code} | {str(dtype).removeprefix('torch.')} |" in text
    for code in TRANSFORMS:
        assert f"\n**{code}, " in text
    assert f"Layout version {LAYOUT_VERSION}" in text
