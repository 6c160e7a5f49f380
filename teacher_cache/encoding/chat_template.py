"""Renders conversations with a processor's chat template, under the text rules of a cache.

On construction it renders two short conversations with markers and finds out in which form the
template reads each role's message (a list of parts, or a plain string), and with which token it
ends an assistant turn. Where it ends none, the tokenizer's end-of-sequence token is appended.
Templates with a thinking mode are rendered without thinking, and a template that writes the date
gets a fixed one: a cache must not depend on the day of its build. Refuses templates that show a
text in neither form.
"""

import dataclasses
import json
import logging
import re
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from teacher_cache.encoding.chat_rendering import (
    Rendering,
    Skeletons,
    Turn,
    append_to_turns,
    locate,
    marked,
    split_at_markers,
    texts_of,
)
from teacher_cache.encoding.control_tokens import ControlTokens
from teacher_cache.schema.options import TextRules
from teacher_cache.schema.regular_file import require_regular

logger = logging.getLogger(__name__)

FIXED_DATE = "26 Jul 2024"
"""What templates get for today's date: the default of Llama's templates."""

_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_DATE = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}{{ '' }}"
_ANSWER = Turn(role="assistant", content=[Turn(type="text", text="b")])
_ASK = Turn(role="user", content=[Turn(type="text", text="a")])
_SYSTEM = Turn(role="system", content=[Turn(type="text", text="s")])


