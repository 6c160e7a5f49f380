"""Refuses teachers whose logits are not their LM head applied to their final states."""

from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.records.lm_head import LmHead


def shared_head(model: Any, tokenizer: Any) -> LmHead:
    """The model's LM head, cut to the rows that its tokenizer has ids for."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has {type(head).__name__} for an LM head, expected one "
            "linear layer; its logits cannot be rebuilt from hidden states"
        )
    num_rows = min(len(head.weight), 1 + max(tokenizer.get_vocab().values()))
    bias: Any = head.bias  # declared a Parameter, None where the layer has no bias
    return LmHead(
        weight=head.weight.detach()[:num_rows],
        bias=None if bias is None else bias.detach()[:num_rows],
    )


def require_plain_head(model: Any, tokenizer: Any) -> None:
    """Run a few text tokens; ValueError unless the logits are head(last hidden state).

    Compares the head's input with the backbone's output, and the head's output with the model's
    logits, to the bit: a soft-cap hardly changes small logits.
    """
    head = model.get_output_embeddings()
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    ids = tokenizer("1 2 3", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hook = head.register_forward_hook(remember)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
            hidden = model.model(**inputs).last_hidden_state
    finally:
        hook.remove()
    entered, left = seen[0] if len(seen) == 1 else (torch.zeros(0), torch.zeros(0))
    if not torch.equal(left.to(logits.dtype), logits) or not torch.equal(entered, hidden):
        raise ValueError(
            f"the logits of {type(model).__name__} are not its LM head applied to the last hidden "
            "state (a scaled or soft-capped head?); such teachers are not supported"
        )
