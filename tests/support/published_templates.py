"""Chat templates that behave as those of published checkpoints, written anew, with tokenizers.

Each entry says which checkpoints it stands for. What is kept of the originals is what they write:
control strings, white space, the order of images and texts, default system messages, and their
`{% generation %}` marks. The tokenizers are tiny, but cut white space as the real ones do.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.support.lazy import (
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

_CORPUS = (
    "what? a dog. why? 5 legs be short user assistant system User: Assistant: USER: ASSISTANT: "
    "x \ny x \ny a\n\nb a\n\nb a\n\n\nb a\n\n\nb You are a helpful assistant. Answer the questions."
)


def _images(written: str) -> str:
    return "{% for p in m.content if p.type == 'image' %}" + written + "{% endfor %}"


def _texts(written: str) -> str:
    return "{% for p in m.content if p.type == 'text' %}" + written + "{% endfor %}"


def _each(written: str, image: str) -> str:
    return (
        "{% for p in m.content %}{% if p.type == 'image' %}" + image + "{% else %}" + written + ""
        "{% endif %}{% endfor %}"
    )


def _or_string(parts: str) -> str:
    return "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"


def _learnt(body: str) -> str:
    return (
        "{% if m.role == 'assistant' %}{% generation %}" + body + "{% endgeneration %}"
        "{% else %}" + body + "{% endif %}"
    )


def _loop(body: str, prompt: str, opening: str = "") -> str:
    return (
        opening + "{% for m in messages %}" + body + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


VICUNA = _loop(
    "{% if m.role != 'system' %}{{ m.role | upper ~ ': ' }}{% endif %}"
    + _images("{{ '<image>\\n' }}")
    + _texts(_learnt("{{ p.text ~ ' ' }}")),
    "ASSISTANT:",
)
"""llava-1.5-7b-hf, -13b-hf, llava-v1.6-vicuna-7b-hf, -13b-hf: ends no turn."""

MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<<SYS>>\\n' ~ m.content[0].text ~ '\\n<</SYS>>\\n\\n' }}{% elif m.role == 'user' %}"
    "{{ '[INST] ' }}" + _images("{{ '<image>\\n' }}") + _texts("{{ p.text }}") + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content[0].text ~ 'END ' }}{% endif %}{% endfor %}"
)
"""llava-v1.6-mistral-7b-hf; END is </s>, in its first releases the plain text <\\s>."""

YI = _loop(
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    + _images("{{ '<image>\\n' }}")
    + _texts("{{ p.text }}")
    + "{{ '<|im_end|>' }}",
    "<|im_start|>assistant\\n",
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nAnswer the questions.<|im_end|>' }}{% endif %}",
)
"""llava-v1.6-34b-hf: ChatML with a default system message and no newline between turns."""

LLAMA3 = _loop(
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' }}"
    + _images("{{ '<image>' }}")
    + _texts("{{ '\\n' ~ p.text ~ '<|eot_id|>' }}"),
    "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)
"""llama3-llava-next-8b-hf: three newlines before a text, two in the prompt; ends every text."""

ONEVISION = _loop(
    "{{ '<|im_start|>' ~ m.role ~ ' ' }}"
    + _images("{{ '<image>' }}")
    + _texts(_learnt("{{ '\\n' ~ p.text }}"))
    + "{{ '<|im_end|>' }}",
    "<|im_start|>assistant\\n",
)
"""llava-onevision-qwen2-*-ov-hf, -si-hf, -ov-chat-hf, EM-KD's teacher: `assistant ` + newline."""

ONEVISION_CONVERTED = _loop(
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    + _images("{{ '<image>\\n' }}")
    + _texts(_learnt("{{ p.text }}"))
    + "{{ '<|im_end|>\\n' }}",
    "<|im_start|>assistant\\n",
)
"""What transformers' conversion of LLaVA-OneVision writes today."""

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

QWEN2_VL = _loop(
    "{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    + _or_string(_each("{{ p.text }}", _QWEN_IMAGE))
    + "{{ '<|im_end|>\\n' }}",
    "<|im_start|>assistant\\n",
)
"""Qwen2-VL and Qwen2.5-VL, Instruct: a default system message."""

QWEN3_VL = _loop(
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    + _or_string(_each("{{ p.text }}", _QWEN_IMAGE))
    + "{{ '<|im_end|>\\n' }}",
    "<|im_start|>assistant\\n",
)
"""Qwen3-VL, Instruct: no default system message."""

QWEN3_VL_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}" + _or_string(_each("{{ p.text.lstrip('\\n') }}", _QWEN_IMAGE)) + ""
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""Qwen3-VL, Thinking: a thinking block in the last turn, opened by the prompt."""

QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.content is string %}{% set text = m.content %}{% else %}{% set text = '' %}{% endif %}"
    "{% set thought = '' %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ text.lstrip('\\n') }}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""Qwen3's text models: reads plain strings only, and drops lists of parts."""

