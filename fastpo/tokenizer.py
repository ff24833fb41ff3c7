"""A small tokenizer trained on the data at hand, for models that are built rather than loaded."""

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastpo.data import Pair

# ChatML, the format of the Qwen family.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(pairs: Iterable[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens and chat template. It never meets an unknown character.

    Args:
        pairs: the text to learn merges from.
        vocab_size: at most so many tokens, at least 256 bytes and 3 special tokens.

    Raises:
        ValueError: vocab_size is too small.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise ValueError(f"tokenizer_vocab_size must be at least {len(alphabet) + 3}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(pairs), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def _texts(pairs: Iterable[Pair]) -> Iterator[str]:
    for pair in pairs:
        for part in pair:
            messages: Any = [{"content": part}] if isinstance(part, str) else part or []
            yield from (message["content"] for message in messages)
