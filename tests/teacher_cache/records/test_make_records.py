"""Records of one sample, tier by tier, against plain loops over the states' logits in float64."""

import math

import pytest
import torch
from torch import Tensor

from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.make_records import make_output
from teacher_cache.records.sketch import decode_codes, fit_basis
from teacher_cache.schema.options import HiddenDtype, RecordKind, RecordSettings
from teacher_cache.schema.samples import TokenSpans, ViewGrid
from tests.support.present import present

LENGTH, WIDTH, VOCAB, KEPT = 14, 6, 19, 4


@pytest.fixture
def spans() -> TokenSpans:
    """Text, six vision tokens with a newline among them, text, a response of three tokens."""
    content = torch.tensor([0, 8, 9, 11, 12, 13])
    return TokenSpans(
        views=(ViewGrid(image=0, view=0, rows=2, cols=3),),
        vision=torch.tensor([1, 2, 3, 5, 6, 7]),
        content=content,
        content_ids=content + 100,
        is_response=content >= 11,
        after_image=content > 1,
    )


@pytest.fixture
def states() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(LENGTH, WIDTH)


@pytest.fixture
def head() -> LmHead:
    torch.manual_seed(1)
    return LmHead(weight=torch.randn(VOCAB, WIDTH), bias=torch.randn(VOCAB))


def _logits(states: Tensor, head: LmHead, position: int) -> list[float]:
    return [
        float(b) + sum(float(w) * float(h) for w, h in zip(row, states[position], strict=True))
        for row, b in zip(head.weight.tolist(), present(head.bias).tolist(), strict=True)
    ]


def test_top_k_rows_sit_at_vision_and_at_predicting_positions(
    spans: TokenSpans, states: Tensor, head: LmHead
) -> None:
    settings = RecordSettings(records="topk", top_k=KEPT, affinity_dtype="float32")
    output = make_output(spans, states, head, settings)
    for record, positions in (
        (present(output.vision), [1, 2, 3, 5, 6, 7]),
        (present(output.response), [10, 11, 12]),
    ):
        assert len(record.ids) == len(positions)
        for row, position in enumerate(positions):
            logits = _logits(states, head, position)
            order = sorted(range(VOCAB), key=lambda v: -logits[v])
            assert record.ids[row].tolist() == order[:KEPT]
            kept = [logits[v] for v in order[:KEPT]]
            assert record.logits[row].tolist() == pytest.approx(kept, abs=1e-5)
            total = math.log(sum(math.exp(z) for z in logits))
            left_out = math.log(sum(math.exp(logits[v]) for v in order[KEPT:]))
            assert float(record.logsumexp[row]) == pytest.approx(total, abs=1e-5)
            assert float(record.log_tail[row]) == pytest.approx(left_out - total, abs=1e-5)


def test_affinity_rows_are_the_text_behind_the_image(
    spans: TokenSpans, states: Tensor, head: LmHead
) -> None:
    settings = RecordSettings(records="topk", top_k=KEPT, affinity_dtype="float32")
    affinity = present(make_output(spans, states, head, settings).affinity)
    assert affinity.cosine.shape == (5, 6)
    for x, text in enumerate([8, 9, 11, 12, 13]):
        for m, vision in enumerate([1, 2, 3, 5, 6, 7]):
            a, b = states[text].double(), states[vision].double()
            cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            assert float(affinity.cosine[x, m]) == pytest.approx(cosine, abs=1e-6)
    half = RecordSettings(records="topk", top_k=KEPT, affinity_dtype="float16")
    stored = present(make_output(spans, states, head, half).affinity)
    assert stored.cosine.dtype == torch.float16


def test_the_sketch_tier_adds_codes_to_the_top_k(
    spans: TokenSpans, states: Tensor, head: LmHead
) -> None:
    settings = RecordSettings(records="topk+sketch", top_k=KEPT)
    basis = fit_basis(states, head, WIDTH)
    output = make_output(spans, states, head, settings, basis)
    assert output.sketch is not None
    assert output.hidden is None
    decoded = decode_codes(basis, output.sketch.codes, output.sketch.scale)
    torch.testing.assert_close(decoded, head.logits(states[spans.vision]), atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="needs a basis"):
        make_output(spans, states, head, settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hidden_tier_stores_states_alone(
    spans: TokenSpans, states: Tensor, head: LmHead, dtype: HiddenDtype
) -> None:
    output = make_output(spans, states, head, RecordSettings(records="hidden", hidden_dtype=dtype))
    assert output.hidden is not None
    assert output.vision is output.response is output.affinity is output.sketch is None
    wanted = states.to(getattr(torch, dtype))
    assert torch.equal(output.hidden.vision, wanted[[1, 2, 3, 5, 6, 7]])
    assert torch.equal(output.hidden.text, wanted[[8, 9, 11, 12, 13]])
    assert torch.equal(output.hidden.predicting, wanted[[10, 11, 12]])


@pytest.mark.parametrize("tier", ["topk", "topk+sketch", "hidden"])
def test_text_alone_has_records_without_rows(
    tier: RecordKind, states: Tensor, head: LmHead
) -> None:
    content = torch.tensor([0, 1, 2])
    text = TokenSpans(
        views=(),
        vision=torch.zeros(0, dtype=torch.int64),
        content=content,
        content_ids=content,
        is_response=content > 1,
        after_image=content > 9,
    )
    settings = RecordSettings(records=tier, top_k=KEPT)
    output = make_output(text, states, head, settings, fit_basis(states, head, 3))
    if output.hidden is not None:
        assert output.hidden.vision.shape == (0, WIDTH)
        assert output.hidden.predicting.shape == (1, WIDTH)
    else:
        assert present(output.vision).ids.shape == (0, KEPT)
        assert present(output.affinity).cosine.shape == (0, 0)


def test_states_that_are_not_finite_are_refused(
    spans: TokenSpans, states: Tensor, head: LmHead
) -> None:
    states[2, 0] = math.nan
    for tier in ("topk", "hidden"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            make_output(spans, states, head, RecordSettings(records=tier, top_k=KEPT))
