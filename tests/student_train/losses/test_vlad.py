"""VLAD of many samples at once: that of loops over samples, tokens and pairs, of any sizes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, ObjectiveConfig, VladText
from student_train.losses import vlad
from student_train.losses.batch_matching import Matched, start_batch_matching
from student_train.losses.objective_loss import distillation_loss
from student_train.losses.vlad import batch_vlad, padded
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import HiddenSignal
from teacher_cache.codec.quantize import from_scale, to_scale
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.schema.teacher_output import AffinityRecord
from tests.support import references
from tests.support.batches import (
    NO_TEXT_AFTER_IMAGE,
    ONE_IMAGE,
    SHAPES,
    TEXT_ONLY,
    RandomBatch,
    RecordForm,
    Shape,
    View,
    random_batch,
)
from tests.support.present import present

ONLY_VLAD = ObjectiveConfig(
    supervised_weight=0.0, rld_weight=0.0, vsd_weight=0.0, smooth_l1_beta=0.3
)
FORMS: tuple[RecordForm, ...] = ("hidden", "topk")
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A sample with or without an image, with or without text after it."""
    views = [View(image, draw(GRIDS), draw(GRIDS)) for image in range(draw(st.integers(0, 2)))]
    return Shape(
        views=views,
        instruction=draw(st.integers(0, 3)),
        response=draw(st.integers(0, 3)),
    )


def matched(batch: RandomBatch, form: RecordForm) -> list[Matched]:
    objective = replace(ONLY_VLAD, matching=MatchingConfig(metric="prob_l1"))
    pending = start_batch_matching(
        batch.states, batch.outputs(form), batch.student_head, objective, batch.assets(form)
    )
    return [sample for sample in pending.result() if sample is not None]


def looped(samples: Sequence[Matched], batch: RandomBatch, text: VladText) -> float:
    """From the equation, over lists; the teacher's states whatever the record holds."""
    means: list[float] = []
    for sample in samples:
        index = next(i for i, state in enumerate(batch.states) if state is sample.state)
        record = present(batch.hidden_outputs[index].hidden)
        entries: list[float] = []
        for x, is_response in enumerate(sample.state.text_is_response.tolist()):
            if text != "all" and is_response != (text == "response"):
                continue
            pairs = zip(sample.pairs.student.tolist(), sample.pairs.teacher.tolist(), strict=True)
            for j, i in pairs:
                own = references.cosine(
                    sample.state.text[x].tolist(), sample.state.vision[j].tolist()
                )
                theirs = references.cosine(record.text[x].tolist(), record.vision[i].tolist())
                entries.append(references.smooth_l1(own - theirs, 0.3))
        if entries:
            means.append(sum(entries) / len(entries))
    return sum(means) / len(means) if means else 0.0


