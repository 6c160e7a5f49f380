"""Brings answers into the forms that benchmarks compare: plain words, numbers, choice letters.

Pure functions of texts; none of them knows a model or a file.
"""

import math
import re
from collections.abc import Sequence

_WORD_BORDER_MARKS = re.compile(r"^(?:(?![-+]?\.?\d)[\W_])+|[\W_]+$")
_ARTICLES = frozenset({"a", "an", "the"})
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_MINUS = ("-", "\u2212")
_SCALES = {"%": 0.01, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?P<currency>[" + _CURRENCY + r"]?)\s*"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?P<exponent>[eE][-+]?\d+)?"
    r"\s*(?P<unit>%|[" + _CURRENCY + r"]|[^\W\d_][^\d]*)?"
)
_OPENING_LETTER = re.compile(r"\(?([A-Za-z])(?:[.):]|\s*$)")
_LONE_LETTER = re.compile(r"\b([A-Z])\b(?!['\u2019])")
_ANSWER_IS = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\**\(?([A-Z])\)?(?![\w'\u2019])", re.IGNORECASE
)


def plain_words(text: str) -> list[str]:
    """Lower-case words without punctuation at their borders.

    Punctuation within a word, and a sign or point in front of a digit, stay: `1,000`, `don't`,
    `-5`, `.5`. A word of punctuation alone is dropped.
    """
    words = (_WORD_BORDER_MARKS.sub("", word) for word in squeeze(text).lower().split())
    return [word for word in words if word]


def without_articles(words: Sequence[str]) -> list[str]:
    """The words that are no English article."""
    return [word for word in words if word not in _ARTICLES]


def squeeze(text: str) -> str:
    """The text with single spaces and none at its ends."""
    return " ".join(text.split())


def number_and_unit(text: str) -> tuple[float, str] | None:
    """The value of a text that is one number, and its unit; None for any other text.

    Thousands may be grouped by commas. A currency sign on either side is a unit; a percent sign
    divides by 100, and the words thousand to trillion multiply. A full stop at the end is ignored.
    """
    match = _NUMBER.fullmatch(squeeze(text).rstrip(".!?;: "))
    if match is None:
        return None
    value = float(match["digits"].replace(",", "") + (match["exponent"] or ""))
    scale, _, rest = (match["unit"] or "").strip().lower().partition(" ")
    value, unit = (value * _SCALES[scale], rest) if scale in _SCALES else (value, f"{scale} {rest}")
    if not math.isfinite(value):
        return None
    return -value if match["sign"] in _MINUS else value, (match["currency"] + unit).strip()


def choice_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names; None if it names none.

    In this order: a letter that opens the answer as `B`, `B.` or `(B)`; the whole text of a choice;
    "the answer is B"; the last capital letter that stands alone; the last choice whose text occurs.
    Without `choices` every letter is allowed. A letter beyond them names nothing.
    """
    allowed = [chr(ord("A") + index) for index in range(len(choices))]

    def known(letter: str) -> str | None:
        return letter if not choices or letter in allowed else None

    text = squeeze(answer)
    if (match := _OPENING_LETTER.match(text)) and (letter := known(match[1].upper())):
        return letter
    words = plain_words(text)
    plain_choices = [plain_words(choice) for choice in choices]
    if words in plain_choices:
        return allowed[plain_choices.index(words)]
    if (match := _ANSWER_IS.search(text)) and (letter := known(match[1].upper())):
        return letter
    letters = [letter for letter in _LONE_LETTER.findall(text) if known(letter)]
    # A and I are words as well, except at the end.
    if letters and (letters[-1] not in "AI" or words[-1] == letters[-1].lower()):
        return letters[-1]
    places = [
        (_last_place(choice, words), letter)
        for choice, letter in zip(plain_choices, allowed, strict=True)
        if choice
    ]
    place, letter = max(places, default=(-1, ""))
    return letter if place >= 0 else None


def _last_place(wanted: list[str], words: list[str]) -> int:
    """Where the wanted words begin for the last time in `words`; -1 if nowhere."""
    starts = range(len(words) - len(wanted), -1, -1)
    return next((i for i in starts if words[i : i + len(wanted)] == wanted), -1)
