"""Proves which pairs of a matching are those of the exact costs, given bounds of the costs' error.

Only `MatchingConfig.certify` uses this file; matching is complete without it.

Given costs C' with |C - C'| <= E entry by entry, a pair is certified when every optimal assignment
of every such C contains it. Any other assignment moves some rows along cycles: each row takes the
column of the next row, or a free column, which closes the cycle through one node `free`. A row
keeps its column if each simple cycle through it costs more than 0, counted at C' - E on the columns
entered and at C' + E on those left. Dual potentials change the cost of no cycle and make single
moves informative: moves that cannot belong to a cycle of cost 0 or less are removed, and Floyd and
Warshall's algorithm bounds the shortest cycles of the rest.

Promise: never wrong, ties and float64 rounding included; an uncertified pair may still be right.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_Matrix = npt.NDArray[np.float64]
_FARTHEST = -1e200
"""Floor of distances: sums of two of them do not overflow."""


def prove_pairs(
    cost: Float[Tensor, "N M"],
    error: Float[Tensor, "N M"],
    rows: Int[Tensor, " P"],
    columns: Int[Tensor, " P"],
) -> Bool[Tensor, " P"]:
    """Return which pairs (rows[i], columns[i]) of an assignment are certified; on the CPU.

    `error` bounds the error of each cost; P is min(N, M), and no row or column occurs twice.
    """
    if cost.shape[0] > cost.shape[1]:
        return prove_pairs(cost.T, error.T, columns, rows)
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
    """Return which rows keep their column `matched[row]` under every cost within the bound."""
    own = np.arange(len(matched)), matched
    if not len(matched):
        return np.empty(0, dtype=bool)
    expected = cost - cost[own][:, None]
    potential = _potentials(_moves(expected, matched))
    largest = np.abs(cost).max() + np.abs(potential).max()
    rounding = 8 * np.finfo(np.float64).eps * (len(matched) + 1) * largest
    least = _moves(expected - error - error[own][:, None], matched) - rounding
    least += potential[:, None] - potential
    possible = _possible_moves(least)
    remaining = np.where(possible, least, np.inf)
    return _shortest_cycles(remaining)[: len(matched)] > 0


def _moves(gain: _Matrix, matched: npt.NDArray[np.int64]) -> _Matrix:
    """Costs of moves between rows, and one more node for the free columns; infinite: no move."""
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
    """Distances from a node at distance 0 of all (Bellman and Ford): the duals of the rows."""
    potential = np.zeros(len(moves))
    for _ in range(len(moves)):
        closer = np.minimum(potential, (potential[:, None] + moves).min(axis=0))
        if (closer == potential).all():
            break
        potential = closer
    return potential


def _possible_moves(moves: _Matrix) -> npt.NDArray[np.bool_]:
    """Return which moves may belong to a simple cycle of cost 0 or less.

    Besides the move, each other node of its strongly connected component adds to the cycle at least
    its cheapest move out (or in), or nothing.
    """
    from scipy.sparse.csgraph import (  # pyright: ignore[reportMissingTypeStubs]
        connected_components,
    )

    possible = np.isfinite(moves)
    while True:
        _, component = connected_components(possible, directed=True, connection="strong")
        kept = possible & (component[:, None] == component)
        weights = np.where(kept, moves, np.inf)
        leaving = np.minimum(0.0, weights.min(axis=1))
        entering = np.minimum(0.0, weights.min(axis=0))
        others_leaving = np.bincount(component, leaving)[component] - leaving
        others_entering = np.bincount(component, entering)[component] - entering
        kept &= weights + others_leaving[:, None] <= 0
        kept &= weights + others_entering <= 0
        if (kept == possible).all():
            return kept
        possible = kept


def _shortest_cycles(moves: _Matrix) -> _Matrix:
    """A lower bound of each node's shortest simple cycle (Floyd and Warshall)."""
    shortest = np.full(len(moves), np.inf)
    busy = np.isfinite(moves).any(axis=1)
    distance = moves[busy][:, busy]
    for via in range(len(distance)):
        through = distance[:, via, None] + distance[via]
        distance = np.maximum(np.minimum(distance, through), _FARTHEST)
    shortest[busy] = distance.diagonal()
    return shortest
