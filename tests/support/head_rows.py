"""Makes blocks of rows for a head, and a plain reference for tests of the fused one.

Promise: deterministic float64 tensors that a test can follow by hand. `naive` is autograd over all
logits at once and shares no code with `head_loss`. `small_chunks` cuts these few rows into chunks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from student_train.head import chunked_pass, fused_loss
from student_train.head.chunked_pass import HeadRows, RowLosses

NUM_ROWS, WIDTH, VOCAB = 10, 4, 7


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 rows, of which the losses see 3 at a time."""
    monkeypatch.setattr(chunked_pass, "CHUNK_ROWS", 4)
    monkeypatch.setattr(fused_loss, "CALLED_ROWS", 4)
    monkeypatch.setattr(chunked_pass, "STEP_BYTES", 4 * VOCAB * 3)
    monkeypatch.setattr(chunked_pass, "PRODUCT_ROWS", 3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class TwoLosses(RowLosses):
    """Two losses that share their logits, and one value without a weight."""

    targets: Tensor

    def chunk(self, rows: slice) -> "TwoLosses":
        return TwoLosses(self.targets[rows])

    def values(self, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        log_q, targets = logits.log_softmax(dim=1), self.targets[rows].to(logits.dtype)
        divergence = (log_q.exp() * (log_q - targets.log_softmax(dim=1))).sum(dim=1)
        return {"divergence": divergence, "first": -log_q[:, 0], "told": logits[:, 0]}


class FirstLogProb(RowLosses):
    """Minus the log-probability of the first vocabulary row."""

    def chunk(self, rows: slice) -> "FirstLogProb":
        return self

    def values(self, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        return {"first": -logits.log_softmax(dim=1)[:, 0]}


def block(hidden: Tensor, seed: int = 0) -> HeadRows:
    targets = normal(len(hidden), VOCAB, seed=seed + 10)
    weights = {
        "divergence": normal(len(hidden), seed=seed + 20),
        "first": normal(len(hidden), seed=seed + 30),
    }

    return HeadRows(hidden=hidden, losses=TwoLosses(targets), weights=weights)


def naive(head: Callable[[Tensor], Tensor], rows: HeadRows) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The same by autograd over all logits at once."""
    logits = head(rows.hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = rows.losses.values(wide, slice(None))
    return sum_of([(values[name] * w).sum() for name, w in rows.weights.items()]), values


def sum_of(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()


def gradients(total: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, tensors, retain_graph=True))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((NUM_ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    found = [normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return found[0], found[1], found[2]


class Made(TorchDispatchMode):
    """Remembers the shape of every dense tensor that is made, views of given ones apart."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes: set[tuple[int, ...]] = set()
        self.products = 0
        """Products of the weight's size."""
        self.num_weights = 0
        """Tensors of the weight's size that no operation was given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.products += func == torch.ops.aten.mm.default and found.shape == (VOCAB, WIDTH)
        given = self.known | {_storage(tensor) for tensor in tree_leaves((args, kwargs))}
        for tensor in found if isinstance(found, tuple) else (found,):
            if _storage(tensor) is not None and _storage(tensor) not in self.known:
                self.shapes.add(tuple(tensor.shape))
                self.num_weights += tensor.shape == (VOCAB, WIDTH) and _storage(tensor) not in given
        return found


def _storage(found: object) -> int | None:
    if isinstance(found, Tensor) and found.layout == torch.strided:
        return found.untyped_storage().data_ptr()
    return None


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
