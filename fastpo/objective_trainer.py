"""What any `transformers.Trainer` needs to train a preference objective from statistics: a class to put before it."""

from typing import Any

import torch
from torch import Tensor, nn

from fastpo.architecture import heads_of
from fastpo.backbone import Wanted, model_stats
from fastpo.callbacks import Memory
from fastpo.checkpoints import LoadsHeads
from fastpo.config import PreferenceConfig
from fastpo.reference_model import Reference
from fastpo.regularizers import label_confidence
from fastpo.schedules import RunningMeans, scheduled_beta
from fastpo.stages import dpo_stage
from fastpo.types import AnySequenceStats, LossOutput, StepTotals


class TrainsObjective(LoadsHeads):
    """The preference loss of a batch, the heads' optimiser group, and the heads in checkpoints.

    The Trainer must have the callback `Memory`, and its models the forward of `install_stats_forward`.

    Attributes:
        objective: what is optimised.
        reference: where the reference's statistics come from.
        vocab_size: rows of the LM head.
        further_statistics: fields of `Wanted` that `further_metrics` reads.
    """

    objective: PreferenceConfig
    reference: Reference
    vocab_size: int
    further_statistics: tuple[str, ...] = ()

    def preference_output(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        totals: StepTotals | None = None,
        *,
        one_side_at_a_time: bool = False,
    ) -> LossOutput:
        """The `LossOutput` of stage dpo for a `PreferenceBatch` on the model's device.

        Args:
            model: the model as the Trainer calls it.
            inputs: the batch.
            totals: what to divide by; None: this batch alone.
            one_side_at_a_time: as in `Wanted`.
        """
        objective, dynamic = self.objective, self.objective.beta_mode == "dynamic_scaling"
        lacking = self.reference.lacking(inputs)
        stats, prompt = self.reference.known(inputs)
        # A policy with an adapter answers for the reference in its own forward.
        inside = lacking.pairs and self.reference.model is None
        if inside:
            self.reference.check_adapter(self.accelerator.unwrap_model(model), lacking)
        elif lacking:
            output = self.reference.ask(model, self.accelerator.unwrap_model(model), inputs, lacking)
            stats, prompt = output.sequence_stats() if lacking.pairs else stats, prompt | output.prompt_features()
        wanted = Wanted(
            shared_logps=objective.ld_alpha is not None,
            log_sum_sq_probs=objective.use_weighting,
            variance="disco" in objective.comparisons,
            reference=inside,
            prompt=lacking.features if inside else (),
            prompt_rows=len(inputs["index"]),
            log_s=dynamic,
            one_side_at_a_time=one_side_at_a_time,
            **dict.fromkeys(self.further_statistics, True),
        )
        policy = model_stats(model, inputs, wanted, prompt or None)
        if inside:
            stats, prompt = policy.reference_stats(), prompt | policy.prompt_features()
        head = heads_of(self.accelerator.unwrap_model(model))["beta_head"] if dynamic else None
        confidence = None
        if "score_chosen" in inputs and "score_rejected" in inputs:
            confidence = label_confidence(inputs["score_chosen"], inputs["score_rejected"])
        policy_stats = policy.sequence_stats()
        found = dpo_stage(
            policy_stats, None if stats is None else self.as_read(stats), objective,
            vocab_size=self.vocab_size, beta=self.base_beta(), log_s=policy.log_s, variance=policy.variance,
            context_scale=inputs.get("context_scale"), pair_weight=inputs.get("pair_weight"),
            prompt_entropy=prompt.get("entropy"), confidence=confidence,
            features=None if head is None else head.features(**{name: prompt[name] for name in head.config.features}),
            totals=totals,
            # What evaluation sees is not remembered.
            state=self.running_means if model.training else dict(self.running_means),
        )  # fmt: skip
        return found._replace(metrics=found.metrics | self.further_metrics(found, policy_stats, inputs))

    def further_metrics(
        self, output: LossOutput, policy: AnySequenceStats, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Metrics of a batch beside the objective's, or in their place; `policy` has the chosen rows first."""
        return {}

    def as_read(self, reference: AnySequenceStats) -> AnySequenceStats:
        """The reference's statistics as the objective reads them; another library may read them otherwise."""
        return reference

    @property
    def running_means(self) -> RunningMeans:
        """What regularisers and batch beta remember; checkpoints keep it."""
        return next(callback.means for callback in self.callback_handler.callbacks if isinstance(callback, Memory))

    def base_beta(self) -> float:
        """beta at this step: `beta`, or what `beta_schedule` says; after training its last value."""
        if self.objective.beta_schedule is None:
            return self.objective.beta
        done = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 1.0
        return scheduled_beta(self.objective.beta_schedule, done)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a parameter group of its own for the Beta head.

        Raises:
            ValueError: no parameter of the model trains.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model must have parameters that train, got none, as of a model loaded from the folder of an adapter: "
                "merge that one (a recipe: its model, and the adapter under merge_adapters), or load it with PEFT's "
                "is_trainable=True"
            )
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        head = heads_of(self.model).get("beta_head")
        parameters = [] if head is None else [p for p in head.parameters() if p.requires_grad]
        if made_here and head is not None and parameters:
            own = {id(parameter) for parameter in parameters}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rate = self.args.learning_rate * head.config.lr_multiplier
            # No decay: what pulls s(x) towards 1 are the regularisers.
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer
