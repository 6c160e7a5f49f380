"""Computes the affinity between text and vision tokens, for the teacher and for the student."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def cosine_affinity(
    text: Float[Tensor, "*B X D"], vision: Float[Tensor, "*B M D"]
) -> Float[Tensor, "*B X M"]:
    """Cosine of every text token's last hidden state with every vision token's (EM-KD, VLAD).

    Leading dimensions (padded samples) must be equal. Computed in float32, for float64 states in
    float64; a zero state has affinity 0 with everything. Gradients flow to both arguments.
    """
    dtype = torch.promote_types(text.dtype, torch.float32)
    unit_text = functional.normalize(text.to(dtype), dim=-1)
    unit_vision = functional.normalize(vision.to(dtype), dim=-1)
    return unit_text @ unit_vision.mT
