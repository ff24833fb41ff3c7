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
CHECKPOINTED = {"gradient_checkpointing": True}
PADDED = {"prefix_sharing": False}  # fastpo shares prompts by itself where that saves enough
SHARED = {"prefix_sharing": True}

CONTENDERS = {
    "eager, full": StepContender("eager", lora=False),
    "TRL, full": StepContender("trl", lora=False),
    "fastpo, full": StepContender("fastpo", lora=False, arguments=PADDED),
    "eager, LoRA": StepContender("eager"),
    "TRL, LoRA": StepContender("trl"),
    "TRL, LoRA, precomputed": StepContender("trl", arguments=CACHED),
    "TRL, LoRA, checkpointing": StepContender("trl", arguments=CHECKPOINTED),
    "TRL, LoRA, precomputed, checkpointing": StepContender("trl", arguments=CACHED | CHECKPOINTED),
    "fastpo, LoRA": StepContender("fastpo", arguments=PADDED),
    "fastpo, LoRA, cached": StepContender("fastpo", arguments=PADDED | CACHED),
    "fastpo, LoRA, cached, packed": StepContender("fastpo", arguments=PADDED | CACHED | {"padding_free": True}),
    "fastpo, LoRA, cached, prefix-shared": StepContender("fastpo", arguments=SHARED | CACHED),
    "fastpo, LoRA, cached, split": StepContender("fastpo", arguments=PADDED | CACHED | {"split_responses": True}),
    "fastpo, LoRA, cached, checkpointing": StepContender("fastpo", arguments=PADDED | CACHED | CHECKPOINTED),
    "fastpo, LoRA, cached, prefix-shared, checkpointing": StepContender(
        "fastpo", arguments=SHARED | CACHED | CHECKPOINTED
    ),
}
# Whose losses and gradient norms the others of a kind must reproduce.
ORACLES = {"full": "eager, full", "LoRA": "eager, LoRA"}
