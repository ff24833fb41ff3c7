"""`PPOTrainingArguments`: what `PPOTrainer` reads, its own fields and what all stages have."""

import dataclasses
import math
from dataclasses import dataclass

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.config import PreferenceConfig, option
from fastpo.generation import Sampling
from fastpo.policy_gradient import GROUP_ADVANTAGES, KL_ESTIMATORS

ADVANTAGES = (*GROUP_ADVANTAGES, "gae")
# Fields of the objective that stage ppo reads; the others are about pairs.
OBJECTIVE_READ = ("beta", "beta_mode", "beta_schedule", "add_beta_head", "beta_head_config")
# Of other stages, or not there yet: name -> why.
REFUSED = {
    "padding_free": "statistics of tokens are of padded rows",
    "prefix_sharing": "it belongs to stage dpo",
    "split_responses": "it belongs to stage dpo",
    "precompute_ref_log_probs": "completions are not known before they are drawn",
    "precompute_ref_batch_size": "it belongs to stage dpo",
    "reference_cache_dir": "it belongs to stage dpo",
    "pad_to_multiple_of": "completions are padded to the longest of a batch",
    "dataset_num_proc": "prompts are tokenised by one process",
    "neftune_noise_alpha": "ratios would be to a policy without the noise",
    "auto_find_batch_size": "a batch holds whole groups of num_generations completions",
    "fsdp": "generate does not work on a model in parts",
}

# As `objective_fields`: the fields of the frozen `Sampling`, laid out for arguments that are not frozen.
SamplingFields = dataclasses.make_dataclass(
    "SamplingFields",
    [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(Sampling)],
)


