"""fastpo: preference optimisation without logits in memory. The whole public surface."""

from fastpo.config import PreferenceConfig
from fastpo.losses import preference_loss
from fastpo.ops import linear_logps, linear_sequence_stats
from fastpo.types import LossOutput, PreferenceBatch, SequenceStats, TokenStats

__all__ = [
    "LossOutput",
    "PreferenceBatch",
    "PreferenceConfig",
    "SequenceStats",
    "TokenStats",
    "linear_logps",
    "linear_sequence_stats",
    "preference_loss",
]
