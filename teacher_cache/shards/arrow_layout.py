"""Finds the record batches of an Arrow file and refuses compressed ones; trusts no byte of it.

pyarrow unpacks compressed buffers, whose sizes the file states, before the caller can check: a few
kilobytes may claim all memory. Our shards compress only their frames. So this module reads just
enough of the flatbuffers (Arrow's File.fbs and Message.fbs) to refuse compression, dictionaries,
and batches that overlap or lie outside the file.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise

_MAGIC = b"ARROW1"
_DICTIONARIES, _BATCHES = 2, 3  # fields of Footer
_MARK = b"\xff\xff\xff\xff"  # before each message; older Arrow versions have none
_VERSION, _HEADER_TYPE, _HEADER, _CUSTOM = 0, 1, 2, 4  # fields of Message
_V5 = 4  # metadata version; earlier ones could ask for compression in custom metadata
_RECORD_BATCH = 3  # of header types
_COMPRESSION = 3  # field of RecordBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBlock:
    """One record batch: its flatbuffer begins at `start`, its buffers at `body`."""

    start: int
    body: int
    end: int


def batch_blocks(data: memoryview) -> tuple[BatchBlock, ...]:
    """The record batches of a file in order; ValueError if they overlap or lie outside it."""
    try:
        (length,) = struct.unpack_from("<i", data, len(data) - len(_MAGIC) - 4)
        footer = len(data) - len(_MAGIC) - 4 - length
        if bytes(data[-len(_MAGIC) :]) != _MAGIC or not 0 < footer < len(data):
            raise ValueError("it does not end like an Arrow file")
        root = _follow(data, footer)
        if _structs(data, root, _DICTIONARIES):
            raise ValueError("it has dictionaries")
        blocks = tuple(
            BatchBlock(start=start, body=start + metadata, end=start + metadata + body)
            for start, metadata, body in _structs(data, root, _BATCHES)
        )
    except struct.error as error:
        raise ValueError(f"its footer is damaged: {error}") from error
    places = [0, *(place for block in blocks for place in (block.start, block.body, block.end))]
    if any(here > there for here, there in pairwise([*places, footer])):
        raise ValueError("its batches overlap or lie outside of it")
    return blocks


def require_plain(data: memoryview, block: BatchBlock) -> None:
    """Raise ValueError unless a block holds an uncompressed record batch."""
    try:
        message = _follow(data, block.start + 8)  # after the mark and the length
        version, kind, header, custom = (
            _field(data, message, number) for number in (_VERSION, _HEADER_TYPE, _HEADER, _CUSTOM)
        )
        if version is None or kind is None or header is None or custom is not None:
            raise ValueError(f"there is no plain record batch at byte {block.start}")
        found = (data[block.start : block.start + 4], data[version], data[kind])
        if found != (_MARK, _V5, _RECORD_BATCH):
            raise ValueError(f"there is no record batch of Arrow's version 5 at {block.start}")
        if _field(data, _follow(data, header), _COMPRESSION) is not None:
            raise ValueError(f"the record batch at byte {block.start} is compressed")
    except (struct.error, IndexError) as error:
        raise ValueError(f"the record batch at byte {block.start} is damaged: {error}") from error


def _structs(data: memoryview, table: int, number: int) -> list[tuple[int, int, int]]:
    """A vector of Block structs: (offset, bytes of metadata, bytes of body)."""
    place = _field(data, table, number)
    if place is None:
        return []
    vector = _follow(data, place)
    (count,) = struct.unpack_from("<I", data, vector)
    return list(struct.iter_unpack("<qi4xq", data[vector + 4 : vector + 4 + 24 * count]))


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Position of a field of a table; None where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size, slot = struct.unpack_from("<H", data, vtable)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", data, vtable + slot)[0] if slot < size else 0
    return table + offset if offset else None


def _follow(data: memoryview, place: int) -> int:
    """The position that the offset stored at `place` points to."""
    return place + struct.unpack_from("<I", data, place)[0]
