"""Draws random numbers without state: each is a pure function of a seed and some names.

The same seed and names give the same numbers on every machine and in every version of numpy: only
raw Philox words are used (a fixed algorithm, Salmon et al. 2011). So a resumed run repeats the
draws of its step, and a sample's draws do not depend on its batch.
"""

from hashlib import blake2b

import numpy as np
from jaxtyping import UInt64


def random_words(seed: int, count: int, *names: int | str) -> UInt64[np.ndarray, " n"]:
    """Return `count` random 64-bit words for `seed` and `names`."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
    digest = blake2b(repr(names).encode(), digest_size=8).digest()
    key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def random_uniform(seed: int, *names: int | str) -> float:
    """Return a number in [0, 1) with 53 random bits for `seed` and `names`."""
    return int(random_words(seed, 1, *names)[0] >> np.uint64(11)) * 2.0**-53
