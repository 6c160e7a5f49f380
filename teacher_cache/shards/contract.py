"""Tests that every shard format must pass, for whoever writes another one.

    class TestMyFormat(ShardContract):
        form = MyFormat()

        def rows(self):
            return list(encode_rows(my_samples, my_spec))  # at least three, none shares a record

pytest finds the tests in the subclass. This module imports no test library, and nothing in the
product imports it. A format stores frames and never decodes them, so the tests use encoded rows.
"""

import dataclasses
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from teacher_cache.codec.columns import VISION_COLUMNS
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.shard import Shard, ShardFormat

METADATA = {"emkd.shard": "3", "emkd.spec": '{"a": "b"}'}


class ShardContract(ABC):
    """Promises of a shard format."""

    form: ClassVar[ShardFormat]

    @abstractmethod
    def rows(self) -> Sequence[EncodedRow]:
        """Rows with images, the same columns, and some frames of equal size but other content."""

    def write(self, path: Path, rows: Sequence[EncodedRow]) -> Path:
        """A new file at `path` with these rows."""
        self.form.write(path, rows, self.rows()[0].frames.keys(), METADATA)
        return path

    def test_rows_come_back_to_the_bit(self, tmp_path: Path) -> None:
        first, *others = self.rows()
        repeated = dataclasses.replace(first, key=f"{first.key}-1")
        guest = dataclasses.replace(first, key=f"{first.key}-2", shared_from=first.key)
        rows = [first, repeated, *others, guest]
        shard = self.form.open(self.write(tmp_path / "shard", rows))
        assert shard.metadata == METADATA
        assert shard.keys == tuple(row.key for row in rows)
        assert _all_rows(shard, first.frames) == rows
        sizes = Counter[str]()
        for row in (row.without_shared for row in rows):
            sizes.update({name: len(frame) for name, frame in row.frames.items()})
            sizes["images"] += sum(map(len, row.images))
        assert shard.stored_bytes() == sizes

    def test_a_shared_record_is_stored_once(self, tmp_path: Path) -> None:
        owner = self.rows()[0]
        guest = dataclasses.replace(owner, key=f"{owner.key}-1", shared_from=owner.key)
        alone = self.write(tmp_path / "alone", [owner]).read_bytes()
        both = self.write(tmp_path / "both", [owner, guest]).read_bytes()
        pieces = [*owner.images, *(owner.frames[name] for name in VISION_COLUMNS & {*owner.frames})]
        assert pieces
        assert all(both.count(piece) == alone.count(piece) for piece in pieces)

    def test_equal_rows_give_equal_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        first = self.write(tmp_path / "a", self.rows())
        second = self.write(tmp_path / "elsewhere" / "b", self.rows())
        assert first.read_bytes() == second.read_bytes()

    def test_only_the_columns_asked_for_are_read(self, tmp_path: Path) -> None:
        row = self.rows()[0]
        name = max(row.frames, key=lambda column: len(row.frames[column]))
        path = self.write(tmp_path / "shard", [row])
        data = bytearray(path.read_bytes())
        data[data.index(row.frames[name]) + len(row.frames[name]) // 2] ^= 1
        path.write_bytes(data)
        shard = self.form.open(path)
        others = row.frames.keys() - {name}
        assert shard.read(0, others).frames.keys() == others
        with _refused(ShardCorruptError, path.name, row.key, name):
            shard.read(0, [name])

    def test_a_flipped_bit_is_an_error_or_changes_nothing(self, tmp_path: Path) -> None:
        rows = list(self.rows())
        path = self.write(tmp_path / "shard", rows)
        intact, draws, num_errors = path.read_bytes(), random.Random(0), 0
        for _ in range(64):
            data = bytearray(intact)
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            path.write_bytes(data)
            try:
                assert self._read_again(path, rows) == rows
            except ShardCorruptError as error:
                num_errors += 1
                assert path.name in str(error)  # noqa: PT017
        assert num_errors > 10

    def test_a_cut_or_zeroed_file_is_an_error(self, tmp_path: Path) -> None:
        rows = list(self.rows())
        path = self.write(tmp_path / "shard", rows)
        intact = path.read_bytes()
        for end in (0, 1, 8, 512, 1024, len(intact) // 2, len(intact) // 2 + 7, len(intact) - 1):
            for tail in (b"", bytes(len(intact) - end)):
                if any(intact[end:]):  # else nothing but padding is lost
                    path.write_bytes(intact[:end] + tail)
                    with _refused(ShardCorruptError, path.name):
                        self._read_again(path, rows)

    def test_frames_of_two_rows_cannot_be_exchanged(self, tmp_path: Path) -> None:
        left, right = self.rows()[:2]
        pairs = [(name, left.frames[name], right.frames[name]) for name in sorted(left.frames)]
        name, mine, theirs = next(p for p in pairs if p[1] != p[2] and len(p[1]) == len(p[2]))
        path = self.write(tmp_path / "shard", [left, right])
        data = path.read_bytes().replace(mine, b"?" * len(mine))
        path.write_bytes(data.replace(theirs, mine).replace(b"?" * len(mine), theirs))
        with _refused(ShardCorruptError, path.name, name):
            self._read_again(path, [left, right])

    def test_many_threads_read_what_one_reads(self, tmp_path: Path) -> None:
        rows = list(self.rows())
        shard = self.form.open(self.write(tmp_path / "shard", rows))
        with ThreadPoolExecutor(6) as pool:
            found = pool.map(lambda n: shard.read(n, rows[0].frames), [*range(len(rows))] * 20)
        assert [*found] == rows * 20

    def test_an_empty_shard_is_a_shard_and_is_never_overwritten(self, tmp_path: Path) -> None:
        assert self.form.open(self.write(tmp_path / "shard", [])).keys == ()
        with _refused(FileExistsError):
            self.write(tmp_path / "shard", [])

    def test_a_row_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        shard = self.form.open(self.write(tmp_path / "shard", self.rows()[:1]))
        for number in (1, 7, -1):
            with _refused(ShardCorruptError, shard.path.name, f"row {number}"):
                shard.read(number, ())

    def test_what_is_not_a_shard_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "shard"
        for content in (None, b"", b"hello", bytes(20_000)):
            if content is not None:
                path.write_bytes(content)
            with _refused(ShardCorruptError, path.name):
                self.form.open(path)

    def test_a_row_with_other_columns_is_refused(self, tmp_path: Path) -> None:
        row = self.rows()[0]
        short = dataclasses.replace(row, frames=dict([*row.frames.items()][1:]))
        with _refused(ValueError, row.key):
            self.write(tmp_path / "shard", [short])

    def _read_again(self, path: Path, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Every row of a file that should have as many; `ShardCorruptError` for another number."""
        shard = self.form.open(path)
        if shard.num_rows != len(rows) or shard.metadata != METADATA:
            raise ShardCorruptError(f"{path}: not the shard that was written")
        return _all_rows(shard, rows[0].frames)


def _all_rows(shard: Shard, columns: Collection[str]) -> list[EncodedRow]:
    return [shard.read(number, columns) for number in range(shard.num_rows)]


@contextmanager
def _refused(error: type[Exception], *words: str) -> Generator[None]:
    """Fail unless the block raises this error, with these words in its message."""
    try:
        yield
    except error as found:
        assert all(word in str(found) for word in words), found  # noqa: PT017
    else:
        raise AssertionError(f"expected {error.__name__} with {words}")
