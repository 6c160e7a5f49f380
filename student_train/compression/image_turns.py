"""Finds the turns of a sample that show images, and the text that may decide what they keep.

`instruction`: only the user's text of the same turn and the end of its prompt decide. So no label
leaks into the choice, training and generation choose alike, and a later turn changes nothing for an
earlier one. `released`: all text after the images, answers included, as in EPIC's code (which also
uses padding; here, padding never counts).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from student_train.config.compression import TextSource
from teacher_cache.encoding.collate import EncodedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTurn:
    """The vision tokens of one turn, and the text that may decide which are kept.

    Ascending positions in the sample. `end` is the last position of the prompt, whose logits
    predict the answer: the row of attention that FastV uses.
    """

    vision: Int[Tensor, " M"]
    text: Int[Tensor, " T"]
    end: int


def image_turns(sample: EncodedSample, source: TextSource) -> tuple[ImageTurn, ...]:
    """Return the turns of a sample that show images, in order; none for text alone."""
    spans = sample.spans
    vision = spans.vision.sort().values
    answers = spans.response if spans.answers is None else spans.answers
    instruction = spans.content[~spans.is_response]
    # All tokens of one turn have the same number of answers (or response tokens) before them.
    number_M = torch.searchsorted(answers, vision)
    number_T = torch.searchsorted(answers, instruction)
    turns: list[ImageTurn] = []
    for number in number_M.unique().tolist():
        shown = vision[number_M == number]
        if source == "released":
            behind = torch.arange(int(shown[-1]) + 1, sample.num_tokens)
            text = behind[~torch.isin(behind, vision)]
            end = sample.num_tokens - 1
        else:
            text = instruction[number_T == number]
            end = int(answers[number]) - 1 if number < len(answers) else sample.num_tokens - 1
        turns.append(ImageTurn(vision=shown, text=text, end=end))
    return tuple(turns)
