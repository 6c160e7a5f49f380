"""Which pairs of a matching are provably those of the exact costs, when these are known roughly.

Given costs C' with |C - C'| <= E entry by entry, a pair is certified when every optimal assignment
of every such C contains it. Any other assignment moves some rows along cycles: a row leaves its
column for that of the next row, or for a free column, which closes the cycle through one node
`free`. An optimal assignment contains no cycle that it could do better without, so a row of which
every simple cycle costs more than 0 at least, at C' - E on the columns entered and C' + E on those
left, keeps its column. Dual potentials change no cycle and make single moves tell what cycles cost:
moves that cannot be part of a cheap cycle are struck out until none is left to strike; what remains
is asked for its shortest cycles.

Promise: never wrong, ties and float64 rounding included; a pair that is not certified may still be
right. It does not matter how the assignment was found.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse.csgraph import connected_components  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

_Matrix = npt.NDArray[np.float64]
_FARTHEST = -1e200
"""Below this no distance matters, and sums of two do not overflow."""


def certified_pairs(
    cost: Float[Tensor, "N M"],
    error: Float[Tensor, "N M"],
    rows: Int[Tensor, " P"],
    columns: Int[Tensor, " P"],
) -> Bool[Tensor, " P"]:
    """Which pairs (rows[i], columns[i]) of an assignment are certified; on the CPU.

    `error` bounds every entry of `cost`; P is min(N, M), and no row or column occurs twice.
    """
    if cost.shape[0] > cost.shape[1]:
        return certified_pairs(cost.T, error.T, columns, rows)
    order = rows.argsort()
    matched = columns[order].numpy()
    wide = cost.detach().to("cpu", torch.float64).numpy()
    bound = error.detach().to("cpu", torch.float64).numpy()
    certified = np.empty(len(matched), dtype=bool)
    certified[order.numpy()] = _certified_rows(wide, bound, matched)
    return torch.from_numpy(certified)


def _certified_rows(
    cost: _Matrix, error: _Matrix, matched: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """For each row, matched to column `matched[row]`, whether it keeps it under every cost."""
    own = np.arange(len(matched)), matched
    if not len(matched):
        return np.empty(0, dtype=bool)
    expected = cost - cost[own][:, None]
    potential = _potentials(_moves(expected, matched))
    largest = np.abs(cost).max() + np.abs(potential).max()
    rounding = 8 * np.finfo(np.float64).eps * (len(matched) + 1) * largest
    least = _moves(expected - error - error[own][:, None], matched) - rounding
    least += potential[:, None] - potential
    possible = _struck_out(least)
    remaining = np.where(possible, least, np.inf)
    return _shortest_cycles(remaining)[: len(matched)] > 0


def _moves(gain: _Matrix, matched: npt.NDArray[np.int64]) -> _Matrix:
    """Weights between rows, and one more node for the free columns; infinite where no move is."""
    size = len(matched)
    moves = np.full((size + 1, size + 1), np.inf)
    moves[:size, :size] = gain[:, matched]
    free = np.ones(gain.shape[1], dtype=bool)
    free[matched] = False
    if free.any():
        moves[:size, size] = gain[:, free].min(axis=1)
        moves[size, :size] = 0.0
    np.fill_diagonal(moves, np.inf)
    return moves


def _potentials(moves: _Matrix) -> _Matrix:
    """Distances from a node that is 0 away from all (Bellman and Ford): the duals of the rows."""
    potential = np.zeros(len(moves))
    for _ in range(len(moves)):
        closer = np.minimum(potential, (potential[:, None] + moves).min(axis=0))
        if (closer == potential).all():
            break
        potential = closer
    return potential


def _struck_out(moves: _Matrix) -> npt.NDArray[np.bool_]:
    """Which moves may be part of a simple cycle of weight 0 or less.

    Beside a move, each other node of its strongly connected part adds to a cycle at least the
    cheapest move out of it (or into it), or nothing.
    """
    possible = np.isfinite(moves)
    while True:
        _, part = connected_components(possible, directed=True, connection="strong")
        kept = possible & (part[:, None] == part)
        weights = np.where(kept, moves, np.inf)
        leaving = np.minimum(0.0, weights.min(axis=1))
        entering = np.minimum(0.0, weights.min(axis=0))
        others_leaving = np.bincount(part, leaving)[part] - leaving
        others_entering = np.bincount(part, entering)[part] - entering
        kept &= weights + others_leaving[:, None] <= 0
        kept &= weights + others_entering <= 0
        if (kept == possible).all():
            return kept
        possible = kept


def _shortest_cycles(moves: _Matrix) -> _Matrix:
    """For each node no more than the weight of its shortest simple cycle (Floyd and Warshall)."""
    shortest = np.full(len(moves), np.inf)
    busy = np.isfinite(moves).any(axis=1)
    distance = moves[busy][:, busy]
    for via in range(len(distance)):
        through = distance[:, via, None] + distance[via]
        distance = np.maximum(np.minimum(distance, through), _FARTHEST)
    shortest[busy] = distance.diagonal()
    return shortest
