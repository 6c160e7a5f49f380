"""Shows tokens as texts, alone or with their probabilities; plain data, ready for JSON."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


def token_texts(tokenizer: Any, ids: Int[Tensor, " N"]) -> list[Any]:
    """Each token's text; pieces of characters as the tokenizer spells them; ids without one."""
    if tokenizer is None:
        return ids.tolist()
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    return [
        tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text
        for token, text in zip(ids.tolist(), texts, strict=True)
    ]


def texts_with_shares(
    tokenizer: Any, ids: Int[Tensor, " N"], probabilities: Float[Tensor, " N"]
) -> list[list[Any]]:
    """[text, probability] of each token."""
    shares = [round(value, 4) for value in probabilities.tolist()]
    return [list(pair) for pair in zip(token_texts(tokenizer, ids), shares, strict=True)]
