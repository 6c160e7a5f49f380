"""Says where the vision tokens of a view lie, and which teacher tokens are in a student's window.

Both models show the same view: its height and width are 1, and a token of a grid lies in the centre
of its cell. So grids of any two shapes compare. No gradient, CPU only.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from teacher_cache.schema.samples import ViewGrid

_ROUNDING = 1e-9


class TokenPlaces(NamedTuple):
    """How the places of n student tokens and m teacher tokens of one view relate."""

    distance: Float[Tensor, "n m"]
    """Between their centres, in heights and widths of the view; float64."""
    inside: Bool[Tensor, "n m"]
    """Whether the teacher token is in the student token's window: its centre lies in the student
    token's cell (borders count), or, where none does, it is one of the nearest."""

    def of_students(self, rows: Int[Tensor, " k"]) -> "TokenPlaces":
        """The same for some of the student tokens."""
        return TokenPlaces(self.distance[rows], self.inside[rows])


def view_geometry(student: ViewGrid, teacher: ViewGrid) -> TokenPlaces:
    """The geometry of one view under the grids of both models."""
    return _geometry((student.rows, student.cols), (teacher.rows, teacher.cols))


@lru_cache(maxsize=16)  # 7 MB each at 576 x 2,304 tokens
def _geometry(student: tuple[int, int], teacher: tuple[int, int]) -> TokenPlaces:
    apart_nm2 = _centres(*student)[:, None] - _centres(*teacher)
    distance_nm = apart_nm2.square().sum(dim=2).sqrt()
    half_cell_2 = 0.5 / torch.tensor(student, dtype=torch.float64)
    in_cell_nm = (apart_nm2.abs() <= half_cell_2 + _ROUNDING).all(dim=2)
    nearest_n1 = distance_nm.min(dim=1, keepdim=True).values
    is_empty_n1 = ~in_cell_nm.any(dim=1, keepdim=True)
    return TokenPlaces(
        distance_nm, in_cell_nm | is_empty_n1 & (distance_nm <= nearest_n1 + _ROUNDING)
    )


def _centres(rows: int, cols: int) -> Float[Tensor, "_ 2"]:
    """The centre of each cell, row by row."""
    down = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    across = (torch.arange(cols, dtype=torch.float64) + 0.5) / cols
    return torch.cartesian_prod(down, across)
