"""Prints the answers of commands, and warnings."""

import sys


def complain(text: str | None) -> None:
    """Print what must not be overlooked beside the answer; nothing where there is nothing."""
    if text is not None:
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a command's answer at once, whoever reads it."""
    print(text, flush=True)
