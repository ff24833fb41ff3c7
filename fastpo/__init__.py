"""fastpo: preference optimisation without logits in memory. The whole public surface."""

import importlib
from typing import TYPE_CHECKING, Any

from fastpo.config import BetaHeadConfig, PreferenceConfig
from fastpo.heads import BetaHead, DiscoHead
from fastpo.losses import gaussian_prior, preference_loss, reward_model_loss
from fastpo.ops import joint_linear_logps, joint_linear_sequence_stats, linear_logps, linear_sequence_stats
from fastpo.regularizers import label_confidence, regularizer_loss
from fastpo.types import (
    ExtendedSequenceStats,
    ExtendedTokenStats,
    JointStats,
    LossOutput,
    PreferenceBatch,
    SequenceStats,
    StepTotals,
    TokenStats,
)
from fastpo.vocab_parallel import vocab_parallel_logps, vocab_parallel_sequence_stats

if TYPE_CHECKING:
    from fastpo.architecture import load_heads
    from fastpo.arguments import PreferenceTrainingArguments
    from fastpo.backbone import install_stats_forward, model_stats
    from fastpo.collation import PreferenceCollator
    from fastpo.data import read_dataset
    from fastpo.ppo_arguments import PPOTrainingArguments
    from fastpo.ppo_trainer import PPOTrainer
    from fastpo.reward_trainer import RewardTrainer
    from fastpo.tokenization import tokenize_dataset
    from fastpo.trainer import PreferenceTrainer

# These need transformers and datasets, which the loss import alone does without.
_TRAINER_SIDE = {
    "PPOTrainer": "fastpo.ppo_trainer",
    "PPOTrainingArguments": "fastpo.ppo_arguments",
    "PreferenceCollator": "fastpo.collation",
    "PreferenceTrainer": "fastpo.trainer",
    "PreferenceTrainingArguments": "fastpo.arguments",
    "RewardTrainer": "fastpo.reward_trainer",
    "install_stats_forward": "fastpo.backbone",
    "load_heads": "fastpo.architecture",
    "model_stats": "fastpo.backbone",
    "read_dataset": "fastpo.data",
    "tokenize_dataset": "fastpo.tokenization",
}

__all__ = [
    "BetaHead",
    "BetaHeadConfig",
    "DiscoHead",
    "ExtendedSequenceStats",
    "ExtendedTokenStats",
    "JointStats",
    "LossOutput",
    "PPOTrainer",
    "PPOTrainingArguments",
    "PreferenceBatch",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceTrainer",
    "PreferenceTrainingArguments",
    "RewardTrainer",
    "SequenceStats",
    "StepTotals",
    "TokenStats",
    "gaussian_prior",
    "install_stats_forward",
    "joint_linear_logps",
    "joint_linear_sequence_stats",
    "label_confidence",
    "linear_logps",
    "linear_sequence_stats",
    "load_heads",
    "model_stats",
    "preference_loss",
    "read_dataset",
    "regularizer_loss",
    "reward_model_loss",
    "tokenize_dataset",
    "vocab_parallel_logps",
    "vocab_parallel_sequence_stats",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINER_SIDE:
        raise AttributeError(f"module 'fastpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_TRAINER_SIDE[name]), name)
