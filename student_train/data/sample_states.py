"""Gathers the student's final hidden states of each sample, as the losses take them.

States are gathered by position in the sample: padding and dropped vision tokens do not change which
teacher token a state is compared with. Dimensions as in teacher_output.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.data.token_layout import TokenLayout
from teacher_cache.schema.samples import TokenSpans, ViewGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStates:
    """The student's final hidden states of one sample, without padding.

    `predicting[i]` is the state whose logits predict `response_ids[i]`. `text` holds the content
    tokens after the image; `text_is_response` marks those of the response.
    """

    views: tuple[ViewGrid, ...]
    vision: Float[Tensor, "N D"]
    text: Float[Tensor, "X D"]
    predicting: Float[Tensor, "R D"]
    text_is_response: Bool[Tensor, " X"]
    response_ids: Int[Tensor, " R"]
    images_before_text: Int[Tensor, " X"] | None = None
    """How many images each text token follows; on the CPU. None: all of them."""
    content_ids: Int[Tensor, " T"]
    """Compared with the teacher's, so that no sample is distilled from another one's record."""
    kept: Int[Tensor, " N"] | None = None
    """Ascending numbers of the vision tokens of `views` that are left where some were dropped
    inside the language model; on the CPU. None: `vision` has all of them."""


def gather_states(
    hidden: Float[Tensor, "B L D"], spans: Sequence[TokenSpans], layout: TokenLayout
) -> list[SampleStates]:
    """Gather the states that the losses need from a padded batch, with gradient.

    `layout` says where each sample's tokens are and which vision tokens are left. Either padding
    side gives the same states. ValueError where tokens other than vision tokens were dropped.
    """
    device = hidden.device
    states: list[SampleStates] = []
    for row, span in enumerate(spans):

        def pick(positions: Tensor, row: int = row) -> Tensor:
            return hidden[row, layout.columns(row, positions).to(device)]

        is_kept = layout.kept(row, span.vision)
        states.append(
            SampleStates(
                views=span.views,
                vision=pick(span.vision[is_kept]),
                text=pick(span.vlad_text),
                predicting=pick(span.predicting),
                text_is_response=span.is_response[span.after_image].to(device),
                images_before_text=span.images_before_text if len(span.views) > 1 else None,
                response_ids=span.content_ids[span.is_response].to(device),
                content_ids=span.content_ids,
                kept=None if bool(is_kept.all()) else is_kept.nonzero()[:, 0],
            )
        )
    return states
