"""``python -m bench.plan_table``: the table of docs/memory.md, as `fastpo plan` computes it. Ten minutes, no GPU."""

import tempfile
from typing import Any

import yaml

from fastpo.plan import GB, Planner, usable
from fastpo.recipe import parse_recipe

CARDS = (16, 24, 40, 80)
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 16,
    "num_hidden_layers": 28, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
    "Qwen3-4B": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_FULL = {"dtype": "float32", "gradient_checkpointing": True, "precompute_ref_log_probs": True}
_LORA = {"dtype": "bfloat16", "use_peft": True, "lora_r": 16, "lora_dropout": 0.0}
SWITCHES: dict[str, dict[str, Any]] = {
    "full": _FULL,
    "full, 8-bit": {**_FULL, "optim": "adamw_8bit"},
    "LoRA, no checkpointing": _LORA,
    "LoRA": {**_LORA, "gradient_checkpointing": True},
}
COMMON = {
    "stage": "dpo", "tokenizer_vocab_size": 512, "dataset": "none", "use_cpu": True, "bf16": True,
    "per_device_train_batch_size": 1, "max_length": 2048,
}  # fmt: skip


def longest(model: dict[str, Any], switches: dict[str, Any]) -> list[int | None]:
    """The largest max_length of one pair at a time on each card."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({**COMMON, "model_config": model, **switches}, file)
        file.flush()
        planner = Planner(*parse_recipe(file.name, []))
    return [planner.largest("max_length", usable(card * GB, on_gpu=True)) for card in CARDS]


def main() -> None:
    print("| model | switches | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for name, model in MODELS.items():
        for label, switches in SWITCHES.items():
            cells = ["" if length is None else f"{length:,}" for length in longest(model, switches)]
            print(f"| {name} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
