"""LLaMA-Factory's DPO trainer with the loss computed from statistics, never from logits."""

from typing import Any

from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor, nn
from transformers import Trainer

from fastpo.adapters import check_adapter
from fastpo.architecture import add_heads
from fastpo.backbone import causal_lm, install_stats_forward
from fastpo.callbacks import Memory, Meter, RunawayBeta
from fastpo.integrations.llamafactory.batches import check_text, preference_batch
from fastpo.lm_head import head_shape
from fastpo.loading import keep_statistics_exact
from fastpo.objective_trainer import TrainsObjective
from fastpo.reference_model import Reference
from fastpo.types import AnySequenceStats, ExtendedSequenceStats


class StatsDPOTrainer(TrainsObjective, CustomDPOTrainer):
    """`CustomDPOTrainer`, the objective being `finetuning_args.preference_config`; arguments are the same.

    Raises:
        ValueError: model and objective do not fit together; before any training.
    """

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any, **kwargs: Any) -> None:
        check_text(processor)
        if ref_model is model and finetuning_args.preference_config.beta_mode == "dynamic_scaling":
            raise ValueError("ref_model must be given to evaluate without training: the Beta head reads the reference")
        self.objective = add_heads(model, ref_model, finetuning_args.preference_config, finetuning_args.heads_source)
        self.vocab_size, _ = head_shape(causal_lm(model))
        self.reference = Reference(self.objective, "dpo")
        below_adapter = finetuning_args.use_ref_model and ref_model is None
        check_adapter(model, is_reference=below_adapter, always=True)
        self._meters = {"train": Meter(), "eval": Meter()}
        if ref_model is not None:
            install_stats_forward(ref_model)
        super().__init__(model, ref_model, finetuning_args, processor, **kwargs)
        self.reference.model = self.ref_model
        # After the Trainer, which may replace the forward itself (use_liger_kernel), and before it wraps the model.
        install_stats_forward(self.model)
        keep_statistics_exact(self.accelerator)
        for callback in (Memory(), RunawayBeta(self)):
            self.add_callback(callback)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a collated batch, and metrics under the names that are logged."""
        output = self.preference_output(model, preference_batch(batch))
        prefix = "eval_" if train_eval == "eval" else ""
        return output.loss, {f"{prefix}{name}": value for name, value in output.metrics.items()}

    def as_read(self, reference: AnySequenceStats) -> AnySequenceStats:
        """LLaMA-Factory's ld_alpha discounts the policy's tokens alone: to the reference all count as shared."""
        if self.objective.ld_alpha is None:
            return reference
        return ExtendedSequenceStats(
            reference.logps, reference.lengths, reference.entropy, shared_logps=reference.logps
        )

    def store_metrics(self, metrics: dict[str, Tensor], train_eval: str = "train") -> None:
        self._meters[train_eval].add(metrics, 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        split = "train" if "loss" in logs else "eval"
        logs.update(self._meters[split].collect(self.accelerator))
        self._meters[split] = Meter()
        Trainer.log(self, logs, *args, **kwargs)
