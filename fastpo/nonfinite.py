"""Losses and gradients that are NaN or infinite: no such step reaches the weights."""

import logging
import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpo.schedules import RunningMeans
from fastpo.types import LossOutput

logger = logging.getLogger(__name__)

SHOWN = 5
ADVICE = "Look at those rows; then at learning_rate, max_grad_norm and the precision (bf16 rather than fp16)."


def check_loss(output: LossOutput, index: Tensor, step: int) -> None:
    """Stop at a loss that is not finite.

    Args:
        output: of a batch.
        index: (B,) numbers of its dataset rows.
        step: optimiser steps done.

    Raises:
        FloatingPointError: names the rows.
    """
    rows, values = _bad_rows(output.losses, output.loss, index)
    if rows:
        raise FloatingPointError(f"{_bad_loss(rows, values, step)}. {ADVICE}")


class StepGuard(TrainerCallback, ExportableState):
    """Judges each optimiser step between its last backward pass and the step of the optimizer.

    A loss that is not finite is made NaN in all it is differentiated by. Then the norm of the gradients, which is the
    same in all processes, is NaN wherever any of them had such a loss: they take the same decision without another
    exchange, and one look at the device per step is enough.
    """

    def __init__(self, trainer: Any, skip: bool) -> None:
        self.trainer, self.skip = trainer, skip
        self.skipped_steps = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._means: RunningMeans = {}
        self._loss = torch.tensor(0.0)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped_steps": self.skipped_steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.skipped_steps = saved["attributes"]["skipped_steps"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen, self._means = [], dict(self.trainer.running_means)
        self._loss = self.trainer._tr_loss.clone()

    def watch(self, output: LossOutput, index: Tensor) -> Tensor:
        """The loss () to differentiate, of a micro-batch of the dataset rows index (B,)."""
        self._seen.append((output.losses.detach(), output.loss.detach(), index))
        finite = torch.isfinite(output.losses).all() & torch.isfinite(output.loss)
        return output.loss * torch.where(finite, 1.0, torch.nan)

    def passes(self, model: Any, norm: Any) -> bool:
        """Whether the step may be made, given the norm of its gradients; if not, it has been skipped.

        Raises:
            FloatingPointError: it may not, and steps are not to be skipped; names the rows.
        """
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        fault = None if math.isfinite(norm) else self._fault(norm, scaled=scaler is not None)
        if scaler is None:  # which says so itself
            # Of this the Trainer learns that the schedule of the learning rate is not to advance.
            self.trainer.optimizer._is_overflow = fault is not None
        if fault is None:
            return True
        if not self.skip:
            raise FloatingPointError(f"{fault}. {ADVICE}")
        if self.trainer.is_world_process_zero():
            logger.warning("%s: step skipped", fault)
        self._skip(model)
        return False

    def _skip(self, model: Any) -> None:
        """Leave nothing of the step: gradients, means that the objective remembers, its part in the logged means."""
        trainer = self.trainer
        self.skipped_steps += 1
        model.zero_grad()  # to None: an optimizer passes over parameters without a gradient
        trainer.running_means.clear()
        trainer.running_means.update(self._means)
        trainer.forget_metrics(len(self._seen))
        trainer._tr_loss.copy_(self._loss)
        trainer._globalstep_last_logged += 1  # the loss is divided by the steps since

    def _fault(self, norm: float, scaled: bool) -> str | None:
        """What is wrong, for all processes; None for gradients that only the scale of the loss made overflow."""
        found = [(*_bad_rows(*batch), batch[2].tolist()) for batch in self._seen]
        if self.trainer.args.world_size > 1:
            found = gather_object(found)
        step = self.trainer.state.global_step
        bad = [row for rows, _, _ in found for row in rows]
        if bad:
            return _bad_loss(bad, [value for _, values, _ in found for value in values], step)
        if scaled:
            return None
        rows = [row for _, _, rows in found for row in rows]
        return f"gradient is not finite at step {step}: its norm is {norm}, with finite losses of dataset rows {rows}"


def _bad_rows(losses: Tensor, loss: Tensor, index: Tensor) -> tuple[list[int], list[float]]:
    """Rows of a batch, and their losses, that are not finite; all rows where only their mean is not."""
    finite = torch.isfinite(losses)
    if bool(finite.all() & torch.isfinite(loss)):  # one wait for the device, not two
        return [], []
    bad = ~finite if not finite.all() else finite
    return index[bad].tolist(), losses[bad].tolist()


def _bad_loss(rows: list[int], losses: list[float], step: int) -> str:
    return f"loss is not finite at step {step}: dataset rows {rows}, losses {losses[:SHOWN]}"
