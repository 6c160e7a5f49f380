"""Scores answers: plain functions of (answer, references) with values from 0 to 1.

With several references the best match counts (VQA accuracy counts agreeing annotators instead).
Runs of white space never matter. An answer equal to its only reference scores 1 everywhere. Refuses
an empty list of references. Each function names the benchmark whose rule it follows.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.config.stages import ScoreName
from pipeline.student.answer_forms import (
    choice_letter,
    number_and_unit,
    plain_words,
    squeeze,
    without_articles,
)

Score = Callable[[str, Sequence[str]], float]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = r""";/[]"{}()=+\_-><@`,?!:"""
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer has the words of one of the references, case and punctuation aside.

    The rule of GQA, TextVQA's and MME's short answers as lmms-eval runs them (`ignore_case`,
    `ignore_punctuation`), but punctuation within a word stays: 3.5 is not 35, and -5 is not 5. A
    text of punctuation alone is compared as it is.
    """

    def score(reference: str) -> float:
        found, expected = plain_words(answer), plain_words(reference)
        if not found or not expected:
            return float(squeeze(answer) == squeeze(reference))
        return float(found == expected)

    return _best(score, references)


def choice_accuracy(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the answer names the right choice, by letter or by text (as MMMU parses answers).

    A reference is a letter or the text of a choice. Unlike MMMU's script, an answer that names no
    choice scores 0; a letter is not drawn for it.
    """
    _require_references(references)
    found = choice_letter(answer, choices)
    named = {choice_letter(reference, choices) for reference in references} - {None}
    if not named:
        raise ValueError(
            f"the reference {references[0]!r} is no letter and none of the choices "
            f"{list(choices)}; give a letter, or the choices"
        )
    return float(found in named)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, articles aside (SQuAD's F1)."""
    found = without_articles(plain_words(answer))

    def score(reference: str) -> float:
        expected = without_articles(plain_words(reference))
        if not found or not expected:
            return float(found == expected)
        common = (Counter(found) & Counter(expected)).total()
        return 2 * common / (len(found) + len(expected))

    return _best(score, references)


def word_accuracy(answer: str, references: Sequence[str]) -> float:
    """Share of the reference's words that the answer has at the same position.

    Extra words of the answer are ignored; only an empty answer matches an empty reference.
    """
    found = answer.split()

    def score(reference: str) -> float:
        expected = reference.split()
        if not expected:
            return float(not found)
        pairs = zip(found, expected, strict=False)
        return sum(have == want for have, want in pairs) / len(expected)

    return _best(score, references)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA's soft accuracy (Antol et al. 2015): min(agreeing annotators / 3, 1) on normalised text.

    As in the official evaluation it is averaged over leaving out one annotator at a time, so only
    four or more references (VQA has ten) can reach 1. A single reference counts as unanimous
    annotators; two or three are refused with ValueError. Contractions match with and without
    their apostrophe, as by the official table of contractions.
    """
    if len(references) in (2, 3):
        raise ValueError(
            f"vqa_accuracy of {len(references)} references can never be 1; give one reference or "
            "the four or more answers of the annotators"
        )
    agrees = [normalise_vqa(answer) == normalise_vqa(reference) for reference in references]
    if len(agrees) == 1:
        return float(agrees[0])
    _require_references(references)
    return math.fsum(min((sum(agrees) - agree) / 3, 1.0) for agree in agrees) / len(agrees)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al. 2019, DocVQA).

    One minus edit distance over the longer length, ignoring case; below 0.5 it counts as 0.
    """
    found = squeeze(answer).lower()

    def score(reference: str) -> float:
        expected = squeeze(reference).lower()
        longest = max(len(found), len(expected))
        if longest == 0:
            return 1.0
        similarity = 1 - edit_distance(found, expected) / longest
        return similarity if similarity >= ANLS_THRESHOLD else 0.0

    return _best(score, references)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """ChartQA's accuracy (Masry et al. 2022): a number may be off by 5 % of the reference.

    "12%" is read as 0.12, "1,000" as 1000. A unit or currency sign may be missing on one side; two
    units must be equal. If either side is no number, the words must be equal (`exact_match`).
    """

    def score(reference: str) -> float:
        found, expected = number_and_unit(answer), number_and_unit(reference)
        if found is None or expected is None:
            return exact_match(answer, [reference])
        units = {found[1], expected[1]} - {""}
        close = abs(found[0] - expected[0]) <= RELAXED_TOLERANCE * abs(expected[0])
        return float(close and len(units) <= 1)

    return _best(score, references)


SCORES: dict[ScoreName, Score] = {
    "exact_match": exact_match,
    "choice_accuracy": choice_accuracy,
    "token_f1": token_f1,
    "word_accuracy": word_accuracy,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def normalise_vqa(text: str) -> str:
    """Lower case, number words as digits, no articles, no punctuation (as the VQA evaluation).

    Punctuation beside a space is dropped; elsewhere it becomes a space. In a text that holds a
    number such as 1,000 it is always dropped. Full stops stay only in front of a digit.
    """
    text = squeeze(text).replace("'", "").replace("\u2019", "")
    has_comma_number = _NUMBER_WITH_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_comma_number else " ")
    words = _FULL_STOP.sub("", cleaned).lower().split()
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            cost = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(cost, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _best(score: Callable[[str], float], references: Sequence[str]) -> float:
    _require_references(references)
    return max(score(reference) for reference in references)


def _require_references(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("there is no reference to score the answer against")
