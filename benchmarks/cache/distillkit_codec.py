"""Encodes and decodes as text distillation tools do: the reference for "token by token".

Written from the description of such codecs, not from anyone's code. For each token: ids packed to
ceil(log2 V) bits, the first log-probabilities as bfloat16, the rest as coefficients of a polynomial
over the rank; together one list of bytes in a Parquet column list<list<uint8>>, which `datasets`
returns as Python integers. Decoding is a Python loop over tokens with a few torch calls for each;
the loop dominates the cost. Lossy, like the originals.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_EXACT, DEGREE = 16, 4

Packed = list[int]
"""The bytes of one token."""


def pack(ids: Int[Tensor, "N K"], log_probs: Float[Tensor, "N K"], vocab_size: int) -> list[Packed]:
    """Encode tokens; `log_probs` descend."""
    num_bits, k = _num_bits(vocab_size), ids.shape[1]
    bits = (ids.long()[:, :, None] >> torch.arange(num_bits)) & 1
    bits = torch.nn.functional.pad(bits.flatten(1), (0, -k * num_bits % 8))
    packed = (bits.unflatten(1, (-1, 8)) << torch.arange(8)).sum(dim=2).to(torch.uint8)
    exact = log_probs[:, :NUM_EXACT].bfloat16()
    rest = log_probs[:, NUM_EXACT:].double()
    curve = torch.linalg.lstsq(_powers(k), rest.T).solution.T.float()
    parts = (packed, exact.view(torch.uint8), curve.contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1).tolist()


def unpack(
    tokens: Sequence[Packed], k: int, vocab_size: int
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Decode tokens one after the other; ids are exact, log-probabilities approximate."""
    num_bits, powers = _num_bits(vocab_size), _powers(k).float()
    sizes = (-(-k * num_bits // 8), 2 * NUM_EXACT, 4 * (DEGREE + 1))
    in_byte, in_id = torch.arange(8), torch.arange(num_bits)
    all_ids: list[Tensor] = []
    all_values: list[Tensor] = []
    for token in tokens:
        packed, exact, curve = torch.tensor(token, dtype=torch.uint8).split(sizes)
        bits = ((packed[:, None] >> in_byte) & 1).flatten()[: k * num_bits]
        all_ids.append((bits.view(k, num_bits).long() << in_id).sum(dim=1))
        head = exact.clone().view(torch.bfloat16).float()
        all_values.append(torch.cat([head, powers @ curve.clone().view(torch.float32)]))
    return torch.stack(all_ids), torch.stack(all_values)


def _num_bits(vocab_size: int) -> int:
    return math.ceil(math.log2(vocab_size))


def _powers(k: int) -> Float[Tensor, "rest terms"]:
    """Powers 0 to `DEGREE` of the rank, from 0 to 1, of the entries that the curve approximates."""
    rank = torch.linspace(0, 1, k - NUM_EXACT, dtype=torch.float64)
    return rank[:, None] ** torch.arange(DEGREE + 1)
