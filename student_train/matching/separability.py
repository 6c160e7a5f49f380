"""What costs say of any matching drawn from them: whether they tell tokens apart at all.

Costs are row + column + interaction, and only the interaction decides who is matched with whom.
Promise: computed in float64, without gradient, for each problem apart; inputs untouched. Dimensions
as in schema.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_SEPARABILITY = 0.1
"""Below this a matching says little of which token is like which (measured: docs/method.md)."""


@torch.no_grad()
def separability(cost: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    """Standard deviation of the interaction over that of the costs; 1 where these are constant."""
    wide = cost.to(torch.float64)
    by_row = wide.mean(dim=-1, keepdim=True)
    interaction = wide - by_row
    by_column = interaction.mean(dim=-2, keepdim=True)
    interaction -= by_column
    # The three parts are orthogonal, so that their mean squares add up to that of the whole.
    apart = interaction.square_().mean(dim=(-2, -1))
    by_row -= by_row.mean(dim=-2, keepdim=True)
    spread = apart + by_row.square_().mean(dim=(-2, -1)) + by_column.square_().mean(dim=(-2, -1))
    return torch.where(spread > 0, apart / spread, 1.0).sqrt()


@torch.no_grad()
def hubness(cost: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    """Number of distinct row minima over the number of rows."""
    nearest = cost.argmin(dim=-1)
    is_nearest = torch.zeros_like(cost[..., 0, :]).scatter_(-1, nearest, 1.0)
    return is_nearest.sum(dim=-1, dtype=torch.float64) / cost.shape[-2]
