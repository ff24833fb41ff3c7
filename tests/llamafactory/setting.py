"""A tiny Qwen with a tokenizer, data in LLaMA-Factory's form, and the published LoRA DPO recipe on them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastpo.data import from_sharegpt
from fastpo.planted import planted_preferences
from fastpo.tokenizer import train_tokenizer

VOCABULARY = 32768  # rows of the LM head: enough that logits are most of a step's memory
# A folder with dataset_info.json and dpo_en_demo; where it is not set, planted preferences are written in that form.
DATA = os.environ.get("FASTPO_DATA")


def write_data(folder: Path) -> Path:
    """A folder for `dataset_dir`."""
    if DATA:
        return Path(DATA)
    folder.mkdir()
    sides = {"prompt": "human", "chosen": "gpt", "rejected": "gpt"}
    rows = []
    for row in planted_preferences(48, seed=0):
        turns = {name: {"from": role, "value": row[name][0]["content"]} for name, role in sides.items()}
        rows.append({"conversations": [turns.pop("prompt")], **turns})
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"dpo_en_demo": info}))
    return folder


def write_model(folder: Path, data: Path) -> Path:
    """A Qwen3 of 5 million parameters, most of them embeddings."""
    info = json.loads((data / "dataset_info.json").read_text())["dpo_en_demo"]
    rows = json.loads((data / info["file_name"]).read_text())
    tokenizer = train_tokenizer((from_sharegpt(row) for row in rows[:64]), 1000)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """The keys of LLaMA-Factory's example of DPO with LoRA, smaller."""
    return {
        "model_name_or_path": str(model),
        "trust_remote_code": True,
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "dataset_dir": str(data),
        "dataset": "dpo_en_demo",
        "template": "qwen",
        "cutoff_len": 256,
        "max_samples": 48,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(output_dir),
        "logging_steps": 1,
        "save_steps": 500,
        "overwrite_output_dir": True,
        "save_only_model": False,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0e-3,
        "num_train_epochs": 1.0,
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **changes,
    }