class ChatTemplate:
    """The chat template of one processor.

    A template in `rules` replaces the processor's own, in the processor too, so that a saved model
    has it. ValueError without any template, and for one that drops, repeats or rewrites texts.
    """

    def __init__(self, processor: Any, rules: TextRules) -> None:
        if rules.template is not None:
            processor.chat_template = rules.template
        if not processor.chat_template:
            raise ValueError(
                f"the {type(processor).__name__} has no chat template; add chat_template.jinja "
                "to the model's folder, or give one with --chat-template FILE"
            )
        self._processor = processor
        self._is_earlier = rules.version == 1
        self._skeletons: Skeletons = {}
        self._as_string: frozenset[str] = frozenset()
        self._source = _text(processor.chat_template)
        self._marks = _MARKS.search(self._source) is not None
        self._variables = {} if self._is_earlier else _variables(self._source)
        self.controls = ControlTokens(processor, "")
        self.end_of_turn: str | None = None
        """The control token that ends an assistant turn, appended or the template's own."""
        appended: str | None = None
        if not self._is_earlier:
            self._as_string = self._find_forms()
            appended = self._find_end(rules.append_eos)
        self.appended = appended
        """The token that is appended to turns without an end; None: none is."""
        self.rules = dataclasses.replace(rules, append_eos=appended is not None)

    def locate(self, turns: list[Turn], add_generation_prompt: bool) -> Rendering:
        """Render turns and find their texts, with the end of every assistant turn."""
        if self._is_earlier:
            return locate(turns, self.render, add_generation_prompt, self._skeletons)
        self._require_usable(turns)
        found = locate(
            turns,
            self.render,
            add_generation_prompt,
            self._skeletons,
            self._find_marks if self._marks else None,
            self.end_of_turn,
        )
        return found if self.appended is None else append_to_turns(found, self.appended, self._ends)

    def render(self, turns: list[Turn], add_generation_prompt: bool) -> str:
        """The text of a conversation; ValueError where the template refuses it."""
        try:
            return self._processor.apply_chat_template(
                [self._in_form(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except ValueError:
            raise
        except Exception as error:  # a template's own raise_exception, and jinja's errors
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _in_form(self, turn: Turn) -> Turn:
        """The turn as the template reads its role: unchanged, or with its text as a string."""
        if turn["role"] not in self._as_string:
            return turn
        if any(part["type"] != "text" for part in turn["content"]):
            raise ValueError(
                f"the chat template reads the {turn['role']}'s message as one string and has no "
                "place for images; give a template that writes them with --chat-template FILE"
            )
        return {"role": turn["role"], "content": "".join(texts_of([turn]))}

    def _find_marks(self, turns: list[Turn]) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        found: Any = render_jinja_template(
            conversations=[[self._in_form(turn) for turn in turns]],
            return_assistant_tokens_mask=True,
            **{**self._processor.tokenizer.special_tokens_map, **self._variables},
        )
        return found[1][0]

    def _find_forms(self) -> frozenset[str]:
        """The roles whose message the template reads as a plain string."""
        why = ""
        for count in range(3):
            for roles in combinations(("assistant", "user"), count):
                why = self._why_not(frozenset(roles), [_ASK, _ANSWER])
                if not why:
                    both = frozenset({*roles, "system"})
                    turns = [_SYSTEM, _ASK, _ANSWER]
                    needs = self._why_not(frozenset(roles), turns)
                    return both if needs and not self._why_not(both, turns) else frozenset(roles)
        raise ValueError(f"the chat template cannot be used: {why}")

    def _why_not(self, as_string: frozenset[str], turns: list[Turn]) -> str:
        """Why these forms hide a text; empty where each appears once."""
        self._as_string = as_string
        try:
            split_at_markers(self.render(marked(turns), False), len(turns))
        except ValueError as error:
            return str(error)
        return ""

    def _find_end(self, append_eos: bool) -> str | None:
        """Find how the template ends an assistant turn; the token to append where it does not."""
        turns = [_ASK, _ANSWER, _ASK, _ANSWER]
        try:
            found = locate(turns, self.render)
        except ValueError:  # a template for conversations of one turn; others it refuses itself
            turns = [_ASK, _ANSWER]
            found = locate(turns, self.render)
        pieces = split_at_markers(self.render(marked(turns), False), len(turns))
        self.controls = ControlTokens(self._processor, "\0".join(pieces))
        ends = [
            self.controls.first_in(found.text[turn.text_end : turn.turn_end])
            for turn in found.responses
        ]
        self.end_of_turn = ends[-1] or ends[0]
        eos: str | None = self._processor.tokenizer.eos_token
        if all(ends) or not append_eos:
            return None
        if eos is None:
            say_once(
                "the chat template does not end every assistant turn and the tokenizer has no "
                "end-of-sequence token to append: a student does not learn to stop there; give a "
                "template that ends turns with --chat-template FILE"
            )
            return None
        self.end_of_turn = self.end_of_turn or eos
        say_once(
            f"the chat template does not end every assistant turn: {eos} is appended to those that "
            "it leaves open, so that a student learns to stop (--no-append-eos leaves it out)"
        )
        return eos

    def _ends(self, text: str) -> bool:
        return self.controls.first_in(text) is not None

    def _require_usable(self, turns: list[Turn]) -> None:
        """Raise ValueError for empty messages, and for texts that spell a control token."""
        for index, turn in enumerate(turns):
            for text in texts_of([turn]):
                self.controls.require_plain(turn["role"], text)
            says = any(part["type"] != "text" or part["text"].strip() for part in turn["content"])
            if not says and turn["role"] != "system":
                name = "answer" if turn["role"] == "assistant" else "question"
                raise ValueError(
                    f"the {name} in message {index} is empty; fill it in or leave the sample out"
                )


def text_rules(append_eos: bool, chat_template: Path | None) -> TextRules:
    """Today's rules with the template of a file: Jinja, or the chat_template.json of checkpoints.

    ValueError for a file that cannot be read.
    """
    if chat_template is None:
        return TextRules(append_eos=append_eos)
    try:
        require_regular(chat_template)
        template = chat_template.read_text(encoding="utf-8")
        if chat_template.suffix == ".json":
            template = json.loads(template)["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{chat_template} cannot be read as a chat template: {error!r}; give a Jinja file, or "
            "a JSON file with the entry chat_template"
        ) from error
    return TextRules(append_eos=append_eos, template=template)


def _text(template: Any) -> str:
    """The template's text; of several named ones, the one that transformers takes."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(
            f"the processor has the chat templates {', '.join(sorted(template))} and none named "
            "default; give one with --chat-template FILE"
        )
    return template["default"]


@cache
def say_once(message: str) -> None:
    """Log a message the first time that this process has it."""
    logger.warning(message)


def _variables(source: str) -> dict[str, Any]:
    """The template, and what it is rendered with besides the conversation."""
    thinking = {"enable_thinking": False} if "enable_thinking" in source else {}
    return {**thinking, "chat_template": (_DATE if "strftime_now" in source else "") + source}
