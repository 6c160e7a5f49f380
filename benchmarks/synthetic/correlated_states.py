"""Makes logits whose neighbouring rows are correlated, like those of image patches."""

import torch
from torch import Tensor

from teacher_cache.records.top_k import top_k_record

VOCAB_SIZE, NUM_USED = 151_936, 24_576


GRID, CELL, WIDTH = 24, 4, 32


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def states(seed: int, correlated: bool, grid: int = GRID) -> Tensor:
    """[M, D] states of one image: random vectors on a coarse lattice, interpolated, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(grid, grid, WIDTH, generator=generator)
    if not correlated:
        return noise.reshape(-1, WIDTH)
    side = grid // CELL + 1
    coarse = torch.randn(1, WIDTH, side, side, generator=generator)
    smooth = torch.nn.functional.interpolate(
        coarse, size=(grid, grid), mode="bilinear", align_corners=True
    )
    field = smooth[0].permute(1, 2, 0) + 0.22 * noise
    return (field / field.square().mean().sqrt()).reshape(-1, WIDTH)


def made_up_logits(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [M, NUM_USED] of states, and the vocabulary rows in use; all others are -inf."""
    generator = torch.Generator().manual_seed(20)
    head = torch.randn(WIDTH, NUM_USED, generator=generator) * 4.3 / WIDTH**0.5
    bias = torch.randn(NUM_USED, generator=generator) * 1.5
    used = torch.randperm(VOCAB_SIZE, generator=generator)[:NUM_USED].sort().values
    return hidden @ head + bias, used


def columns(hidden: Tensor, dtype: torch.dtype, k: int) -> dict[str, Tensor]:
    """The vision columns of an image whose logits were computed in `dtype`."""
    logits, used = made_up_logits(hidden)
    record = top_k_record(logits.to(dtype), k)
    return {
        "v_ids": used[record.ids.long()].to(torch.int32),
        "v_logits": record.logits,
        "v_lse": record.logsumexp,
        "v_tail": record.log_tail,
    }
