"""Values that may be None, where a test expects one."""

from typing import TypeVar

Value = TypeVar("Value")


def present(value: Value | None) -> Value:
    """The value, which must not be None."""
    assert value is not None
    return value
