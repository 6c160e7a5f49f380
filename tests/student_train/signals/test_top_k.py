"""Positions may keep different numbers of entries: every loss is what each position alone gives.

The reference is a plain loop over positions, each a rectangular record cut to its own count.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchMetric, ObjectiveConfig, TailPolicy
from student_train.divergence.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl
from student_train.divergence.tail_policies import resolve_tail
from student_train.losses.objective_loss import distillation_loss
from student_train.matching.cost import cost_matrix
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import DenseSignal, Signal, concatenate, kept_mass
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import encode_sketch, fit_basis
from teacher_cache.records.top_k import top_k_record
from teacher_cache.schema.teacher_output import TeacherOutput, TopKRecord
from tests.support import references
from tests.support.batches import SHAPES, RandomBatch, normal, random_batch
from tests.support.strategies import BEARTYPE_DRAWS, ragged_top_k_records, true_record

VOCAB, WIDTH = 9, 6
POLICIES: tuple[TailPolicy, ...] = ("blend", "bucket", "renormalise")
COUNTS = st.lists(st.integers(1, VOCAB) | st.just(VOCAB), min_size=1, max_size=6)


def ragged(
    seed: int, counts: Sequence[int], *, sketched: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, TopKSignal]:
    """A teacher's logits and what is kept of them."""
    head = LmHead(weight=normal(seed, VOCAB, WIDTH).to(dtype))
    hidden = normal(seed + 1, len(counts), WIDTH).to(dtype)
    logits = head.logits(hidden)
    record = true_record(logits, counts)
    if not sketched:
        return logits, TopKSignal(record=record)
    basis = fit_basis(normal(seed + 2, 8, WIDTH), head, 2)
    code = encode_sketch(basis, hidden, record)
    sketch = SketchCode(codes=code.codes, scale=code.scale, tail_shift=code.tail_shift, basis=basis)
    return logits, TopKSignal(record=record, sketch=sketch)


def alone(signal: TopKSignal) -> list[TopKSignal]:
    """Every position as a rectangular signal of the entries that it keeps."""
    found: list[TopKSignal] = []
    for row, count in enumerate(signal.counts.tolist()):
        one = signal.rows(torch.tensor([row]))
        kept = {name: getattr(one.record, name)[:, :count] for name in ("ids", "logits")}
        found.append(replace(one, record=replace(one.record, **kept, num_kept=None)))
    return found


def gradient(divergence: Divergence, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(divergence.value.sum(), student)
    return found


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    counts=COUNTS,
    policy=st.sampled_from(POLICIES),
    divergence=st.sampled_from([reverse_kl, forward_kl, jensen_shannon]),
    sketched=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_divergences_and_their_gradients_are_those_of_each_position_alone(
    seed: int,
    counts: list[int],
    policy: TailPolicy,
    divergence: Callable[..., Divergence],
    sketched: bool,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    if policy != "renormalise" and not sketched:
        temperature = 1.0  # others are refused
    _, signal = ragged(seed, counts, sketched=sketched, dtype=dtype)
    student = normal(seed + 3, len(counts), VOCAB + 2).to(dtype).requires_grad_()
    found = divergence(student, signal, policy, temperature, 0.3)
    rows = [
        divergence(student[row, None], one, policy, temperature, 0.3)
        for row, one in enumerate(alone(signal))
    ]
    bound = 1e-12 if dtype == torch.float64 and not sketched else 3e-6
    for field in fields(Divergence):
        expected = torch.cat([getattr(row, field.name) for row in rows])
        torch.testing.assert_close(getattr(found, field.name), expected, rtol=bound, atol=bound)
    expected = torch.stack([gradient(row, student) for row in rows]).sum(0)
    torch.testing.assert_close(gradient(found, student), expected, rtol=bound, atol=bound)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), counts=COUNTS)
