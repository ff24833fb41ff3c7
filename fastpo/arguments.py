"""`PreferenceTrainingArguments`: transformers' TrainingArguments, the objective's fields, and the stage's."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from fastpo.config import PROMPT_FEATURES, PreferenceConfig, option
from fastpo.loss_inputs import check_reward_config
from fastpo.stages import HEAD_STAGES, STAGES

_DICTIONARIES = ("pref_loss_type", "beta_head_config", "regularizers", "beta_schedule")


# PreferenceConfig is frozen and TrainingArguments is not, so the one cannot inherit from the other: its fields are
# laid out again here, in one place, from the same definition.
def objective_fields(class_name: str, names: tuple[str, ...]) -> type:
    """A dataclass of those fields of `PreferenceConfig`, for training arguments to inherit from."""
    fields = [f for f in dataclasses.fields(PreferenceConfig) if f.name in names]
    return dataclasses.make_dataclass(
        class_name,
        [
            # A dictionary comes from the command line as JSON text.
            (
                f.name,
                dict | str | None if f.name in _DICTIONARIES else f.type,
                dataclasses.field(default=f.default, metadata=f.metadata),
            )
            for f in fields
        ],
    )


OBJECTIVE_NAMES = tuple(f.name for f in dataclasses.fields(PreferenceConfig))
ObjectiveFields = objective_fields("ObjectiveFields", OBJECTIVE_NAMES)


@dataclass
class PreferenceTrainingArguments(ObjectiveFields, TrainingArguments):  # type: ignore[misc, valid-type]
    """Arguments of `PreferenceTrainer` and `RewardTrainer`: everything of `transformers.TrainingArguments`, the fields
    of `PreferenceConfig`, flat and under the same names, and those below.

    Raises:
        TypeError, ValueError: as `PreferenceConfig`, or an unknown stage.
    """

    stage: str = option("dpo", "What is trained: sft (chosen responses), rm (a reward model), dpo (preferences), ppo.")
    max_length: int | None = option(1024, "Longest prompt + completion, in tokens; none: no limit.")
    disable_dropout: bool = option(True, "Set the model's dropout to 0, so that policy and reference compare.")
    skip_bad_rows: bool = option(False, "Leave unusable rows out, naming them, instead of stopping.")
    skip_nonfinite_steps: bool = option(False, "Skip a step whose loss or gradient is NaN or infinite, not stop at it.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise.")
    padding_free: bool = option(False, "Lay a batch's sequences end to end in one row, without padding.")
    prefix_sharing: bool | None = option(
        None, "Run each prompt once for both its responses. Default: where that saves an eighth of a batch's tokens."
    )
    pad_to_multiple_of: int | None = option(None, "Pad a batch's rows to a multiple of so many tokens.")
    split_responses: bool = option(
        False, "Hold the activations of the chosen or of the rejected responses, never both, for one more forward."
    )
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's statistics before training, keep them on disk, and free the reference."
    )
    precompute_ref_batch_size: int | None = option(None, "Pairs at once for it; default: per_device_eval_batch_size.")
    reference_cache_dir: str | None = option(
        None, "Where they are kept and looked for; default: fastpo/reference in the Hugging Face cache."
    )
    center_rewards_coefficient: float | None = option(
        None, "Stage rm: weight of the mean of (r_chosen + r_rejected)^2, which keeps rewards around 0."
    )
    # Where transformers' defaults do not suit preference training.
    learning_rate: float = option(1e-6, "The initial learning rate; about ten times more with LoRA.")
    logging_steps: float = option(10, "Log every so many steps, or this fraction of them.")
    remove_unused_columns: bool = option(False, "Kept off: the collator picks its columns.")

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        for name, least in (("max_length", 2), ("pad_to_multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer >= {least}, or None, got {value!r}")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(f"precompute_ref_batch_size must be >= 1, got {self.precompute_ref_batch_size!r}")
        if self.pad_to_multiple_of and (self.padding_free or self.prefix_sharing):
            raise ValueError("pad_to_multiple_of must be None where padding_free or prefix_sharing leave no padding")
        if self.neftune_noise_alpha and (self.padding_free or self.prefix_sharing):
            raise ValueError(
                "neftune_noise_alpha scales noise by the length of a row: it must be None where padding_free or "
                f"prefix_sharing lay several sequences in one, got {self.neftune_noise_alpha!r}"
            )
        if self.prefix_sharing and self.split_responses:
            raise ValueError("prefix_sharing=True needs both responses at once: split_responses must be False")
        self._check_stage()
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0 here (the objective has label_smoothing), "
                f"got {self.label_smoothing_factor!r}"
            )
        _ = self.preference_config  # which raises where the fields state none
        # The batch has no field of the name `labels`; None would have the Trainer guess from the model's forward.
        self.label_names: list[str] = []
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for; torch warns at every loader
        super().__post_init__()

    def _check_stage(self) -> None:
        """What is asked for exists in the stage."""
        if self.stage != "dpo":
            for name in ("prefix_sharing", "split_responses", "precompute_ref_log_probs"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to stage dpo, got stage={self.stage!r}")
        if self.stage == "rm" and self.padding_free:
            raise ValueError("padding_free must be False in stage rm, whose rows are padded, got True")
        weight = self.center_rewards_coefficient
        if weight is not None and self.stage != "rm":
            raise ValueError(f"center_rewards_coefficient belongs to stage rm, got stage={self.stage!r}")
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"center_rewards_coefficient must be >= 0 and finite, or None, got {weight!r}")

    @property
    def preference_config(self) -> PreferenceConfig:
        """The objective that the fields state now, also where they were set after construction.

        Raises:
            TypeError, ValueError: as the class.
        """
        return build_objective(self, self.stage)


def read_objective(fields: Any, names: tuple[str, ...] = OBJECTIVE_NAMES) -> PreferenceConfig:
    """The objective that flat fields of some names state; dictionaries given as JSON are parsed in place.

    Raises:
        TypeError, ValueError: as `PreferenceConfig`.
    """
    for name in (name for name in _DICTIONARIES if name in names):
        value = getattr(fields, name)
        if name != "pref_loss_type" or str(value).lstrip().startswith("{"):
            setattr(fields, name, parse_dict(name, value))
    return PreferenceConfig(**{name: getattr(fields, name) for name in names})


def build_objective(fields: Any, stage: str) -> PreferenceConfig:
    """`read_objective` of all its fields, for a stage.

    Raises:
        TypeError, ValueError: as `PreferenceConfig`; or a head, regularisers or another field that stage or beta_mode
            cannot use.
    """
    objective = read_objective(fields)
    for name, stages in HEAD_STAGES.items():
        if getattr(objective, f"add_{name}") and stage not in stages:
            there = ", ".join(other for other in stages if other in STAGES)
            raise ValueError(f"add_{name} belongs to stage {there}, got stage={stage!r}")
    if stage == "rm":
        check_reward_config(objective)
    if objective.regularizers and objective.beta_mode != "dynamic_scaling":
        raise ValueError(
            f"regularizers act on a learned beta: they must be None with beta_mode={objective.beta_mode!r}, "
            f"got {objective.regularizers!r}"
        )
    return objective


def parse_dict(name: str, value: Any) -> dict | None:
    """A dictionary, from a recipe as it is or from the command line as JSON."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("", "none", "null"):
        return None
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a dictionary in JSON, got {value!r}: {error.msg}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a dictionary, got {value!r}")
    return parsed


def own_columns(args: PreferenceTrainingArguments) -> tuple[str, ...]:
    """The dataset's own columns that the objective may read, where they are there."""
    if args.stage != "dpo":
        return ("margin",) if args.stage == "rm" else ()
    objective, columns = args.preference_config, ["context_scale", "pair_weight"]
    if objective.beta_mode == "dynamic_scaling":
        columns += [f"prompt_{name}" for name in PROMPT_FEATURES]
    if "confidence" in objective.regularizer_weights:
        columns += ["score_chosen", "score_rejected"]
    return tuple(columns)
