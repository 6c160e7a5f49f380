"""The three forms of a teacher signal answer alike, and refuse what they do not know."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_train.signals.from_cache import response_signal, vision_signal
from student_train.signals.teacher_signal import (
    DenseSignal,
    HiddenSignal,
    Signal,
    TopKSignal,
    concatenate,
)
from teacher_cache.records.assets import TeacherAssets
from tests.support.batches import ONE_IMAGE, TWO_IMAGES, RandomBatch, random_batch

VOCAB = 11
IDS = torch.tensor([0, 3, 10])
CPU = torch.device("cpu")


@pytest.fixture
def batch() -> RandomBatch:
    return random_batch(0, [ONE_IMAGE, TWO_IMAGES])


def dense_vision(batch: RandomBatch, sample: int) -> Tensor:
    hidden = batch.hidden_outputs[sample].hidden
    assert hidden is not None
    return batch.teacher_head.logits(hidden.vision)


def exact_signals(batch: RandomBatch) -> list[Signal]:
    every_row = batch.outputs("topk", VOCAB)[1]
    return [
        DenseSignal(logits=dense_vision(batch, 1)),
        vision_signal(batch.hidden_outputs[1], batch.assets("hidden")),
        vision_signal(every_row, TeacherAssets()),
    ]


def test_exact_signals_agree_and_k_equal_to_the_vocabulary_to_the_bit(batch: RandomBatch) -> None:
    expected = dense_vision(batch, 1)
    index = torch.tensor([5, 0, 2])
    for signal in exact_signals(batch):
        assert signal.exact
        assert (signal.num_rows, signal.vocab_size) == expected.shape
        assert torch.equal(signal.dense_logits(), expected)
        torch.testing.assert_close(signal.logits_at(IDS), expected[:, IDS])
        torch.testing.assert_close(signal.rows(index).dense_logits(), expected[index])
        assert torch.equal(signal.to(CPU).dense_logits(), expected)


def test_concatenation_keeps_rows_and_order(batch: RandomBatch) -> None:
    for form in ("hidden", "topk", "topk+sketch"):
        outputs, assets = batch.outputs(form), batch.assets(form)
        signals = [vision_signal(output, assets) for output in outputs]
        joined = concatenate(signals)
        assert type(joined) is type(signals[0])
        assert joined.num_rows == sum(signal.num_rows for signal in signals)
        last = joined.rows(torch.arange(signals[0].num_rows, joined.num_rows))
        if form != "topk":
            torch.testing.assert_close(last.logits_at(IDS), signals[1].logits_at(IDS))
        if isinstance(last, TopKSignal) and isinstance(signals[1], TopKSignal):
            torch.testing.assert_close(last.kept_log_probs(), signals[1].kept_log_probs())


def test_autocast_has_no_say_in_how_signals_are_joined(batch: RandomBatch) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        dense = DenseSignal(logits=dense_vision(batch, 1).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            joined = concatenate([dense, dense])
        assert joined.logits_at(IDS).dtype == dtype


def test_signals_of_different_forms_are_not_concatenated(batch: RandomBatch) -> None:
    dense, hidden, top_k = exact_signals(batch)
    sketched = vision_signal(batch.outputs("topk+sketch")[1], batch.assets("topk+sketch"))
    for mixture in ([dense, hidden], [hidden, top_k], [top_k, dense], [top_k, sketched], []):
        with pytest.raises(ValueError, match="cannot concatenate"):
            concatenate(mixture)


def test_the_sketch_completes_the_top_k_to_a_distribution(batch: RandomBatch) -> None:
    signal = vision_signal(batch.outputs("topk+sketch", 4)[1], batch.assets("topk+sketch"))
    assert isinstance(signal, TopKSignal)
    estimate = signal.estimated_log_probs()
    torch.testing.assert_close(
        estimate.exp().sum(1), torch.ones(signal.num_rows).double(), atol=1e-5, rtol=0
    )
    true = dense_vision(batch, 1).log_softmax(1)
    torch.testing.assert_close(
        estimate.gather(1, signal.record.ids.long()), true.gather(1, signal.record.ids.long())
    )
    assert signal.to(CPU).num_rows == signal.num_rows


def test_a_top_k_record_refuses_what_it_does_not_hold(batch: RandomBatch) -> None:
    signal = vision_signal(batch.outputs("topk", 4)[0], TeacherAssets())
    assert isinstance(signal, TopKSignal)
    assert not signal.exact
    with pytest.raises(ValueError, match="4 largest of 11 logits does not hold them all"):
        signal.dense_logits()
    with pytest.raises(ValueError, match=r"use records `topk\+sketch` or `hidden`"):
        signal.logits_at(IDS)
    with pytest.raises(ValueError, match=r"only records `topk\+sketch` estimate"):
        signal.estimated_log_probs()


def test_response_signals_have_one_row_per_response_token(batch: RandomBatch) -> None:
    for form in ("hidden", "topk", "topk+sketch"):
        for state, output in zip(batch.states, batch.outputs(form), strict=True):
            signal = response_signal(output, batch.assets(form))
            assert signal.num_rows == len(state.response_ids)


def test_a_part_that_was_not_read_or_stored_is_named(batch: RandomBatch) -> None:
    bare = replace(batch.outputs("topk")[0], vision=None, response=None)
    with pytest.raises(ValueError, match="without its part `vision`"):
        vision_signal(bare, TeacherAssets())
    with pytest.raises(ValueError, match="without its part `response`"):
        response_signal(bare, TeacherAssets())
    for make in (vision_signal, response_signal):
        with pytest.raises(ValueError, match="need the cache's LM head"):
            make(batch.hidden_outputs[0], TeacherAssets())
    with pytest.raises(ValueError, match="need the cache's basis"):
        vision_signal(batch.outputs("topk+sketch")[0], TeacherAssets())


def test_no_gradient_enters_a_signal() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    head_signal = random_batch(1, [ONE_IMAGE])
    hidden = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for signal in (
        DenseSignal(logits=logits),
        HiddenSignal(hidden=hidden, head=head_signal.teacher_head),
    ):
        assert not signal.dense_logits().requires_grad
        assert not signal.logits_at(torch.tensor([1])).requires_grad


def test_assets_move_together(batch: RandomBatch) -> None:
    assets = TeacherAssets(head=batch.teacher_head, sketch=batch.assets("topk+sketch").sketch)
    moved = assets.to(CPU)
    assert moved.head is not None
    assert moved.sketch is not None
    assert torch.equal(moved.head.weight, batch.teacher_head.weight)
