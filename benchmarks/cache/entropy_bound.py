"""Measures how far a cache's bytes are from the entropy bound of single bytes.

    python -m benchmarks.cache.entropy_bound [--k 128]

Prints, for every column that EM-KD reads, its bytes per sample raw, as stored, and as a bound: the
entropy of each byte of a value (lowest byte, next one, ...), counted over all samples. zstd beats
the bound where values repeat, or depend on neighbours that a layout brings together. Where it only
reaches the bound, the rest is noise to every container that uses zstd.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.synthetic.cached_samples import make_samples, tensors
from benchmarks.synthetic.tables import print_table
from teacher_cache.codec.columns import encode_column
from teacher_cache.schema.teacher_output import CachedSample

COLUMNS = (
    "records",
    "column",
    "raw KB/sample",
    "stored",
    "entropy of its bytes",
    "stored / entropy",
)


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits per symbol of the counted distribution."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def column_bounds(samples: Sequence[CachedSample]) -> Mapping[str, tuple[int, int, float]]:
    """The bytes of each column over all samples: raw, as stored, and their entropy."""
    found: dict[str, tuple[int, int, float]] = {}
    rows = [tensors(sample) for sample in samples]
    for name in rows[0]:
        octets = [
            row[name].contiguous().view(torch.uint8).numpy().reshape(-1, row[name].itemsize)
            for row in rows
        ]
        whole = np.concatenate(octets)
        bits = sum(
            len(whole) * entropy(np.bincount(whole[:, place], minlength=256))
            for place in range(whole.shape[1])
        )
        stored = sum(len(encode_column(name, row[name])) for row in rows)
        found[name] = (whole.size, stored, bits / 8)
    return found


def lines(samples: Sequence[CachedSample], k: int, least_share: float = 0.01) -> list[list[str]]:
    """The table's rows: columns with at least this share of the stored bytes, then the sum."""
    bounds = column_bounds(samples)
    total = [sum(each[at] for each in bounds.values()) for at in range(3)]
    shown = {name: each for name, each in bounds.items() if each[1] >= least_share * total[1]}
    scale = 1e3 * len(samples)
    return [
        [
            *(f"k = {k}", name, *(f"{each / scale:.1f}" for each in (raw, stored, bound))),
            f"{stored / bound:.2f}",
        ]
        for name, (raw, stored, bound) in [*shown.items(), ("all", total)]
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--k", type=int, default=64, help="kept entries")
    options = parser.parse_args(arguments)
    print_table(COLUMNS, lines(make_samples(32, options.k), options.k))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
