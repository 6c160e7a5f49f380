"""EPIC's keep-sets as plain loops over lists, written from the method (docs/epic.md).

Never edited to agree with the code. Ratios are written as decimals and meant so.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

Rows = Sequence[Sequence[float]]


def dart_by_loops(
    states: Rows, keys: Rows, vision: Sequence[int], text: Sequence[int], ratio: float
) -> list[int]:
    """Pivots by the L1 norm of keys; each takes its share of the least similar that are left."""

    def pivots(places: Sequence[int]) -> list[int]:
        by_norm = sorted(places, key=lambda place: -sum(abs(x) for x in keys[place]))
        return sorted(by_norm[:4])

    def cosine(a: Sequence[float], b: Sequence[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    if ratio == 0:
        return sorted(vision)
    kept = pivots(vision)
    chosen = kept + pivots(text)
    share = math.floor((1 - Fraction(str(ratio))) * len(vision) / len(chosen))
    for pivot in chosen:
        free = [place for place in sorted(vision) if place not in kept]
        free.sort(key=lambda place: cosine(states[pivot], states[place]))
        kept = kept + free[:share]
    return sorted(kept)


def fastv_by_loops(attention: Sequence[float], vision: Sequence[int], ratio: float) -> list[int]:
    """Those that receive most attention."""
    best = sorted(vision, key=lambda place: -attention[place])
    return sorted(best[: math.floor((1 - Fraction(str(ratio))) * len(vision))])


def random_by_loops(words: Sequence[int], vision: Sequence[int], ratio: float) -> list[int]:
    """Those with the smallest words."""
    pairs = sorted(zip(words, vision, strict=True))
    return sorted(
        place for _, place in pairs[: math.floor((1 - Fraction(str(ratio))) * len(pairs))]
    )


def rotated(head: Sequence[float], cos: Sequence[float], sin: Sequence[float]) -> list[float]:
    """Rotary embedding of one head: entry i turns with entry i + d/2."""
    half = len(head) // 2
    partner = [-x for x in head[half:]] + list(head[:half])
    return [x * c + y * s for x, y, c, s in zip(head, partner, cos, sin, strict=True)]


def attention_by_loops(
    queries: Rows, keys: Sequence[Rows], row: int, scaling: float
) -> list[float]:
    """Causal attention of token `row`, mean over heads.

    `queries` are the row's, by head; `keys` those of all tokens, by group of heads, then token.
    """
    num_tokens = len(keys[0])
    total = [0.0] * num_tokens
    for head, query in enumerate(queries):
        group = keys[head * len(keys) // len(queries)]
        scores = [
            scaling * sum(q * k for q, k in zip(query, group[token], strict=True))
            for token in range(row + 1)
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        for token, weight in enumerate(weights):
            total[token] += weight / sum(weights) / len(queries)
    return total
