"""Compile a function's type checks at its first call: most functions are imported and never called.

pyproject.toml names `checked` as jaxtyping's type checker. `beartype` writes and compiles a wrapper
for each function that it decorates, which took a quarter of the time to collect the tests.
"""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with beartype's checks of its arguments and result."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = beartype(function)
        return compiled(*args, **kwargs)

    return call
