"""Selects which parts of a student are trained."""

from collections.abc import Collection

from torch import nn

from student_train.config.recipe import TrainPart

PART_PREFIXES: dict[TrainPart, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.", "model.visual.", "model.vision_model."),
    "projector": (
        "model.multi_modal_projector.",
        "model.image_newline",
        "model.visual.merger.",
        "model.connector.",
    ),
    "language_model": ("model.language_model.", "model.text_model.", "lm_head."),
}
"""Name prefixes of each part's parameters; the longest one that fits decides. They cover LLaVA's
family, InternVL, Qwen-VL (its merger is the projector) and Idefics3. A newline embedding belongs to
the projector."""
_PART_OF: dict[str, TrainPart] = {
    prefix: part for part, prefixes in PART_PREFIXES.items() for prefix in prefixes
}


def set_trainable(model: nn.Module, parts: Collection[TrainPart]) -> dict[TrainPart, int]:
    """Train the named parts and freeze the others; return each part's number of trained weights.

    A head tied to the input embeddings counts once. ValueError for no part, and for models with
    parameters that belong to no part.
    """
    if not parts:
        raise ValueError(f"nothing to train; name at least one of {', '.join(PART_PREFIXES)}")
    counts: dict[TrainPart, int] = dict.fromkeys(PART_PREFIXES, 0)
    for name, parameter in model.named_parameters():
        known = [prefix for prefix in _PART_OF if name.startswith(prefix)]
        if not known:
            raise ValueError(
                f"parameter {name} of {type(model).__name__} belongs to none of the parts "
                f"{', '.join(PART_PREFIXES)}; add its prefix to PART_PREFIXES"
            )
        owner = _PART_OF[max(known, key=len)]
        parameter.requires_grad_(owner in parts)
        counts[owner] += parameter.numel() if owner in parts else 0
    return counts