def test_the_bucket_and_the_uniform_tail_are_those_of_the_loops(
    seed: int, counts: list[int]
) -> None:
    logits, signal = ragged(seed, counts, sketched=False)
    student = normal(seed + 3, len(counts), VOCAB)
    found = reverse_kl(student, signal, "bucket").value.tolist()
    config = MatchingConfig(metric="prob_l1")
    costs = cost_matrix(student[:, :1], student, signal, config)
    for row, count in enumerate(counts):
        own, theirs = student[row].tolist(), logits[row].tolist()
        if count == VOCAB:
            assert found[row] == pytest.approx(references.reverse_kl(own, theirs))
            probabilities = references.probabilities(theirs)
        else:
            assert found[row] == pytest.approx(references.bucket_reverse_kl(own, theirs, count))
            probabilities = references.probabilities_with_uniform_tail(theirs, count)
        expected = references.l1(references.probabilities(own), probabilities)
        assert float(costs[row, row]) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    counts=COUNTS,
    metric=st.sampled_from(["raw_l1", "centred_l1", "prob_l1"]),
    sketched=st.booleans(),
)
def test_costs_are_those_of_each_position_alone(
    seed: int, counts: list[int], metric: MatchMetric, sketched: bool
) -> None:
    logits, signal = ragged(seed, counts, sketched=sketched)
    student = normal(seed + 3, 4, VOCAB)
    config = MatchingConfig(metric=metric, num_shared_ids=None)
    if metric != "prob_l1" and not sketched and not signal.exact:
        with pytest.raises(ValueError, match=f"outside the top {min(counts)}, which"):
            cost_matrix(student[:, :1], student, signal, config)
        return
    found = cost_matrix(student[:, :1], student, signal, config)
    columns = [cost_matrix(student[:, :1], student, one, config) for one in alone(signal)]
    bound = 1e-6 if sketched else 1e-12
    torch.testing.assert_close(found, torch.cat(columns, dim=1), rtol=bound, atol=bound)
    whole = signal.counts == VOCAB
    exact = cost_matrix(student[:, :1], student, DenseSignal(logits=logits), config)
    torch.testing.assert_close(found[:, whole], exact[:, whole], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon])
@pytest.mark.parametrize("sketched", [False, True])
def test_gradients_are_those_of_finite_differences(
    policy: TailPolicy, divergence: Callable[..., Divergence], sketched: bool
) -> None:
    counts = [2, VOCAB, 1, 5]
    _, signal = ragged(0, counts, sketched=sketched)
    student = normal(3, len(counts), VOCAB).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(s, signal, policy).value, student)


@BEARTYPE_DRAWS
@settings(deadline=None, max_examples=60)
@given(
    record=ragged_top_k_records(),
    policy=st.sampled_from(POLICIES),
    certainty=st.sampled_from([1.0, 2000.0]),
)
def test_no_record_gives_nan_or_infinite_values_or_gradients(
    record: TopKRecord, policy: TailPolicy, certainty: float
) -> None:
    student = torch.zeros(len(record.ids), record.vocab_size)
    student[:, 0] = certainty
    student.requires_grad_()
    found = reverse_kl(student, TopKSignal(record=record), policy)
    assert bool(torch.isfinite(gradient(found, student)).all())
    parts = (found.head, found.bucket, found.tail)
    for values in (found.value, *parts, found.student_tail_mass, found.lower):
        assert bool(torch.isfinite(values).all())


def test_one_short_position_among_whole_ones_is_not_exact_and_is_named() -> None:
    _, signal = ragged(6, [VOCAB, 3, VOCAB], sketched=False)
    assert not signal.exact
    assert signal.rows(torch.tensor([2, 0])).exact
    assert signal.to(torch.device("cpu")).counts.tolist() == [VOCAB, 3, VOCAB]
    assert [resolve_tail(policy, signal) for policy in POLICIES] == [
        "bucket",
        "bucket",
        "renormalise",
    ]
    for refused in (signal.dense_logits, lambda: signal.logits_at(torch.tensor([0]))):
        with pytest.raises(ValueError, match="3 largest of 9"):
            refused()
    with pytest.raises(ValueError, match="holds the 3 largest of 9 logits"):
        resolve_tail("exact", signal)
    with pytest.raises(ValueError, match=r"temperature 2\.0 the mass of the tail"):
        reverse_kl(normal(7, 3, VOCAB), signal, "bucket", 2.0)
    assert kept_mass(signal) == pytest.approx(1 - float(signal.record.log_tail[1].exp()) / 3)


