"""Makes a text teacher and student from real text: word statistics of the installed sources.

Both mix the counts of what follows the last two words, the last word, and any word, in Python files
of torch and transformers. The student has read a twentieth of the text and uses one word at most.
Every prediction follows true text, as in RLD. Held-out positions; a fixed seed.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from student_train.signals.teacher_signal import DenseSignal, TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.tail_template import MeanTail
from teacher_cache.records.top_k import top_k_record

VOCAB_SIZE, WIDTH, NUM_FILES = 8192, 256, 200
NUM_CALIBRATED, NUM_MEASURED = 2000, 200
_WORD = re.compile(r"[A-Za-z_]+|\d|[^\sA-Za-z_\d]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextProblem:
    """Logits at held-out positions, and records of K entries of the teacher."""

    student_logits: Tensor
    teacher: DenseSignal
    record: TopKSignal
    head: LmHead
    """A random one, to turn gradients by logits into gradients by states."""

    @classmethod
    def make(cls, top_k: int) -> "TextProblem":
        """Count words, calibrate a template, and cut the records."""
        words = _words()
        cut = int(0.9 * len(words))
        teacher = _Counts(words[:cut], weights=(0.15, 0.35, 0.5))
        student = _Counts(words[: len(words) // 20], weights=(0.4, 0.6, 0.0))
        places = random.Random(0).sample(range(cut + 2, len(words)), NUM_CALIBRATED + NUM_MEASURED)
        before = [(words[place - 2], words[place - 1]) for place in places]
        tails = MeanTail(VOCAB_SIZE)
        # States whose head is the identity are logits.
        tails.update(
            teacher.logits(before[:NUM_CALIBRATED]), LmHead(weight=torch.eye(VOCAB_SIZE)), top_k
        )
        logits = teacher.logits(before[NUM_CALIBRATED:])
        found = top_k_record(logits, top_k)
        record = TopKSignal(record=found, template=tails.log_shares)
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) / WIDTH**0.5
        return cls(
            student_logits=student.logits(before[NUM_CALIBRATED:]),
            teacher=DenseSignal(logits=logits),
            record=record,
            head=LmHead(weight=head),
        )


class _Counts:
    """Log-probabilities of the next word, from counts after none, one and two words."""

    def __init__(self, words: Sequence[int], weights: tuple[float, float, float]) -> None:
        self.weights = weights
        single = torch.bincount(torch.tensor(words), minlength=VOCAB_SIZE).double() + 0.1
        self.single = single / single.sum()
        self.after: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            self.after[second,][third] += 1
            self.after[first, second][third] += 1

    def logits(self, before: Sequence[tuple[int, int]]) -> Tensor:
        return torch.stack([self._next(*pair) for pair in before]).log().float()

    def _next(self, first: int, second: int) -> Tensor:
        found = self.weights[0] * self.single
        for words, weight in (((second,), self.weights[1]), ((first, second), self.weights[2])):
            counts = self.after.get(words)
            if counts:
                share = torch.tensor(list(counts.values()), dtype=torch.float64)
                trust = weight / (share.sum() + 5)  # rare contexts count less
                found = found.index_add(0, torch.tensor(list(counts)), trust * share)
        return found / found.sum()


def _words() -> list[int]:
    roots = [Path(module.__file__ or "").parent for module in (transformers, torch)]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))[: 4 * NUM_FILES : 4]]
    texts = [_WORD.findall(file.read_text(encoding="utf-8", errors="ignore")) for file in files]
    common = Counter(word for text in texts for word in text).most_common(VOCAB_SIZE)
    number = {word: place for place, (word, _) in enumerate(common)}
    return [number[word] for text in texts for word in text if word in number]
