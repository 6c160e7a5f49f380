"""Rows that kernels read give the values, bounds and gradients of torch: interpreted, on a CPU."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import DivergenceName, ObjectiveConfig
from student_train.divergence.kernel_rows import (
    KernelRows,
    RowRequest,
)
from student_train.divergence.student_rows import DenseRows
from student_train.head import chunked_pass
from student_train.head.fused_loss import HeadLoss, head_loss
from student_train.head.linear_head import LinearHead
from student_train.losses.logit_terms import (
    BlockLosses,
    LogitTerm,
    SupervisedTerm,
    divergence_term,
    head_rows,
)
from student_train.ops.use_kernels import SWITCH
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import DenseSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.schema.teacher_output import TopKRecord

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROWS, WIDTH = 6, 8
DIRECTIONS: list[DivergenceName] = ["reverse_kl", "forward_kl", "jsd"]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs to a row; the interpreter takes its time."""
    monkeypatch.setattr("student_train.ops.logit_rows_triton.COLUMNS", 256)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher_of(
    seed: int, num_rows: int, vocab_size: int, top_k: int, *, varying: bool = False
) -> TopKSignal:
    """The top-k of a made-up teacher, or another number at each position."""
    logits = 2 * normal(seed, num_rows, vocab_size)
    kept = logits.topk(top_k, dim=1)
    num_kept, mask = None, torch.ones(num_rows, top_k, dtype=torch.bool)
    if varying:
        num_kept = 1 + torch.arange(num_rows) * 7 % top_k
        mask = torch.arange(top_k) < num_kept[:, None]
    ids = torch.where(mask, kept.indices, kept.indices[:, :1])
    tail = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    record = TopKRecord(
        ids=ids.int(),
        logits=torch.where(mask, kept.values, kept.values[:, :1]),
        logsumexp=logits.logsumexp(dim=1),
        log_tail=tail - logits.logsumexp(dim=1),
        log_least=logits.amin(dim=1) - logits.logsumexp(dim=1),
        vocab_size=vocab_size,
        num_kept=num_kept,
    )
    return TopKSignal(record=record)


def sketched(teacher: TopKSignal) -> TopKSignal:
    rank, size = 3, teacher.vocab_size
    basis = SketchBasis(
        hidden_mean=torch.zeros(rank),
        projection=torch.eye(rank),
        mean_logits=normal(8, size),
        directions=normal(9, size, rank).half(),
    )
    codes = (50 * normal(10, teacher.num_rows, rank)).to(torch.int8)
    scale = torch.full((teacher.num_rows,), 0.01)
    shift = torch.full((teacher.num_rows,), -8.0)
    return replace(
        teacher, sketch=SketchCode(codes=codes, scale=scale, tail_shift=shift, basis=basis)
    )


def terms_of(
    teacher: Signal, vocab_size: int, objective: ObjectiveConfig, *, supervised: bool = True
) -> list[LogitTerm]:
    labels = torch.arange(teacher.num_rows) * 37 % vocab_size
    if isinstance(teacher, TopKSignal):  # one label is kept, and one fills its row
        labels = labels.to(teacher.record.ids.device)
        labels[0] = teacher.record.ids[0, 0]
    divergence = divergence_term("rld", 0.7, teacher, objective)
    own = SupervisedTerm(weight=0.3, response_ids=labels)
    return [own, divergence] if supervised else [divergence]


def there_and_back(
    terms: list[LogitTerm], vocab_size: int, dtype: torch.dtype, device: str
) -> tuple[HeadLoss, Tensor, Tensor]:
    hidden = normal(1, ROWS, WIDTH).to(device, dtype).requires_grad_()
    weight = normal(2, vocab_size, WIDTH).to(device, dtype).requires_grad_()
    found = head_loss(LinearHead(weight=weight), [head_rows(hidden, terms)])
    found.total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return found, hidden.grad, weight.grad