@dataclass
class PPOFields(SamplingFields):  # type: ignore[misc, valid-type]
    """What stage ppo does, beside the objective: the arguments of `PPOTrainingArguments` that are its own.

    Raises:
        ValueError: a field is out of its range, or read by nothing.
    """

    num_generations: int = option(8, "Completions of each prompt in a step, which are compared with one another.")
    max_prompt_length: int | None = option(
        None, "A prompt keeps its last so many tokens; default: what max_completion_length leaves of max_length."
    )
    num_iterations: int = option(1, "Optimiser steps on the same completions.")
    advantage: str = option(
        "rloo", "Against what a completion is judged: rloo, grpo (others of its prompt), gae (a value head)."
    )
    epsilon: float = option(0.2, "How far a token's probability ratio moves down before it is clipped.")
    epsilon_high: float | None = option(None, "How far up; default: epsilon.")
    gamma: float = option(1.0, "Discount per token, of advantage gae.")
    lam: float = option(0.95, "lambda of advantage gae.")
    vf_coef: float = option(0.1, "Weight of the value head's loss, with advantage gae.")
    cliprange_value: float | None = option(
        None, "With advantage gae: how far a value counts to have moved since the completions were drawn; none: freely."
    )
    kl_estimator: str = option("k1", "KL to the reference per token: k1 (log pi - log ref), or k3 (never negative).")
    kl_target: float | None = option(
        None, "With beta_mode dynamic_scaling: train s(x) until each prompt has this KL; none: s(x) is frozen."
    )
    risk_aversion: float = option(0.0, "kappa: of Gaussian rewards count mean - kappa * deviation.")
    reward_model: str | None = option(None, "Folder or repository of a reward model.")
    reward_funcs: list[str] | None = option(
        None, "Functions that give rewards: package.module:function, or file.py:function."
    )
    reward_weights: list[float] | None = option(
        None, "Weights of the rewards in their sum, the reward model's first; default: 1 each."
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that did not come to their end out of the loss."
    )
    use_vllm: bool = option(False, "Not there yet: completions are drawn by transformers' generate.")

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # one name in a recipe
            self.reward_funcs = [self.reward_funcs]
        _ = self.sampling  # which raises where the fields are out of range
        if self.use_vllm:
            raise ValueError(
                "use_vllm must be False: completions are drawn by transformers' generate; vLLM would need the new "
                "weights after every step, which fastpo does not hand on yet"
            )
        for name in ("num_generations", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        for name, choices in (("advantage", ADVANTAGES), ("kl_estimator", KL_ESTIMATORS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.advantage != "gae":
            if self.num_generations < 2:
                raise ValueError(
                    f"num_generations must be >= 2 with advantage={self.advantage!r}, which compares the completions "
                    f"of a prompt, got {self.num_generations}"
                )
            for name in ("gamma", "lam", "vf_coef", "cliprange_value"):
                self._check_default(name, "advantage='gae'")
        sources = len(self.reward_funcs or []) + (self.reward_model is not None)
        if self.reward_weights is not None and sources and len(self.reward_weights) != sources:
            raise ValueError(f"reward_weights must have one number per reward, {sources}, got {self.reward_weights!r}")

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})

    def _check_default(self, name: str, owner: str) -> None:
        field = next(f for f in dataclasses.fields(self) if f.name == name)
        if getattr(self, name) != field.default:
            raise ValueError(f"{name} is read with {owner} alone: leave it at its default, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        positive = ("epsilon", "epsilon_high", "kl_target", "cliprange_value")
        for name in (*positive, "vf_coef", "risk_aversion"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > 0 if name in positive else value >= 0)):
                least = "> 0" if name in positive else ">= 0"
                raise ValueError(f"{name} must be a finite number {least}, got {value!r}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be >= 1, got {self.max_prompt_length!r}")
        weights = self.reward_weights
        if weights is not None and not (isinstance(weights, list | tuple) and all(map(math.isfinite, weights))):
            raise ValueError(f"reward_weights must be a list of finite numbers, got {weights!r}")
        if self.epsilon >= 1:
            raise ValueError(f"epsilon must be < 1, got {self.epsilon!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")


def check_ppo_objective(objective: PreferenceConfig, fields: PPOFields) -> None:
    """Raise ValueError where the objective has what stage ppo does not read, or ppo what needs another objective."""
    for field in dataclasses.fields(PreferenceConfig):
        if field.name not in OBJECTIVE_READ and getattr(objective, field.name) != field.default:
            raise ValueError(
                f"{field.name} is not used in stage ppo: leave it at its default, "
                f"got {getattr(objective, field.name)!r}"
            )
    if fields.kl_target is not None and objective.beta_mode != "dynamic_scaling":
        raise ValueError(
            "kl_target trains s(x): it must be None without beta_mode='dynamic_scaling', got "
            f"{fields.kl_target!r} with beta_mode={objective.beta_mode!r}"
        )


@dataclass
class PPOTrainingArguments(PPOFields, PreferenceTrainingArguments):
    """Arguments of `PPOTrainer`: those of `PreferenceTrainingArguments`, and those of `PPOFields`.

    ``per_device_train_batch_size`` counts completions, as in TRL.

    Raises:
        TypeError, ValueError: as both; a field of the former that this stage does not read.
    """

    stage: str = option("ppo", "What is trained: ppo.")

    def __post_init__(self) -> None:
        PPOFields.__post_init__(self)
        PreferenceTrainingArguments.__post_init__(self)
        if self.stage != "ppo":
            raise ValueError(f"stage must be ppo for PPOTrainingArguments, got {self.stage!r}")
        check_ppo_objective(self.preference_config, self)
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} must be unset in stage ppo ({reason}), got {getattr(self, name)!r}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be random or sequential in stage ppo, got "
                f"{self.train_sampling_strategy!r}"
            )
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size counts completions and must be a multiple of num_generations="
                f"{self.num_generations}, got {self.per_device_train_batch_size}"
            )
        prompt = self.max_prompt_length or 1
        if self.max_length is not None and prompt + self.max_completion_length > self.max_length:
            raise ValueError(
                f"max_length must have room for a prompt ({prompt} tokens) and a completion "
                f"(max_completion_length={self.max_completion_length}), got {self.max_length}"
            )

    @property
    def prompt_limit(self) -> int | None:
        """The last so many tokens that a prompt keeps; None: all."""
        if self.max_prompt_length is not None or self.max_length is None:
            return self.max_prompt_length
        return self.max_length - self.max_completion_length
