"""What matching asks of a head is what the head says of all rows; nothing else is computed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchMetric
from student_train.head.linear_head import LinearHead, LogitsOf
from student_train.head.student_logits import StudentLogits
from student_train.matching.cost import cost_matrix, pair_costs
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import HiddenSignal, Signal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from tests.support.batches import ONE_IMAGE, RecordForm, normal, random_batch

VOCAB, WIDTH = 11, 5
METRICS: tuple[MatchMetric, ...] = ("raw_l1", "centred_l1", "prob_l1")


def linear_head(seed: int, softcap: float | None = None) -> LinearHead:
    return LinearHead(
        weight=normal(seed, VOCAB + 2, WIDTH), bias=normal(seed + 1, VOCAB + 2), softcap=softcap
    )


def as_function(head: LogitsOf) -> LogitsOf:
    return lambda hidden: head(hidden)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(0, 4),
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB, unique=True),
    size=st.integers(1, VOCAB),
    softcap=st.sampled_from([None, 0.7]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_source_gives_the_same_columns_and_rows(
    seed: int,
    num_rows: int,
    ids: list[int],
    size: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    head = linear_head(seed, softcap)
    assert head.bias is not None
    head = LinearHead(weight=head.weight.to(dtype), bias=head.bias.to(dtype), softcap=softcap)
    hidden = normal(seed + 2, num_rows, WIDTH).to(dtype)
    logits, chosen = head(hidden), torch.tensor(ids)
    eps = torch.finfo(dtype).eps
    require_close = partial(torch.testing.assert_close, rtol=4 * eps, atol=16 * eps)
    for source in (logits, head, as_function(head)):
        student = StudentLogits.of(hidden, source, VOCAB)
        require_close(student.at(chosen), logits[:, chosen])
        blocks = list(student.blocks(chosen, size))
        assert all(block.shape[1] <= size for block in blocks)
        require_close(torch.cat(blocks, dim=1), logits[:, chosen])
        rows = torch.cat([student.rows(chunk) for chunk in student.chunks])
        require_close(rows, logits[:, :VOCAB])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_ids", [4, None])
@pytest.mark.parametrize("form", ["hidden", "topk+sketch", "topk"])
def test_costs_and_means_are_those_of_given_logits(
    metric: MatchMetric, num_ids: int | None, form: RecordForm
) -> None:
    kept = 4 if metric == "prob_l1" else VOCAB
    batch = random_batch(0, [ONE_IMAGE])
    assets = TeacherAssets() if form == "topk" else batch.assets(form)
    teacher = vision_signal(batch.outputs(form, kept)[0], assets)
    hidden, head = normal(1, 3, WIDTH).requires_grad_(), linear_head(2, softcap=5.0)
    config = MatchingConfig(metric=metric, num_shared_ids=num_ids)
    given = pair_costs(hidden, head(hidden), teacher, config)
    assert given.mean_logits is not None
    for source in (head, as_function(head)):
        found = pair_costs(hidden, source, teacher, config)
        assert found.mean_logits is not None
        assert not found.cost.requires_grad
        torch.testing.assert_close(found.cost, given.cost)
        torch.testing.assert_close(found.mean_logits, given.mean_logits)
    if num_ids is None or metric == "prob_l1":
        torch.testing.assert_close(given.mean_logits[0], head(hidden)[:, :VOCAB].mean(dim=1))


def columns_only(seed: int) -> LinearHead:
    head = linear_head(seed)

    class Columns(LinearHead):
        def __call__(self, hidden: Tensor) -> Tensor:
            raise AssertionError("all logits were computed")

    return Columns(weight=head.weight, bias=head.bias)


@pytest.mark.parametrize("metric", ["raw_l1", "centred_l1"])
def test_a_linear_head_multiplies_the_compared_rows_alone(metric: MatchMetric) -> None:
    teacher = HiddenSignal(hidden=normal(0, 4, 3), head=LmHead(weight=normal(1, VOCAB, 3)))
    config = MatchingConfig(metric=metric, num_shared_ids=4)
    hidden = normal(2, 2, WIDTH)
    cost_matrix(hidden, columns_only(3), teacher, config)
    with pytest.raises(AssertionError, match="all logits"):
        cost_matrix(
            normal(2, 2, WIDTH), columns_only(3), teacher, replace(config, metric="prob_l1")
        )


def test_a_function_is_called_once_for_each_chunk_of_tokens() -> None:
    calls: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return linear_head(4)(hidden)

    student = StudentLogits.of(normal(5, 3, WIDTH), head, VOCAB)
    list(student.blocks(torch.arange(VOCAB), 2))
    assert calls == [3]


def test_the_head_runs_in_the_models_precision_wherever_it_is_asked() -> None:
    teacher: Signal = HiddenSignal(
        hidden=normal(6, 4, 3).float(), head=LmHead(weight=normal(7, VOCAB, 3).float())
    )
    wide = linear_head(8)
    assert wide.bias is not None
    head = LinearHead(weight=wide.weight.float().requires_grad_(), bias=wide.bias.float())
    hidden = normal(9, 3, WIDTH).float()
    sources: list[Callable[[Tensor], Tensor]] = [head, as_function(head)]
    for metric in METRICS:
        config = MatchingConfig(metric=metric, num_shared_ids=None)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(hidden)
            found = [cost_matrix(hidden, source, teacher, config) for source in sources]
        assert logits.dtype == torch.bfloat16
        expected = cost_matrix(hidden, logits, teacher, config)
        for cost in found:
            assert cost.dtype == torch.float32
            torch.testing.assert_close(cost, expected, rtol=0.02, atol=0.02)


def test_a_head_with_fewer_rows_than_the_teacher_is_refused() -> None:
    hidden = normal(10, 2, WIDTH)
    for source in (linear_head(11), as_function(linear_head(11)), linear_head(11)(hidden)):
        with pytest.raises(ValueError, match="13 vocabulary rows, the teacher's cache 14"):
            StudentLogits.of(hidden, source, VOCAB + 3).rows(slice(0, 1))
