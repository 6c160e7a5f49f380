"""`blend` by the cache's template of an average tail: plain loops, laws, gradients, its name."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, preset
from student_train.divergence.divergence import Measure, forward_kl, jensen_shannon, reverse_kl
from student_train.divergence.tail_policies import resolve_tail
from student_train.losses.objective_loss import distillation_loss
from student_train.signals.teacher_signal import DenseSignal, concatenate
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.records.top_k import top_k_record
from tests.student_train.signals.test_top_k import alone
from tests.support import references
from tests.support.batches import ONE_IMAGE, normal, random_batch
from tests.support.strategies import true_record

VOCAB = 9
MEASURES = (reverse_kl, forward_kl, jensen_shannon)
COUNTS = st.lists(st.integers(1, VOCAB), min_size=1, max_size=5)


def templated(seed: int, counts: list[int], scale: float = 1.0) -> tuple[Tensor, TopKSignal]:
    """A teacher's logits, what is kept of them, and a template."""
    logits = scale * normal(seed, len(counts), VOCAB)
    template = (scale * normal(seed + 1, VOCAB)).log_softmax(0)
    return logits, TopKSignal(record=true_record(logits, counts), template=template)


def loops(measure: Measure, log_q: list[float], log_p: list[float]) -> float:
    log_m = [math.log((math.exp(q) + math.exp(p)) / 2) for q, p in zip(log_q, log_p, strict=True)]
    return {
        reverse_kl: references.kl(log_q, log_p),
        forward_kl: references.kl(log_p, log_q),
        jensen_shannon: (references.kl(log_q, log_m) + references.kl(log_p, log_m)) / 2,
    }[measure]


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    counts=COUNTS,
    blend=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    measure=st.sampled_from(MEASURES),
    scale=st.sampled_from([0.3, 1.0, 6.0]),
)
def test_it_is_the_chain_rule_with_the_template_in_place_of_the_tail(
    seed: int, counts: list[int], blend: float, measure: Measure, scale: float
) -> None:
    logits, signal = templated(seed, counts, scale)
    assert signal.template is not None
    student = scale * normal(seed + 2, len(counts), VOCAB)
    found = measure(student, signal, "blend", 1.0, blend)
    for row, count in enumerate(counts):
        log_q = references.log_softmax(student[row].tolist())
        log_p = references.log_softmax(logits[row].tolist())
        expected = loops(measure, log_q, log_p)
        if count < VOCAB:
            kept = references.top_ids(logits[row].tolist(), count)
            outside = [v for v in range(VOCAB) if v not in kept]
            log_tau = references.log_sum_exp([log_p[v] for v in outside])
            shape = signal.template.tolist()
            rest = references.log_sum_exp([shape[v] for v in outside])
            guess = [log_p[v] if v in kept else shape[v] - rest + log_tau for v in range(VOCAB)]
            assert sum(math.exp(guess[v]) for v in outside) == pytest.approx(math.exp(log_tau))
            lumped = [references.bucketed(each, kept) for each in (log_q, log_p)]
            whole, bucket = loops(measure, log_q, guess), loops(measure, *lumped)
            expected = (1 - blend) * bucket + blend * whole
        assert found.value[row].item() == pytest.approx(expected, rel=1e-7, abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), counts=COUNTS, scale=st.sampled_from([0.1, 1.0, 20.0, 200.0]))
