"""Counts what the means of an optimizer step are taken over.

A step's term is one mean over all its micro-batches and ranks. So each micro-batch divides its sums
by the counts of the whole step, and the shares add up: however a step is cut, its gradient is the
same. The counts are known before any model runs.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Bool
from torch import Tensor

from student_train.config.objective import VladText
from student_train.data.sample_states import SampleStates
from teacher_cache.schema.samples import TokenSpans


class StepCounts(NamedTuple):
    """Counts of some samples; those of a step are the sums over its micro-batches and ranks."""

    response_tokens: int
    """Of supervised, RLD and KD."""
    image_samples: int
    """Samples with an image, for VSD; also those whose vision tokens were all dropped."""
    affinity_samples: int
    """Samples with an image and with text after it that VLAD compares."""

    @classmethod
    def of_spans(cls, spans: Iterable[TokenSpans], text: VladText) -> "StepCounts":
        """Counts of encoded samples; `text` says which tokens VLAD compares."""
        samples = (
            (int(span.is_response.sum()), bool(span.views), span.is_response[span.after_image])
            for span in spans
        )
        return _count(samples, text)

    @classmethod
    def of_states(cls, states: Iterable[SampleStates], text: VladText) -> "StepCounts":
        """Counts of the same samples after the student's pass."""
        samples = ((len(s.response_ids), bool(s.views), s.text_is_response) for s in states)
        return _count(samples, text)

    def of_term(self, name: str) -> int:
        """What the term of that name is a mean over."""
        of_samples = {"vsd": self.image_samples, "vlad": self.affinity_samples}
        return of_samples.get(name, self.response_tokens)


def _count(samples: Iterable[tuple[int, bool, Bool[Tensor, " X"]]], text: VladText) -> StepCounts:
    """From each sample's response tokens, images, and which text after the image is response."""
    num_tokens = num_images = num_compared = 0
    for num_response, has_image, is_response in samples:
        compared = is_response if text == "response" else ~is_response
        has_text = bool(len(is_response)) if text == "all" else bool(compared.any())
        num_tokens += num_response
        num_images += has_image
        num_compared += has_image and has_text
    return StepCounts(num_tokens, num_images, num_compared)
