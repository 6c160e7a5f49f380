"""Which parts of a student are trained."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = Literal["vision_tower", "projector", "language_model"]


PARTS: tuple[Part, ...] = ("vision_tower", "projector", "language_model")


PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.", "model.visual.", "model.vision_model."),
    "projector": (
        "model.multi_modal_projector.",
        "model.image_newline",
        "model.visual.merger.",
        "model.connector.",
    ),
    "language_model": ("model.language_model.", "model.text_model.", "lm_head."),
}
"""Parameter names that begin so belong to the part, the longest beginning counts: LLaVA's family
and InternVL; Qwen-VL, whose merger is the projector; Idefics3. A newline embedding is the
projector's."""


def set_trainable(model: "PreTrainedModel", parts: Collection[Part]) -> dict[Part, int]:
    """Train the named parts and freeze all others; return each part's number of trained weights.

    A head that is tied to the input embeddings is counted once. Raises `ValueError` when no part
    is named and for models with parameters that belong to no part.
    """
    if not parts:
        raise ValueError(f"nothing to train; name at least one of {', '.join(PARTS)}")
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        owner = _owner(name)
        if owner is None:
            raise ValueError(
                f"parameter {name} of {type(model).__name__} belongs to none of the parts "
                f"{', '.join(PARTS)}; models whose parameters begin otherwise cannot be trained"
            )
        parameter.requires_grad_(owner in parts)
        counts[owner] += parameter.numel() if owner in parts else 0
    return counts


def _owner(name: str) -> Part | None:
    """The part that a parameter belongs to, by the longest beginning of its name that is known."""
    begins: dict[str, Part] = {
        begin: part for part in PARTS for begin in PART_PREFIXES[part] if name.startswith(begin)
    }
    return begins[max(begins, key=len)] if begins else None
