"""Tiny models, a tokenizer and data that the training tests share."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.data import from_prompt_pair
from fastpo.planted import planted_preferences
from fastpo.tokenizer import train_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    rows = planted_preferences(64, seed=0)
    return train_tokenizer((from_prompt_pair(row) for row in rows), 300)


def tiny_model(model_type: str = "qwen3", seed: int = 0, **fields: Any) -> Any:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} if model_type == "gpt2" else SHAPE
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    vocab = {"vocab_size": len(tokenizer) + 21}  # a head padded beyond the tokenizer, as Qwen's is
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **special, **vocab, **fields}))


def tiny_pairs(rows: int = 8, seed: int = 1) -> Dataset:
    return Dataset.from_list(planted_preferences(rows, seed))


def tiny_args(output_dir: Path | str, **fields: Any) -> PreferenceTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "reference_cache_dir": f"{output_dir}/reference",
    }
    return PreferenceTrainingArguments(**{**defaults, **fields})
