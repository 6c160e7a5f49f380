"""Tensors and records come back to the bit, and damage never becomes a number."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codec import frames
from teacher_cache.codec.columns import (
    TIER_PARTS,
    Part,
    columns_of,
    encode_column,
    output_columns,
    output_from_columns,
    parts_in,
)
from teacher_cache.codec.frames import DTYPES, decode_frame, encode_frame
from teacher_cache.codec.transforms import (
    BYTE_STREAM_SPLIT,
    DELTA_BY_RANK,
    DICTIONARY,
    TRANSFORMS,
    Transform,
    ragged_delta,
)
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import RecordKind
from tests.support.strategies import (
    BEARTYPE_DRAWS,
    TIERS,
    VOCAB_SIZE,
    assert_same_bits,
    assert_same_outputs,
    make_output,
    teacher_outputs,
)

pytestmark = BEARTYPE_DRAWS


@settings(deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    transform=st.sampled_from(list(TRANSFORMS.values())),
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tensor_of_any_dtype_comes_back_to_the_bit(
    dtype: torch.dtype, transform: Transform, shape: list[int], seed: int
) -> None:
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    # Random bits: NaNs with payloads, infinities and subnormals among the floats.
    values = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    tensor = torch.zeros(shape, dtype=dtype)
    if num_bytes:
        bits = values % 2 if dtype == torch.bool else values
        tensor = torch.from_numpy(bits).view(dtype).reshape(shape)
    assert_same_bits(decode_frame(encode_frame(tensor, [transform])), tensor)


def test_views_that_are_not_contiguous_are_stored_by_their_values() -> None:
    tensor = torch.arange(12).reshape(3, 4).T[::2]
    assert_same_bits(decode_frame(encode_frame(tensor)), tensor.contiguous())


def test_a_frame_can_be_read_without_this_package() -> None:
    content = zstandard.decompress(encode_frame(torch.tensor([[1.5, -2.0]])))
    assert content == struct.pack("<BBBII2f", 1, 0, 2, 1, 2, 1.5, -2.0)


@pytest.mark.parametrize(
    ("transform", "payload"),
    [
        # 1.5 is 0x3fc00000, -2.0 is 0xc0000000: the lowest bytes of both, the next ones, ...
        (BYTE_STREAM_SPLIT, "0000 0000 c000 3fc0"),
        # In descending order 1.5 is 0x403fffff and -2.0 is 0xc0000000: 0x7fc00001 more.
        (DELTA_BY_RANK, "ff01 ff00 3fc0 407f"),
        # Two entries, ascending as integers: 0x3fc00000, then 0x80400000 more; places 0 and 1.
        (DICTIONARY, "02000000 0000 0000 c040 3f80 00 01"),
    ],
)
def test_the_bytes_of_a_transform_are_these(transform: Transform, payload: str) -> None:
    content = zstandard.decompress(encode_frame(torch.tensor([[1.5, -2.0]]), [transform]))
    header = struct.pack("<BBBII", 1, transform.code, 2, 1, 2)
    assert content.hex() == (header + bytes.fromhex(payload)).hex()


@pytest.mark.parametrize("num_entries", [1, 256, 257, 65_536, 65_537])
def test_a_dictionary_of_any_size_comes_back(num_entries: int) -> None:
    ids = torch.randperm(num_entries, dtype=torch.int32).repeat(2)
    frame = encode_frame(ids, [DICTIONARY])
    width = {1: 1, 256: 1, 257: 2, 65_536: 2, 65_537: 4}[num_entries]
    size = zstandard.get_frame_parameters(frame).content_size
    assert size == 3 + 4 + 4 + num_entries * (4 + 2 * width)
    assert_same_bits(decode_frame(frame), ids)


def test_the_smallest_of_the_layouts_is_taken() -> None:
    ids = torch.randint(100_000, 100_300, (64, 64), dtype=torch.int32)
    sizes = [len(encode_frame(ids, [each])) for each in TRANSFORMS.values()]
    assert len(encode_frame(ids, list(TRANSFORMS.values()))) == min(sizes)


def test_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        encode_frame(torch.zeros(2, dtype=torch.complex64))


def test_more_dimensions_than_a_header_may_have_are_refused() -> None:
    assert_same_bits(decode_frame(encode_frame(torch.zeros([1] * 8))), torch.zeros([1] * 8))
    with pytest.raises(ValueError, match="9 dimensions"):
        encode_frame(torch.zeros([1] * 9))


def test_what_a_hostile_header_says_is_not_repeated_at_length() -> None:
    sizes = [0] + [2**32 - 1] * 254
    frame = _frame(struct.pack("<BBB255I", 1, 0, 255, *sizes))
    with pytest.raises(ShardCorruptError) as refused:
        decode_frame(frame)
    assert len(str(refused.value)) < 200


def test_threads_decode_side_by_side() -> None:
    tensors = [torch.arange(n, n + 5000, dtype=torch.int32) for n in range(64)]
    encoded = [encode_frame(tensor, [BYTE_STREAM_SPLIT]) for tensor in tensors]
    with ThreadPoolExecutor(8) as pool:
        for tensor, decoded in zip(tensors, pool.map(decode_frame, encoded), strict=True):
            assert_same_bits(decoded, tensor)


def test_every_flipped_bit_of_a_frame_is_noticed() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    frame = encode_frame(tensor)
    for place in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[place] ^= 1 << bit
            try:
                # Two header bits mean nothing to zstd; then the numbers must be right.
                assert_same_bits(decode_frame(bytes(damaged)), tensor)
            except ShardCorruptError:
                continue


def test_every_cut_and_every_addition_is_noticed() -> None:
    frame = encode_frame(torch.arange(24))
    for end in range(len(frame)):
        with pytest.raises(ShardCorruptError):
            decode_frame(frame[:end])
    for addition in (b"\0", frame):
        with pytest.raises(ShardCorruptError):
            decode_frame(frame + addition)


def _frame(content: bytes, checksum: bool = True, content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(
        write_checksum=checksum, write_content_size=content_size
    ).compress(content)


def _ragged(lengths: list[int], count: int) -> bytes:
    """A frame of `count` bytes in ranks of those lengths."""
    columns = b"".join(
        bytes(length >> shift & 255 for length in lengths) for shift in (0, 8, 16, 24)
    )
    header = struct.pack("<BBBII", 6, 4, 1, count, len(lengths))
    return _frame(header + columns + bytes(count))


def test_ragged_deltas_of_true_lengths_are_read_rank_by_rank() -> None:
    assert decode_frame(_ragged([2, 1], 3)).shape == (3,)
    # Rows (1.5, -2.0) and (1.5); steps as in test_the_bytes_of_a_transform_are_these.
    values = torch.tensor([1.5, 1.5, -2.0])
    content = zstandard.decompress(encode_frame(values, [ragged_delta([2, 1])]))
    header = struct.pack("<BBBII", 1, 4, 1, 3, 2) + bytes.fromhex("0201 0000 0000 0000")
    assert content.hex() == (header + bytes.fromhex("ffff01 ffff00 3f3fc0 40407f")).hex()
    with pytest.raises(ValueError, match="are no ragged_delta of 3"):
        encode_frame(values, [ragged_delta([2, 2])])


@pytest.mark.parametrize(
    "frame",
    [
        _frame(struct.pack("<BBBI", 1, 0, 1, 2) + bytes(8), checksum=False),
        _frame(struct.pack("<BBBI", 1, 0, 1, 2) + bytes(8), content_size=False),
        _frame(struct.pack("<BBBI", 99, 0, 1, 2) + bytes(8)),
        _frame(struct.pack("<BBBI", 1, 0, 1, 3) + bytes(8)),
        _frame(struct.pack("<BBBIII", 1, 0, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(8)),
        *(_frame(struct.pack("<BBB4I", 1, code, 4, 0, *[2**32 - 1] * 3)) for code in range(3)),
        _frame(struct.pack("<BBB4II", 1, 3, 4, 0, *[2**32 - 1] * 3, 0)),
        _frame(struct.pack("<BBBI", 1, 99, 1, 2) + bytes(8)),
        _frame(struct.pack("<BBBII", 1, 2, 2, 2**32 - 1, 1) + bytes(8)),
        _frame(struct.pack("<BBBI", 1, 3, 1, 2) + bytes(3)),
        _frame(struct.pack("<BBBII", 1, 3, 1, 2, 2**32 - 1) + bytes(8)),
        _frame(struct.pack("<BBBIIfBB", 1, 3, 1, 2, 1, 1.5, 0, 1)),
        _frame(struct.pack("<BBBI", 1, 4, 1, 2) + bytes(3)),
        _frame(struct.pack("<BBBII", 1, 4, 1, 2, 2**32 - 1) + bytes(16)),
        _ragged([1, 2], 3),
        _ragged([2, 0, 1], 3),
        _ragged([2, 2], 3),
        _frame(struct.pack("<BBB", 1, 0, 200) + bytes(8)),
        _frame(struct.pack("<BBB9I", 1, 0, 9, 2, *[1] * 8) + bytes(8)),
        _frame(b""),
    ],
    ids=[
        "no-checksum",
        "no-size",
        "dtype",
        "shape",
        "huge-shape",
        "huge-empty-plain",
        "huge-empty-columns",
        "huge-empty-ranks",
        "huge-empty-dictionary",
        "transform",
        "short-ranks",
        "cut-dictionary",
        "huge-dictionary",
        "place-outside-dictionary",
        "cut-ragged_delta",
        "huge-ragged_delta",
        "ascending-ragged_delta",
        "empty-step-of-ragged_delta",
        "ragged_delta-of-other-values",
        "cut-header",
        "many-dims",
        "empty",
    ],
)
def test_frames_that_were_not_written_by_encode_frame_are_refused(frame: bytes) -> None:
    with pytest.raises(ShardCorruptError):
        decode_frame(frame)


def test_a_frame_that_claims_a_huge_content_takes_no_memory_for_it() -> None:
    # Frame header with an 8-byte content size of 2**50, then nothing that could fill it.
    claim = b"\x28\xb5\x2f\xfd" + bytes([0b11100100]) + struct.pack("<Q", 2**50) + bytes(64)
    with pytest.raises(ShardCorruptError, match="claims 1125899906842624 bytes"):
        decode_frame(claim)


def test_a_dictionary_that_would_grow_beyond_the_limit_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = encode_frame(torch.zeros(200, dtype=torch.int64), [DICTIONARY])
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 8 * 200 - 1)
    with pytest.raises(ShardCorruptError, match=r"claims shape \[200\]"):
        decode_frame(frame)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), records=st.sampled_from(TIERS))
def test_any_output_comes_back_from_its_columns(data: st.DataObject, records: RecordKind) -> None:
    output = data.draw(teacher_outputs(records))
    columns = output_columns(output)
    assert set(columns) == columns_of(TIER_PARTS[records])
    encoded = {name: encode_column(name, values) for name, values in columns.items()}
    decoded = {name: decode_frame(frame) for name, frame in encoded.items()}
    assert_same_outputs(output_from_columns(decoded, VOCAB_SIZE), output)


@pytest.mark.parametrize("records", TIERS)
def test_parts_that_were_not_asked_for_are_none(records: RecordKind) -> None:
    columns = output_columns(make_output(records, seed=0))
    for part in TIER_PARTS[records]:
        asked = {name: values for name, values in columns.items() if name in columns_of({part})}
        assert parts_in(output_from_columns(asked, VOCAB_SIZE)) == {part}


@pytest.mark.parametrize("part", ["vision", "sketch", "response", "hidden"])
def test_half_a_part_is_an_error(part: Part) -> None:
    records: RecordKind = "hidden" if part == "hidden" else "topk+sketch"
    columns = output_columns(make_output(records, seed=0))
    for name in sorted(columns_of({part}) - columns_of(())):
        with pytest.raises(KeyError, match=name):
            output_from_columns({n: v for n, v in columns.items() if n != name}, VOCAB_SIZE)
