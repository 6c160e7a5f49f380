"""Real tokenizers and processors for the tiny models, built without any file or network.

The processors of LLaVA-OneVision, Qwen2.5-VL and InternVL need a video processor, and that needs
torchvision. A subclass leaves it out and is registered under its own name, so that
`AutoProcessor` finds it; its text and image paths are the library's.
"""

import re
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    InternVLConfig,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)

_CORPUS = (
    "what is in the picture? a red square and a blue circle. user assistant system "
    "how many digits do you see? there are three of them: one, two, four. describe both images"
)


@cache
def _bpe(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return tokenizer.to_str()


def tokenizer(extra: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with named extra special tokens (name -> text)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(tuple(extra.values()))),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=extra,
    )


def token_id(words: PreTrainedTokenizerFast, text: str) -> int:
    """Id of one special token."""
    found = words.convert_tokens_to_ids(text)
    assert isinstance(found, int)
    return found


class StillOnevisionProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without videos."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 16,
        vision_aspect_ratio: str = "anyres_max_9",
        chat_template: str | None = None,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = "full"
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class StillQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without videos."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class StillInternVLProcessor(InternVLProcessor):
    """InternVL's processor without videos."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 4,
        chat_template: str | None = None,
    ) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = "<img>", "</img>"
        self.start_image_token_id = tokenizer.convert_tokens_to_ids("<img>")
        self.end_image_token_id = tokenizer.convert_tokens_to_ids("</img>")
        self.image_token, self.video_token = "<IMG_CONTEXT>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)")


AutoProcessor.register(LlavaOnevisionConfig, StillOnevisionProcessor, exist_ok=True)
AutoProcessor.register(Qwen2_5_VLConfig, StillQwenProcessor, exist_ok=True)
AutoProcessor.register(InternVLConfig, StillInternVLProcessor, exist_ok=True)
