"""Random draws that need no state: each is a pure function of a seed and of the names it is given.

Promise: the same seed and names give the same words on every machine and in every version of
numpy: only raw Philox words are used (a fixed algorithm, Salmon et al. 2011), as for the order of
the samples. So a run that resumes continues the same draws by naming the step it is at, and what
is drawn for one sample does not depend on the samples beside it. Refuses seeds beyond 64 bits.
"""

from hashlib import blake2b

import numpy as np
from jaxtyping import UInt64


def random_words(seed: int, count: int, *names: int | str) -> UInt64[np.ndarray, " n"]:
    """`count` random 64-bit words that belong to `seed` and `names`."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
    digest = blake2b(repr(names).encode(), digest_size=8).digest()
    key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def random_uniform(seed: int, *names: int | str) -> float:
    """A number in [0, 1) with 53 random bits that belongs to `seed` and `names`."""
    return int(random_words(seed, 1, *names)[0] >> np.uint64(11)) * 2.0**-53
