"""What TRL logs of a batch of pairs and fastpo does not, or counts otherwise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpo.config import PreferenceConfig
from fastpo.scores import desensitized
from fastpo.types import AnySequenceStats, LossOutput

# What `trl_metrics` reads beside log-probs and entropy: fields of `Wanted`.
FURTHER_STATISTICS = ("top1", "mean_logits")


@torch.no_grad()
def trl_metrics(output: LossOutput, policy: AnySequenceStats, objective: PreferenceConfig) -> dict[str, Tensor]:
    """Metrics under TRL's names, as TRL counts them: rewards and log-probs are sums over a response's tokens.

    Args:
        output: of the objective, for B pairs.
        policy: statistics of the 2B rows under the policy, the chosen ones first, `FURTHER_STATISTICS` among them.
        objective: what `output` is of.
    """
    chosen, rejected = policy.split()
    rewards, other = output.chosen_rewards, output.rejected_rewards
    if objective.per_token:
        rewards, other = rewards * chosen.lengths.clamp(min=1), other * rejected.lengths.clamp(min=1)
    margins = rewards - other
    return {
        "rewards/chosen": rewards.mean(),
        "rewards/rejected": other.mean(),
        "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": desensitized(chosen, objective.ld_alpha).mean(),
        "logps/rejected": desensitized(rejected, objective.ld_alpha).mean(),
        "entropy": (policy.entropy * policy.lengths).sum() / policy.lengths.sum().clamp(min=1),
        "mean_token_accuracy": _per_token(chosen, "top1"),
        "logits/chosen": _per_token(chosen, "mean_logits"),
        "logits/rejected": _per_token(rejected, "mean_logits"),
    }


def _per_token(side: AnySequenceStats, name: str) -> Tensor:
    return getattr(side, name).sum() / side.lengths.sum().clamp(min=1)


def tokens_in(batch: Mapping[str, Tensor]) -> Tensor:
    """() int64 tokens of a batch without its padding; a prompt counts for each of its responses, as in TRL."""
    if "paths" not in batch:
        return batch["attention_mask"].sum()
    prompt_start, prompt_end, start, end = batch["paths"].unbind(1)
    return (prompt_end - prompt_start + end - start).sum()


class TokenCount(TrainerCallback):
    """Counts the tokens trained on by this process, on from the last log of the run that is resumed."""

    def __init__(self) -> None:
        self.before, self.seen = 0, torch.zeros((), dtype=torch.int64)

    def add(self, batch: Mapping[str, Tensor]) -> None:
        seen = tokens_in(batch)
        self.seen = self.seen.to(seen.device) + seen

    def total(self, accelerator: Any) -> int:
        """Over all processes; every process must call it."""
        return self.before + int(accelerator.reduce(self.seen.to(accelerator.device), "sum"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self.before, self.seen = logged[-1] if logged else 0, torch.zeros((), dtype=torch.int64)
