"""A run of stage rm, on however many processes `torch.distributed.run` started."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_args, tiny_pairs, tiny_tokenizer

from fastpo import RewardTrainer

ROWS, HELD_OUT = 8, 5  # of which two processes cannot have as many each


def run(folder: Path, **fields: Any) -> dict[str, Any]:
    """Losses, what an evaluation found, and the weights."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = tiny_args(
        folder / f"on {processes}", stage="rm", optim="sgd", learning_rate=0.3, max_grad_norm=0.0, max_steps=3,
        per_device_train_batch_size=ROWS // processes, per_device_eval_batch_size=1,
        center_rewards_coefficient=0.1, ddp_find_unused_parameters=False, **fields,
    )  # fmt: skip
    data = tiny_pairs(ROWS).add_column("margin", [0.1 * i for i in range(ROWS)])
    trainer = RewardTrainer(
        str(folder / "policy"), args, train_dataset=data, eval_dataset=tiny_pairs(HELD_OUT, seed=3),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "found": {name: found[f"eval_{name}"] for name in ("nll", "ece")},
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    cases = {"scalar": {}, "disco": {"add_disco_head": True, "pref_loss_type": "disco"}}
    found = {name: run(Path(folder), **fields) for name, fields in cases.items()}
    torch.save(found, f"{folder}/found.{os.environ.get('RANK', 'alone')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
