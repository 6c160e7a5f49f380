"""Promises of schema/checked_json.py: what was written comes back, or is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import DecodeError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.text().filter("check".__ne__), VALUES, max_size=4)


@given(fields=FIELDS, indent=st.sampled_from([None, 1]))
def test_fields_come_back_in_any_layout(fields: dict[str, object], indent: int | None) -> None:
    text = to_checked_json(fields, indent)
    assert from_checked_json(text, "it") == fields
    again = json.dumps(dict(reversed(json.loads(text).items())), indent=3)
    assert from_checked_json(again, "it") == fields


def test_every_flipped_bit_and_cut_is_found_or_changes_nothing() -> None:
    fields = {"step": 12, "loss": 0.1, "name": "a", "none": None, "more": [1.5, {"x": True}]}
    data = to_checked_json(fields).encode()
    num_found = 0
    for place in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = from_checked_json(bytes(damaged), "run/file.json")
        except DecodeError as error:
            num_found += 1
            assert str(error).startswith("run/file.json is damaged")  # noqa: PT017
        else:
            # In the name of the digest's field: the record's decoder refuses the unknown name.
            assert found == fields or found.keys() - fields.keys()
    assert num_found > 7 * len(data)
    for end in range(len(data)):
        with pytest.raises(DecodeError):
            from_checked_json(data[:end], "it")


def test_older_objects_are_read_and_other_json_is_refused() -> None:
    assert from_checked_json('{"a": 1}', "it") == {"a": 1}
    with pytest.raises(DecodeError, match="found list, expected an object"):
        from_checked_json("[1]", "it")
    assert math.isnan(from_checked_json(to_checked_json({"a": math.nan}), "it")["a"])
