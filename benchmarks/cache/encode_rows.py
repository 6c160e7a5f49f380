"""Time of `encode_rows` where columns are computed twice (A, the old way) and once (B).

    python -m benchmarks.cache.encode_rows [--samples 4] [--rounds 5]

Samples of one image each (576 or 729 vision tokens, k = 64); shared: three samples per image, which
share its vision record. Processor time of one core, best of the rounds, A and B in turn. Both must
give the same bytes.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from itertools import product

from benchmarks.synthetic.cached_samples import SKETCH_RANK, VOCAB_SIZE, WIDTH, make_samples
from benchmarks.synthetic.tables import print_table
from teacher_cache.codec.columns import output_columns
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.samples import Message, make_sample
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_rows
from tests.support.strategies import make_spec

SETTINGS: dict[str, dict[str, object]] = {
    "exact": {"logits_codec": "exact", "affinity_dtype": "float16"},
    "8 bits": {
        "logits_codec": "affine8",
        "logits_max_error": 1.0,
        "affinity_dtype": "int8",
        "affinity_max_error": 0.1,
    },
}


def timed(
    samples: Sequence[CachedSample], spec: CacheSpec, *, twice: bool
) -> tuple[float, list[EncodedRow]]:
    """Processor seconds of encoding the samples, and their rows."""
    start = time.process_time()
    if twice:
        for each in samples:
            output_columns(each.output, spec)
    rows = list(encode_rows(samples, spec))
    return time.process_time() - start, rows


def sharing(first: CachedSample, number: int) -> CachedSample:
    """A further sample with the image and the vision record of `first`."""
    question = Message(role="user", text=f"And {number}?")
    messages = [*first.sample.messages, question, Message(role="assistant", text="Yes.")]
    return CachedSample(
        sample=make_sample(f"{first.sample.source_id}-{number}", first.sample.images, messages),
        output=dataclasses.replace(first.output, shared_from=first.sample.key),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    alone = make_samples(options.samples, 64)
    shared = [each for one in alone for each in (one, sharing(one, 1), sharing(one, 2))]
    table: list[list[str]] = []
    for (name, changes), samples in product(SETTINGS.items(), (alone, shared)):
        size = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "sketch_rank": SKETCH_RANK}
        spec = make_spec("topk+sketch", top_k=64, **size, **changes)
        pairs = [
            (timed(samples, spec, twice=True), timed(samples, spec, twice=False))
            for _ in range(options.rounds)
        ]
        assert all(a[1] == b[1] for a, b in pairs)
        a, b = (1000 * min(pair[side][0] for pair in pairs) / len(samples) for side in (0, 1))
        vision = "shared" if samples is shared else "own"
        table.append([name, vision, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}"])
    print_table(["numbers", "vision record", "A ms/sample", "B ms/sample", "B / A"], table)


if __name__ == "__main__":
    main()