def test_signals_of_different_numbers_of_entries_are_joined() -> None:
    logits = normal(8, 6, VOCAB)
    narrow, wide = (
        TopKSignal(record=top_k_record(logits[:2], 2)),
        TopKSignal(record=top_k_record(logits[2:4], VOCAB)),
    )
    uneven = TopKSignal(record=true_record(logits[4:], [1, 4]))
    joined = concatenate([narrow, wide, uneven])
    assert isinstance(joined, TopKSignal)
    expected = TopKSignal(record=true_record(logits, [2, 2, VOCAB, VOCAB, 1, 4]))
    assert joined.record.num_kept is not None
    for name in ("ids", "logits", "num_kept"):
        assert torch.equal(getattr(joined.record, name), getattr(expected.record, name)), name
    for name in ("log_tail", "logsumexp"):
        torch.testing.assert_close(getattr(joined.record, name), getattr(expected.record, name))
    for signals, counts in (([narrow, narrow], None), ([narrow, wide], [2, 2, VOCAB, VOCAB])):
        pair = concatenate(signals)
        assert isinstance(pair, TopKSignal)
        found = pair.record.num_kept
        assert (None if found is None else found.tolist()) == counts


def test_a_decoded_sketch_says_what_the_sketch_says() -> None:
    _, signal = ragged(9, [2, 4, 3], sketched=True)
    decoded, ids = signal.decode(), torch.tensor([5, 0])
    torch.testing.assert_close(decoded.estimated_log_probs(), signal.estimated_log_probs())
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(decoded.rows(rows).logits_at(ids), signal.rows(rows).logits_at(ids))
    assert decoded.sketch is not None
    assert decoded.sketch.decoded is not None
    bare = replace(signal, sketch=None)
    assert bare.decode() is bare


def uneven_outputs(batch: RandomBatch, seed: int) -> list[TeacherOutput]:
    """The batch's bare top-k outputs, every position with a number of entries of its own."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = batch.teacher_head.vocab_size

    def cut(states: Tensor) -> TopKRecord:
        counts = torch.randint(1, vocab_size + 1, (len(states),), generator=generator)
        return true_record(batch.teacher_head.logits(states), counts.tolist())

    found: list[TeacherOutput] = []
    for output, states in zip(batch.outputs("topk"), batch.hidden_outputs, strict=True):
        assert states.hidden is not None
        vision, response = cut(states.hidden.vision), cut(states.hidden.predicting)
        found.append(replace(output, vision=vision, response=response))
    return found


@pytest.mark.parametrize("tail", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_objective_of_a_batch_is_the_mean_over_positions_alone(
    tail: TailPolicy, seed: int
) -> None:
    batch = random_batch(seed, SHAPES)
    outputs = uneven_outputs(batch, seed)
    matching = MatchingConfig(metric="prob_l1")
    found = distillation_loss(
        batch.states, outputs, batch.student_head, ObjectiveConfig(tail=tail, matching=matching)
    )

    def mean(logits: Tensor, signals: Sequence[Signal]) -> Tensor:
        values = [reverse_kl(r[None], s, tail).value for r, s in zip(logits, signals, strict=True)]
        return torch.cat(values).mean()

    responses = [one for o in outputs if o.response for one in alone(TopKSignal(record=o.response))]
    predicting = torch.cat([state.predicting for state in batch.states])
    rld = mean(batch.student_head(predicting), responses)
    torch.testing.assert_close(found.terms["rld"], rld, rtol=1e-12, atol=1e-12)
    vsd: list[Tensor] = []
    for state, output, pairs in zip(batch.states, outputs, found.assignments, strict=True):
        if pairs is None or output.vision is None:
            continue
        logits = batch.student_head(state.vision)
        signals = alone(TopKSignal(record=output.vision))
        vsd.append(mean(logits[pairs.student], [signals[at] for at in pairs.teacher.tolist()]))
    torch.testing.assert_close(found.terms["vsd"], torch.stack(vsd).mean(), rtol=1e-12, atol=1e-12)
