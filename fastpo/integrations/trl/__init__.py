"""TRL's trainers on fastpo's losses: replace `from trl import ...` by `from fastpo.integrations.trl import ...`."""

from fastpo.integrations.trl.dpo_config import DPOConfig
from fastpo.integrations.trl.dpo_trainer import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer"]
