"""Affinity between text and vision tokens: the one function that both sides of VLAD use.

The teacher's matrix is stored (or recomputed from stored states), the student's is computed while
it trains; a difference between them must never come from two ways of computing a cosine.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def cosine_affinity(
    text: Float[Tensor, "*B X D"], vision: Float[Tensor, "*B M D"]
) -> Float[Tensor, "*B X M"]:
    """Cosine of every text token's last hidden state with every vision token's (EM-KD, VLAD).

    Leading dimensions, of samples that are filled up to one size, are the same on both sides.
    Computed in float32 (float64 for float64 states); a zero state has affinity 0 with everything.
    Gradients flow to both arguments.
    """
    dtype = torch.promote_types(text.dtype, torch.float32)
    unit_text = functional.normalize(text.to(dtype), dim=-1)
    unit_vision = functional.normalize(vision.to(dtype), dim=-1)
    return unit_text @ unit_vision.mT
