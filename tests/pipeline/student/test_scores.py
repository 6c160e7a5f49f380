"""Promises of student/scores.py: hand-checked cases, and laws that hold for every score."""

from functools import cache
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.stages import ScoreName
from pipeline.student.scores import (
    SCORES,
    anls,
    choice_accuracy,
    edit_distance,
    exact_match,
    normalise_vqa,
    relaxed_accuracy,
    token_f1,
    vqa_accuracy,
    word_accuracy,
)

texts = st.text(alphabet="aAbtheone12.,%'-$ !\n", max_size=12)
every_score = pytest.mark.parametrize("name", sorted(SCORES))
every_score_of_any_text = pytest.mark.parametrize("name", sorted(set(SCORES) - {"choice_accuracy"}))


def test_every_score_of_the_configuration_is_there() -> None:
    assert set(SCORES) == set(get_args(ScoreName))


@every_score_of_any_text
@given(answer=texts, references=st.lists(texts, min_size=4, max_size=6))
@settings(deadline=None)
def test_scores_lie_in_the_unit_interval_whatever_the_order_of_references(
    name: ScoreName, answer: str, references: list[str]
) -> None:
    value = SCORES[name](answer, references)
    assert 0 <= value <= 1
    assert SCORES[name](answer, references[::-1]) == pytest.approx(value)


@every_score_of_any_text
@given(text=texts)
@settings(deadline=None)
def test_an_answer_equal_to_its_only_reference_scores_1(name: ScoreName, text: str) -> None:
    assert SCORES[name](text, [text]) == 1
    assert SCORES[name](f"  {text}\n", [text]) == 1


@every_score
def test_no_reference_is_refused(name: ScoreName) -> None:
    with pytest.raises(ValueError, match="no reference"):
        SCORES[name]("x", [])


@given(answer=texts, references=st.lists(texts, min_size=1, max_size=4))
@settings(deadline=None)
def test_the_best_reference_counts(answer: str, references: list[str]) -> None:
    for score in (exact_match, word_accuracy, anls, relaxed_accuracy):
        assert score(answer, references) == max(score(answer, [r]) for r in references)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (" bs5  dq2\n", "bs5 dq2", 1),
        ("B.", "B", 1),
        ("(B)", "B", 1),
        ("Yes.", "yes", 1),
        ('"Red", I think', "red i think", 1),
        ("dq2 bs5", "bs5 dq2", 0),
        ("3.5", "35", 0),
        ("-5", "5", 0),
        (".5", "5", 0),
        ("don't", "dont", 0),
        ("$5", "5", 1),
        ("?!", "?!", 1),
        ("?", "!", 0),
        ("", "?", 0),
    ],
)
def test_exact_match_ignores_case_and_outer_punctuation(
    answer: str, reference: str, expected: int
) -> None:
    assert exact_match(answer, [reference]) == expected
    assert exact_match(answer, ["something else", reference]) == expected


CITIES = ("Rome", "Paris", "New York")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("b) because", "B"),
        ("B. Paris", "B"),
        ("paris.", "B"),
        ("The answer is (B).", "B"),
        ("Answer: **B**", "B"),
        ("I would say B", "B"),
        ("I would say A.", "A"),
        ("It is New York, I think", "C"),
        ("Rome? No: Paris", "B"),
        ("A", "A"),
        ("A street", None),
        ("E", None),
        ("neither", None),
        ("", None),
    ],
)
def test_an_answer_names_a_choice_by_letter_or_by_text(answer: str, expected: str | None) -> None:
    for letter, city in zip("ABC", CITIES, strict=True):
        right = float(letter == expected)
        assert choice_accuracy(answer, [letter], CITIES) == right
        assert choice_accuracy(answer, [city], CITIES) == right


def test_a_reference_that_names_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Oslo' is no letter and none of the choices \['Rome'"):
        choice_accuracy("B", ["Oslo"], CITIES)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a red car", "The red car.", 1),
        ("red car", "red bus", 0.5),
        ("a big red car", "red car", 0.8),
        ("car car", "car", 2 / 3),
        ("blue", "red", 0),
        ("", "red", 0),
        ("the", "a", 1),
    ],
)
def test_token_f1_counts_common_words_once_each(
    answer: str, reference: str, expected: float
) -> None:
    assert token_f1(answer, [reference]) == pytest.approx(expected)
    assert token_f1(reference, [answer]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("bs5 dq2 fx1 gv0", "bs5 dq2 fx1 gv0", 1.0),
        ("bs5 dq3 fx1 gv0", "bs5 dq2 fx1 gv0", 0.75),
        ("bs5", "bs5 dq2 fx1 gv0", 0.25),
        ("dq2 bs5", "bs5 dq2", 0.0),
        ("bs5 dq2 more words", "bs5 dq2", 1.0),
        ("", "bs5", 0.0),
        ("x", "", 0.0),
    ],
)
def test_word_accuracy_counts_words_in_their_places(
    answer: str, reference: str, expected: float
) -> None:
    assert word_accuracy(answer, [reference]) == expected


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_accuracy_of_ten_annotators_is_the_official_one(agreeing: int, expected: float) -> None:
    references = ["two dogs"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("The 2 dogs.", references) == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 3])
def test_vqa_accuracy_that_could_never_be_1_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="can never be 1"):
        vqa_accuracy("x", ["x"] * count)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "dog"),
        ("None", "0"),
        ("yes, it is", "yes it is"),
        ("1,000 people", "1000 people"),
        ("left-right", "left right"),
        ("3.5 m.", "3.5 m"),
        ("don't", "dont"),
        ("dont", "dont"),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


def test_anls_cuts_at_one_half() -> None:
    assert anls("ABCD", ["abcd"]) == 1
    assert anls("abcx", ["abcd"]) == 0.75
    assert anls("abxx", ["abcd"]) == 0.5
    assert anls("axxx", ["abcd"]) == 0
    assert anls("", [""]) == 1


@given(first=st.text("abc", max_size=7), second=st.text("abc", max_size=7))
@settings(deadline=None)
def test_edit_distance_equals_its_recursive_definition(first: str, second: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    assert edit_distance(first, second) == distance(len(first), len(second))


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1),
        ("95.0", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("12.5%", "0.125", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Blue", "blue", 1),
        ("Blue.", "blue", 1),
        ("blue", "100", 0),
        ("nan", "100", 0),
        ("1,000", "1000", 1),
        ("1,00", "100", 0),
        ("$5", "5", 1),
        ("5 $", "$5", 1),
        ("\u20ac5", "$5", 0),
        ("5 km", "5", 1),
        ("5.1 km", "5 km", 1),
        ("5 km", "5 kg", 0),
        ("3 million", "3,000,000", 1),
        ("$3 million", "3000000", 1),
        ("3 million", "3", 0),
        ("\u22124", "-4", 1),
        ("12 %", "12", 0),
        ("5.", "5", 1),
    ],
)
def test_relaxed_accuracy_allows_five_percent(answer: str, reference: str, expected: int) -> None:
    assert relaxed_accuracy(answer, [reference]) == expected
