"""The teacher's logits at N positions, in one of three forms with one interface.

    DenseSignal    every logit                                   (a live teacher, tests)
    HiddenSignal   the state before the head, and the head       (tier `hidden`)
    TopKSignal     K logits, the normaliser, the tail's mass,    (tiers `topk`, `topk+sketch`)
                   perhaps a sketch of all others: top_k.py

A signal is `exact` when it knows every logit: the first two always, the third where every position
keeps V. A signal refuses questions about logits that it does not know. No gradient flows into a
signal. Dimensions as in teacher_output.py, N any number of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.ops.precision import at_least_float32
from student_train.signals.top_k import TopKSignal, concatenate_top_k
from teacher_cache.records.lm_head import LmHead


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSignal:
    """Every raw logit of every position."""

    exact: ClassVar[bool] = True
    logits: Float[Tensor, "N V"]

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.logits.shape[1]

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits."""
        return self.logits.detach()

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at the vocabulary rows `ids`."""
        return self.logits.detach()[:, ids]

    def rows(self, index: Int[Tensor, " P"] | slice) -> "DenseSignal":
        """The positions `index`, in that order; a slice copies nothing."""
        return DenseSignal(logits=self.logits[index])

    def to(self, device: torch.device) -> "DenseSignal":
        """The same signal on another device."""
        return DenseSignal(logits=self.logits.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSignal:
    """The final hidden states, and the head that turns them into logits."""

    exact: ClassVar[bool] = True
    hidden: Float[Tensor, "N D"]
    head: LmHead

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.head.vocab_size

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits, computed now."""
        with torch.no_grad():
            return self.head.logits(self.hidden)

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at the vocabulary rows `ids`; the other rows of the head are not touched."""
        with torch.no_grad():
            return self.head.logits_at(self.hidden, ids)

    def rows(self, index: Int[Tensor, " P"] | slice) -> "HiddenSignal":
        """The positions `index`, in that order; a slice copies nothing."""
        return HiddenSignal(hidden=self.hidden[index], head=self.head)

    def to(self, device: torch.device) -> "HiddenSignal":
        """The same signal on another device; no copy where it is already there."""
        return HiddenSignal(hidden=self.hidden.to(device), head=self.head.to(device))


Signal = DenseSignal | HiddenSignal | TopKSignal


def concatenate(signals: Sequence[Signal]) -> Signal:
    """One signal with the positions of all, in order.

    The signals come from one cache and share form, vocabulary, and head or basis (the first one's
    is kept). Top-k signals may differ in K. Autocast is off here, because under bfloat16 it refuses
    to join float16 tensors. ValueError for different forms, or for no signal.
    """
    kinds = sorted({type(signal).__name__ for signal in signals})
    if len(kinds) != 1:
        raise ValueError(f"cannot concatenate {len(signals)} signals of kinds {kinds} into one")
    dense = [signal.logits for signal in signals if isinstance(signal, DenseSignal)]
    states = [signal for signal in signals if isinstance(signal, HiddenSignal)]
    top_k = [signal for signal in signals if isinstance(signal, TopKSignal)]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        if dense:
            return DenseSignal(logits=torch.cat(dense))
        if states:
            hidden = torch.cat([signal.hidden for signal in states])
            return HiddenSignal(hidden=hidden, head=states[0].head)
        return concatenate_top_k(top_k)


@torch.no_grad()
def kept_mass(signal: Signal) -> float:
    """Mean teacher probability inside what the record keeps; 1 for exact signals, 0 for no rows."""
    if signal.num_rows == 0:
        return 0.0
    if not isinstance(signal, TopKSignal) or signal.exact:
        return 1.0
    return 1.0 - float(at_least_float32(signal.record.log_tail).exp().mean())
