"""Training runs that are the same on one process and on several, under `torch.distributed.run` or within pytest."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import sharded_head_cases
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastpo import reference_cache
from fastpo.kernels import sharded
from fastpo.trainer import PreferenceTrainer

ROWS = 8  # of the dataset, which every optimiser step sees whole, on however many processes
LEDPO: dict[str, Any] = {
    "add_beta_head": True, "beta_mode": "dynamic_scaling", "beta_head_config": {"kind": "mlp"},
    # `smooth` compares the pairs of one process, so it is not the same on several.
    "regularizers": {"pointwise": 0.1, "entropy": 0.1, "global": 1.0, "range": 1.0},
}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft"},
    "dpo": {"sft_weight": 0.5, "sft_reduction": "token", "length_normalization": True, "beta": 1.0},
    "cached": {"precompute_ref_log_probs": True, "length_normalization": True, "beta": 1.0, **LEDPO},
    "split": {
        "split_responses": True,
        "gradient_checkpointing": True,
        "length_normalization": True,
        "beta": 1.0,
        **LEDPO,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "bf16": {"bf16": True, "length_normalization": True, "beta": 1.0},
    "ledpo": {"length_normalization": True, "beta": 1.0, **LEDPO},
    "heads unused": {"add_beta_head": True, "add_disco_head": True},
    "heads in use": {"add_disco_head": True, "pref_loss_type": {"disco": 1.0, "sigmoid": 0.5}, **LEDPO},
    "no heads": {},
}
AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
}  # fmt: skip
# What is small stays whole otherwise, and everything here is small.
ALL_OF_IT: dict[str, Any] = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    # Without the search for unused parameters, DDP stops at the second step if a trained one had no gradient.
    "ddp": {"ddp_find_unused_parameters": False},
    "zero2": {"deepspeed": {**AUTO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {**AUTO, "zero_optimization": {"stage": 3, **ALL_OF_IT}}},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    # Linear layers are units of their own, the LM head too: as nobody calls it, it stays sharded.
    "fsdp2 apart": {
        "fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer", "Linear"]}
    },
}  # fmt: skip


def save_models(folder: Path) -> None:
    """The policy and the reference that `run` wants; loaded and not made there, because ZeRO-3 makes others."""
    for name, seed in (("policy", 0), ("reference", 7)):
        model = tiny_model(seed=seed)
        with torch.no_grad():
            # An untrained head is so unsure that fp32 hardly tells its entropy from log V.
            model.lm_head.weight.mul_(20)
        model.save_pretrained(folder / name)


def run(case: str, folder: Path, engine: str = "ddp", resume_from: str | None = None, **fields: Any) -> dict[str, Any]:
    """Train a case "objective, part" on what `save_models` left; what the steps gave, and how the model was held."""
    objective, part = case.split(", ")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "max_steps": 3,
        "per_device_train_batch_size": ROWS // processes, **OBJECTIVES[objective], **ENGINES[engine], **fields,
    }  # fmt: skip
    AcceleratorState._reset_state()
    for name in ("FSDP", "DEEPSPEED"):
        os.environ.pop(f"ACCELERATE_USE_{name}", None)  # of an earlier case
    args = tiny_args(**{"output_dir": folder / "run", **options})
    if args.fsdp and args.world_size > 1:
        # accelerate takes the FSDP2 path for GPUs alone; nothing on that path needs one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # DDP spreads what the first process draws.
    torch.manual_seed(100 + (args.process_index if engine == "ddp" else 0))
    adapter = None
    if part != "full":
        adapter = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
            modules_to_save=["lm_head"] if part == "lora head" else None,
        )  # fmt: skip
    trainer = PreferenceTrainer(
        str(folder / "policy"), None if adapter else str(folder / "reference"), args, train_dataset=tiny_pairs(ROWS),
        processing_class=tiny_tokenizer(), peft_config=adapter, callbacks=[gradients := Gradients()],
    )  # fmt: skip
    assert ("precompute_ref_log_probs" in options) == ("ref_chosen_logps" in trainer.train_dataset.column_names)
    with mock.patch.object(sharded, "sharded_statistics", wraps=sharded.sharded_statistics) as sharded_head:
        trainer.train(resume_from_checkpoint=resume_from)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    means = {name: float(mean) for name, mean in trainer.running_means.items()}
    return {
        "losses": losses, "means": means, "gradients": gradients.last,
        "weights": {name: _whole(p) for name, p in _trained(trainer.model)},
        "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "sharded_head_calls": sharded_head.call_count,
    }  # fmt: skip


class Gradients(TrainerCallback):
    """Those of the last step, which depend on all steps before it; none of an engine that keeps them to itself."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.last = {name: _whole(p.grad) for name, p in _trained(model) if p.grad is not None}


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    model = getattr(model, "module", model)  # DDP, DeepSpeed
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _whole(x: Tensor) -> Tensor:
    if hasattr(x, "ds_id"):
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([x]):
            return x.detach().clone()
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach().clone()


def run_and_resume(case: str, folder: Path, engine: str) -> dict[str, Any]:
    """A run that leaves a checkpoint on its way, and one that goes on from there."""
    output = folder / f"resumed {engine} {case}"
    fields = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "output_dir": str(output)}
    whole = run(case, folder, engine, save_strategy="steps", save_steps=2, **fields)
    return {"whole": whole, "resumed": run(case, folder, engine, str(output / "checkpoint-2"), **fields)}


def main(folder: str, *cases: str) -> None:
    reference_cache.SHARD_ROWS = 2  # so that every process has some to make
    torch.set_num_threads(1)
    PartialState(cpu=True)  # starts the process group
    for case in cases:
        engine, _, name = case.partition(": ")
        if case == "vocab_parallel":
            found = sharded_head_cases.evaluate_all()
        elif name.endswith(", resumed"):
            found = run_and_resume(name.removesuffix(", resumed"), Path(folder), engine)
        else:
            found = run(name, Path(folder), engine)
        torch.save(found, f"{folder}/{case}.{os.environ['RANK']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
