"""The student's vision logits, as matching asks for them: no more columns or rows than it needs.

Costs look at a few thousand vocabulary rows or at all V, a chunk at a time. A linear head
multiplies those rows alone: 2 % of the work at 3,072 of 151,936. A head that is some function gives
all its logits, for a chunk of tokens at a time, and only the asked columns are kept. Logits that
are there already are looked up.

Promise: no gradient; nothing is kept between calls, since training changes the head; the head runs
under the autocast in which the record was made, whatever is set where it is asked. Refuses a head
with fewer vocabulary rows than the teacher. Dimensions as in schema.py, W >= V the student's rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.head.linear_head import LinearHead, LogitsOf
from teacher_cache.records.lm_head import row_chunks


def autocast_here(device: torch.device) -> torch.autocast:
    """What is set now. Its cache stays off: it would keep casts that were made without gradient."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentLogits:
    """Logits of N tokens at the V vocabulary rows of a teacher."""

    hidden: Float[Tensor, "N D"]
    source: Float[Tensor, "N W"] | LogitsOf
    """The logits themselves, or the head that computes them."""
    vocab_size: int
    autocast: torch.autocast = field(repr=False)

    @classmethod
    def of(
        cls, hidden: Float[Tensor, "N D"], source: Tensor | LogitsOf, vocab_size: int
    ) -> "StudentLogits":
        """As of here and now: ValueError where the student has fewer than `vocab_size` rows."""
        found = cls(
            hidden=hidden,
            source=source,
            vocab_size=vocab_size,
            autocast=autocast_here(hidden.device),
        )
        if isinstance(source, Tensor):
            found.require(source.shape[1])
        if isinstance(source, LinearHead):
            found.require(len(source.weight))
        return found

    @property
    def num_rows(self) -> int:
        """Number of tokens."""
        return len(self.hidden)

    @property
    def chunks(self) -> list[slice]:
        """Slices of tokens, at least one, whose logits may be held at once."""
        return list(row_chunks(self.num_rows, self.vocab_size)) or [slice(0)]

    def require(self, width: int) -> None:
        """ValueError where `width` vocabulary rows are fewer than the teacher's."""
        if width < self.vocab_size:
            raise ValueError(
                f"the student has {width} vocabulary rows, the teacher's cache {self.vocab_size}: "
                "they do not share a tokenizer"
            )

    @torch.no_grad()
    def rows(self, chunk: slice) -> Float[Tensor, "n V"]:
        """All V logits of some tokens, in the head's own precision."""
        if isinstance(self.source, Tensor):
            logits = self.source[chunk]
        else:
            with self.autocast:
                logits = self.source(self.hidden[chunk])
            self.require(logits.shape[1])
        return logits[:, : self.vocab_size]

    @torch.no_grad()
    def at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """The logits of all tokens at the vocabulary rows `ids`."""
        if isinstance(self.source, Tensor):
            return self.source[:, ids]
        if isinstance(self.source, LinearHead):
            with self.autocast:
                return self.source.logits_at(self.hidden, ids)
        return torch.cat([self.rows(chunk)[:, ids] for chunk in self.chunks])

    def blocks(self, ids: Int[Tensor, " C"], size: int) -> Iterator[Tensor]:
        """The logits at `ids`, `size` columns at a time.

        A function computes all its logits however few are asked for, so it is called once and its
        columns are held; from other sources a block is gone before the next.
        """
        if isinstance(self.source, Tensor | LinearHead):
            yield from (self.at(block) for block in ids.split(size))
        else:
            yield from self.at(ids).split(size, dim=1)
