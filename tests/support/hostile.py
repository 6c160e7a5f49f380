"""Shards as a forger would write them, and a limit to the memory in which they are refused."""

import io
import json
import resource
import tarfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash


def rewrite_arrow(
    path: Path,
    change: Callable[[list[dict[str, Any]]], object],
    options: Any = None,
    schema: Any = None,
) -> None:
    """Write an Arrow shard anew with its rows as `change` leaves them."""
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    rows, schema = table.to_pylist(), schema or table.schema
    change(rows)
    with path.open("wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for row in rows:
            columns = [pa.array([row[field.name]], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def rewrite_tar(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Write a tar anew with its members as `change` leaves them."""
    with tarfile.open(path) as tar:
        files = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        members = {member.name: file.read() for member, file in files if file is not None}
    change(members)
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def rebound(key: str, source_id: str, messages: str, checks: str, shared_from: str | None) -> str:
    """The checks of a row, made to fit these texts."""
    sums = json.loads(checks)
    texts = [key, source_id, shared_from, messages, sums["images"], sorted(sums["planes"].items())]
    return json.dumps({**sums, "row": xxhash.xxh3_64_hexdigest(json.dumps(texts).encode())})


@contextmanager
def little_memory(num_bytes: int) -> Generator[None]:
    """Let this process take so much memory more; what asks for more gets a MemoryError."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Trap:
    """Unpickling one of these creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (self.path,))
