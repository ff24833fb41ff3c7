"""What the trainers of all stages share: guarded steps, metrics between logs, cards, whole checkpoints."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.adapters import without_reference_adapter
from fastpo.arguments import PreferenceTrainingArguments
from fastpo.callbacks import EarlierLoss, Memory, Meter
from fastpo.checkpoints import AtomicTrainer
from fastpo.loading import keep_statistics_exact
from fastpo.model_card import write_model_card
from fastpo.nonfinite import StepGuard, check_loss
from fastpo.objective_trainer import TrainsObjective
from fastpo.trackers import show_beta_histograms
from fastpo.types import LossOutput, StepTotals

logger = logging.getLogger(__name__)


class StageTrainer(TrainsObjective, AtomicTrainer):
    """A `transformers.Trainer` whose losses are `LossOutput`s.

    A subclass computes a `LossOutput` in its `compute_loss` and hands it to `watched_loss`.

    Args:
        args: `PreferenceTrainingArguments`.
        named: as in `transformers.Trainer`.
    """

    args: PreferenceTrainingArguments
    train_dataset: Any
    eval_dataset: Any
    dataset_name: str | None = None  # for model cards: a dataset of the hub, or a file
    _tag_names: tuple[str, ...] = ()

    def __init__(self, *, args: PreferenceTrainingArguments, **named: Any) -> None:
        self._meters = {"train": Meter(), "eval": Meter()}
        super().__init__(args=args, **named)
        if args.skip_nonfinite_steps and self.is_deepspeed_enabled:
            raise ValueError("skip_nonfinite_steps must be False with DeepSpeed, which steps by itself, got True")
        self._guard = StepGuard(self, args.skip_nonfinite_steps)
        for callback in (EarlierLoss(self), Memory(), self._guard):
            self.add_callback(callback)
        keep_statistics_exact(self.accelerator)

    # --- loss -------------------------------------------------------------------------------------------------------

    def watched_loss(self, model: nn.Module, output: LossOutput, index: Tensor) -> Tensor:
        """The loss () to differentiate, of the dataset rows index (B,), with the metrics noted for the next log.

        Raises:
            FloatingPointError: it is not finite; in training that is said when the step would be made.
        """
        # With DeepSpeed the backward pass makes the step: too late for the guard.
        if model.training and not self.is_deepspeed_enabled:
            loss = self._guard.watch(output, index)
        else:
            if model.training or not self.args.skip_nonfinite_steps:
                check_loss(output, index, self.state.global_step)
            loss = output.loss
        self._meters["train" if model.training else "eval"].add(output.metrics, len(index))
        return loss

    def step_totals(self, rows: int, tokens: Any, device: torch.device) -> StepTotals:
        """What an optimiser step averages over, given what this process has of it; see `StepTotals`."""
        counts = torch.tensor([rows, tokens], dtype=torch.float64, device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "mean")
        rows_total, tokens_total = counts.clamp(min=1e-9).float()
        return StepTotals(rows_total, tokens_total)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, in which every process sees a step gone wrong; None of a step that was skipped."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.is_deepspeed_enabled:
            return norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        return norm if self._guard.passes(model, norm) else None

    def forget_metrics(self, batches: int) -> None:
        """Leave the last so many training batches out of the logged means."""
        self._meters["train"].forget(batches)

    # --- evaluation and logging -------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._meters["eval"] = Meter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._meters["eval"].collect(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meters["train"].collect(self.accelerator))
            self._meters["train"] = Meter()
            if self.args.skip_nonfinite_steps:
                logs["skipped_steps"] = self._guard.skipped_steps
        show_beta_histograms(self.callback_handler.callbacks, self.base_beta())
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write output_dir/README.md, as `push_to_hub` does; see `fastpo.model_card`. Arguments as in TRL."""
        if self.is_world_process_zero():
            given = [tags] if isinstance(tags, str) else tags or []
            write_model_card(self, model_name, dataset_name or self.dataset_name, [*self._tag_names, *given])

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_reference_adapter(self.model):
            super()._save(output_dir, state_dict)


def use_one_gpu(args: Any) -> None:
    """A process drives one GPU: several would be torch's DataParallel."""
    if args.n_gpu > 1:
        logger.warning("One process drives one GPU here: using the first of %d. See `accelerate launch`.", args.n_gpu)
        args._n_gpu = 1


def check_vocabulary(tokenizer: Any, embeddings: int) -> None:
    """Raise ValueError for a tokenizer without an end-of-sequence token, or with more tokens than the model has."""
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class must have an eos_token, got None")
    if len(tokenizer) > embeddings:
        raise ValueError(f"processing_class has {len(tokenizer)} tokens, more than the model's {embeddings} embeddings")
