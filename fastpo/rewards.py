"""Rewards of completions, of functions and of reward models: their weighted sum, checked."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.data import Text
from fastpo.policy_gradient import risk_adjusted
from fastpo.reward_functions import RewardFunction, function_rewards
from fastpo.scoring import RewardModel

RewardSource = RewardFunction | RewardModel | str | Path


class Scored(NamedTuple):
    """Of R completions, fp32 on the CPU.

    Attributes:
        rewards: (R,) the weighted sum.
        parts: name -> (R,) each reward by itself, NaN where it does not apply.
        sigma: (R,) mean deviation of the Gaussian ones; None without such.
    """

    rewards: Tensor
    parts: dict[str, Tensor]
    sigma: Tensor | None


class RewardSum:
    """The weighted sum of rewards.

    Args:
        sources: functions (see `fastpo.reward_functions`), which also get completion_ids, and answer None where they
            do not apply; `RewardModel`s, or the folders or names of such.
        weights: of each; None: 1.
        risk_aversion: kappa; Gaussian rewards count mean - kappa * deviation.
        max_length: in tokens, of prompt and completion before a reward model that is loaded here.
        device: of such a model.

    Raises:
        TypeError, ValueError: no source, one that cannot give rewards, or a risk_aversion without Gaussian rewards.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        weights: Sequence[float] | None = None,
        *,
        risk_aversion: float = 0.0,
        max_length: int | None = None,
        device: Any = None,
    ) -> None:
        if not sources:
            raise ValueError("reward_funcs or reward_model must name at least one reward, got none")
        self.sources: dict[str, RewardFunction | RewardModel] = {}
        for given in sources:
            source = given
            if isinstance(given, str | Path):
                source = RewardModel(given, max_length=max_length, device=device)
            if not callable(source) and not isinstance(source, RewardModel):
                raise TypeError(f"reward_funcs must be functions, RewardModels or paths, got {type(source).__name__}")
            self.sources[_distinct(_name_of(source), self.sources)] = source
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(self.weights) != len(sources):
            raise ValueError(f"reward_weights must have one number per reward, {len(sources)}, got {weights!r}")
        self.risk_aversion = risk_aversion
        if risk_aversion and not any(getattr(source, "gaussian", False) for source in self.sources.values()):
            raise ValueError(
                "risk_aversion needs Gaussian rewards, which a reward model with a Disco head gives: it must be 0 with "
                f"{', '.join(self.sources)}, got {risk_aversion!r}"
            )

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        index: Sequence[int],
    ) -> Scored:
        """Rewards of R completions of as many prompts.

        Args:
            prompts, completions: all text or all messages.
            completion_ids: their tokens, the end-of-sequence token included.
            columns: further columns of the dataset.
            index: numbers of the dataset rows, for errors.

        Raises:
            ValueError: as `function_rewards`, where None is allowed; as `RewardModel.score`; or a completion has no
                reward at all.
        """
        parts, sigmas = {}, []
        for name, source in self.sources.items():
            if isinstance(source, RewardModel):
                try:
                    mean, variance = source.score(prompts, completions)
                except ValueError as error:
                    raise ValueError(f"reward model {name} cannot score: {error}") from error
                if variance is not None:
                    sigmas.append(variance.sqrt())
                    mean = risk_adjusted(mean, variance, self.risk_aversion)
                parts[name] = _checked(mean, name, index)
            else:
                further = {**columns, "completion_ids": list(completion_ids)}
                parts[name] = torch.tensor(function_rewards(source, prompts, completions, further, index, some=True))
        each = torch.stack(list(parts.values()))
        nowhere = each.isnan().all(dim=0)
        if nowhere.any():
            rows = sorted({index[i] for i in nowhere.nonzero().flatten().tolist()})
            raise ValueError(
                f"reward_funcs {', '.join(self.sources)} must give each completion at least one reward, got None alone "
                f"for prompts of dataset rows {rows}"
            )
        total = (each * torch.tensor(self.weights)[:, None]).nansum(dim=0)
        return Scored(total, parts, torch.stack(sigmas).mean(dim=0) if sigmas else None)


def _checked(rewards: Tensor, name: str, index: Sequence[int]) -> Tensor:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"reward model {name} must give finite rewards, got {rewards[bad[0]].item()} for dataset row "
            f"{index[bad[0]]}"
        )
    return rewards


def _name_of(source: Any) -> str:
    if isinstance(source, RewardModel):
        return Path(source.model.config._name_or_path).name or "reward_model"
    return getattr(source, "__name__", type(source).__name__)


def _distinct(name: str, taken: Any) -> str:
    numbered = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate not in taken)
