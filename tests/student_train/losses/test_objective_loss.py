"""EM-KD's objective: equal to the loops on ragged batches, and its laws (method.md)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_train.config.objective import MatchingConfig, ObjectiveConfig, preset
from student_train.losses.objective_loss import LossTerms, distillation_loss
from student_train.signals.from_cache import vision_signal
from teacher_cache.schema.teacher_output import TeacherOutput
from tests.support import references
from tests.support.batches import (
    EMKD,
    EQUAL_GRIDS,
    ONE_IMAGE,
    SHAPES,
    TEXT_ONLY,
    TWO_IMAGES,
    RandomBatch,
    RecordForm,
    Shape,
    random_batch,
)

VOCAB = 11
ALL_IDS = MatchingConfig(num_shared_ids=None)


def values(found: LossTerms) -> dict[str, float]:
    return {name: term.item() for name, term in found.terms.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_term_is_that_of_the_loops_on_ragged_batches(seed: int, temperature: float) -> None:
    batch = random_batch(seed)
    objective = replace(EMKD, temperature=temperature, smooth_l1_beta=0.3)
    expected = references.emkd(
        batch.reference(),
        batch.student_head.weight.tolist(),
        batch.teacher_head.weight.tolist(),
        temperature,
        0.3,
    )
    forms: tuple[tuple[RecordForm, int], ...] = (("hidden", 4), ("topk", VOCAB))
    for form, k in forms:
        found = batch.loss(objective, form, k)
        assert values(found) == pytest.approx(expected, abs=1e-6)
        total = 0.5 * expected["supervised"] + 0.5 * expected["rld"]
        total += 0.25 * expected["vsd"] + 25 * expected["vlad"]
        assert found.total.item() == pytest.approx(total, abs=1e-5)
        assert found.tails == {"rld": "exact", "vsd": "exact"}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_term_is_that_of_the_loops_on_each_kind_of_sample_alone(shape: Shape) -> None:
    batch = random_batch(7, [shape])
    weights = batch.student_head.weight.tolist(), batch.teacher_head.weight.tolist()
    expected = references.emkd(batch.reference(), *weights)
    assert values(batch.loss()) == pytest.approx(expected, abs=1e-6)


def looped_vsd(batch: RandomBatch, found: LossTerms, blend: float) -> float:
    """VSD of the pairs that were matched, K = 4, with the tail that the sketch decodes to."""
    samples: list[float] = []
    sketches = batch.outputs("topk+sketch")
    for state, full, coded, pairs in zip(
        batch.states, batch.hidden_outputs, sketches, found.assignments, strict=True
    ):
        if pairs is None:
            continue
        dense = vision_signal(full, batch.assets("hidden")).dense_logits()
        decoded = vision_signal(coded, batch.assets("topk+sketch")).logits_at(torch.arange(VOCAB))
        student = batch.student_head(state.vision)[:, :VOCAB].tolist()
        kls = [
            references.blended_reverse_kl(
                student[j], dense[i].tolist(), decoded[i].tolist(), 4, blend
            )
            for j, i in zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True)
        ]
        samples.append(sum(kls) / len(kls))
    return sum(samples) / len(samples)


def test_top_k_terms_lump_the_tail_and_a_sketch_shapes_it() -> None:
    batch = random_batch(8, [ONE_IMAGE, TEXT_ONLY, TWO_IMAGES])
    lumped = batch.loss(replace(EMKD, matching=MatchingConfig(metric="prob_l1")), "topk")
    assert lumped.tails == {"rld": "bucket", "vsd": "bucket"}
    assert values(lumped)["vsd"] == pytest.approx(looped_vsd(batch, lumped, 0.0), abs=1e-6)
    sketched = batch.loss(EMKD, "topk+sketch")
    assert sketched.tails == {"rld": "bucket", "vsd": "blend"}
    assert values(sketched)["vsd"] == pytest.approx(looped_vsd(batch, sketched, 0.5), abs=1e-6)
    kls: list[float] = []
    for sample in batch.reference():
        own = references.linear(sample.student.predicting, batch.student_head.weight.tolist())
        theirs = references.linear(sample.teacher.predicting, batch.teacher_head.weight.tolist())
        kls += [
            references.bucket_reverse_kl(s[:VOCAB], t, 4) for s, t in zip(own, theirs, strict=True)
        ]
    for found in (lumped, sketched):
        assert values(found)["rld"] == pytest.approx(sum(kls) / len(kls), abs=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it() -> None:
    batch = random_batch(9, [EQUAL_GRIDS], student_vocab_size=VOCAB, student_width=6)
    record = batch.hidden_outputs[0].hidden
    assert record is not None
    with torch.no_grad():
        batch.student_head.weight.copy_(batch.teacher_head.weight)
    state = replace(
        batch.states[0], vision=record.vision, text=record.text, predicting=record.predicting
    )
    for form in ("hidden", "topk+sketch"):
        found = distillation_loss(
            [state], batch.outputs(form), batch.student_head, EMKD, batch.assets(form)
        )
        pairs = found.assignments[0]
        assert pairs is not None
        assert pairs.teacher.tolist() == [0, 1, 2, 3]
        tolerance = 1e-12 if form == "hidden" else 2e-2
        for name in ("rld", "vsd", "vlad"):
            assert found.terms[name].item() == pytest.approx(0.0, abs=tolerance)


def permuted(output: TeacherOutput, order: Tensor) -> TeacherOutput:
    assert output.hidden is not None
    hidden = replace(output.hidden, vision=output.hidden.vision[order])
    return replace(output, hidden=hidden)


def test_permuting_teacher_tokens_changes_the_assignment_and_no_loss() -> None:
    batch = random_batch(10, [EQUAL_GRIDS])
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(batch, hidden_outputs=[permuted(batch.hidden_outputs[0], order)])
    for form in ("hidden", "topk", "topk+sketch"):
        metric = "prob_l1" if form == "topk" else "raw_l1"
        objective = replace(EMKD, matching=replace(ALL_IDS, metric=metric))
        plain, other = batch.loss(objective, form), moved.loss(objective, form)
        tolerance = 1e-3 if form == "topk+sketch" else 1e-9
        assert values(other) == pytest.approx(values(plain), rel=tolerance)
        before, after = plain.assignments[0], other.assignments[0]
        assert before is not None
        assert after is not None
        assert order[after.teacher].tolist() == before.teacher.tolist()
        assert after.teacher.tolist() != before.teacher.tolist()


@pytest.mark.parametrize("shape", [TEXT_ONLY, ONE_IMAGE, TWO_IMAGES])
def test_a_sample_without_vision_tokens_adds_nothing_to_a_vision_term(shape: Shape) -> None:
    batch = random_batch(11, [ONE_IMAGE, shape, TWO_IMAGES])
    counted = 3 if shape.views else 2  # samples with an image, whatever was dropped of it
    if shape.views:  # few tokens and a high ratio: none is left of them
        nothing = torch.empty(0, dtype=torch.int64)
        batch.states[1] = replace(batch.states[1], vision=batch.states[1].vision[:0], kept=nothing)
    whole = batch.loss()
    keep = [0, 2]
    fewer = replace(
        batch,
        states=[batch.states[i] for i in keep],
        hidden_outputs=[batch.hidden_outputs[i] for i in keep],
    )
    part = fewer.loss()
    for name in ("vsd", "vlad"):
        assert whole.terms[name].item() * counted == pytest.approx(part.terms[name].item() * 2)
    assert whole.assignments[1] is None
    assert whole.terms["supervised"].item() != part.terms["supervised"].item()


@pytest.mark.parametrize("shape", [TEXT_ONLY, replace(TEXT_ONLY, response=0)])
def test_terms_without_anything_to_average_are_zeros_with_a_gradient(shape: Shape) -> None:
    batch = random_batch(12, [shape, shape])
    for form in ("hidden", "topk"):
        objective = replace(EMKD, matching=replace(ALL_IDS, metric="prob_l1"))
        found = batch.loss(objective, form)
        empty = ["vsd", "vlad"] if shape.response else list(found.terms)
        for name in empty:
            assert found.terms[name].item() == 0.0
            assert found.terms[name].requires_grad
            assert all(not gradient.any() for gradient in batch.gradients(found.terms[name]))
        assert bool(torch.isfinite(found.total))


def test_k_equal_to_the_vocabulary_agrees_with_the_states() -> None:
    batch = random_batch(15)
    live, cached = batch.loss(EMKD, "hidden"), batch.loss(EMKD, "topk", VOCAB)
    for name in ("supervised", "rld", "vsd"):
        torch.testing.assert_close(live.terms[name], cached.terms[name], rtol=1e-12, atol=1e-12)
    for one, other in zip(live.assignments, cached.assignments, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.teacher, other.teacher)


def test_a_term_of_weight_zero_is_not_computed_and_its_records_are_not_read() -> None:
    batch = random_batch(16, [ONE_IMAGE, TEXT_ONLY])
    bare = [replace(o, vision=None, affinity=None, response=None) for o in batch.outputs("topk")]
    found = distillation_loss(batch.states, bare, batch.student_head, preset("supervised"))
    assert list(found.terms) == ["supervised"]
    assert found.weights == {"supervised": 1.0}
    assert found.assignments == (None, None)
    assert torch.equal(found.total, found.terms["supervised"])
    rld = batch.loss(preset("rld"), "topk")
    assert list(rld.terms) == ["supervised", "rld"]
    only_vlad = ObjectiveConfig(
        supervised_weight=0.0, rld_weight=0.0, vsd_weight=0.0, matching=ALL_IDS
    )
    found = batch.loss(only_vlad)
    assert list(found.terms) == ["vlad"]
    assert not batch.gradients(found.total)[-1].any(), "the head has no part in VLAD"


def test_hidden_cosine_matches_without_any_vision_logits() -> None:
    batch = random_batch(17, [ONE_IMAGE], student_width=6)
    matching = MatchingConfig(metric="hidden_cosine")
    objective = ObjectiveConfig(
        supervised_weight=0.0, rld_weight=0.0, vsd_weight=0.0, matching=matching
    )

    def refuse(hidden: Tensor) -> Tensor:
        raise AssertionError("the head was called")

    found = distillation_loss(
        batch.states, batch.hidden_outputs, refuse, objective, batch.assets("hidden")
    )
    assert found.terms["vlad"].item() > 0


def test_mixed_precision_is_the_models_affair_and_not_the_losses() -> None:
    batch = random_batch(23, [ONE_IMAGE, TWO_IMAGES], dtype=torch.float32)
    plain = batch.student_head.weight

    def head(hidden: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu"), "the head runs in the model's precision"
        return (hidden[:, None, :] * plain).sum(dim=2)

    forms: tuple[RecordForm, ...] = ("hidden", "topk+sketch")
    for form in forms:
        expected = batch.loss(EMKD, form)
        outputs, assets = batch.outputs(form), batch.assets(form)
        with torch.autocast("cpu", torch.bfloat16):
            found = distillation_loss(batch.states, outputs, head, EMKD, assets)
        assert values(found) == pytest.approx(values(expected), rel=1e-4)


def test_another_text_or_an_empty_batch_is_refused() -> None:
    batch = random_batch(19, [ONE_IMAGE, TEXT_ONLY])
    changed = replace(batch.states[1], content_ids=batch.states[1].content_ids + 1)
    with pytest.raises(ValueError, match="sample 1 of the batch: the student's 6 text tokens"):
        replace(batch, states=[batch.states[0], changed]).loss()
    flipped = replace(batch.states[0], text_is_response=~batch.states[0].text_is_response)
    with pytest.raises(ValueError, match="sample 0 of the batch: student and teacher disagree"):
        replace(batch, states=[flipped, batch.states[1]]).loss()
    with pytest.raises(ValueError, match="at least one sample"):
        distillation_loss([], [], batch.student_head, EMKD)


def test_a_sample_whose_image_only_one_side_saw_is_refused() -> None:
    batch = random_batch(20, [ONE_IMAGE])
    blind = replace(batch.states[0], views=(), vision=batch.states[0].vision[:0])
    with pytest.raises(ValueError, match="needs the same views on both sides"):
        replace(batch, states=[blind]).loss()


def test_the_log_says_what_the_divergences_rest_on() -> None:
    batch = random_batch(22, [ONE_IMAGE, TWO_IMAGES])
    exact = batch.loss().diagnostics
    assert set(exact) == {
        "match_mean_cost",
        "match_separability",
        "match_arbitrary",
        "match_hubness",
        "match_distance",
        "match_inside",
        "match_local",
        "student_row_mean_spread",
    }
    sketched_loss = batch.loss(EMKD, "topk+sketch")
    sketched = sketched_loss.diagnostics
    for name in ("rld", "vsd"):
        parts = [sketched[f"{name}_{part}_part"] for part in ("head", "bucket", "tail")]
        if name == "rld":  # the others are means over samples, the log is over rows
            assert sum(parts) == pytest.approx(sketched_loss.terms[name].item())
        for part in ("lower_bound", "student_tail_mass", "teacher_kept_mass"):
            assert f"{name}_{part}" in sketched
        assert math.isfinite(sketched[f"{name}_upper_bound"])
    assert sketched["vsd_tail_is_blend"] == sketched["rld_tail_is_bucket"] == 1.0
    assert 0 < sketched["vsd_teacher_kept_mass"] < 1
    assert all(isinstance(value, float) for value in sketched.values())
    both = batch.loss(replace(EMKD, divergence="jsd"), "topk+sketch")
    true = batch.loss(replace(EMKD, divergence="jsd")).terms["rld"].item()
    bounds = [both.diagnostics[f"rld_{side}_bound"] for side in ("lower", "upper")]
    assert 0 < bounds[0] <= true <= bounds[1] <= math.log(2)
