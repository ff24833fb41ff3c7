"""What a trainer remembers between steps, and what it watches."""

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpo.architecture import heads_of
from fastpo.schedules import RunningMeans

logger = logging.getLogger(__name__)

RUNAWAY = 10.0  # where an s(x) without a bound is no longer sane


class Memory(TrainerCallback, ExportableState):
    """Holds the objective's running means, and keeps them in checkpoints."""

    def __init__(self) -> None:
        self.means: RunningMeans = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"means": {name: float(mean) for name, mean in self.means.items()}}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.means = {name: torch.tensor(value) for name, value in saved["attributes"]["means"].items()}


class RunawayBeta(TrainerCallback):
    """Says once which way s(x) runs into its bound, or far from 1 without one, and what to do."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.warned = trainer, False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        mean = (logs or {}).get("log_s/mean")
        if mean is None or self.warned:
            return
        config = heads_of(self.trainer.model)["beta_head"].config
        bound = math.log(config.s_max or RUNAWAY)
        if abs(mean) > 0.9 * bound:
            self.warned = True
            logger.warning(
                "beta %s: mean log s(x) is %.2f of at most %.2f at step %d. Raise the regularizers 'pointwise' and "
                "'global' (now %s), or lower beta_head_config's lr_multiplier (now %g).",
                "blows up" if mean > 0 else "collapses", mean, bound, state.global_step,
                self.trainer.objective.regularizer_weights or "none", config.lr_multiplier,
            )  # fmt: skip


class EarlierLoss(TrainerCallback):
    """Makes train_loss of a resumed run the mean over all its steps; transformers counts those since the resumption."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = 0
        for row in state.log_history:
            if "loss" in row:
                self.trainer._total_loss_scalar += row["loss"] * (row["step"] - before)
                before = row["step"]


class Meter:
    """Row-weighted means of metrics between two logs; names that end in /min or /max keep their extreme."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: list[int] = []

    def add(self, metrics: dict[str, Tensor], weight: int) -> None:
        self._weights.append(weight)
        for name, value in metrics.items():
            self._values[name].append(value)

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Over all processes; every process must call it with the same names."""
        found = {}
        for name, values in self._values.items():
            stacked = torch.stack(values).double()
            weights = torch.tensor(self._weights, dtype=torch.float64, device=stacked.device)
            if name.endswith("/min"):
                found[name] = accelerator.gather(stacked.min()).min().item()
            elif name.endswith("/max"):
                found[name] = accelerator.gather(stacked.max()).max().item()
            else:
                totals = torch.stack(((stacked * weights).sum(), weights.sum()))
                total, weight = accelerator.reduce(totals, "sum").tolist()
                found[name] = total / weight
        return found
