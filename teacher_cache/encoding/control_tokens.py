"""Finds the control tokens of a tokenizer, and messages that spell them.

A control token is an added token that structures a conversation or stands for an image or video: a
special token, one that the chat template writes, or one that the processor names. A tokenizer reads
its spelling as the token wherever it stands, also inside a message. Such a message is refused: the
model would see a turn end, or an image, that is not there.
"""

import re
from collections.abc import Iterable
from typing import Any

GROUNDING_TOKENS = frozenset(
    {f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")}
    | {f"<{slash}{name}>" for name in ("ref", "box", "quad") for slash in ("", "/")}
)
"""Special tokens of Qwen-VL and InternVL that answers about places consist of: ordinary content."""

_TILE = re.compile(r"<row_\d+_col_\d+>")


class ControlTokens:
    """The control tokens of one processor; `written` is text that its chat template writes."""

    def __init__(self, processor: Any, written: str) -> None:
        tokenizer = processor.tokenizer
        named = {
            value
            for name, value in vars(processor).items()
            if name.endswith(("_token", "_tag")) and isinstance(value, str)
        }
        found: dict[str, int] = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or token.content in named
            or _TILE.fullmatch(token.content)
            or (token.content.strip() and token.content in written)
        }
        found |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids = frozenset(found.values())
        self._any = _alternatives(found)
        self._spelled = _alternatives(
            token
            for token, index in found.items()
            if token not in GROUNDING_TOKENS and _as_text(tokenizer, token) != [index]
        )

    def first_in(self, text: str) -> str | None:
        """The first control token in a text that the template writes."""
        found = self._any.search(text)
        return None if found is None else found[0]

    def require_plain(self, role: str, text: str) -> None:
        """Raise ValueError where the text of a message spells a control token."""
        found = self._spelled.search(text)
        if found is not None:
            raise ValueError(
                f"the {role}'s text spells the control token {found[0]!r} at character "
                f"{found.start()}, which the tokenizer would read as control; change the text or "
                "leave the sample out"
            )


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _as_text(tokenizer: Any, token: str) -> list[int]:
    """The ids of a token's spelling where no added token is looked for."""
    backend = tokenizer.backend_tokenizer
    text = token if backend.normalizer is None else backend.normalizer.normalize_str(token)
    words = [(text, (0, len(text)))]
    if backend.pre_tokenizer is not None:
        words = backend.pre_tokenizer.pre_tokenize_str(text)
    return [piece.id for word, _ in words for piece in backend.model.tokenize(word)]
