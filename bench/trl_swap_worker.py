"""One run of examples/trl_dpo.py, as it is or with TRL's own import: ``python -m bench.trl_swap_worker``.

It reads a job from stdin, {"library": "fastpo" or "trl", "argv": the script's arguments}, and prints one JSON line.
"""

import json
import sys
from typing import Any

import torch

from bench.machine import ROOT
from bench.worker import emit
from fastpo.memory import peak_bytes_of

SCRIPT = ROOT / "examples" / "trl_dpo.py"
IMPORTS = {
    "fastpo": "from fastpo.integrations.trl import DPOConfig, DPOTrainer\n",
    "trl": "from trl import DPOConfig, DPOTrainer\n",
}


def script_of(library: str) -> str:
    """The script, with the one line exchanged."""
    text = SCRIPT.read_text()
    if text.count(IMPORTS["fastpo"]) != 1:
        raise ValueError(f"{SCRIPT} must have the line {IMPORTS['fastpo']!r} once")
    return text.replace(IMPORTS["fastpo"], IMPORTS[library])


def measure(library: str, argv: list[str]) -> dict[str, Any]:
    """Losses of each step, tokens seen, and bytes that training took above what was loaded before it."""
    scope: dict[str, Any] = {"__name__": "swapped"}
    exec(compile(script_of(library), str(SCRIPT), "exec"), scope)
    trainer = scope["make_trainer"](argv)
    extra = peak_bytes_of(trainer.train, torch.device("cpu"))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": [row["loss"] for row in logged],
        "num_tokens": logged[-1]["num_tokens"],
        "beta": [[row["beta/min"], row["beta/max"]] for row in logged if "beta/min" in row],
        "extra_bytes": extra,
        "seconds": trainer.state.log_history[-1]["train_runtime"],
    }


def main() -> None:
    job = json.load(sys.stdin)
    emit("row", **measure(job["library"], job["argv"]))


if __name__ == "__main__":
    main()
