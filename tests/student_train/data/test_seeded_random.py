"""Draws are a pure function of a seed and names."""

import pytest

from student_train.data.seeded_random import random_uniform, random_words

WORDS = [
    17828170464205729577,
    599829497138686158,
    16558119987784262430,
]


def test_the_same_seed_and_names_give_the_same_words_for_ever() -> None:
    assert random_words(7, 3, "sample", 2).tolist() == WORDS
    assert random_words(7, 2, "sample", 2).tolist() == WORDS[:2]


def test_another_seed_or_another_name_gives_other_words() -> None:
    drawn = [
        random_words(seed, 1, *names)[0] for seed in (0, 1) for names in ((), (1,), ("1",), (1, 2))
    ]
    assert len({int(word) for word in drawn}) == len(drawn)


def test_uniform_draws_fill_the_unit_interval() -> None:
    drawn = [random_uniform(0, "ratio", step) for step in range(4000)]
    assert 0 <= min(drawn) < 0.01
    assert 0.99 < max(drawn) < 1
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)


def test_seeds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        random_words(-1, 1)
