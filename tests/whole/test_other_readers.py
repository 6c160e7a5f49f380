"""DuckDB and Hugging Face `datasets` read our shards without our code.

Each reader runs in its own process, which fails if it has loaded a module of ours. pyarrow, tarfile
and webdataset are tested in test_format_docs.py.
"""

from pathlib import Path

import pytest
import torch

from teacher_cache.codec.columns import output_columns
from teacher_cache.codec.frames import decode_frame
from tests.docs.test_format_docs import DOCS, read, run_alone, small_cache

DUCKDB = """
import json, sys
import duckdb, pyarrow as pa
shards = pa.concat_tables(pa.ipc.open_file(pa.memory_map(path)).read_all() for path in sys.argv[1:])
rows = duckdb.sql('''
    SELECT key, source_id, json_extract_string(messages, '$[1].text'), len(images),
           octet_length(images[1]), octet_length(v_ids)
    FROM shards ORDER BY key
''').fetchall()
print(json.dumps(rows))
"""

DATASETS_ARROW = """
import json, sys
from datasets import load_dataset
rows = load_dataset("arrow", data_files=sys.argv[2:], split="train", cache_dir=sys.argv[1])
print(json.dumps([
    {name: value.hex() if isinstance(value, bytes) else [v.hex() for v in value]
     if isinstance(value, list) else value for name, value in row.items()} for row in rows]))
"""


def frame_of(row: dict[str, str], name: str) -> torch.Tensor:
    """The tensor in a column that was read as hexadecimal digits."""
    return decode_frame(bytes.fromhex(row[name]))


def test_duckdb_queries_arrow_shards(tmp_path: Path) -> None:
    reader, files = small_cache(tmp_path / "cache", "arrow", "topk", torch.float32)
    found = run_alone(DUCKDB, *files, cwd=tmp_path)
    assert [row[0] for row in found] == sorted(reader.keys)
    for key, source_id, answer, num_images, image_bytes, id_bytes in found:
        sample = read(reader, reader.find(key)).sample
        assert (source_id, answer) == (sample.source_id, sample.messages[1].text)
        assert num_images == len(sample.images)
        assert image_bytes == (len(sample.images[0]) if sample.images else None)
        assert id_bytes > 0


JOIN = """
import json, sys
import duckdb, pyarrow as pa
shards = pa.concat_tables(pa.ipc.open_file(pa.memory_map(path)).read_all() for path in sys.argv[2:])
print(json.dumps([
    [key, [image.hex() for image in images], v_ids.hex(), r_ids.hex()]
    for key, images, v_ids, r_ids in duckdb.sql(sys.argv[1]).fetchall()]))
"""


def test_the_join_in_the_docs_completes_rows_that_share(tmp_path: Path) -> None:
    page = (DOCS / "format.md").read_text()
    sql = page[page.index("    SELECT") :].split("\n\n")[0]
    reader, files = small_cache(tmp_path / "cache", "arrow", "topk", torch.float32, share=True)
    rows = run_alone(JOIN, sql, *files, cwd=tmp_path)
    assert sorted(row[0] for row in rows) == sorted(reader.keys)
    for key, images, v_ids, r_ids in rows:
        stored = read(reader, reader.find(key))
        columns = output_columns(stored.output)
        assert [bytes.fromhex(image) for image in images] == list(stored.sample.images)
        assert torch.equal(decode_frame(bytes.fromhex(v_ids)), columns["v_ids"])
        assert torch.equal(decode_frame(bytes.fromhex(r_ids)), columns["r_ids"])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_hugging_face_datasets_reads_arrow_shards(tmp_path: Path) -> None:
    reader, files = small_cache(tmp_path / "cache", "arrow", "topk", torch.float32)
    rows = run_alone(DATASETS_ARROW, tmp_path / "hf", *files, cwd=tmp_path)
    assert [row["key"] for row in rows] == list(reader.keys)
    for index, row in enumerate(rows):
        stored = read(reader, index)
        assert [bytes.fromhex(image) for image in row["images"]] == list(stored.sample.images)
        for name, values in output_columns(stored.output).items():
            assert torch.equal(frame_of(row, name), values), name
