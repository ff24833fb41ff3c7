"""Train recipes one after the other in one process: ``python run_recipes.py plain|fastpo JOBS.json RESULTS.json``."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastpo.memory import hand_back_what_is_freed, peak_bytes_of


def train(recipe: dict[str, Any]) -> dict[str, Any]:
    """What it logged, and how far resident memory rose, in bytes."""
    from llamafactory.train import tuner

    peak = peak_bytes_of(lambda: tuner.run_exp(dict(recipe)), torch.device("cpu"))
    state = json.loads((Path(recipe["output_dir"]) / "trainer_state.json").read_text())
    return {"log": state["log_history"], "peak": peak}


def set_loss_type(repaired: bool) -> None:
    """Since trl 0.20 the loss is an argument of `dpo_loss`, which LLaMA-Factory leaves at sigmoid."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from trl import DPOTrainer

    def dpo_loss(self: Any, *logps: Any) -> Any:
        return DPOTrainer.dpo_loss(self, *logps, loss_type=self.loss_type)

    CustomDPOTrainer.dpo_loss = dpo_loss if repaired else DPOTrainer.dpo_loss


def main() -> None:
    kind, jobs, results = sys.argv[1:]
    torch.set_num_threads(1)
    hand_back_what_is_freed()
    if kind == "fastpo":
        from fastpo.integrations.llamafactory.__main__ import install

        install()
    found: dict[str, Any] = {}
    for name, recipe in json.loads(Path(jobs).read_text()).items():
        if kind == "plain":
            set_loss_type(repaired=not name.startswith("as_it_is"))
        found[name] = train(recipe)
        Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