def test_the_tail_has_the_mass_that_the_record_knows(
    seed: int, counts: list[int], scale: float
) -> None:
    """Also where the template holds next to nothing outside what is kept."""
    _, signal = templated(seed, counts, scale)
    found = (
        signal.templated_log_probs().scatter(1, signal.record.ids.long(), -torch.inf).logsumexp(1)
    )
    has_tail = torch.tensor(counts) < VOCAB
    torch.testing.assert_close(
        found[has_tail], signal.record.log_tail[has_tail], rtol=1e-9, atol=1e-8
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), counts=COUNTS, measure=st.sampled_from(MEASURES))
def test_positions_are_what_each_is_alone_and_the_bounds_hold(
    seed: int, counts: list[int], measure: Measure
) -> None:
    logits, signal = templated(seed, counts)
    student = normal(seed + 2, len(counts), VOCAB)
    found = measure(student, signal)
    rows = [measure(student[row, None], one) for row, one in enumerate(alone(signal))]
    for name in ("value", "tail", "lower", "upper"):
        expected = torch.cat([getattr(row, name) for row in rows])
        torch.testing.assert_close(getattr(found, name), expected)
    joined = measure(student, concatenate(alone(signal)))
    torch.testing.assert_close(joined.value, found.value)
    true = measure(student, DenseSignal(logits=logits)).value
    assert bool((found.lower <= true + 1e-9).all())
    assert bool((true <= found.upper + 1e-9).all())


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_are_those_of_finite_differences_and_inputs_stay(
    measure: Measure,
) -> None:
    _, signal = templated(11, [3, 1, 8, VOCAB])
    assert signal.template is not None
    before = signal.template.clone()
    student = normal(13, 4, VOCAB).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: measure(s, signal).value, student)
    assert torch.equal(signal.template, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", MEASURES)
def test_other_precisions_come_close(dtype: torch.dtype, measure: Measure) -> None:
    logits, exact = templated(14, [3, 3, 5])
    assert exact.template is not None
    half = TopKSignal(record=top_k_record(logits.to(dtype), 3), template=exact.template.float())
    student = normal(16, 3, VOCAB)
    wide = TopKSignal(record=top_k_record(logits.to(dtype).double(), 3), template=exact.template)
    found, expected = measure(student.to(dtype), half), measure(student.to(dtype).double(), wide)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), expected.value, rtol=1e-4, atol=1e-5)


def test_the_true_tail_as_template_makes_the_whole_blend_exact() -> None:
    logits = normal(17, 1, VOCAB)
    signal = TopKSignal(record=top_k_record(logits, 3), template=logits[0].log_softmax(0))
    student = normal(18, 1, VOCAB)
    for measure in MEASURES:
        exact = measure(student, DenseSignal(logits=logits)).value
        torch.testing.assert_close(measure(student, signal, "blend", 1.0, 1.0).value, exact)


def test_only_blend_without_a_sketch_takes_the_template_and_says_so() -> None:
    _, signal = templated(19, [3])
    assert resolve_tail("blend", signal) == "blend_template"
    assert resolve_tail("bucket", signal) == "bucket"
    assert resolve_tail("blend", replace(signal, template=None)) == "bucket"
    with pytest.raises(ValueError, match=r"temperature 2\.0 the mass of the tail"):
        resolve_tail("blend", signal, 2.0)
    with pytest.raises(ValueError, match="has no template of the tails"):
        replace(signal, template=None).templated_log_probs()


def test_a_loss_takes_the_template_of_its_positions_and_the_log_names_it() -> None:
    batch = random_batch(20, [ONE_IMAGE])
    outputs = batch.outputs("topk")
    assert outputs[0].response is not None
    vocab = outputs[0].response.vocab_size
    shapes = [normal(seed, vocab).float().log_softmax(0) for seed in (21, 22)]
    objective = replace(preset("emkd"), matching=MatchingConfig(metric="prob_l1"))

    def terms(template: TailTemplate | None) -> dict[str, float]:
        assets = TeacherAssets(template=template)
        found = distillation_loss(batch.states, outputs, batch.student_head, objective, assets)
        named = "bucket" if template is None else "blend_template"
        other = "bucket" if template is None or template.response is None else named
        assert found.tails == {"rld": other, "vsd": named}
        assert found.diagnostics[f"vsd_tail_is_{named}"] == 1.0
        return {name: float(value.detach()) for name, value in found.terms.items()}

    both = terms(TailTemplate(vision=shapes[0], response=shapes[1]))
    swapped = terms(TailTemplate(vision=shapes[1], response=shapes[0]))
    without, half = terms(None), terms(TailTemplate(vision=shapes[0]))
    assert len({both["rld"], swapped["rld"], without["rld"]}) == 3
    assert len({both["vsd"], swapped["vsd"], without["vsd"]}) == 3
    assert (half["vsd"], half["rld"]) == (both["vsd"], without["rld"])
    assert both["vlad"] == without["vlad"]
