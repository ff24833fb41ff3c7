"""A TRL script before and after its import is changed: ``python -m bench.trl_swap DATA --out bench/results``.

For every loss that TRL has, examples/trl_dpo.py trains on DATA (LLaMA-Factory's ranking form) for a few steps twice, in
processes of their own: with TRL's DPOTrainer and with fastpo's. If their losses differ by more than 1e-4, or fastpo
needs no less memory, the exit status is 1. OUT gets trl_swap.json and trl_swap.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, provenance
from bench.measure import gemm_ceiling
from bench.runner import spawn

TOLERANCE = 1e-4  # of losses; relative above 1
PROCESS_LIMIT = 900  # seconds
COMMON = (
    "--max_steps 3 --per_device_train_batch_size 2 --max_length 128 --learning_rate 1e-3 --lr_scheduler_type constant "
    "--logging_steps 1 --save_strategy no --report_to none --disable_tqdm true --use_cpu --bf16 no"
)
ALONE = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
)
CASES = {
    **{name: f"--loss_type {name}" for name in ALONE},
    "exo_pair": "--loss_type exo_pair --label_smoothing 1e-3",
    "robust": "--loss_type robust --label_smoothing 0.1",
    "forward_kl": "--f_divergence_type forward_kl",
    "js_divergence": "--f_divergence_type js_divergence",
    "alpha_divergence": "--f_divergence_type alpha_divergence --f_alpha_divergence_coef 0.7",
    "ld_alpha": "--ld_alpha 0.4",
    "use_weighting": "--use_weighting true",
    "MPO": "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0",
    "LoRA": "--use_peft true --lora_target_modules q_proj v_proj",
}
LEARNED = '--add_beta_head true --beta_mode dynamic_scaling --beta_head_config {"lr_multiplier":10}'
Result = dict[str, Any]


def run(library: str, options: str, data: Path, threads: int | None) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--dataset_name", str(data.resolve()), "--output_dir", folder, *COMMON.split(), *options.split()]
        job = {"library": library, "argv": argv}
        lines, trouble = spawn(job, PROCESS_LIMIT, threads, module="bench.trl_swap_worker")
    if trouble or not lines:
        raise RuntimeError(f"{library} {options}: {trouble or 'no result'}")
    return lines[0]


def difference(losses: list[float], others: list[float]) -> float:
    """The largest of two curves, relative where the loss is above 1."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, others, strict=True))


def holds(pair: dict[str, Result]) -> bool:
    ours, theirs = pair["fastpo"], pair["trl"]
    same = difference(ours["losses"], theirs["losses"]) <= TOLERANCE and ours["num_tokens"] == theirs["num_tokens"]
    return same and ours["extra_bytes"] < theirs["extra_bytes"]


def report(result: Result) -> str:
    lines = [
        "# A TRL script, its import exchanged\n",
        provenance(result),
        "`examples/trl_dpo.py` with `from trl import DPOConfig, DPOTrainer` and with `from fastpo.integrations.trl "
        f"import DPOConfig, DPOTrainer`; `{COMMON}` and the options shown. A Qwen3 with hidden size 64, 2 layers and "
        "32,768 tied embeddings; the reference is a second model, but for LoRA. Extra memory is the highest resident "
        "memory of training less that before it. The difference is the largest between two losses of the same step, "
        "relative where the loss is above 1.\n",
        "| case | options | losses, fastpo | largest difference | extra MB, TRL | extra MB, fastpo | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pair in result["cases"].items():
        ours, theirs = pair["fastpo"], pair["trl"]
        megabytes = [x["extra_bytes"] / 2**20 for x in (theirs, ours)]
        lines.append(
            f"| {name} | `{pair['options']}` | {_shown(ours['losses'])} | "
            f"{difference(ours['losses'], theirs['losses']):.0e} | {megabytes[0]:.0f} | {megabytes[1]:.0f} | "
            f"{megabytes[1] / megabytes[0]:.2f} |"
        )
    learned = result["learned_beta"]
    low, high = learned["beta"][-1]
    lines.append(
        f"\nWhat TRL cannot: `{LEARNED}`: losses {_shown(learned['losses'])}; beta from {low:.4f} to {high:.4f} in the "
        f"last step; {learned['extra_bytes'] / 2**20:.0f} MB.\n"
    )
    return "\n".join(lines)


def _shown(losses: list[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON file of ranked answers")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="a case; repeatable")
    parser.add_argument("--threads", type=int, help="threads of each run; the machine's own choice by default")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    command = f"python -m bench.trl_swap {arguments.data.name}"
    result: Result = {
        "meta": describe(device, command, arguments.threads or torch.get_num_threads()),
        "gemm_ceiling_tflops": gemm_ceiling(device, torch.float32),
        "learned_beta": run("fastpo", LEARNED, arguments.data, arguments.threads),
        "cases": {},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or CASES:
        pair: Result = {"options": CASES[name]}
        pair |= {library: run(library, CASES[name], arguments.data, arguments.threads) for library in ("trl", "fastpo")}
        result["cases"][name] = pair
        print(f"{name}: {'same' if holds(pair) else 'DIFFERS'}", flush=True)
        # After every case, so that one who cannot wait has those that are done.
        (arguments.out / "trl_swap.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "trl_swap.md").write_text(report(result))
    print(report(result))
    return 0 if all(map(holds, result["cases"].values())) else 1


if __name__ == "__main__":
    sys.exit(main())
