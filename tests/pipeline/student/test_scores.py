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
    edit_distance,
    exact_match,
    normalise_vqa,
    relaxed_accuracy,
    vqa_accuracy,
    word_accuracy,
)

texts = st.text(alphabet="aAbtheone12.,%' !\n", max_size=12)
every_score = pytest.mark.parametrize("name", sorted(SCORES))


def test_every_score_of_the_configuration_is_there() -> None:
    assert set(SCORES) == set(get_args(ScoreName))


@every_score
@given(answer=texts, references=st.lists(texts, min_size=4, max_size=6))
@settings(deadline=None)
def test_scores_lie_in_the_unit_interval_whatever_the_order_of_references(
    name: ScoreName, answer: str, references: list[str]
) -> None:
    value = SCORES[name](answer, references)
    assert 0 <= value <= 1
    assert SCORES[name](answer, references[::-1]) == pytest.approx(value)


@every_score
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


def test_exact_match_ignores_white_space_only() -> None:
    assert exact_match(" bs5  dq2\n", ["bs5 dq2"]) == 1
    assert exact_match("Bs5 dq2", ["bs5 dq2"]) == 0
    assert exact_match("b", ["a", "b"]) == 1


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
        ("blue", "100", 0),
        ("nan", "100", 0),
    ],
)
def test_relaxed_accuracy_allows_five_percent(answer: str, reference: str, expected: int) -> None:
    assert relaxed_accuracy(answer, [reference]) == expected
