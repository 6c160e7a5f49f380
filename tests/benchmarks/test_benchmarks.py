"""What the benchmarks compare is equal: every container gives back what was put into it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cache.containers import Container, containers, decode, fields
from benchmarks.cache.distillkit_codec import pack, unpack
from benchmarks.synthetic.cached_samples import PARTS, VOCAB_SIZE, make_samples, tensors
from teacher_cache.schema.teacher_output import CachedSample
from tests.support.strategies import assert_same_bits

K = 32


@pytest.fixture(scope="module")
def samples() -> list[CachedSample]:
    return make_samples(2, K, picture_kb=1, grids=(8, 4))


def arrays(row: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a container's row holds, whatever else its reader puts beside the arrays."""
    return {
        name.removesuffix(".npy"): (value.dtype.str, value.shape, value.tobytes())
        for name, value in row.items()
        if isinstance(value, np.ndarray)
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's files
@pytest.mark.parametrize("container", containers(), ids=lambda each: each.name)
def test_every_container_gives_back_what_was_put_into_it(
    container: Container, samples: list[CachedSample], tmp_path: Path
) -> None:
    if container.missing is not None:
        pytest.skip(container.missing)
    container.write(tmp_path / "stored", samples)
    opened = container.open(tmp_path / "stored")
    for row, sample in zip(container.stream(opened, len(samples)), samples, strict=True):
        if isinstance(row, CachedSample):
            assert row.sample == sample.sample
            for name, values in tensors(row).items():
                assert_same_bits(values, tensors(sample)[name])
        else:
            assert arrays(row) == arrays(decode(fields(sample)))


def test_the_tensors_of_peers_are_all_that_em_kd_reads(samples: list[CachedSample]) -> None:
    assert {name[0] for name in tensors(samples[0])} >= {part[0] for part in PARTS}


def test_the_loop_over_tokens_gives_the_ids_exactly_and_the_values_about(
    samples: list[CachedSample],
) -> None:
    record = samples[0].output.vision
    assert record is not None
    log_probs = record.logits.float() - record.logsumexp[:, None]
    packed = pack(record.ids, log_probs, VOCAB_SIZE)
    ids, values = unpack(packed, K, VOCAB_SIZE)
    assert torch.equal(ids, record.ids.long())
    assert len(packed[0]) == K * 18 // 8 + 2 * 16 + 4 * 5
    assert float((values - log_probs).abs().mean()) < 0.1
