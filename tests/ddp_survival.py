"""Runs of two processes under `torch.distributed.run`, for test_survival: stopped, resumed, with a step gone wrong."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from transformers import TrainerCallback

from fastpo.preemption import SaveOnSigterm
from fastpo.tokenization import tokenize_dataset
from fastpo.trainer import PreferenceTrainer

BAD = 11  # a row of the second process: batches go to the processes in turns


class TerminateSecond(TrainerCallback):
    """SIGTERM to the second process alone, in its second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(output_dir: Path, *callbacks: Any, resume: bool = False, bad: bool = False, **fields: Any) -> dict[str, Any]:
    """What each process has in the end: weights, losses, how it ended."""
    rows = tokenize_dataset(tiny_pairs(16), tiny_tokenizer(), stage="dpo", max_length=64, source="pairs").to_list()
    for row in rows:
        row["context_scale"] = float("nan") if bad and row["index"] == BAD else 1.0
    args = tiny_args(
        output_dir, per_device_train_batch_size=2, max_steps=4, train_sampling_strategy="sequential", **fields
    )
    trainer = PreferenceTrainer(
        tiny_model(), tiny_model(seed=7), args, train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip
    ended = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (SystemExit, FloatingPointError) as error:
        ended = str(error)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"ended": ended, "step": trainer.state.global_step, "losses": losses, "weights": weights}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "whole": run(folder / "whole"),
        "stopped": run(folder / "stopped", SaveOnSigterm(), TerminateSecond()),
        "resumed": run(folder / "stopped", resume=True),
        "bad": run(folder / "bad", bad=True),
        "skipped": run(folder / "skipped", bad=True, skip_nonfinite_steps=True),
    }
    torch.save(found, folder / f"found.{os.environ['RANK']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
