"""A language model to be built and trained on the spot, where a demonstration wants no download."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from fastpo.data import find_form
from fastpo.tokenizer import train_tokenizer

TINY_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "tie_word_embeddings": True,
}
VOCAB_SIZE = 1024


def tiny_model(rows: Dataset, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen3 of two layers with random weights, in fp32, and a tokenizer that was trained on the rows.

    Args:
        rows: preference pairs in any form of `fastpo.data`.
        seed: of the weights.

    Raises:
        ValueError: the rows have no form that is known.
    """
    form = find_form(rows.column_names, "dpo", "rows")
    tokenizer = train_tokenizer((form(row) for row in rows), VOCAB_SIZE)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(**TINY_QWEN3, vocab_size=len(tokenizer), **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
