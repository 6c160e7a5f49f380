"""Refuses flags and values that earlier versions had, with what to do instead."""

from collections.abc import Sequence

REMOVED = {
    "--top-mass": "is now --top-p; rename it",
    "--top-k-floor": "is now --min-k; rename it",
    "--match-solver": "was removed: SciPy solves every assignment (linear_sum_assignment); omit it",
    "--tail uniform": "was removed: it biases the gradients; omit it, or give --tail bucket",
    "--tail mean_logit": "was removed: it biases the gradients; omit it, or give --tail bucket",
    "--match-metric raw_l2": "was removed; omit it for raw_l1, the metric of the paper",
}
"""A flag, or a flag and its value -> why it is refused."""

RENAMED_FIELDS = {
    "top_mass": "settings.top_p",
    "top_k_floor": "settings.min_k",
    "compressor": "settings.grid.compressor",
    "ratios": "settings.grid.ratios",
    "compress_layer": "settings.grid.layer",
    "compress_text": "settings.grid.text",
    "compress_seed": "settings.grid.seed",
}
"""A field of an earlier version's build settings -> its name today."""


def refuse_removed(arguments: Sequence[str]) -> None:
    """Raise ValueError for the first argument that an earlier version took."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        name = flag.replace("_", "-")
        for given in (name, f"{name} {value}"):
            if given in REMOVED:
                raise ValueError(f"{given} {REMOVED[given]}")
