"""What every shard format must keep; `test_shards.py` runs this class for each of them."""

import dataclasses
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.codec.columns import TIER_PARTS, encode_plane, output_planes, parts_in, planes_of
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import RecordKind, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import encode_row, encode_rows, read_sample
from teacher_cache.shards.shard import ShardFormat
from tests.support.strategies import TIERS, assert_same, cached_samples, make_cached, make_spec

METADATA = {"emkd.shard": "3", "emkd.spec": '{"a": "b"}'}
PLANES = planes_of(TIER_PARTS["topk"])


class ShardContract:
    """Promises of a shard format, for any rows."""

    name: ShardFormatName

    @property
    def form(self) -> ShardFormat:
        return shard_format(self.name)

    def written(self, folder: Path, cached: Sequence[CachedSample], records: RecordKind) -> Path:
        path = folder / f"shard{self.form.suffix}"
        spec = make_spec(records)
        self.form.write(path, encode_rows(cached, spec), planes_of(TIER_PARTS[records]), METADATA)
        return path

    def read_all(self, path: Path, cached: Sequence[CachedSample]) -> list[CachedSample]:
        """Every part of the samples that were written, each at its place."""
        shard, spec = self.form.open(path), make_spec("topk")
        if shard.num_rows != len(cached) or shard.metadata != METADATA:
            raise ShardCorruptError(f"{path}: not the shard that was written")
        keys = [sample.sample.key for sample in cached]
        return [read_sample(shard, n, key, TIER_PARTS["topk"], spec) for n, key in enumerate(keys)]

    @settings(
        deadline=None,
        max_examples=25,
        suppress_health_check=[HealthCheck.differing_executors],  # one test, two formats
    )
    @given(data=st.data(), records=st.sampled_from(TIERS))
    def test_any_rows_come_back_to_the_bit(self, data: st.DataObject, records: RecordKind) -> None:
        rows = st.lists(cached_samples(records), max_size=3, unique_by=lambda row: row.sample.key)
        cached = data.draw(rows)
        spec = make_spec(records)
        with tempfile.TemporaryDirectory() as folder:
            shard = self.form.open(self.written(Path(folder), cached, records))
            assert shard.metadata == METADATA
            assert shard.keys == tuple(sample.sample.key for sample in cached)
            for row, sample in enumerate(cached):
                parts = TIER_PARTS[records]
                assert_same(read_sample(shard, row, sample.sample.key, parts, spec), sample)

    def test_equal_rows_give_equal_bytes(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(4)]
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        first = self.written(tmp_path / "a", cached, "topk")
        second = self.written(tmp_path / "b", cached, "topk")
        assert first.read_bytes() == second.read_bytes()

    def test_repeated_samples_are_told_apart(self, tmp_path: Path) -> None:
        one = make_cached(1)
        sample = dataclasses.replace(one.sample, key=f"{one.sample.key}-1")
        again = dataclasses.replace(one, sample=sample)
        path = self.written(tmp_path, [one, again], "topk")
        assert [read.sample.key for read in self.read_all(path, [one, again])] == [
            one.sample.key,
            f"{one.sample.key}-1",
        ]

    def test_only_the_planes_asked_for_are_read(self, tmp_path: Path) -> None:
        cached = make_cached(1)
        path = self.written(tmp_path, [cached], "topk")
        data = bytearray(path.read_bytes())
        frame = encode_plane("v_logits", output_planes(cached.output)["v_logits"])
        data[data.index(frame) + len(frame) // 2] ^= 1
        path.write_bytes(data)
        shard, spec, key = self.form.open(path), make_spec("topk"), cached.sample.key
        read = read_sample(shard, 0, key, {"response", "affinity"}, spec)
        assert parts_in(read.output) == {"response", "affinity"}
        with pytest.raises(ShardCorruptError, match=rf"{path.name}: sample {key}.*v_logits"):
            read_sample(shard, 0, key, {"vision"}, spec)

    def test_a_flipped_byte_is_an_error_or_changes_nothing(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.written(tmp_path, cached, "topk")
        intact = path.read_bytes()
        num_errors = 0
        draws = random.Random(0)
        for _ in range(64):
            data = bytearray(intact)
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            path.write_bytes(data)
            try:
                read = self.read_all(path, cached)
            except ShardCorruptError as error:
                num_errors += 1
                assert path.name in str(error)  # noqa: PT017
            else:
                for left, right in zip(read, cached, strict=True):
                    assert_same(left, right)
        assert num_errors > 10

    def test_a_cut_or_zeroed_file_is_an_error(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.written(tmp_path, cached, "topk")
        intact = path.read_bytes()
        for end in (0, 1, 8, 512, 1024, len(intact) // 2, len(intact) // 2 + 7, len(intact) - 1):
            for tail in (b"", bytes(len(intact) - end)):
                if not any(intact[end:]):
                    continue  # nothing but padding is lost
                path.write_bytes(intact[:end] + tail)
                with pytest.raises(ShardCorruptError, match=path.name):
                    self.read_all(path, cached)

    def test_frames_of_two_samples_cannot_be_exchanged(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(2)]
        path = self.written(tmp_path, cached, "topk")
        left, right = (encode_plane("v_lse", output_planes(row.output)["v_lse"]) for row in cached)
        assert len(left) == len(right)
        data = path.read_bytes().replace(left, b"?" * len(left))
        path.write_bytes(data.replace(right, left).replace(b"?" * len(left), right))
        with pytest.raises(ShardCorruptError, match="v_lse"):
            self.read_all(path, cached)

    def test_content_that_is_not_the_keys_is_refused(self, tmp_path: Path) -> None:
        one, other = make_cached(1), make_cached(2)
        swapped = dataclasses.replace(one.sample, key=other.sample.key)
        path = self.written(tmp_path, [dataclasses.replace(one, sample=swapped)], "topk")
        with pytest.raises(ShardCorruptError, match="not those that the key names"):
            self.read_all(path, [other])

    def test_many_threads_read_what_one_reads(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(6)]
        shard = self.form.open(self.written(tmp_path, cached, "topk"))
        alone = [shard.read(row, PLANES) for row in range(6)]
        with ThreadPoolExecutor(6) as pool:
            rows = [number % 6 for number in range(120)]
            assert list(pool.map(lambda row: shard.read(row, PLANES), rows)) == alone * 20

    def test_an_empty_shard_is_a_shard(self, tmp_path: Path) -> None:
        assert self.form.open(self.written(tmp_path, [], "topk")).keys == ()

    def test_a_row_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        shard = self.form.open(self.written(tmp_path, [make_cached(1)], "topk"))
        for row in (1, 7, -1):
            with pytest.raises(ShardCorruptError, match=f"it has 1 rows, none is row {row}"):
                shard.read(row, PLANES)

    def test_what_is_not_a_shard_is_refused(self, tmp_path: Path) -> None:
        for content in (b"", b"hello", bytes(20_000)):
            (tmp_path / "shard").write_bytes(content)
            with pytest.raises(ShardCorruptError, match="shard"):
                self.form.open(tmp_path / "shard")
        with pytest.raises(ShardCorruptError, match="absent"):
            self.form.open(tmp_path / "absent")

    def test_a_row_with_other_planes_is_refused(self, tmp_path: Path) -> None:
        row = encode_row(make_cached(1), make_spec("topk"))
        with pytest.raises(ValueError, match="the shard holds"):
            self.form.write(tmp_path / "shard", [row], planes_of({"hidden"}), {})

    def test_a_file_that_is_there_is_never_overwritten(self, tmp_path: Path) -> None:
        self.written(tmp_path, [], "topk")
        with pytest.raises(FileExistsError):
            self.written(tmp_path, [], "topk")
