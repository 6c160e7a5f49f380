"""Keep-sets against plain loops written from the method, and their counts against the paper's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.compression.compressors import (
    COMPRESSORS,
    Compressor,
    CompressorInputs,
    dart_keep,
    fastv_keep,
    find_compressor,
    random_keep,
    register,
)
from student_train.data.seeded_random import random_words
from tests.support.epic_references import dart_by_loops, fastv_by_loops, random_by_loops

NAMES = ("dart", "fastv", "random")
RATIOS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.556, 0.667, 0.778, 0.889, 0.9, 0.99])


def made_up(seed: int, num_vision: int, num_text: int, vision_first: bool) -> CompressorInputs:
    """One turn with random states: vision tokens in two blocks, text before or behind them."""
    generator = torch.Generator().manual_seed(seed)
    length = num_vision + num_text + 5
    places = torch.arange(2, 2 + num_vision + num_text)
    vision, text = places[:num_vision], places[num_vision:]
    if not vision_first:
        text, vision = places[:num_text], places[num_text:]
    vision = torch.cat([vision[: num_vision // 2], vision[num_vision // 2 :] + 1])
    return CompressorInputs(
        vision=vision,
        instruction=text + (1 if vision_first else 0),
        states=torch.randn(length, 6, generator=generator, dtype=torch.float64),
        keys=torch.randn(length, 4, generator=generator, dtype=torch.float64),
        attention=torch.rand(length, generator=generator, dtype=torch.float64),
        random_words=random_words(seed, num_vision),
    )


def by_loops(name: str, inputs: CompressorInputs, ratio: float) -> list[int]:
    vision, text = inputs.vision.tolist(), inputs.instruction.tolist()
    if name == "dart":
        assert inputs.states is not None
        assert inputs.keys is not None
        return dart_by_loops(inputs.states.tolist(), inputs.keys.tolist(), vision, text, ratio)
    if name == "fastv":
        assert inputs.attention is not None
        return fastv_by_loops(inputs.attention.tolist(), vision, ratio)
    assert inputs.random_words is not None
    return random_by_loops(inputs.random_words.tolist(), vision, ratio)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_vision=st.integers(1, 40),
    num_text=st.integers(0, 9),
    vision_first=st.booleans(),
    ratio=RATIOS,
)
def test_keep_sets_are_those_of_plain_loops(
    name: str, seed: int, num_vision: int, num_text: int, vision_first: bool, ratio: float
) -> None:
    inputs = made_up(seed, num_vision, num_text, vision_first)
    kept = COMPRESSORS[name].keep(inputs, ratio).tolist()
    assert kept == by_loops(name, inputs, ratio)
    assert kept == sorted(set(kept) & set(inputs.vision.tolist()))
    if ratio == 0:
        assert kept == inputs.vision.tolist()


@pytest.mark.parametrize(
    ("ratio", "dart", "others"),
    [(0.889, 60, 63), (0.778, 124, 127), (0.667, 188, 191), (0.556, 252, 255)],
)
def test_counts_of_576_tokens_are_the_released_codes(ratio: float, dart: int, others: int) -> None:
    inputs = made_up(0, 576, 12, True)
    counts = {name: len(COMPRESSORS[name].keep(inputs, ratio)) for name in NAMES}
    assert counts == {"dart": dart, "fastv": others, "random": others}


def test_a_ratio_means_the_decimal_that_was_written() -> None:
    assert len(fastv_keep(made_up(0, 10, 0, True), 0.9)) == 1
    assert (1 - 0.9) * 10 < 1


def test_ties_go_to_the_earlier_token() -> None:
    vision, text, same = torch.arange(3, 13), torch.tensor([13]), torch.ones(14, 1)
    inputs = CompressorInputs(
        vision=vision, instruction=text, states=same, keys=same, attention=same[:, 0]
    )
    assert fastv_keep(inputs, 0.7).tolist() == [3, 4, 5]
    assert dart_keep(inputs, 0.5).tolist() == [
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
    ]  # 4 pivots, 1 for each of 5 pivots


def test_half_precision_is_summed_in_float32() -> None:
    keys = torch.full((600, 4096), 0.1, dtype=torch.bfloat16)
    keys[300:304] += 0.001
    vision, text = torch.arange(576), torch.arange(576, 580)
    inputs = CompressorInputs(
        vision=vision, instruction=text, states=torch.randn(600, 8), keys=keys
    )
    assert keys[300, 0] > keys[0, 0]
    assert dart_keep(inputs, 0.99).tolist() == [300, 301, 302, 303]


def test_random_keeps_each_token_equally_often() -> None:
    counts = np.zeros(8)
    for draw in range(1500):
        inputs = replace(made_up(0, 8, 0, True), vision=torch.arange(8))
        inputs = replace(inputs, random_words=random_words(0, 8, draw))
        counts[random_keep(inputs, 0.75).numpy()] += 1
    assert np.abs(counts / 1500 - 0.25).max() < 0.04


def test_one_more_compressor_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_train.compression.compressors.COMPRESSORS", dict(COMPRESSORS))
    first = Compressor(
        name="first", needs=frozenset(), keep=lambda inputs, ratio: inputs.vision[:1]
    )
    register(first)
    assert find_compressor("first") is first
    with pytest.raises(ValueError, match="there is a compressor 'first' already"):
        register(first)
    with pytest.raises(ValueError, match="expected one of dart, fastv, first, random"):
        find_compressor("last")
