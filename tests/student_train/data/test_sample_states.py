"""States picked from a padded batch: no trace of padding, each label predicted from its left."""

from collections.abc import Sequence

import torch
from torch import Tensor

from student_train.config.objective import MatchingConfig, ObjectiveConfig
from student_train.data.sample_states import SampleStates, gather_states
from student_train.data.token_layout import TokenLayout
from student_train.losses.objective_loss import distillation_loss
from teacher_cache.schema.samples import TokenSpans
from tests.support.batches import random_batch

EMKD = ObjectiveConfig(matching=MatchingConfig(num_shared_ids=None))


def padded(batch: Sequence[tuple[Tensor, TokenSpans]], side: str) -> list[SampleStates]:
    """Gather from a padded batch whose padding holds rubbish."""
    length = max(len(hidden) for hidden, _ in batch)
    offsets = [length - len(hidden) if side == "left" else 0 for hidden, _ in batch]
    rows = torch.full((len(batch), length, batch[0][0].shape[1]), torch.nan, dtype=torch.float64)
    for row, (hidden, _), offset in zip(rows, batch, offsets, strict=True):
        row[offset : offset + len(hidden)] = hidden
    return gather_states(rows, [spans for _, spans in batch], layout(batch, offsets))


def layout(batch: Sequence[tuple[Tensor, TokenSpans]], starts: Sequence[int]) -> TokenLayout:
    tokens = tuple(torch.arange(len(hidden)) for hidden, _ in batch)
    length = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
    return TokenLayout(rows=tokens, starts=tuple(starts), length=length)


def test_left_and_right_padding_give_the_same_losses_to_the_bit() -> None:
    batch = random_batch(18)
    samples: list[tuple[Tensor, TokenSpans]] = []
    generator = torch.Generator().manual_seed(0)
    for state, output in zip(batch.states, batch.hidden_outputs, strict=True):
        num_before = int((~output.after_image).sum()) if output.views else len(output.content_ids)
        num_vision = len(state.vision)
        content = torch.arange(1, len(output.content_ids) + 1)
        content[num_before:] += num_vision
        length = num_vision + len(content) + 2
        spans = TokenSpans(
            views=state.views,
            vision=torch.arange(num_before + 1, num_before + 1 + num_vision),
            content=content,
            content_ids=output.content_ids,
            is_response=output.is_response,
            after_image=output.after_image,
        )
        samples.append((torch.randn(length, 5, generator=generator).double(), spans))
    found = [
        distillation_loss(
            padded(samples, side),
            batch.hidden_outputs,
            batch.student_head,
            EMKD,
            batch.assets("hidden"),
        )
        for side in ("left", "right")
    ]
    assert bool(torch.isfinite(found[0].total))
    for name, term in found[0].terms.items():
        assert torch.equal(term, found[1].terms[name]), name


def test_the_response_is_predicted_one_position_to_the_left() -> None:
    hidden = torch.arange(6.0, dtype=torch.float64)[None, :, None]
    spans = TokenSpans(
        views=(),
        vision=torch.tensor([], dtype=torch.int64),
        content=torch.tensor([1, 2, 4, 5]),
        content_ids=torch.tensor([10, 11, 12, 13]),
        is_response=torch.tensor([False, False, True, True]),
        after_image=torch.zeros(4, dtype=torch.bool),
    )
    (state,) = gather_states(hidden, [spans], layout([(hidden[0], spans)], [0]))
    assert state.predicting[:, 0].tolist() == [3.0, 4.0]
    assert state.response_ids.tolist() == [12, 13]
