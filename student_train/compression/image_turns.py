"""What may decide which images' tokens are kept: the text of the turn that shows them.

Promise (`instruction`): a turn's images are judged by what the user says with them and by the end
of the prompt, all of which is known before that turn is answered. So no label leaks into the
choice, training and generation choose alike, and a later turn changes nothing for an earlier one.
`released` looks at all text behind the images, answers included, as EPIC's code does (but never at
padding, which its code also looks at).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from student_train.config.compression import TextSource
from teacher_cache.models.collate import EncodedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTurn:
    """The vision tokens of one turn, and the text that may be asked about them.

    Positions of the sample, ascending. `end` is the last position of the prompt, whose logits
    predict the turn's answer: the row of attention that FastV reads.
    """

    vision: Int[Tensor, " M"]
    text: Int[Tensor, " T"]
    end: int


def image_turns(sample: EncodedSample, source: TextSource) -> tuple[ImageTurn, ...]:
    """The turns of a sample that show images, in order; none for text alone."""
    spans = sample.spans
    vision = spans.vision.sort().values
    response = spans.response
    instruction = spans.content[~spans.is_response]
    # Tokens of one turn have equally many response tokens before them.
    number_M = torch.searchsorted(response, vision)
    number_T = torch.searchsorted(response, instruction)
    turns: list[ImageTurn] = []
    for number in number_M.unique().tolist():
        shown = vision[number_M == number]
        if source == "released":
            behind = torch.arange(int(shown[-1]) + 1, sample.num_tokens)
            text = behind[~torch.isin(behind, vision)]
            end = sample.num_tokens - 1
        else:
            text = instruction[number_T == number]
            end = int(response[number]) - 1 if number < len(response) else sample.num_tokens - 1
        turns.append(ImageTurn(vision=shown, text=text, end=end))
    return tuple(turns)
