"""Prints the answers and the warnings of commands."""

import sys


def echo(text: str) -> None:
    """Print an answer to stdout at once."""
    print(text, flush=True)


def warn(text: str | None) -> None:
    """Print a warning or an error to stderr at once; None prints nothing."""
    if text is not None:
        print(text, file=sys.stderr, flush=True)
