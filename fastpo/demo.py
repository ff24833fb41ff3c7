"""`fastpo demo`: sft, then dpo, of a tiny Qwen3 on generated data; before and after, and what the head costs."""

import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from fastpo.backbone import install_stats_forward, sequence_stats
from fastpo.collation import PreferenceCollator
from fastpo.memory import head_memory
from fastpo.planted import planted_preferences
from fastpo.recipe import parse_recipe
from fastpo.reporting import final_table
from fastpo.resumable import write_jsonl
from fastpo.run import prepare_training, run_training
from fastpo.scores import per_length
from fastpo.tiny import TINY_QWEN3, VOCAB_SIZE
from fastpo.tokenization import tokenize_dataset

TRAIN_ROWS, HELD_OUT_ROWS = 512, 128
MAX_LENGTH = 128
COMMON = {"dtype": "float32", "max_length": MAX_LENGTH,
          "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine",
          "warmup_steps": 0.1, "logging_steps": 4, "save_strategy": "no", "seed": 0}  # fmt: skip
HEAD_TOKENS = 1024


def run_demo(output_dir: str) -> None:
    """Train in output_dir/sft and output_dir/dpo and print what came of it."""
    start = time.perf_counter()
    transformers_logging.set_verbosity_warning()
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    train, held_out = planted_preferences(TRAIN_ROWS, seed=1), planted_preferences(HELD_OUT_ROWS, seed=2)
    write_jsonl(root / "preferences.jsonl", train)
    # The first model learns to speak from both kinds of response alike, so that it has no preference yet.
    both = [{"prompt": row["prompt"], "completion": row[side]} for row in train for side in ("chosen", "rejected")]
    write_jsonl(root / "responses.jsonl", both)

    print(f"1. sft: a tiny Qwen3 learns to answer, from {len(both)} responses of both kinds")
    sft = {
        **COMMON, "stage": "sft", "model_config": TINY_QWEN3, "tokenizer_vocab_size": VOCAB_SIZE, "num_train_epochs": 3,
        "learning_rate": 3e-3, "dataset": str(root / "responses.jsonl"), "output_dir": str(root / "sft"),
    }  # fmt: skip
    trainer, _ = _train(root, sft)
    before = preference_accuracy(trainer.model, trainer.processing_class, held_out)

    print(f"\n2. dpo: it learns which kind people prefer, from {TRAIN_ROWS} pairs")
    dpo = {
        **COMMON, "stage": "dpo", "model_name_or_path": str(root / "sft"), "num_train_epochs": 1,
        "learning_rate": 3e-4, "dataset": str(root / "preferences.jsonl"), "output_dir": str(root / "dpo"),
    }  # fmt: skip
    trainer, pictures = _train(root, dpo)
    after = preference_accuracy(trainer.model, trainer.processing_class, held_out)
    print(final_table(root / "dpo"))

    print(f"\n3. held-out preference accuracy ({HELD_OUT_ROWS} pairs; higher mean log-prob for the chosen; chance 0.5)")
    print(f"   before dpo {before:.3f}, after dpo {after:.3f}")
    print(f"\n4. extra memory of the LM head, forward + backward, {HEAD_TOKENS} tokens, 151,936 rows of 896, fp32")
    print(f"   fused log-probs {head_memory('auto', tokens=HEAD_TOKENS) / 2**20:8.0f} MB")
    print(f"   full logits     {head_memory('reference', tokens=HEAD_TOKENS) / 2**20:8.0f} MB")
    print(f"\npictures: {' '.join(str(picture) for picture in pictures)}")
    print(f"model: {root / 'dpo'}   done in {time.perf_counter() - start:.0f} s")


def _train(root: Path, recipe: dict[str, Any]) -> tuple[Any, list[Path]]:
    path = root / f"{recipe['stage']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    trainer = prepare_training(*parse_recipe(str(path), []))
    return trainer, run_training(trainer)


@torch.no_grad()
def preference_accuracy(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Fraction of pairs whose chosen response has the higher mean log-prob per token, under the model alone."""
    install_stats_forward(model)
    rows = tokenize_dataset(
        Dataset.from_list(pairs), tokenizer, stage="dpo", max_length=MAX_LENGTH, source="held-out pairs"
    )
    collate = PreferenceCollator(tokenizer.pad_token_id)
    model.eval()
    right = 0
    for first in range(0, len(rows), 32):
        batch = collate([rows[i] for i in range(first, min(first + 32, len(rows)))])
        ids, attention, completion = (
            batch[name].to(model.device) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        chosen, rejected = (
            per_length(side.logps, side, True) for side in sequence_stats(model, ids, attention, completion).split()
        )
        right += int((chosen > rejected).sum())
    return right / len(rows)
