"""What a layer shows is what the model itself computes there: keys, attention, normed states."""

from typing import Any

import pytest
import torch

from student_train.compression.compressors import COMPRESSORS, Compressor, CompressorInputs
from student_train.compression.decoder import decoder_of
from student_train.compression.image_turns import image_turns
from tests.support.deep import at, batch_of, compressed, deep_batch
from tests.support.lazy import DynamicCache
from tests.support.paths import TinyFolder

LAYER = 2
MODELS = [
    ("llava", "llama"),
    ("llava", "mistral"),
    ("llava", "qwen3"),
    ("qwen2_5_vl", "qwen2_vl"),
    ("llava", None),
    ("qwen2_5_vl", None),
]


@pytest.mark.parametrize(("family", "decoder"), MODELS)
def test_evidence_is_what_an_eager_model_with_a_cache_computes(
    family: str, decoder: str | None, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = deep_batch(tiny_folder(family), "left", decoder=decoder, attention="eager")
    seen: list[CompressorInputs] = []

    def look(inputs: CompressorInputs, _ratio: float) -> torch.Tensor:
        seen.append(inputs)
        return inputs.vision

    every: Any = frozenset({"states", "keys", "attention", "random_words"})
    witness = Compressor(name="witness", needs=every, keep=look)
    monkeypatch.setitem(COMPRESSORS, "witness", witness)
    compressed(model, at(0.5, "witness", LAYER), batch)
    expected = [(s, turn) for s in batch.samples for turn in image_turns(s, "instruction")]
    assert len(seen) == len(expected) == 4
    for inputs, (sample, turn) in zip(seen, expected, strict=True):
        alone = batch_of([sample]).inputs
        cache: Any = DynamicCache()
        with torch.no_grad():
            output = model(
                **alone, past_key_values=cache, output_hidden_states=True, output_attentions=True
            )
            states = decoder_of(model).norm(output.hidden_states[LAYER][0])
        attention = output.attentions[LAYER - 1][0, :, turn.end].mean(dim=0)
        keys = cache.layers[LAYER - 1].keys[0].transpose(0, 1).flatten(1)
        assert inputs.vision.tolist() == turn.vision.tolist()
        assert inputs.instruction.tolist() == turn.text.tolist()
        torch.testing.assert_close(inputs.states, states, rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs.keys, keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs.attention, attention, rtol=0, atol=1e-6)
        assert inputs.attention is not None
        assert bool((inputs.attention[turn.vision] > 0).all())
