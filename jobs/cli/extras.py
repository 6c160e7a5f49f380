"""Checks that the libraries of an optional extra are installed, before a command begins to work."""

from importlib.util import find_spec

_LIBRARIES = {"demo": ("sklearn", "matplotlib"), "report": ("matplotlib",)}
"""Extra of pyproject.toml -> the modules that it brings."""


def require_extra(extra: str) -> None:
    """Raise ValueError where a library of the extra is missing, and say how to install it."""
    missing = [name for name in _LIBRARIES[extra] if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; run pip install 'emkd[{extra}]', then this "
            "command again"
        )