def gradients(batch: RandomBatch, term: Tensor) -> list[Tensor]:
    inputs = [tensor for state in batch.states for tensor in (state.vision, state.text)]
    return list(torch.autograd.grad(term, inputs, allow_unused=True, materialize_grads=True))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(shapes(), min_size=1, max_size=5),
    st.integers(0, 2**16),
    st.sampled_from(["all", "instruction", "response"]),
)
def test_a_ragged_batch_has_the_vlad_of_the_loops(
    kinds: list[Shape], seed: int, text: VladText
) -> None:
    batch = random_batch(seed, [*kinds, ONE_IMAGE])
    for form in FORMS:
        samples = matched(batch, form)
        found = batch_vlad(samples, replace(ONLY_VLAD, vlad_text=text))
        assert found.item() == pytest.approx(looped(samples, batch, text), abs=1e-12)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(batch, found))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_batch_are_those_of_its_samples_one_by_one(form: RecordForm) -> None:
    batch = random_batch(3)
    samples = matched(batch, form)
    means = [batch_vlad([sample], ONLY_VLAD) for sample in samples]
    compared = [m for m, sample in zip(means, samples, strict=True) if len(sample.state.text)]
    assert len(compared) < len(means), "one of the samples has no text after its image"
    expected = gradients(batch, torch.stack(compared).mean())
    found = gradients(batch, batch_vlad(samples, ONLY_VLAD))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: RecordForm) -> None:
    batch = random_batch(4, [SHAPES[3], ONE_IMAGE])
    samples = matched(batch, form)
    inputs = [tensor for state in batch.states for tensor in (state.vision, state.text)]

    def value(*moved: Tensor) -> Tensor:
        states = [
            replace(sample.state, vision=moved[2 * i], text=moved[2 * i + 1])
            for i, sample in enumerate(samples)
        ]
        again = [sample._replace(state=s) for sample, s in zip(samples, states, strict=True)]
        return batch_vlad(again, ONLY_VLAD)

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("most", [1, 7, 12, 40])
def test_any_bound_of_what_is_looked_at_together_gives_the_same(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(5, [*SHAPES, *SHAPES])
    largest: list[int] = []

    def watched(text: Tensor, vision: Tensor) -> Tensor:
        affinity = cosine_affinity(text, vision)
        largest.append(affinity.numel())
        return affinity

    for form in FORMS:
        samples = matched(batch, form)
        whole = batch_vlad(samples, ONLY_VLAD)
        expected = gradients(batch, whole)
        largest.clear()
        with monkeypatch.context() as patched:
            patched.setattr(vlad, "MOST_ENTRIES", most)
            patched.setattr(vlad, "cosine_affinity", watched)
            found = batch_vlad(samples, ONLY_VLAD)
        alone = max(len(s.state.text) * s.pairs.num_pairs for s in samples)
        assert max(largest) <= max(most, alone)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
        for one, other in zip(gradients(batch, found), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_samples_without_text_to_compare_count_for_nothing_and_leave_a_gradient_of_zero() -> None:
    batch = random_batch(6, [NO_TEXT_AFTER_IMAGE, TEXT_ONLY, NO_TEXT_AFTER_IMAGE])
    for form in FORMS:
        found = batch_vlad(matched(batch, form), ONLY_VLAD)
        assert found.item() == 0
        assert all(not gradient.any() for gradient in gradients(batch, found))


def test_a_filled_up_place_never_reaches_a_value_or_a_gradient() -> None:
    pieces = [torch.ones(n, 2, requires_grad=True) for n in (0, 3, 1)]
    filled = padded(pieces)
    assert filled.shape == (3, 3, 2)
    assert filled.sum().item() == 8
    torch.autograd.backward((filled * torch.arange(1.0, 19.0).view(3, 3, 2)).sum())
    assert present(pieces[1].grad).tolist() == [[7, 8], [9, 10], [11, 12]]
    assert present(pieces[2].grad).tolist() == [[13, 14]]
    assert padded([torch.zeros(0, 2), torch.zeros(0, 2)]).shape == (2, 0, 2)


def test_records_of_neither_kind_and_of_both_are_refused() -> None:
    batch = random_batch(7, [ONE_IMAGE, ONE_IMAGE])
    stored, states = matched(batch, "topk"), matched(batch, "hidden")
    without = replace(stored[1].output, affinity=None)
    with pytest.raises(ValueError, match="without its part `affinity` \\(or `hidden`\\)"):
        batch_vlad([stored[0], stored[1]._replace(output=without)], ONLY_VLAD)
    with pytest.raises(ValueError, match="some samples of the batch were read with affinities"):
        batch_vlad([stored[0], states[1]], ONLY_VLAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_states_are_compared_in_float32(dtype: torch.dtype) -> None:
    exact = random_batch(8)
    batch = random_batch(8, dtype=dtype)
    expected = batch_vlad(matched(exact, "hidden"), ONLY_VLAD).item()
    samples = [
        own._replace(pairs=true.pairs, teachers=vision_signal(own.output, batch.assets("hidden")))
        for own, true in zip(matched(batch, "hidden"), matched(exact, "hidden"), strict=True)
    ]
    samples = [
        s._replace(teachers=s.teachers.rows(s.pairs.teacher), place=slice(None)) for s in samples
    ]
    found = batch_vlad(samples, ONLY_VLAD)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=40 * torch.finfo(dtype).eps)
    assert all(gradient.dtype == dtype for gradient in gradients(batch, found))


LARGE = [
    Shape(views=[View(0, (12, 12), (24, 24))], instruction=24, response=40),
    Shape(views=[View(0, (9, 9), (18, 18))], instruction=10, response=7),
    Shape(views=[View(0, (6, 6), (24, 24)), View(1, (3, 3), (9, 9))], instruction=3, response=90),
]


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_int8_affinities_move_the_states_gradient_by_one_and_a_half_percent_at_a_gap_of_0_04(
    noise: float,
) -> None:
    """The error is absolute, half a step at most: as the gap of cosines shrinks its share grows.

    The student's states are those it is matched to, and some noise.
    """
    batch = random_batch(9, LARGE, student_width=896, teacher_width=896, dtype=torch.float32)
    states, stored, gaps = list[Matched](), list[Matched](), list[Tensor]()
    for sample in matched(batch, "hidden"):
        hidden = present(sample.output.hidden)
        assert isinstance(sample.teacher, HiddenSignal)
        hidden.text.add_(hidden.vision[: len(hidden.text)], alpha=0.3)
        state = replace(
            sample.state,
            vision=(sample.teacher.hidden + noise * sample.vision).detach().requires_grad_(),
            text=(hidden.text + noise * sample.state.text).detach().requires_grad_(),
        )
        states.append(sample._replace(state=state))
        theirs = cosine_affinity(hidden.text, hidden.vision)
        own = cosine_affinity(state.text, state.vision).detach()
        gaps.append((own - theirs[:, sample.pairs.teacher]).flatten())
        affinity = AffinityRecord(cosine=from_scale(*to_scale(theirs)))
        output = replace(sample.output, hidden=None, affinity=affinity)
        stored.append(sample._replace(state=state, output=output))

    def gradient(samples: Sequence[Matched]) -> Tensor:
        inputs = [tensor for s in samples for tensor in (s.state.vision, s.state.text)]
        found = torch.autograd.grad(batch_vlad(samples, ONLY_VLAD), inputs)
        return torch.cat([each.flatten() for each in found])

    exact, found = gradient(states), gradient(stored)
    error = float((found - exact).norm() / exact.norm())
    gap = float(torch.cat(gaps).square().mean().sqrt())
    assert 0 < error <= 0.015 * 0.04 / gap


def test_stored_states_and_affinities_as_they_are_lose_nothing() -> None:
    batch = random_batch(10)
    states = matched(batch, "hidden")
    stored = [
        own._replace(pairs=true.pairs)
        for own, true in zip(matched(batch, "topk"), states, strict=True)
    ]
    by_states = gradients(batch, batch_vlad(states, ONLY_VLAD))
    by_affinities = gradients(batch, batch_vlad(stored, ONLY_VLAD))
    for one, other in zip(by_states, by_affinities, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_autocast_does_not_reach_it() -> None:
    objective = replace(ONLY_VLAD, matching=MatchingConfig(metric="hidden_l2"))
    batch = random_batch(11, student_width=6, dtype=torch.float32)
    outputs, assets = batch.outputs("hidden"), batch.assets("hidden")
    plain = distillation_loss(batch.states, outputs, batch.student_head, objective, assets)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(batch.states, outputs, batch.student_head, objective, assets)
    assert torch.equal(plain.total, found.total)
