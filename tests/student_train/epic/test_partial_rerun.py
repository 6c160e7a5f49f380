"""Running the upper layers once more is a second whole pass, without the layers below."""

from pathlib import Path

import pytest
import torch

from student_train.compression.compression import compress
from student_train.epic.partial_rerun import record_entry, rerun_from_layer
from student_train.models.forward import final_hidden
from tests.support.deep import at, compressed, deep_batch
from tests.support.paths import TinyFolder

LAYER = 2


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_a_second_pass_to_the_bit_and_leaves_the_first_alone(
    family: str, compressor: str, checkpointing: bool, tiny_folder: TinyFolder
) -> None:
    model, batch = deep_batch(tiny_folder(family), "left")
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    student_settings = at(0.75, compressor)
    expected = compressed(model, student_settings, batch, 0)
    # This order is the harder one: the hooks of `compress` are there first.
    with compress(model, student_settings, batch) as found, record_entry(model, LAYER) as entry:
        student = final_hidden(model, batch.inputs)
    assert torch.equal(student, expected[0])
    assert torch.equal(found.layout.positions, expected[1].positions)
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(model.get_decoder().layers)
    ]
    for ratio, layer, draw in ((0.5, LAYER, 1), (0.0, LAYER, 1), (0.5, LAYER + 1, 2)):
        ran.clear()
        with torch.no_grad():
            hidden, layout = rerun_from_layer(
                model, entry, at(ratio, compressor, layer), batch, draw
            )
        assert ran == [2, 3]
        wanted = compressed(model, at(ratio, compressor, layer), batch, draw)
        assert torch.equal(hidden, wanted[0])
        assert torch.equal(layout.positions, wanted[1].positions)
    for hook in hooks:
        hook.remove()
    student.sum().backward()


def test_the_second_pass_has_the_precision_of_the_first(llava: Path) -> None:
    model, batch = deep_batch(llava)
    with record_entry(model, LAYER) as entry, torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            final_hidden(model, batch.inputs)
            wanted = compressed(model, at(0.5), batch, 0)[0]
        assert torch.equal(rerun_from_layer(model, entry, at(0.5), batch)[0], wanted)


def test_what_cannot_be_run_again_is_refused(llava: Path) -> None:
    model, batch = deep_batch(llava)
    with record_entry(model, LAYER) as entry, torch.no_grad():
        with pytest.raises(ValueError, match="no pass was recorded"):
            rerun_from_layer(model, entry, at(0.5), batch)
        with compress(model, at(0.5, layer=1), batch):
            final_hidden(model, batch.inputs)
        with pytest.raises(ValueError, match="a stage is at layer 1, but"):
            rerun_from_layer(model, entry, at(0.5, layer=1), batch)
        with pytest.raises(ValueError, match="give it the whole batch"):
            rerun_from_layer(model, entry, at(0.5), batch)
    for layer in (0, 4):
        with pytest.raises(ValueError, match="choose 1 to 3"), record_entry(model, layer):
            pass
