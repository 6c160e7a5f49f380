"""Makes vision states and heads that are as hard to match as real ones, the same everywhere.

A head's rows belong to 3,000 clusters of tokens, with heavy-tailed norms and a bias that falls with
a token's rank; the student's head shares 80 % of the teacher's. States are fields over the
teacher's grid (smooth background, an object, noise); the spread along their axes falls as a power
of the rank. The student sees them pooled to its own grid, with noise of its own. Teacher logits
have about 1.5 nats of entropy at V = 151,936, and about 2 % of their mass outside the top 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from student_train.head.linear_head import LinearHead
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import HiddenSignal, TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis, encode_sketch, fit_basis
from teacher_cache.records.top_k import top_k_from_hidden

WIDTH, NUM_CLUSTERS, NUM_IMAGES = 512, 3000, 8
SPREAD, NOISE, SHARPNESS = 0.4, 0.35, 2.8
"""Axis j of the states spreads as j to the minus SPREAD: the smaller, the more a sketch loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Two heads, the axes of their states, and the sketch basis fitted to other images."""

    student_head: LmHead
    teacher_head: LmHead
    axes: Tensor
    basis: SketchBasis

    @classmethod
    def make(cls, vocab_size: int, rank: int) -> "Models":
        """Heads over `vocab_size` rows, and a basis of `rank` directions."""
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        cluster = torch.randint(NUM_CLUSTERS, (vocab_size,), generator=generator)
        rows = (
            normal(NUM_CLUSTERS, WIDTH)[cluster]
            .mul_(0.75)
            .add_(normal(vocab_size, WIDTH), alpha=0.66)
        )
        norm = (0.35 * normal(vocab_size, 1)).exp_() / WIDTH**0.5
        rank_of = torch.randperm(vocab_size, generator=generator) + 1.0
        bias = -0.5 * rank_of.log()
        teacher = LmHead(weight=rows * norm, bias=bias)
        private = normal(vocab_size, WIDTH).mul_(0.6).add_(rows, alpha=0.8)
        axes = torch.linalg.qr(normal(WIDTH, WIDTH)).Q * torch.arange(1, WIDTH + 1) ** -SPREAD
        axes *= SHARPNESS * WIDTH**0.5 / axes.norm()
        states = torch.cat([field(axes, 27, 27, seed) for seed in range(100, 100 + NUM_IMAGES)])
        return cls(
            student_head=LmHead(weight=private * norm, bias=bias),
            teacher_head=teacher,
            axes=axes,
            basis=fit_basis(states, teacher, rank),
        )

    def cut(self, rank: int) -> SketchBasis:
        """The first directions of the basis."""
        return SketchBasis(
            hidden_mean=self.basis.hidden_mean,
            projection=self.basis.projection[:, :rank].contiguous(),
            mean_logits=self.basis.mean_logits,
            directions=self.basis.directions[:, :rank].contiguous(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One view: the student's states and head, and the teacher's signal of each tier."""

    student_hidden: Tensor
    student_head: LinearHead
    hidden: HiddenSignal
    top_ks: dict[int, TopKSignal]
    sketches: dict[int, TopKSignal]

    @classmethod
    def make(
        cls,
        models: Models,
        student_grid: tuple[int, int],
        teacher_grid: tuple[int, int],
        top_ks: Sequence[int],
        ranks: Sequence[int],
        image: int = 0,
    ) -> "Problem":
        """A view of an image that the basis was not fitted to."""
        states = field(models.axes, *teacher_grid, seed=200 + 2 * image)
        grid = states.T.reshape(1, WIDTH, *teacher_grid)
        pooled = functional.adaptive_avg_pool2d(grid, student_grid)[0].flatten(1).T
        own = field(models.axes, *student_grid, seed=201 + 2 * image, noise=1.0, smooth=0.0)
        records = {k: top_k_from_hidden(states, models.teacher_head, k) for k in top_ks}
        bare = {k: TopKSignal(record=record) for k, record in records.items()}
        first = next(iter(records))
        sketches: dict[int, TopKSignal] = {}
        for rank in ranks:
            basis = models.cut(rank)
            code = encode_sketch(basis, states, records[first])
            sketch = SketchCode(
                codes=code.codes, scale=code.scale, tail_shift=code.tail_shift, basis=basis
            )
            sketches[rank] = replace(bare[first], sketch=sketch)
        head = models.student_head
        return cls(
            student_hidden=pooled + 0.3 * own,
            student_head=LinearHead(weight=head.weight, bias=head.bias),
            hidden=HiddenSignal(hidden=states, head=models.teacher_head),
            top_ks=bare,
            sketches=sketches,
        )

    @property
    def student_logits(self) -> Tensor:
        """All student logits, computed now."""
        return self.student_head(self.student_hidden)


def field(
    axes: Tensor, rows: int, cols: int, seed: int, noise: float = NOISE, smooth: float = 1.0
) -> Tensor:
    """States [rows * cols, WIDTH] over a grid: smooth background, an object, noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, WIDTH, 7, 7, generator=generator)
    background = functional.interpolate(coarse, (rows, cols), mode="bicubic", align_corners=True)
    down, right = torch.meshgrid(
        torch.linspace(-1, 1, rows), torch.linspace(-1, 1, cols), indexing="ij"
    )
    middle = torch.rand(2, generator=generator) - 0.5
    inside = ((down - middle[0]) ** 2 + (right - middle[1]) ** 2 < 0.2).float()
    thing = torch.randn(WIDTH, 1, 1, generator=generator)
    grain = torch.randn(WIDTH, rows, cols, generator=generator)
    values = smooth * (background[0] * (1 - 0.7 * inside) + thing * inside) + noise * grain
    return values.flatten(1).T @ axes.T
