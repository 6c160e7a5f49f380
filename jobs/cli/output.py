"""Prints the answers and the warnings of commands, control characters escaped.

Names and texts come from data: they must not move the cursor or turn the direction of a line.
"""

import logging
import sys

from teacher_cache.schema.errors import printable


def echo(text: str) -> None:
    """Print an answer to stdout at once."""
    print(_escaped(text), flush=True)


def warn(text: str | None) -> None:
    """Print a warning or an error to stderr at once; None prints nothing."""
    if text is not None:
        print(_escaped(text), file=sys.stderr, flush=True)


class EscapingFormatter(logging.Formatter):
    """Formats a log record, control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return _escaped(super().format(record))


def _escaped(text: str) -> str:
    """The text with its line ends and tabs as they are."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
