"""TRL's trainers on fastpo's losses: replace `from trl import ...` by `from fastpo.integrations.trl import ...`."""

from fastpo.integrations.trl.dpo_config import DPOConfig
from fastpo.integrations.trl.dpo_trainer import DPOTrainer
from fastpo.integrations.trl.reward import RewardConfig, RewardTrainer

__all__ = ["DPOConfig", "DPOTrainer", "RewardConfig", "RewardTrainer"]
