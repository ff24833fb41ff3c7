"""A PPO run that is the same on one process and on two, under `torch.distributed.run` or within pytest."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from fastpo import PPOTrainer, PPOTrainingArguments
from fastpo.architecture import heads_of

LOGGED = ("loss", "reward", "kl/completion", "completions/min_length")
WORDS = ("tea", "rice", "bees", "maps", "chess", "ferns", "cats", "bread", "knives", "trees")


def odd(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]


def run(folder: Path, resume: bool = False, advantage: str = "rloo") -> dict[str, Any]:
    """Weights, head and logs after training on 4 prompts a step, however many processes share them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state()
    args = PPOTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_completion_length=4, num_generations=4, num_iterations=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2 // processes, optim="sgd", learning_rate=0.3,
        max_grad_norm=0.0, max_steps=5, logging_steps=1, save_steps=3, save_total_limit=1, disable_tqdm=True,
        report_to=[], add_beta_head=True, beta_mode="dynamic_scaling", kl_target=0.5, beta=0.5,
        lr_scheduler_type="constant", ddp_find_unused_parameters=False, per_device_eval_batch_size=2,
        advantage=advantage,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"Tell me of {word}" for word in WORDS]})
    trainer = PPOTrainer(
        tiny_model(seed=1), tiny_model(), args, odd, data, data.select(range(4)), processing_class=tiny_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume or None)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "head": {name: p.clone() for name, p in heads_of(trainer.model)["beta_head"].state_dict().items()},
        "logs": [{name: row[name] for name in LOGGED} for row in rows],
        "evaluation": trainer.evaluate()["eval_reward"],
    }  # fmt: skip


def main(folder: str) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)  # starts the process group
    whole = run(Path(folder, "run"))
    resumed = run(Path(folder, "run"), resume=True)  # from step 3, whose rollouts serve step 4 too
    values = run(Path(folder, "values"), advantage="gae")
    found = {"whole": whole, "resumed": resumed, "values": values}
    torch.save(found, f"{folder}/found.{os.environ['RANK']}")


if __name__ == "__main__":
    main(sys.argv[1])
