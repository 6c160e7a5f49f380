"""Computes a student's final hidden states, and finds its output head."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn


def final_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "B L D"]:
    """Run the model and return the states that enter its head, after the final norm.

    Goes through `forward`, as wrappers such as DistributedDataParallel need. Only the last hidden
    states are kept. Logits are computed at one position and dropped.
    """
    output = model(
        **inputs, output_hidden_states=[-1], logits_to_keep=1, use_cache=False, return_dict=True
    )
    return output.hidden_states[-1]


def output_head(model: nn.Module) -> nn.Module:
    """Return the language-model head of a model, which may be wrapped (DDP) or compiled."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False).get_output_embeddings()
