"""Computes the student's vision logits for matching: only the columns and rows it asks for.

Costs read a few thousand vocabulary rows, or all V in chunks. A linear head multiplies only those
rows: 2 % of the work at 3,072 of 151,936. A head that is a function computes all logits for a chunk
of tokens, and only the requested columns are kept. No gradient. Refuses a head with fewer
vocabulary rows than the teacher. Dimensions as in teacher_output.py, W >= V the student's rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.head.linear_head import LinearHead, LogitsOf
from teacher_cache.records.lm_head import row_chunks


def autocast_here(device: torch.device) -> torch.autocast:
    """The autocast set now, without its cache, which would keep casts made without gradient."""
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
        """Under the autocast set now; ValueError for fewer than `vocab_size` student rows."""
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
        """Slices of tokens, at least one, whose logits fit in memory together."""
        return list(row_chunks(self.num_rows, self.vocab_size)) or [slice(0)]

    def require(self, width: int) -> None:
        """ValueError if `width` vocabulary rows are fewer than the teacher's."""
        if width < self.vocab_size:
            raise ValueError(
                f"the student has {width} vocabulary rows, the teacher's cache {self.vocab_size}: "
                "they do not share a tokenizer; train a student that has the teacher's"
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

        A function computes all its logits anyway, so it is called once and its columns are held.
        Other sources hold one block at a time.
        """
        if isinstance(self.source, Tensor | LinearHead):
            yield from (self.at(block) for block in ids.split(size))
        else:
            yield from self.at(ids).split(size, dim=1)
