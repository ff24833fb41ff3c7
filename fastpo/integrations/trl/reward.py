"""TRL's `RewardTrainer` and `RewardConfig` with fastpo's objectives of a reward model, Gaussian rewards among them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import trl
from torch import Tensor, nn
from trl.trainer.utils import get_config_model_id

from fastpo.architecture import add_reward_head, check_optimizer, without_heads
from fastpo.arguments import objective_fields, read_objective
from fastpo.backbone import causal_lm
from fastpo.checkpoints import LoadsHeads
from fastpo.config import PreferenceConfig
from fastpo.loss_inputs import check_reward_config
from fastpo.reward_model import answers_by_head, check_reward_model, install_reward_forward
from fastpo.stages import rm_stage
from fastpo.types import LossOutput

REWARD_FIELDS = (
    *("pref_loss_type", "add_disco_head", "home_advantage", "label_smoothing"),
    *("variance_floor", "disco_prior_weight"),
)
_RewardFields = objective_fields("RewardFields", REWARD_FIELDS)


@dataclass
class RewardConfig(_RewardFields, trl.RewardConfig):  # type: ignore[misc, valid-type]
    """`trl.RewardConfig` and, from `PreferenceConfig`, what a reward model's objective is made of.

    Further arguments: pref_loss_type (``sigmoid``: TRL's loss; ``disco``: Gaussian rewards; another function of the
    margin; or a dictionary of such and their weights), add_disco_head, home_advantage, label_smoothing, variance_floor,
    disco_prior_weight.

    Raises:
        TypeError, ValueError: as `PreferenceConfig`, or a pref_loss_type that no reward model can have.
    """

    def __post_init__(self) -> None:
        _ = self.preference_config  # which raises where the fields state none
        super().__post_init__()

    @property
    def preference_config(self) -> PreferenceConfig:
        """The objective that the fields state now, also where they were set after construction.

        Raises:
            TypeError, ValueError: as the class.
        """
        objective = read_objective(self, REWARD_FIELDS)
        check_reward_config(objective)
        return objective


class RewardTrainer(LoadsHeads, trl.RewardTrainer):
    """`trl.RewardTrainer` with the same arguments, datasets and metrics, and the objectives of `RewardConfig`.

    The loss is `fastpo.reward_model_loss`, with ``margin`` and `center_rewards_coefficient` as in TRL; by default it is
    TRL's. With ``pref_loss_type="disco"`` the Disco head answers for the model's ``score``, which is then not trained:
    rewards are its means, and TRL's metrics are of these. A Disco head is saved beside the model or adapter; from a
    folder, or the repository of a model on the hub, that holds one it is loaded.

    Args:
        model, args and all others: as in `trl.RewardTrainer`; args a `RewardConfig` of this module.

    Raises:
        TypeError, ValueError: as `trl.RewardTrainer`, or args, model and objective do not fit together.
    """

    _tag_names: ClassVar[list[str]] = [*trl.RewardTrainer._tag_names, "fastpo"]

    def __init__(self, model: Any, args: RewardConfig | None = None, *others: Any, **named: Any) -> None:
        source = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = RewardConfig(f"{source.split('/')[-1]}-Reward")
        if not isinstance(args, RewardConfig):
            raise TypeError(f"args must be fastpo's RewardConfig, got {type(args).__module__}.{type(args).__name__}")
        self.objective = args.preference_config
        if isinstance(model, str):
            super().__init__(model, args, *others, **named)
        else:
            with without_heads(model):  # which an adapter on all linear layers would take for layers
                super().__init__(model, args, *others, **named)
        if self.objective.add_disco_head:
            check_reward_model(self.model)
        add_reward_head(self.model, self.objective, source)
        check_optimizer(self.optimizer, self.model)
        if "disco" in self.objective.comparisons:
            # Without a part in the loss, a trainable parameter would stop DistributedDataParallel.
            causal_lm(self.model).score.requires_grad_(False)
            install_reward_forward(self.model)
        elif answers_by_head(self.model):
            raise ValueError(
                "model answers with its Disco head, which only pref_loss_type='disco' trains: load it anew"
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL runs the model and takes its metrics of the rewards; the loss is made of them anew."""
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        output = self.loss_output(outputs, inputs.get("margin"))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("variance/mean", "disco/prior"):
            if name in output.metrics:
                metrics[name].append(self.accelerator.gather(output.metrics[name]).mean().item())
        return (output.loss, outputs) if return_outputs else output.loss

    def loss_output(self, outputs: Any, margin: Tensor | None = None) -> LossOutput:
        """The objective's `LossOutput` of what the model answered for B chosen, then B rejected sequences."""
        chosen, rejected = outputs["logits"].squeeze(-1).chunk(2)
        variance = outputs.get("variance")
        variances = (None, None) if variance is None else variance.chunk(2)
        return rm_stage(
            chosen, rejected, self.objective, chosen_variance=variances[0], rejected_variance=variances[1],
            margin=margin, center_rewards_coefficient=self.args.center_rewards_coefficient,
        )  # fmt: skip
