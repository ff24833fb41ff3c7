"""LLaMA-Factory's reward trainer with fastpo's losses, a Disco head, and no logits."""

from types import MethodType
from typing import Any

import torch
from llamafactory.train.rm.trainer import PairwiseTrainer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastpo.architecture import add_heads, heads_of
from fastpo.backbone import causal_lm
from fastpo.callbacks import Meter
from fastpo.integrations.llamafactory.batches import check_text, preference_batch
from fastpo.reward_model import last_attended
from fastpo.stages import rm_stage


class StatsRewardTrainer(PairwiseTrainer):
    """`PairwiseTrainer`, the objective being `finetuning_args.preference_config`; arguments are the same.

    With a Disco head in use its mean is the reward, and the value head, which LLaMA-Factory and TRL read, is saved as a
    copy of it.

    Raises:
        ValueError: model and objective do not fit together; before any training.
    """

    def __init__(self, finetuning_args: Any, processor: Any, model: Any, **kwargs: Any) -> None:
        check_text(processor)
        self.objective = add_heads(
            model.pretrained_model, None, finetuning_args.preference_config, finetuning_args.heads_source
        )
        self._head = heads_of(model.pretrained_model)["disco_head"] if "disco" in self.objective.comparisons else None
        if self._head is not None:
            model.v_head.requires_grad_(False)
        self._meters = {"train": Meter(), "eval": Meter()}
        super().__init__(finetuning_args, processor, model=model, **kwargs)
        _install_reward_forward(self.model, self._head is not None)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The mean loss of a collated batch; with `return_outputs` also (loss, chosen scores, rejected scores)."""
        batch = preference_batch(inputs)
        found = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            completion_mask=batch["completion_mask"],
        )
        chosen, rejected = found["mean"].float().chunk(2)
        variances = (None, None) if found.get("variance") is None else found["variance"].chunk(2)
        output = rm_stage(
            chosen, rejected, self.objective, chosen_variance=variances[0], rejected_variance=variances[1]
        )
        self._meters["train" if model.training else "eval"].add(output.metrics, 1)
        return (output.loss, (output.loss, chosen, rejected)) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        split, prefix = ("train", "") if "loss" in logs else ("eval", "eval_")
        found = self._meters[split].collect(self.accelerator)
        self._meters[split] = Meter()
        logs.update({f"{prefix}{name}": value for name, value in found.items()})
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._head is not None and state_dict is None:
            with torch.no_grad():
                value = self.model.v_head.summary
                value.weight.copy_(self._head.linear.weight[:1])
                value.bias.copy_(self._head.linear.bias[:1])
        super()._save(output_dir, state_dict)


def _install_reward_forward(model: Any, disco: bool) -> None:
    """Teach a causal LM with a value head to answer a `completion_mask` with rewards (2B,) at the last tokens."""
    model._plain_forward, model._disco = model.forward, disco
    model.forward = MethodType(_forward, model)


def _forward(self: Any, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
    if completion_mask is None:
        return self._plain_forward(*args, **kwargs)
    lm = causal_lm(self.pretrained_model)
    hidden = lm.base_model(**kwargs, use_cache=False)[0]
    rows, last = torch.arange(len(hidden), device=hidden.device), last_attended(kwargs["attention_mask"])
    if not self._disco:
        return ModelOutput(mean=self.v_head(hidden).squeeze(-1)[rows, last])
    mean, variance = lm.disco_head(hidden[rows, last])
    return ModelOutput(mean=mean, variance=variance)
