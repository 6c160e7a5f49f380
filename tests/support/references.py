"""EM-KD in plain Python loops over lists of floats: the truth that the code is compared with.

Written from the equations (docs/method.md), not from the code, and never edited to agree with it.
A `Row` is the logits of one position, a matrix a list of rows; no tensor, no library but `math`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Row = Sequence[float]
Matrix = Sequence[Row]


def log_sum_exp(values: Row) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values))


def log_softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in logits]
    normaliser = log_sum_exp(scaled)
    return [value - normaliser for value in scaled]


def kl(log_a: Row, log_b: Row) -> float:
    """KL(a || b) of two distributions given by their logarithms."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def reverse_kl(student: Row, teacher: Row, temperature: float = 1.0) -> float:
    """T^2 KL(student || teacher), both as logits over the same vocabulary."""
    return temperature**2 * kl(log_softmax(student, temperature), log_softmax(teacher, temperature))


def jensen_shannon(student: Row, teacher: Row, temperature: float = 1.0) -> float:
    """Half the KL of each side to their mean, times the temperature squared."""
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    log_m = [math.log((math.exp(q) + math.exp(p)) / 2) for q, p in zip(log_q, log_p, strict=True)]
    return temperature**2 * (kl(log_q, log_m) + kl(log_p, log_m)) / 2


def top_ids(teacher: Row, k: int) -> list[int]:
    return sorted(range(len(teacher)), key=lambda v: (-teacher[v], v))[:k]


def bucketed(log_probs: Row, kept: Sequence[int]) -> list[float]:
    """The kept entries and, as one more outcome, everything else together."""
    outside = [value for v, value in enumerate(log_probs) if v not in kept]
    return [log_probs[v] for v in kept] + [log_sum_exp(outside)]


def bucket_reverse_kl(student: Row, teacher: Row, k: int) -> float:
    kept = top_ids(teacher, k)
    return kl(bucketed(log_softmax(student), kept), bucketed(log_softmax(teacher), kept))


def blended_reverse_kl(student: Row, teacher: Row, estimate: Row, k: int, blend: float) -> float:
    """(1 - blend) KL on k + 1 outcomes + blend KL against p with an estimated tail.

    `estimate` are logits whose *shape* outside the top-k is used; their mass there is made the
    teacher's true tail mass.
    """
    kept = top_ids(teacher, k)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    outside = [v for v in range(len(teacher)) if v not in kept]
    log_tail = log_sum_exp([log_p[v] for v in outside])
    shape = log_sum_exp([estimate[v] for v in outside])
    log_p_hat = [
        log_p[v] if v in kept else estimate[v] - shape + log_tail for v in range(len(teacher))
    ]
    bucket = kl(bucketed(log_q, kept), bucketed(log_p, kept))
    return (1 - blend) * bucket + blend * kl(log_q, log_p_hat)


def l1(a: Row, b: Row) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def centred(row: Row) -> list[float]:
    mean = sum(row) / len(row)
    return [value - mean for value in row]


def probabilities(logits: Row) -> list[float]:
    return [math.exp(value) for value in log_softmax(logits)]


def probabilities_with_uniform_tail(logits: Row, k: int) -> list[float]:
    kept = top_ids(logits, k)
    exact = probabilities(logits)
    tail = 1 - sum(exact[v] for v in kept)
    return [p if v in kept else tail / (len(logits) - k) for v, p in enumerate(exact)]


def best_assignment(cost: Matrix) -> tuple[float, list[tuple[int, int]]]:
    """Least total cost over all injective pairings of the smaller side, by trying every one."""
    num_rows, num_columns = len(cost), len(cost[0])
    if num_rows > num_columns:
        total, pairs = best_assignment([list(column) for column in zip(*cost, strict=True)])
        return total, sorted((row, column) for column, row in pairs)
    best: tuple[float, list[tuple[int, int]]] = (math.inf, [])
    for columns in itertools.permutations(range(num_columns), num_rows):
        total = sum(cost[row][column] for row, column in enumerate(columns))
        if total < best[0]:
            best = (total, list(enumerate(columns)))
    return best


def cosine(a: Row, b: Row) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def smooth_l1(difference: float, beta: float) -> float:
    size = abs(difference)
    return size**2 / (2 * beta) if size < beta else size - beta / 2


def linear(states: Matrix, weight: Matrix) -> list[list[float]]:
    """Logits of final hidden states under an LM head without a bias."""
    return [
        [sum(h * w for h, w in zip(state, row, strict=True)) for row in weight] for state in states
    ]


@dataclass(frozen=True, kw_only=True)
class ReferenceSide:
    """One model's states of one sample; `vision` has one block of rows per assignment problem."""

    vision: Sequence[Matrix]
    text: Matrix
    predicting: Matrix


@dataclass(frozen=True, kw_only=True)
class ReferenceSample:
    student: ReferenceSide
    teacher: ReferenceSide
    response_ids: Sequence[int]


def emkd(
    samples: Sequence[ReferenceSample],
    student_head: Matrix,
    teacher_head: Matrix,
    temperature: float = 1.0,
    beta: float = 1.0,
) -> dict[str, float]:
    """The four unweighted terms of EM-KD with a fully known teacher and raw-logit matching."""
    vocab_size = len(teacher_head)
    cross_entropies: list[float] = []
    response_kls: list[float] = []
    sample_vsd: list[float] = []
    sample_vlad: list[float] = []
    for sample in samples:
        own_logits = linear(sample.student.predicting, student_head)
        teacher_logits = linear(sample.teacher.predicting, teacher_head)
        for own, theirs, label in zip(own_logits, teacher_logits, sample.response_ids, strict=True):
            cross_entropies.append(-log_softmax(own)[label])
            response_kls.append(reverse_kl(own[:vocab_size], theirs, temperature))
        pair_kls: list[float] = []
        entries: list[float] = []
        for own_block, their_block in zip(
            sample.student.vision, sample.teacher.vision, strict=True
        ):
            own_rows = [row[:vocab_size] for row in linear(own_block, student_head)]
            their_rows = linear(their_block, teacher_head)
            _, pairs = best_assignment([[l1(s, t) for t in their_rows] for s in own_rows])
            for j, i in pairs:
                pair_kls.append(reverse_kl(own_rows[j], their_rows[i], temperature))
                for own_text, their_text in zip(
                    sample.student.text, sample.teacher.text, strict=True
                ):
                    own_affinity = cosine(own_text, own_block[j])
                    their_affinity = cosine(their_text, their_block[i])
                    entries.append(smooth_l1(own_affinity - their_affinity, beta))
        if pair_kls:
            sample_vsd.append(sum(pair_kls) / len(pair_kls))
        if entries:
            sample_vlad.append(sum(entries) / len(entries))
    return {
        "supervised": _mean(cross_entropies),
        "rld": _mean(response_kls),
        "vsd": _mean(sample_vsd),
        "vlad": _mean(sample_vlad),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
