"""Fits the sketch basis and the tail template of a cache to states of some samples.

The basis is fitted to vision states, the template to states at vision positions and at
response-predicting positions. Memory does not grow with the number of states. Equal states in equal
batches give equal digests. Dimensions as in schema/teacher_output.py.
"""

from jaxtyping import Float
from torch import Tensor

from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import HiddenMoments, SketchBasis, basis_from_moments
from teacher_cache.records.tail_template import MeanTail, TailTemplate
from teacher_cache.schema.options import RecordSettings, holds


class Calibration:
    """Accumulates the states of samples, for records of these settings."""

    def __init__(self, head: LmHead, settings: RecordSettings) -> None:
        self._head = head
        self._settings = settings
        self._moments = HiddenMoments(head.weight.shape[1])
        self._vision, self._response = MeanTail(head.vocab_size), MeanTail(head.vocab_size)
        self._num_vision = self._num_response = 0

    @property
    def num_tokens(self) -> int:
        """Vision tokens so far, or response tokens where there are no images."""
        return self._num_vision or self._num_response

    def add(self, vision: Float[Tensor, "M D"], predicting: Float[Tensor, "R D"]) -> None:
        """Add the finite states of one sample."""
        settings = self._settings
        cut = settings.top_k, settings.top_p, settings.min_k
        self._num_vision += len(vision)
        self._num_response += len(predicting)
        self._vision.update(vision, self._head, *cut)
        self._response.update(predicting, self._head, *cut)
        if holds(settings.records, "sketch"):
            self._moments.update(vision)

    def sketch(self) -> SketchBasis | None:
        """The basis; None for records without a sketch. ValueError without vision tokens."""
        if not holds(self._settings.records, "sketch"):
            return None
        return basis_from_moments(self._moments, self._head, self._settings.sketch_rank)

    def template(self) -> TailTemplate | None:
        """The template; None where records keep every logit."""
        found = TailTemplate(vision=self._vision.log_shares, response=self._response.log_shares)
        return found if found.tensors() else None
