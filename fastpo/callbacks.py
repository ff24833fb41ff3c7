"""What a trainer remembers between steps, and what it watches."""

import logging
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpo.memory import PeakMeter
from fastpo.schedules import RunningMeans

logger = logging.getLogger(__name__)


class SharedMeans(RunningMeans):
    """Running means that are the same on every process: what is set on each becomes the mean of all.

    A running mean of means is the mean of running means, so these are one process's means over the whole batch where
    all processes have as many rows. Setting is a collective call.
    """

    def __setitem__(self, name: str, mean: Tensor) -> None:
        super().__setitem__(name, reduce(mean, "mean"))


class Memory(TrainerCallback, ExportableState):
    """Holds the objective's running means, and keeps them in checkpoints."""

    def __init__(self) -> None:
        self.means = SharedMeans()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"means": {name: float(mean) for name, mean in self.means.items()}}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        means = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved["attributes"]["means"].items()}
        self.means = SharedMeans(means)


class PeakMemory(TrainerCallback):
    """Measures training's peak memory, in bytes; see `PeakMeter`. Make it before the model.

    Args:
        recipe: what is trained, for whoever compares.
    """

    def __init__(self, recipe: Any, device: torch.device) -> None:
        self.recipe, self.meter = recipe, PeakMeter(device)
        self.bytes: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bytes = self.meter.peak()


class RunawayBeta(TrainerCallback):
    """Says once that most s(x) have run to their bound, or far from 1 without one, and what to do."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.warned = trainer, False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.warned or (logs or {}).get("log_s/runaway", 0) <= 0.5:
            return
        self.warned, mean, objective = True, logs["log_s/mean"], self.trainer.objective
        bound = objective.beta_head.s_max
        logger.warning(
            "beta %s at step %d: %.0f%% of s(x) are %s, mean log s(x) is %.2f. Raise the regularizers 'pointwise' "
            "and 'global' (now %s), or lower beta_head_config's lr_multiplier (now %g).",
            "blows up" if mean > 0.1 else "collapses" if mean < -0.1 else "runs to both ends",
            state.global_step, 100 * logs["log_s/runaway"],
            "beyond tenfold" if bound is None else f"near their bound, {bound:g} or its inverse",
            mean, objective.regularizer_weights or "none", objective.beta_head.lr_multiplier,
        )  # fmt: skip


class EarlierLoss(TrainerCallback):
    """Makes train_loss of a resumed run the mean over all its steps; transformers counts those since the resumption.

    Saving implies logging here: a checkpoint does not hold the first part of a mean that runs across it, so that the
    loss logged next would not be that of an uninterrupted run.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With the strategy "best", whether to save is known only after the evaluation.
        control.should_log |= control.should_save or (args.save_strategy == "best" and control.should_evaluate)

    on_epoch_end = on_step_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = 0
        for row in state.log_history:
            if "loss" in row:
                made = row["step"] - row.get("skipped_steps", 0)
                self.trainer._total_loss_scalar += row["loss"] * (made - before)
                before = made


class Meter:
    """Row-weighted means of metrics between two logs; names whose last part has min or max keep their extreme.

    A batch in which a metric is NaN, because nothing there has it, does not count for it.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: list[int] = []

    def add(self, metrics: dict[str, Tensor], weight: int) -> None:
        self._weights.append(weight)
        for name, value in metrics.items():
            self._values[name].append(value)

    def forget(self, batches: int) -> None:
        """Take the last so many batches back."""
        kept = len(self._weights) - batches
        del self._weights[kept:]
        for values in self._values.values():
            del values[kept:]

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Over all processes, in two exchanges; every process must call it with the same names."""
        if not self._weights:
            return {}
        stacked = {name: torch.stack(values).double() for name, values in self._values.items()}
        device = next(iter(stacked.values())).device
        weights = torch.tensor(self._weights, dtype=torch.float64, device=device)
        extremes = {name: sign for name in stacked if (sign := _sign_of_extreme(name))}
        means = {name: values for name, values in stacked.items() if name not in extremes}
        sums = torch.stack([(torch.where(values.isnan(), 0, values) * weights).sum() for values in means.values()])
        counts = torch.stack([(~values.isnan() * weights).sum() for values in means.values()])
        totals, counted = accelerator.reduce(torch.stack((sums, counts)), "sum")
        found = dict(zip(means, (totals / counted).tolist(), strict=True))
        if extremes:
            # The greatest is the negative of the least negative.
            lowest = torch.stack([(sign * stacked[name]).min() for name, sign in extremes.items()])
            everywhere = accelerator.gather(lowest).view(-1, len(extremes)).amin(dim=0).tolist()
            found |= {name: sign * low for (name, sign), low in zip(extremes.items(), everywhere, strict=True)}
        return found


def _sign_of_extreme(name: str) -> int:
    """1 of a least value, -1 of a greatest one, by its name (x/min, completions/max_length); 0 of others."""
    last = name.rpartition("/")[2].split("_")
    return ("min" in last) - ("max" in last)
