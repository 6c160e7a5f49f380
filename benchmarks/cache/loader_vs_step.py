"""Measures whether the demo's student waits for loading or for learning.

A student of the demo's sizes takes optimizer steps with the demo's settings (demo_student.py).
`loader` is the samples per second that one process reads, decodes, encodes and collates; `student`
is what the steps consume when batches are ready. Both on one thread.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.synthetic.demo_student import make_miniature


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Samples per second of one process."""

    loader: float
    student: float

    @property
    def ratio(self) -> float:
        """How many students one loader could feed."""
        return self.loader / self.student


def measure(num_samples: int, num_steps: int) -> Throughput:
    """Build the miniature, then time loading and learning alternately."""
    with tempfile.TemporaryDirectory() as place:
        miniature = make_miniature(Path(place), num_samples)
        batches = iter(miniature.stream)
        miniature.step(next(batches))
        loading = learning = float("inf")
        for _ in range(num_steps):
            started = time.process_time()
            batch = next(batches)
            loaded = time.process_time()
            miniature.step(batch)
            loading = min(loading, loaded - started)
            learning = min(learning, time.process_time() - loaded)
    size = miniature.settings.micro_batch_size
    return Throughput(loader=size / loading, student=size / learning)
