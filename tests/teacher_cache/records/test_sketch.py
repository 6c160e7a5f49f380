"""The sketch: exact at full rank but for rounding, better with rank, true tails, stable bits."""

import pytest
import torch
from torch import Tensor

from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import (
    HiddenMoments,
    SketchBasis,
    basis_from_moments,
    decode_codes,
    encode_sketch,
    fit_basis,
)
from teacher_cache.records.top_k import top_k_from_hidden
from tests.support.strategies import true_record

NUM_STATES, WIDTH, VOCAB = 200, 24, 61


@pytest.fixture
def head() -> LmHead:
    torch.manual_seed(1)
    return LmHead(weight=torch.randn(VOCAB, WIDTH), bias=torch.randn(VOCAB))


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(2)
    spectrum = torch.logspace(0, -2, WIDTH)
    return torch.randn(NUM_STATES, WIDTH) * spectrum + torch.randn(WIDTH)


def _errors(basis: SketchBasis, head: LmHead, hidden: Tensor, k: int = 8) -> Tensor:
    top = top_k_from_hidden(hidden, head, k)
    code = encode_sketch(basis, hidden, top)
    return decode_codes(basis, code.codes, code.scale) - head.logits(hidden)


def test_full_rank_is_exact_but_for_rounding(head: LmHead, hidden: Tensor) -> None:
    basis = fit_basis(hidden, head, WIDTH)
    codes = (hidden - basis.hidden_mean) @ basis.projection
    step = codes.abs().amax(dim=1, keepdim=True) / 127
    directions = basis.directions.float().abs()
    rounding = 0.5 * step * directions.sum(dim=1) + codes.abs() @ directions.T * 2.0**-10
    assert bool((_errors(basis, head, hidden).abs() <= rounding + 1e-3).all())


def test_directions_carry_the_most_logit_energy_a_subspace_of_their_rank_can(
    head: LmHead, hidden: Tensor
) -> None:
    logits = head.logits(hidden).double()
    values = torch.linalg.svdvals(logits - logits.mean(dim=0)) ** 2
    for rank in (1, 4, 12):
        left_out = _errors(fit_basis(hidden, head, rank), head, hidden).square().sum()
        optimum = values[rank:].sum()
        assert float(left_out) >= 0.99 * float(optimum)
        assert float(left_out) <= 1.01 * float(optimum) + 2e-3 * float(values.sum())


def test_energy_grows_with_rank(head: LmHead, hidden: Tensor) -> None:
    ranks = (1, 2, 4, 8, 16)
    losses = [
        float(_errors(fit_basis(hidden, head, r), head, hidden).square().sum()) for r in ranks
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("rank", [2, WIDTH])
def test_the_tail_has_its_true_mass(head: LmHead, hidden: Tensor, rank: int) -> None:
    basis = fit_basis(hidden, head, rank)
    top = top_k_from_hidden(hidden, head, 8)
    record = encode_sketch(basis, hidden, top)
    log_p = decode_codes(basis, record.codes, record.scale) + record.tail_shift[:, None]
    for row in range(NUM_STATES):
        outside = sorted(set(range(VOCAB)) - set(top.ids[row].tolist()))
        mass = log_p[row, outside].double().exp().sum()
        assert float(mass.log()) == pytest.approx(float(top.log_tail[row]), abs=1e-4)


def test_keeping_every_row_needs_no_shift(head: LmHead, hidden: Tensor) -> None:
    top = top_k_from_hidden(hidden, head, VOCAB)
    record = encode_sketch(fit_basis(hidden, head, 4), hidden, top)
    assert not record.tail_shift.any()


def test_a_position_is_coded_alike_beside_positions_that_keep_more_or_fewer_entries(
    head: LmHead, hidden: Tensor
) -> None:
    basis = fit_basis(hidden, head, 4)
    counts = [(1, 8, VOCAB)[row % 3] for row in range(NUM_STATES)]
    record = encode_sketch(basis, hidden, true_record(head.logits(hidden), counts))
    for num_kept in (1, 8, VOCAB):
        rows = torch.tensor(counts) == num_kept
        alone = encode_sketch(basis, hidden, top_k_from_hidden(hidden, head, num_kept))
        assert torch.equal(record.codes[rows], alone.codes[rows])
        torch.testing.assert_close(record.tail_shift[rows], alone.tail_shift[rows])


def test_chosen_rows_are_decoded_as_all_rows_are(head: LmHead, hidden: Tensor) -> None:
    basis = fit_basis(hidden, head, 6)
    record = encode_sketch(basis, hidden, top_k_from_hidden(hidden, head, 8))
    ids = torch.tensor([5, 0, 60])
    torch.testing.assert_close(
        decode_codes(basis, record.codes, record.scale, ids),
        decode_codes(basis, record.codes, record.scale)[:, ids],
    )


def test_moments_do_not_depend_on_how_states_arrive(hidden: Tensor) -> None:
    pieces = HiddenMoments(WIDTH)
    for part in (hidden[:1], hidden[1:1], hidden[1:90], hidden[90:]):
        pieces.update(part)
    states = hidden.double()
    torch.testing.assert_close(pieces.mean, states.mean(dim=0))
    torch.testing.assert_close(pieces.covariance, torch.cov(states.T, correction=0))


def test_equal_input_gives_an_equal_digest(head: LmHead, hidden: Tensor) -> None:
    first, again = fit_basis(hidden, head, 6), fit_basis(hidden.clone(), head, 6)
    assert first.digest == again.digest
    assert SketchBasis.from_tensors(first.tensors()).digest == first.digest
    assert fit_basis(hidden[1:], head, 6).digest != first.digest


def test_a_head_without_full_rank_and_constant_states_work(hidden: Tensor) -> None:
    narrow = LmHead(weight=torch.randn(5, 3) @ torch.randn(3, WIDTH))
    basis = fit_basis(hidden, narrow, WIDTH)
    assert basis.rank == WIDTH
    assert float(_errors(basis, narrow, hidden, k=2).abs().max()) < 0.2
    same = hidden[:1].expand(4, WIDTH)
    record = encode_sketch(fit_basis(same, narrow, 3), same, top_k_from_hidden(same, narrow, 2))
    assert bool(torch.isfinite(record.tail_shift).all())


def test_calibration_without_states_is_refused(head: LmHead, hidden: Tensor) -> None:
    with pytest.raises(ValueError, match="is fitted to vision tokens, found 0"):
        basis_from_moments(HiddenMoments(WIDTH), head, 4)
    with pytest.raises(ValueError, match="sketch_rank is 0"):
        fit_basis(hidden, head, 0)


def test_states_of_other_positions_are_refused(head: LmHead, hidden: Tensor) -> None:
    basis = fit_basis(hidden, head, 4)
    with pytest.raises(ValueError, match="do not belong"):
        encode_sketch(basis, hidden[:3], top_k_from_hidden(hidden[:2], head, 8))
