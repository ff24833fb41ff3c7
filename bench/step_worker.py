"""One contender's training steps in a process of its own: ``python -m bench.step_worker``.

It reads a job from stdin, {"contender": name, "shape": fields of `StepShape`, "steps": how many}, and prints one JSON
line.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from bench.step_contenders import CONTENDERS, PACKAGES, StepContender
from bench.step_problem import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    POLICY_SEED,
    REFERENCE_SEED,
    StepShape,
    fill_adapter,
    lora_config,
    make_dataset,
    make_model,
    make_pairs,
    make_tokenizer,
)
from bench.worker import emit
from fastpo.memory import peak_bytes_of

Train = Callable[[], object]


@dataclasses.dataclass
class Record:
    """What the steps leave; times from `time.perf_counter`."""

    begun: list[float] = dataclasses.field(default_factory=list)
    ended: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    grad_norms: list[float] = dataclasses.field(default_factory=list)


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Fills a `Record` from inside a Trainer. A step begins when its batch is there, and ends with zeroed gradients."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.record.begun.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.ended.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "grad_norm" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.grad_norms.append(float(logs["grad_norm"]))


def unavailable(contender: StepContender) -> str | None:
    """Why it cannot run here, or None."""
    if find_spec(contender.trainer if contender.trainer == "trl" else PACKAGES[contender.trainer]) is None:
        return f"{PACKAGES[contender.trainer]} is not installed"
    if contender.trainer == "eager":
        return None
    arguments = _arguments_class(contender)
    unknown = sorted(set(contender.arguments) - {x.name for x in dataclasses.fields(arguments)})
    return f"{arguments.__name__} has no {', '.join(unknown)}" if unknown else None


def measure(name: str, shape: StepShape, steps: int) -> dict[str, Any]:
    """Figures of `steps` steps of a contender, the first of which warms up; see the report for what they mean."""
    contender, record = CONTENDERS[name], Record()
    model = make_model(shape, POLICY_SEED)
    reference = None if contender.lora else make_model(shape, REFERENCE_SEED)
    with tempfile.TemporaryDirectory() as folder:
        prepared = time.perf_counter()
        if contender.trainer == "eager":
            train = prepare_eager(contender, shape, steps, model, reference, record)
        else:
            train = prepare_trainer(contender, shape, steps, model, reference, record, Path(folder))
        loaded = psutil.Process().memory_info().rss
        extra = peak_bytes_of(train, torch.device("cpu"))
    seconds = [end - begin for begin, end in zip(record.begun, record.ended, strict=True)]
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[:1],
        "setup_seconds": [record.begun[0] - prepared],
        "extra_bytes": extra,
        "loaded_bytes": loaded,
        "losses": record.losses,
        "grad_norms": record.grad_norms,
    }


def prepare_eager(
    contender: StepContender,
    shape: StepShape,
    steps: int,
    model: nn.Module,
    reference: nn.Module | None,
    record: Record,
) -> Train:
    """A plain loop: the model's own logits, log-softmax, AdamW."""
    if contender.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
        fill_adapter(model)
    input_ids, completion_mask = make_pairs(shape).batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def reference_logps() -> Tensor:
        with torch.no_grad():
            if reference is not None:
                return sequence_logps(reference, input_ids, completion_mask)
            with model.disable_adapter():  # type: ignore[operator]
                return sequence_logps(model, input_ids, completion_mask)

    def train() -> None:
        model.train()
        for _ in range(steps):
            record.begun.append(time.perf_counter())
            loss = dpo_loss(sequence_logps(model, input_ids, completion_mask), reference_logps())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            record.ended.append(time.perf_counter())
            record.losses.append(loss.item())
            record.grad_norms.append(norm.item())

    return train


def sequence_logps(model: nn.Module, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """(R,) summed log-probs of the completions, from full logits."""
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    logps = F.log_softmax(logits[:, :-1], dim=-1).gather(2, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(1)


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def prepare_trainer(
    contender: StepContender,
    shape: StepShape,
    steps: int,
    model: nn.Module,
    reference: nn.Module | None,
    record: Record,
    folder: Path,
) -> Train:
    """The contender's trainer on as many rows as a step takes; returns its `train`."""
    options: dict[str, Any] = {
        "output_dir": str(folder / "run"), "max_steps": steps, "per_device_train_batch_size": shape.pairs,
        "max_length": shape.prompt + shape.completion, "beta": BETA, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if contender.trainer == "fastpo" and "precompute_ref_log_probs" in contender.arguments:
        options["reference_cache_dir"] = str(folder / "reference")
    trainer = _trainer_class(contender)(
        model=model, ref_model=reference, args=_arguments_class(contender)(**{**options, **contender.arguments}),
        train_dataset=make_dataset(make_pairs(shape)), processing_class=make_tokenizer(shape.vocab),
        peft_config=lora_config() if contender.lora else None, callbacks=[Watch(record)],
    )  # fmt: skip
    if contender.lora:
        fill_adapter(trainer.model)
    return trainer.train


def _arguments_class(contender: StepContender) -> Any:
    if contender.trainer == "trl":
        from trl import DPOConfig

        return DPOConfig
    from fastpo import PreferenceTrainingArguments

    return PreferenceTrainingArguments


def _trainer_class(contender: StepContender) -> Any:
    if contender.trainer == "trl":
        from trl import DPOTrainer

        return DPOTrainer
    from fastpo import PreferenceTrainer

    return PreferenceTrainer


def main() -> None:
    job = json.load(sys.stdin)
    reason = unavailable(CONTENDERS[job["contender"]])
    if reason is not None:
        emit("unavailable", reason=reason)
        return
    emit("row", **measure(job["contender"], StepShape(**job["shape"]), job["steps"]))


if __name__ == "__main__":
    main()
