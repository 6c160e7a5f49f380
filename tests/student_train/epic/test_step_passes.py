"""EPIC's step is two whole passes of one model, without the half of them that is the same."""

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.epic.partial_rerun import LayerEntry, rerun_from_layer
from student_train.epic.step_passes import student_pass
from student_train.epic.step_plan import StepPlan
from student_train.losses.objective_loss import distillation_loss
from student_train.models.forward import output_head
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.samples import Message, Sample, make_sample
from tests.support.deep import deep_model, encode
from tests.support.epic import fixed, gradients, plan, student_batch, two_passes
from tests.support.lazy import student_from_vanilla, student_loss
from tests.support.paths import TinyFolder
from tests.support.tiny import ask, tiny_image, tiny_samples

NOTHING = TeacherAssets()


def loss_of(
    model: Any, batch: Any, step: StepPlan | None, name: ObjectiveName = "epic-tcd", **options: Any
) -> Any:
    return student_loss(model, batch, replace(preset(name), **options), NOTHING, step)


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
@pytest.mark.parametrize(
    ("family", "side"), [("llava", "left"), ("llava_next", "right"), ("qwen2_5_vl", "left")]
)
def test_values_and_gradients_are_those_of_two_whole_passes(
    family: str, side: Any, compressor: str, tiny_folder: TinyFolder
) -> None:
    """A ragged batch: several turns, text alone, two images; float64; weights of 0.3 and 0.7."""
    model, processor = deep_model(tiny_folder(family))
    model.double().train()
    batch = student_batch(encode(model, processor), side, torch.float64)
    step = plan(fixed(compressor, ratio=0.8))
    found = loss_of(model, batch, step, temperature=2.0)
    expected = two_passes(model, batch.model, step, temperature=2.0)
    assert_close(found.terms, expected, rtol=1e-9, atol=1e-12)
    assert float(expected["kd"].detach()) > 1e-6
    assert found.weights == {"supervised": 0.3, "kd": 0.7}
    total = 0.3 * expected["supervised"] + 0.7 * expected["kd"]
    torch.testing.assert_close(found.total, total, rtol=1e-9, atol=0)
    wanted = gradients(model, total)
    assert_close(gradients(model, found.total), wanted, rtol=1e-6, atol=1e-12)
    kd = loss_of(model, batch, step, temperature=2.0).terms["kd"]
    alone = two_passes(model, batch.model, step, temperature=2.0)["kd"]
    assert_close(gradients(model, kd), gradients(model, alone), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
def test_checkpointing_changes_no_gradient(compressor: str, llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = student_batch(encode(model, processor))
    step = plan(fixed(compressor))
    plain = gradients(model.train(), loss_of(model, batch, step).total)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, loss_of(model, batch, step).total)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_batch_is_the_mean_of_its_samples_tokens(tiny_folder: TinyFolder) -> None:
    model, processor = deep_model(tiny_folder("llava_next"))
    model.double()
    samples = encode(model, processor)
    step = plan(fixed("random"))
    whole = loss_of(model, student_batch(samples, dtype=torch.float64), step)
    counts = torch.tensor([int(sample.spans.is_response.sum()) for sample in samples])
    for name in ("supervised", "kd"):
        alone = torch.stack(
            [
                loss_of(model, student_batch([sample], dtype=torch.float64), step).terms[name]
                for sample in samples
            ]
        )
        mean = (alone * counts).sum() / counts.sum()
        torch.testing.assert_close(whole.terms[name], mean, rtol=1e-9, atol=1e-14)
        assert name == "supervised" or float(alone[2].detach()) == 0  # text alone


def four_tokens() -> Sample:
    """DART keeps all of four vision tokens."""
    turns = [Message(role="user", text="<image> what?"), Message(role="assistant", text="two.")]
    return make_sample("four", [tiny_image(1, 16, 16)], turns)


@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("behind the last layer", plan(ProgressionConfig(schedule="lcd"), step=0)),
        ("no images", plan(fixed())),
        ("too few", plan(fixed())),
    ],
)
def test_where_nothing_is_dropped_kd_is_zero_and_all_else_supervised(
    case: str, step: StepPlan, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = deep_model(tiny_folder("qwen2_5_vl"))
    samples = {"no images": [ask("how many?", seeds=())], "too few": [four_tokens()]}.get(case)
    batch = student_batch(encode(model, processor, samples))
    monkeypatch.setattr("student_train.epic.step_passes.rerun_from_layer", None)  # no second pass
    found = loss_of(model, batch, step)
    assert float(found.terms["kd"].detach()) == 0
    assert not any(bool(g.any()) for g in gradients(model, found.terms["kd"]).values())
    plain = loss_of(model, batch, None, name="supervised")
    assert torch.equal(found.terms["supervised"], plain.terms["supervised"])
    with_kd = gradients(model, loss_of(model, batch, step).total)
    scaled = gradients(model, 0.3 * loss_of(model, batch, None, name="supervised").total)
    assert_close(with_kd, scaled, rtol=1e-4, atol=1e-6)


def test_one_set_of_weights_serves_both_passes(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied, the teacher has no graph, and what was recorded is not kept."""
    entries: list[weakref.ref[LayerEntry]] = []

    def watched(model: Any, entry: LayerEntry, *rest: Any) -> Any:
        entries.append(weakref.ref(entry))
        return rerun_from_layer(model, entry, *rest)

    monkeypatch.setattr("student_train.epic.step_passes.rerun_from_layer", watched)
    model, processor = deep_model(llava)
    batch = student_batch(encode(model, processor))
    hooks = [len(layer._forward_pre_hooks) for layer in model.get_decoder().layers]
    found = student_pass(model, batch.model, plan(fixed()), teach=True)
    assert [entry() for entry in entries] == [None]
    assert found.consistency_teacher_states is not None
    assert not found.consistency_teacher_states.requires_grad
    assert hooks == [len(layer._forward_pre_hooks) for layer in model.get_decoder().layers]
    with torch.no_grad():
        model.get_decoder().layers[3].mlp.down_proj.weight.add_(1.0)
    moved = student_pass(model, batch.model, plan(fixed()), teach=True)
    assert moved.consistency_teacher_states is not None
    assert not torch.equal(moved.consistency_teacher_states, found.consistency_teacher_states)


def test_mixed_precision_gives_both_passes_one_precision(llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = student_batch(encode(model, processor))
    step = plan(fixed(ratio=0.8))
    exact = loss_of(model, batch, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(model, batch, step)
    torch.testing.assert_close(found.total, exact.total, rtol=2e-2, atol=0)
    same = replace(step, teacher=step.student, teacher_draw=step.student_draw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(loss_of(model, batch, same).terms["kd"].detach()) == 0
    assert all(bool(g.isfinite().all()) for g in gradients(model, found.total).values())


class Adapter(nn.Module):
    """A head that cannot be taken apart, as LoRA's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("kind", ["bias", "adapter", "untied"])
def test_the_teacher_speaks_through_whatever_head_the_student_has(
    kind: str, tiny_folder: TinyFolder
) -> None:
    model, processor = deep_model(tiny_folder("qwen2_5_vl" if kind == "untied" else "llava"))
    if kind != "untied":
        torch.manual_seed(2)
        head = nn.Linear(32, output_head(model).get_parameter("weight").shape[0])
        model.set_output_embeddings(head if kind == "bias" else Adapter(head))
    model.double()
    batch = student_batch(encode(model, processor), dtype=torch.float64)
    step = plan(fixed())
    found = loss_of(model, batch, step)
    expected = two_passes(model, batch.model, step)
    assert_close(found.terms, expected, rtol=1e-9, atol=1e-12)
    total = 0.3 * expected["supervised"] + 0.7 * expected["kd"]
    assert_close(gradients(model, found.total), gradients(model, total), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_student_that_pools_is_trained_so_too(family: str, tiny_folder: TinyFolder) -> None:
    loaded: Any = student_from_vanilla(str(tiny_folder(family)), stride=2)
    model, processor = loaded
    model.double()
    batch = student_batch(encode(model, processor), dtype=torch.float64)
    step = replace(plan(fixed("random", layer=1)), drops=True)
    found = loss_of(model, batch, step)
    assert_close(found.terms, two_passes(model, batch.model, step), rtol=1e-9, atol=1e-12)
    assert float(found.terms["kd"].detach()) > 0


def test_the_log_says_how_hard_the_step_was(llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = student_batch(encode(model, processor, tiny_samples(4)))  # 16, 16, 0 and 32 tokens
    found = loss_of(model, batch, plan(fixed("random"))).diagnostics
    assert found == {
        "epic_layer": 2.0,
        "student_ratio": 0.75,
        "teacher_ratio": pytest.approx(0.45),
        "vision_tokens": pytest.approx(64 / 3),
        "vision_tokens_kept": pytest.approx(16 / 3),
    }
    alone = loss_of(model, batch, plan(fixed("random")), name="supervised").diagnostics
    assert alone == {name: value for name, value in found.items() if name != "teacher_ratio"}


def test_the_loss_of_other_objectives_has_no_second_pass(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = deep_model(llava)
    batch = student_batch(encode(model, processor))
    monkeypatch.setattr("student_train.epic.step_passes.rerun_from_layer", None)
    step = plan(fixed())
    found = loss_of(model, batch, step, name="supervised")
    model = copy.deepcopy(model)
    expected = two_passes(model, batch.model, step)["supervised"]
    torch.testing.assert_close(found.total, expected)
    states = student_pass(model, batch.model, step).states
    assert [len(state.vision) for state in states] == [4, 4, 0, 12, 4]
    with pytest.raises(ValueError, match="needs at least one sample"):
        distillation_loss([], [], output_head(model), preset("supervised"))
