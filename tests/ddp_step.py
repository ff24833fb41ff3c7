"""Optimiser steps under `torch.distributed.run`, for test_trainer: what the parameters moved by, case by case."""

import sys
from typing import Any

import torch
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer

from fastpo.trainer import PreferenceTrainer

HEADS: dict[str, Any] = {"add_beta_head": True, "add_disco_head": True, "beta_head_config": {"kind": "mlp"}}
IN_USE: dict[str, Any] = {"beta_mode": "dynamic_scaling", "pref_loss_type": {"disco": 1.0, "sigmoid": 0.5}}
STEP: dict[str, Any] = {
    "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 1.0, "per_device_train_batch_size": 4,
    "sft_weight": 0.5, "sft_reduction": "token", "length_normalization": True, "beta": 1.0,
}  # fmt: skip
# Without the search for unused parameters, DDP stops at the second step if a trainable one had no gradient.
SEVERAL: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.1}
SEVERAL |= {"ddp_find_unused_parameters": False}
CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "sft": {"stage": "sft"},
    "no heads": SEVERAL,
    "heads unused": SEVERAL | HEADS,
    "heads in use": SEVERAL | HEADS | IN_USE,
}


def main(output: str) -> None:
    torch.set_num_threads(1)
    for name, fields in CASES.items():
        args = tiny_args(f"{output}.run", **{**STEP, **fields})
        model, reference = tiny_model(), tiny_model(seed=7)
        torch.manual_seed(100 + args.process_index)  # each process makes other heads, until DDP has spread the first's
        trainer = PreferenceTrainer(
            model, reference, args, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer()
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train()
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        moved = {name: before[name] - p for name, p in after.items()}
        torch.save({"moved": moved, "after": after}, f"{output}.{name}.{args.process_index}")


if __name__ == "__main__":
    main(sys.argv[1])