def assert_alike(
    terms: list[LogitTerm], vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """By kernels as by torch, each of which rounds on its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        expected, *gradients = there_and_back(terms, vocab_size, dtype, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_pass, "use_kernels", lambda rows: True)
        patch.setattr(chunked_pass, "_step_by_step", None)  # nothing goes torch's way
        found, *others = there_and_back(terms, vocab_size, dtype, device)
    assert found.values[0].keys() == expected.values[0].keys()
    for name, values in expected.values[0].items():
        close = torch.allclose(found.values[0][name], values, rtol=1e-5, atol=2e-5)
        assert close, (name, found.values[0][name], values)
    share = 5e-5 if dtype == torch.float32 else 2e-2
    for gradient, other in zip(gradients, others, strict=True):
        assert float((gradient - other).abs().max()) <= share * float(gradient.abs().max())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_are_torchs(direction: DivergenceName, varying: bool, dtype: torch.dtype) -> None:
    teacher = teacher_of(3, ROWS, 300, 16, varying=varying)
    objective = ObjectiveConfig(divergence=direction)
    assert_alike(terms_of(teacher, 311, objective), 311, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_on_a_gpu_are_torchs(direction: DivergenceName, dtype: torch.dtype) -> None:
    teacher = teacher_of(3, ROWS, 9000, 64, varying=True).to(torch.device("cuda"))
    terms = terms_of(teacher, 9001, ObjectiveConfig(divergence=direction))
    assert_alike(terms, 9001, dtype, "cuda")


@pytest.mark.parametrize("top_k", [16, 64, 256])
def test_any_number_of_kept_entries_is_served(top_k: int) -> None:
    teacher = teacher_of(4, ROWS, 700, top_k, varying=True)
    assert_alike(terms_of(teacher, 700, ObjectiveConfig()), 700, torch.float32)
    assert_alike(terms_of(teacher, 700, ObjectiveConfig(), supervised=False), 700, torch.float32)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blends_with_an_estimate_are_torchs(varying: bool, dtype: torch.dtype) -> None:
    teacher = sketched(teacher_of(5, ROWS, 300, 16, varying=varying))
    terms = terms_of(teacher, 300, ObjectiveConfig(tail="blend", blend=0.4))
    assert terms[-1].tail == "blend"
    assert_alike(terms, 300, dtype)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(2, 600),
    extra=st.integers(0, 40),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    varying=st.booleans(),
)
def test_what_is_read_of_rows_is_what_dense_rows_say(
    seed: int, vocab_size: int, extra: int, scale: float, varying: bool
) -> None:
    teacher = teacher_of(seed, 3, vocab_size, min(5, vocab_size - 1), varying=varying)
    logits = scale * normal(seed + 1, 3, vocab_size + extra)
    before = logits.clone()
    read = KernelRows(logits, [RowRequest(teacher=teacher)])
    dense = DenseRows(logits[:, :vocab_size].double(), teacher.record.ids)
    pairs = {
        "kept": (read.log_q_kept, dense.log_q_kept),
        "mass": (read.log_q_mass, dense.log_q_mass),
        "largest": (read.tail_largest(32), dense.tail_largest(32)),
        "smallest": (read.min_log_q(), dense.min_log_q()),
        "entropy": (read.tail_neg_entropy(), dense.tail_neg_entropy()),
    }
    for name, (found, expected) in pairs.items():
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-5, msg=name)
    assert torch.equal(logits, before)


def test_a_row_has_the_same_bits_beside_any_others_and_without_weights_nothing_is_edited() -> None:
    teacher, objective = teacher_of(6, ROWS, 300, 8), ObjectiveConfig()
    logits = normal(7, ROWS, 300)

    def run(index: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
        terms = terms_of(teacher.rows(index), 300, objective, supervised=False)
        rows = logits[index].clone()
        weights = {"rld": torch.ones(len(index))} if weighted else {}
        return BlockLosses(terms=terms).values_in_place(rows, weights)["rld"], rows

    every = torch.arange(ROWS)
    values, gradients = run(every, True)
    alone, gradient = run(every[4:5], True)
    assert torch.equal(values[4:5], alone)
    assert torch.equal(gradients[4:5], gradient)
    same, untouched = run(every, False)
    assert torch.equal(same, values)
    assert torch.equal(untouched, logits)


def test_other_losses_stay_with_torch() -> None:
    teacher = teacher_of(6, ROWS, 40, 8)

    def served(signal: Signal, objective: ObjectiveConfig) -> bool:
        return BlockLosses(terms=terms_of(signal, 40, objective)).has_kernels

    assert served(teacher, ObjectiveConfig())
    assert served(sketched(teacher), ObjectiveConfig())
    assert not served(sketched(teacher), ObjectiveConfig(divergence="jsd"))
    assert not served(sketched(teacher), ObjectiveConfig(temperature=2.0))
    assert not served(teacher, ObjectiveConfig(tail="renormalise"))
    assert not served(teacher_of(6, ROWS, 40, 40), ObjectiveConfig())
    assert not served(DenseSignal(logits=normal(2, ROWS, 40)), ObjectiveConfig())
    two = [divergence_term(n, 1.0, teacher, ObjectiveConfig()) for n in ("rld", "kd")]
    assert not BlockLosses(terms=two).has_kernels
