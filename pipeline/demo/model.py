"""Makes the demo's untrained vanilla teacher: tokenizer, processor, a LLaVA of 36 vision tokens.

Ordinary transformers classes, which the auto classes load from disk: SigLIP and Qwen3 of two layers
and width 64, the smallest at which a student with pooled vision tokens is clearly worse. The chat
template ends every turn with the end-of-turn token.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from pipeline.demo.digits import IMAGE_PIXELS, PATCH_PIXELS, PATCHES_SIDE
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER

WIDTH = 64
NUM_LAYERS = 2
NUM_HEADS = 4
VOCAB_SIZE = 512
"""Rows of embedding and head; as in many models, the tokenizer uses only the first ones."""
INIT_STD = 0.12
"""The usual 0.02 stalls for hundreds of steps at this width."""

PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_PLACEHOLDER + "\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the messages: one token per digit and per cell name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT, IMAGE_PLACEHOLDER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(IMAGE_PLACEHOLDER, "") for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer and SigLIP's image processor: 48 x 48 pixels, 36 placeholders each."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Make the model with random weights that depend on `seed` alone."""
    ids = tokenizer.get_vocab()
    vision = SiglipVisionConfig(
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        vision_use_head=False,
    )
    text = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=WIDTH // NUM_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        pad_token_id=ids[PAD],
        eos_token_id=ids[END],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE_PLACEHOLDER],
        image_seq_length=PATCHES_SIDE**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = ids[PAD]
    model.generation_config.eos_token_id = ids[END]
    return model