INTERNVL = _loop(
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    + _or_string(_each("{{ p.text }}", "{{ '<IMG_CONTEXT>\\n' }}"))
    + "{{ '<|im_end|>\\n' }}",
    "<|im_start|>assistant\\n",
)
"""InternVL2.5, InternVL3, InternVL3.5, -hf."""

_UTTERANCE = (
    "{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    + _each("{{ p.text }}", "{{ '<image>' }}")
    + "{{ '<end_of_utterance>\\n' }}"
)
IDEFICS3 = _loop(_UTTERANCE, "Assistant:", "<|begin_of_text|>")
"""Idefics3-8B-Llama3."""

SMOLVLM = _loop(_UTTERANCE, "Assistant:", "<|im_start|>")
"""SmolVLM-Instruct, SmolVLM2-*-Instruct."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A template with the tokens of its tokenizer; `space` names how that treats spaces."""

    template: str
    image: str = "<image>"
    bos: str | None = None
    eos: str = "<|im_end|>"
    tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    plain_tokens: tuple[str, ...] = ()
    """Added tokens that are not special, as Qwen3's thinking tags."""
    sentencepiece: bool = False


_LLAMA: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "tokens": (), "sentencepiece": True}
_QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_THINK = ("<think>", "</think>")

PUBLISHED: dict[str, Published] = {
    "llava-1.5": Published(template=VICUNA, **_LLAMA),
    "llava-v1.6-vicuna": Published(template=VICUNA, **_LLAMA),
    "llava-v1.6-mistral": Published(template=MISTRAL.replace("END", "</s>"), **_LLAMA),
    "llava-v1.6-mistral, first": Published(template=MISTRAL.replace("END", "<\\\\s>"), **_LLAMA),
    "llava-v1.6-34b": Published(template=YI, bos="<|startoftext|>"),
    "llama3-llava-next": Published(
        template=LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llava-onevision": Published(template=ONEVISION),
    "llava-onevision, converted": Published(template=ONEVISION_CONVERTED),
    "qwen2-vl": Published(template=QWEN2_VL, image="<|image_pad|>", tokens=_QWEN),
    "qwen2.5-vl": Published(template=QWEN2_VL, image="<|image_pad|>", tokens=_QWEN),
    "qwen3-vl": Published(template=QWEN3_VL, image="<|image_pad|>", tokens=_QWEN),
    "qwen3-vl-thinking": Published(
        template=QWEN3_VL_THINKING, image="<|image_pad|>", tokens=_QWEN, plain_tokens=_THINK
    ),
    "qwen3": Published(template=QWEN3, plain_tokens=_THINK),
    "internvl": Published(template=INTERNVL, image="<IMG_CONTEXT>"),
    "idefics3": Published(
        template=IDEFICS3,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        tokens=("<end_of_utterance>",),
    ),
    "smolvlm": Published(
        template=SMOLVLM, bos="<|im_start|>", eos="<end_of_utterance>", tokens=("<|im_start|>",)
    ),
}


@cache
def _backend(sentencepiece: bool) -> str:
    """A tokenizer without control tokens, with Llama's spaces, or those of Qwen and Llama 3."""
    if sentencepiece:
        found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        found.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    else:
        found = Tokenizer(models.BPE())
        words = Regex(r" ?[^\s\d]+|\d|\s*[\r\n]+|\s+")
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>"] if sentencepiece else [],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    found.train_from_iterator([_CORPUS], trainer)
    return found.to_str()


def published_processor(known: Published) -> tuple[Any, Any]:
    """A LLaVA processor with this template and its tokens, and a config to match: 4x4 images."""
    backend = Tokenizer.from_str(_backend(known.sentencepiece))
    special = [known.image, known.eos, *known.tokens, "<pad>"]
    special += [] if known.bos is None else [known.bos]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in known.plain_tokens])
    if known.bos is not None:
        index = backend.token_to_id(known.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{known.bos} $A", special_tokens=[(known.bos, index)]
        )
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=known.bos,
        eos_token=known.eos,
        pad_token="<pad>",
        unk_token="<unk>" if known.sentencepiece else None,
        extra_special_tokens={"image_token": known.image},
    )
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token=known.image,
        chat_template=known.template,
    )
    vision = SiglipVisionConfig(image_size=16, patch_size=4)
    index: Any = words.convert_tokens_to_ids(known.image)
    config = LlavaConfig(
        vision_config=vision, image_token_index=index, vision_feature_select_strategy="full"
    )
    return processor, config
