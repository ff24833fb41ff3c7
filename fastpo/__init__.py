"""fastpo: preference optimisation without logits in memory. The whole public surface."""

import importlib
from typing import TYPE_CHECKING, Any

from fastpo.config import PreferenceConfig
from fastpo.losses import preference_loss
from fastpo.ops import joint_linear_logps, joint_linear_sequence_stats, linear_logps, linear_sequence_stats
from fastpo.types import JointStats, LossOutput, PreferenceBatch, SequenceStats, TokenStats

if TYPE_CHECKING:
    from fastpo.arguments import PreferenceTrainingArguments
    from fastpo.data import PreferenceCollator
    from fastpo.trainer import PreferenceTrainer

# These need transformers and datasets, which the loss import alone does without.
_TRAINER_SIDE = {
    "PreferenceCollator": "fastpo.data",
    "PreferenceTrainer": "fastpo.trainer",
    "PreferenceTrainingArguments": "fastpo.arguments",
}

__all__ = [
    "JointStats",
    "LossOutput",
    "PreferenceBatch",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceTrainer",
    "PreferenceTrainingArguments",
    "SequenceStats",
    "TokenStats",
    "joint_linear_logps",
    "joint_linear_sequence_stats",
    "linear_logps",
    "linear_sequence_stats",
    "preference_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINER_SIDE:
        raise AttributeError(f"module 'fastpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_TRAINER_SIDE[name]), name)
