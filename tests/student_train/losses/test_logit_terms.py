"""Terms row by row: how rows are cut into chunks changes neither values nor gradients."""

import pytest
import torch

from student_train.config.objective import MatchingConfig, ObjectiveConfig
from student_train.head import chunked_pass
from student_train.losses.logit_terms import SupervisedTerm, divergence_term, head_rows
from student_train.signals.teacher_signal import DenseSignal
from tests.support.batches import RecordForm, random_batch

OBJECTIVE = ObjectiveConfig(matching=MatchingConfig(metric="prob_l1", num_shared_ids=None))


@pytest.mark.parametrize("form", ["hidden", "topk", "topk+sketch"])
def test_chunks_change_nothing(form: RecordForm, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(3)
    whole = batch.loss(OBJECTIVE, form)
    expected = batch.gradients(whole.total)
    monkeypatch.setattr(chunked_pass, "CHUNK_ROWS", 5)
    monkeypatch.setattr(chunked_pass, "STEP_BYTES", 2 * 4 * len(batch.student_head.weight))
    cut = batch.loss(OBJECTIVE, form)
    for name, term in whole.terms.items():
        torch.testing.assert_close(cut.terms[name], term, rtol=1e-12, atol=1e-12)
    assert cut.diagnostics == pytest.approx(whole.diagnostics, rel=1e-12)
    for one, other in zip(batch.gradients(cut.total), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_function_for_a_head_gives_what_the_fused_head_gives() -> None:
    batch = random_batch(4)
    fused = batch.loss(OBJECTIVE, "topk+sketch")
    called = batch.loss(OBJECTIVE, "topk+sketch", head=lambda hidden: batch.student_head(hidden))
    torch.testing.assert_close(called.total, fused.total, rtol=1e-12, atol=1e-12)
    pairs = zip(batch.gradients(called.total), batch.gradients(fused.total), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_each_rows_weight_is_its_share_of_the_mean() -> None:
    hidden, logits = torch.zeros(5, 3), torch.zeros(5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    teacher = DenseSignal(logits=logits)
    pairs = [2, 0, 3]
    terms = [
        SupervisedTerm(weight=0.5, response_ids=labels),
        divergence_term("vsd", 0.25, teacher, OBJECTIVE, pairs_per_sample=pairs),
    ]
    weights = head_rows(hidden, terms).weights
    torch.testing.assert_close(weights["supervised"], torch.full((5,), 0.1))
    expected = [0.25 / 2 / num for num in pairs for _ in range(num)]
    torch.testing.assert_close(weights["vsd"], torch.tensor(expected))
