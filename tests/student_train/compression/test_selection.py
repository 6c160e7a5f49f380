"""What decides which tokens go on: the sample's own question, and the draw; against plain loops."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.compression.compressors import find_compressor
from student_train.compression.image_turns import image_turns
from student_train.compression.layer_view import AttentionRecorder, LayerView
from student_train.compression.selection import TokenSelector
from student_train.config.compression import CompressionSettings, DropStage
from student_train.data.seeded_random import random_words
from student_train.data.token_layout import layout_of
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.samples import Message, Sample, make_sample
from tests.support.deep import at, batch_of, compressed, deep_model, encode, made_up_sample
from tests.support.epic_references import (
    attention_by_loops,
    dart_by_loops,
    fastv_by_loops,
    random_by_loops,
    rotated,
)
from tests.support.lazy import LlamaAttention, LlamaConfig
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples

WIDTH, HEADS, GROUPS = 8, 4, 2


def made_up(sizes: list[tuple[int, int, int]], name: str) -> EncodedSample:
    """A sample of turns, each with (vision, instruction, response) tokens and control tokens."""
    kinds = ["control"]
    for num_vision, num_text, num_response in sizes:
        kinds += ["vision"] * num_vision + ["text"] * num_text + ["control"]
        kinds += ["response"] * num_response + ["control"]
    where = {kind: [n for n, k in enumerate(kinds) if k == kind] for kind in set(kinds)}
    vision, text, response = (where.get(kind, []) for kind in ("vision", "text", "response"))
    return made_up_sample(len(kinds), vision, text, response, name)


def heads(flat: torch.Tensor, angles: torch.Tensor) -> list[list[float]]:
    """The heads (of width 2) of one token, rotated."""
    cos, sin = angles.cos().tolist(), angles.sin().tolist()
    return [rotated(head, cos, sin) for head in flat.unflatten(0, (-1, 2)).tolist()]


TURN = st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 3))


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
@settings(deadline=None, max_examples=25)
@given(
    batch_sizes=st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    per_row=st.booleans(),
    ratio=st.sampled_from([0.1, 0.5, 0.75, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ragged_batches_keep_what_plain_loops_keep_of_each_turn(
    compressor: str,
    batch_sizes: list[list[tuple[int, int, int]]],
    side: Literal["left", "right"],
    per_row: bool,
    ratio: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch = batch_of([made_up(turns, str(n)) for n, turns in enumerate(batch_sizes)], side)
    whole = layout_of(batch)
    # Some vision tokens were dropped before, as behind a first stage.
    layout = whole.only(
        [
            tokens[~torch.isin(tokens, s.spans.vision) | (torch.rand(len(tokens)) < 0.8)]
            for tokens, s in zip(whole.rows, batch.samples, strict=True)
        ]
    )
    config: Any = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=2
    )
    attention: Any = LlamaAttention(config, 0).double()
    recorder = AttentionRecorder(SimpleNamespace(self_attn=attention))
    handles = recorder.attach()
    hidden = torch.randn(len(batch_sizes), layout.length, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        queries, keys = attention.q_proj(hidden), attention.k_proj(hidden)
    for handle in handles:
        handle.remove()
    angles = torch.randn(len(batch_sizes) if per_row else 1, whole.length, 2, dtype=torch.float64)
    found = find_compressor(compressor)
    choices = CompressionSettings(compressor=compressor, stages=(), seed=seed)
    stage = DropStage(layer=2, ratio=ratio)
    selector = TokenSelector(found, choices, batch, draw=5)
    view = LayerView(found.needs, torch.nn.Identity(), recorder, hidden)
    rows = selector.kept_rows(stage, layout, view, (angles.cos(), angles.sin()))
    for row, sample in enumerate(batch.samples):
        here = layout.rows[row].tolist()
        columns = [layout.starts[row] + n for n in range(len(here))]
        spun = [p + (batch.offsets[row] if per_row else 0) for p in here]
        waves = angles[row if per_row else 0, spun]
        key_heads = [heads(keys[row, c], wave) for c, wave in zip(columns, waves, strict=True)]
        kept = set(here) - set(sample.spans.vision.tolist())
        for number, turn in enumerate(image_turns(sample, "instruction")):
            vision = [here.index(p) for p in turn.vision.tolist() if p in here]
            text, end = [here.index(p) for p in turn.text.tolist()], here.index(turn.end)
            if not vision:
                continue
            if compressor == "dart":
                states = [hidden[row, column].tolist() for column in columns]
                flat_keys = [[x for head in token for x in head] for token in key_heads]
                chosen = dart_by_loops(states, flat_keys, vision, text, ratio)
            elif compressor == "fastv":
                asked = heads(queries[row, columns[end]], waves[end])
                groups = [[token[g] for token in key_heads] for g in range(GROUPS)]
                weights = attention_by_loops(asked, groups, end, attention.scaling)
                chosen = fastv_by_loops(weights, vision, ratio)
            else:
                drawn = random_words(seed, len(vision), sample.key, number, 2, 5).tolist()
                chosen = random_by_loops(drawn, vision, ratio)
            kept |= {here[n] for n in chosen}
        assert rows[row].tolist() == sorted(kept)


def answered(answer: str) -> Sample:
    sample = tiny_samples(1)[0]
    messages = [sample.messages[0], Message(role="assistant", text=answer)]
    return make_sample("asked", sample.images, messages)


def kept_vision(
    model: Any, samples: Sequence[Any], chosen: CompressionSettings, draw: int = 0
) -> list[list[int]]:
    _, layout = compressed(model, chosen, batch_of(samples), draw)
    return [
        sample.spans.vision[layout.kept(row, sample.spans.vision)].tolist()
        for row, sample in enumerate(samples)
    ]


@pytest.mark.parametrize("compressor", ["dart", "fastv"])
def test_the_answer_decides_nothing_unless_the_released_way_is_asked_for(
    compressor: str, tiny_folder: TinyFolder
) -> None:
    model, processor = deep_model(tiny_folder("llava_next"))
    encoder = SampleEncoder(processor, model.config)
    answers = ["a red square, one digit.", "two digits.", "describe the picture: blue, a word"]
    samples = [encoder.encode(answered(answer)) for answer in answers]
    prompt = encoder.encode_prompt(answered("a red square"))
    chosen = at(0.5, compressor)
    one_by_one = [kept_vision(model, [sample], chosen)[0] for sample in [*samples, prompt]]
    assert len({tuple(kept) for kept in one_by_one}) == 1
    assert kept_vision(model, [*samples, prompt], chosen) == one_by_one
    leaking = kept_vision(model, samples, replace(chosen, text="released"))
    assert len({tuple(kept) for kept in leaking}) > 1


def test_the_draw_and_the_sample_decide_what_random_keeps(llava: Path) -> None:
    model, processor = deep_model(llava)
    samples = encode(model, processor)
    chosen = at(0.75, "random")
    kept = kept_vision(model, samples, chosen)
    assert kept == kept_vision(model, samples, chosen)
    assert kept[::-1] == kept_vision(model, samples[::-1], chosen)
    others = [
        kept_vision(model, samples, chosen, draw=1),
        kept_vision(model, samples, replace(chosen, seed=1)),
    ]
    assert all(a != b for other in others for a, b in zip(kept, other, strict=True) if a)
    assert kept[0] != kept[1]  # both have one image of 16 tokens at the same place
