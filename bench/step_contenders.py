"""Who takes the training step of `python -m bench --preset step`: a way of training, and arguments for its trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PACKAGES = {"eager": "torch", "trl": "trl", "fastpo": "fastpo"}


@dataclass(frozen=True)
class StepContender:
    """One row of the table.

    Attributes:
        trainer: "eager", "trl" or "fastpo".
        lora: an adapter is trained and the reference is the model without it; else the whole model is trained and the
            reference is a second one.
        arguments: what its trainer is told beyond what all are.
    """

    trainer: str
    lora: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> str:
        return "LoRA" if self.lora else "full"


CACHED = {"precompute_ref_log_probs": True}
PACKED = CACHED | {"padding_free": True}
SHARED = CACHED | {"prefix_sharing": True}
CHECKPOINTED = {"gradient_checkpointing": True}

CONTENDERS = {
    "eager, full": StepContender("eager", lora=False),
    "TRL, full": StepContender("trl", lora=False),
    "fastpo, full": StepContender("fastpo", lora=False),
    "eager, LoRA": StepContender("eager"),
    "TRL, LoRA": StepContender("trl"),
    "TRL, LoRA, precomputed": StepContender("trl", arguments=CACHED),
    "TRL, LoRA, checkpointing": StepContender("trl", arguments=CHECKPOINTED),
    "TRL, LoRA, precomputed, checkpointing": StepContender("trl", arguments=CACHED | CHECKPOINTED),
    "fastpo, LoRA": StepContender("fastpo"),
    "fastpo, LoRA, cached": StepContender("fastpo", arguments=CACHED),
    "fastpo, LoRA, cached, packed": StepContender("fastpo", arguments=PACKED),
    "fastpo, LoRA, cached, prefix-shared": StepContender("fastpo", arguments=SHARED),
    "fastpo, LoRA, cached, split": StepContender("fastpo", arguments=CACHED | {"split_responses": True}),
    "fastpo, LoRA, cached, checkpointing": StepContender("fastpo", arguments=CACHED | CHECKPOINTED),
    "fastpo, LoRA, cached, prefix-shared, checkpointing": StepContender("fastpo", arguments=SHARED | CHECKPOINTED),
}
# Whose losses and gradient norms the others of a kind must reproduce.
ORACLES = {"full": "eager, full", "LoRA": "eager, LoRA"}
