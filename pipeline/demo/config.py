"""The settings of the demo's handwritten digits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.checks import at_least_one
from teacher_cache.schema.strict_json import StrictRecord

DigitQuestions = Literal["cells", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsConfig(StrictRecord):
    """Write the demo's data: grids of scikit-learn's handwritten digits, as LLaVA JSON."""

    out: Path
    num_train: int = 4096
    """Training samples."""
    num_heldout: int = 512
    """Held-out samples."""
    questions: DigitQuestions = "cells"
    """Eight cells named after the image, or one row named before it (as emkd demo --epic)."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "num_train", "num_heldout")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, found {self.seed}")
