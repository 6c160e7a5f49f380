"""Top-k records against plain loops in float64; ties, tails, chunks and bad numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.records import lm_head
from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.records.top_k import top_k_from_hidden, top_k_record


def _reference(row: list[float], k: int) -> tuple[list[int], float, float]:
    """Ids by descending logit then ascending id, logsumexp, log of the mass left out."""
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    peak = max(row)
    total = peak + math.log(sum(math.exp(z - peak) for z in row))
    rest = [row[v] for v in order[k:]]
    if not rest:
        return order, total, -math.inf
    top = max(rest)
    return order[:k], total, top + math.log(sum(math.exp(z - top) for z in rest)) - total


@given(st.integers(0, 4), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_records_equal_a_plain_loop_ties_included(
    num_rows: int, vocab_size: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    # Few distinct values, so that ties within and across the border of the top-k are the rule.
    values = st.sampled_from([-60.0, -2.0, -0.0, 0.0, 1.5, 1.5, 30.0])
    row = st.lists(values, min_size=vocab_size, max_size=vocab_size)
    rows = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    logits = torch.tensor(rows, dtype=torch.float64).reshape(num_rows, vocab_size)
    record = top_k_record(logits, k)
    assert record.ids.dtype == torch.int32
    for index, numbers in enumerate(rows):
        ids, total, tail = _reference(numbers, k)
        assert record.ids[index].tolist() == ids
        assert record.logits[index].tolist() == [numbers[v] for v in ids]
        assert float(record.logsumexp[index]) == pytest.approx(total, rel=1e-12)
        assert float(record.log_tail[index]) == pytest.approx(tail, rel=1e-12)


@given(st.integers(0, 4), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_a_cut_by_mass_keeps_the_shortest_beginning_that_holds_it(
    num_rows: int, vocab_size: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    floor = data.draw(st.integers(1, k))
    mass = data.draw(st.sampled_from([0.1, 0.5, 0.9, 0.99]))
    values = st.sampled_from([-60.0, -2.0, -0.0, 0.0, 1.5, 1.5, 30.0])
    row = st.lists(values, min_size=vocab_size, max_size=vocab_size)
    rows = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    logits = torch.tensor(rows, dtype=torch.float64).reshape(num_rows, vocab_size)
    record = top_k_record(logits, k, mass, floor)
    assert record.num_kept is not None
    for index, numbers in enumerate(rows):
        order, total, _ = _reference(numbers, vocab_size)
        held, num_kept = 0.0, 0
        while num_kept < k and (num_kept < floor or held < mass):
            held += math.exp(numbers[order[num_kept]] - total)
            num_kept += 1
        found = int(record.num_kept[index])
        if found != num_kept:  # the mass is met to the last bit, or missed by it
            near = sum(math.exp(numbers[v] - total) for v in order[: min(found, num_kept)])
            assert near == pytest.approx(mass, rel=1e-12)
            num_kept = found
        _, _, tail = _reference(numbers, num_kept)
        padding = record.ids.shape[1] - num_kept
        assert record.ids[index].tolist() == order[:num_kept] + order[:1] * padding
        assert record.logits[index].tolist() == [numbers[v] for v in record.ids[index].tolist()]
        assert float(record.log_tail[index]) == pytest.approx(tail, rel=1e-12)
    assert record.ids.shape[1] == max(record.num_kept.tolist(), default=1)


def test_of_equal_logits_at_a_cut_by_mass_the_smaller_ids_are_kept() -> None:
    record = top_k_record(torch.zeros(2, 10), 8, top_p=0.45, min_k=1)
    assert record.num_kept is not None
    assert record.num_kept.tolist() == [5, 5]
    assert record.ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(("mass", "floor"), [(0.0, 1), (1.0, 1), (0.9, 0), (0.9, 5)])
def test_cuts_that_cannot_be_are_refused(mass: float, floor: int) -> None:
    with pytest.raises(ValueError, match=r"top_p is|min_k is"):
        top_k_record(torch.zeros(1, 9), 4, mass, floor)


def test_chunks_of_rows_change_nothing_of_a_cut_by_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = LmHead(weight=torch.randn(11, 6), bias=torch.randn(11))
    hidden = torch.randn(7, 6)
    whole = top_k_from_hidden(hidden, head, 8, 0.8, 2)
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 25)
    parts = top_k_from_hidden(hidden, head, 8, 0.8, 2)
    assert whole.counts.tolist() == parts.counts.tolist()
    assert len(set(whole.counts.tolist())) > 1
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_tail, parts.log_tail)
    assert top_k_from_hidden(hidden[:0], head, 8, 0.8, 2).counts.shape == (0,)


def test_a_tail_too_small_for_subtraction_keeps_its_mass() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0, -1.0]])
    record = top_k_record(logits, 1)
    _, _, tail = _reference([40.0, 0.0, 0.0, -1.0], 1)
    assert float(record.log_tail[0]) == pytest.approx(tail, rel=1e-6)


def test_keeping_every_row_keeps_every_bit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 17).to(torch.bfloat16)
    record = top_k_record(logits, 17)
    back = torch.empty_like(logits).scatter(1, record.ids.long(), record.logits)
    assert torch.equal(back, logits)
    assert record.logits.dtype == torch.bfloat16
    assert record.logsumexp.dtype == torch.float32
    assert torch.equal(record.log_tail, torch.full((5,), -torch.inf))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = LmHead(weight=torch.randn(11, 6), bias=torch.randn(11))
    hidden = torch.randn(7, 6)
    whole = top_k_from_hidden(hidden, head, 4)
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 25)
    assert [s.stop - s.start for s in row_chunks(7, 11)] == [2, 2, 2, 1]
    assert [s.stop - s.start for s in row_chunks(2, 100)] == [1, 1]
    parts = top_k_from_hidden(hidden, head, 4)
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_tail, parts.log_tail)
    assert top_k_from_hidden(hidden[:0], head, 4).ids.shape == (0, 4)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1\.\.3"):
        top_k_record(torch.zeros(1, 3), k)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits: Tensor = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 3 positions"):
        top_k_record(logits, 2)
