"""LLaMA-Factory's fine-tuning arguments with fastpo's beside them, and the objective that both state."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llamafactory.hparams import FinetuningArguments

from fastpo.arguments import OBJECTIVE_NAMES, ObjectiveFields, build_objective
from fastpo.config import PreferenceConfig, option
from fastpo.integrations.llamafactory_recipes.meanings import LOSSES

# fastpo's name -> LLaMA-Factory's for the same number
TWINS = {"beta": "pref_beta", "label_smoothing": "dpo_label_smoothing", "sft_weight": "pref_ftx"}
STAGES = ("rm", "dpo")
OWN_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")


@dataclass
class PreferenceFinetuningArguments(ObjectiveFields, FinetuningArguments):
    """`FinetuningArguments` and the fields of `PreferenceConfig`, flat and under the same names.

    Attributes:
        preference_config: the objective; None in stages that have none.
        heads_source: where the model's heads may be saved.

    Raises:
        TypeError, ValueError: as either, or a key says again what another says, or asks for what is not done here.
    """

    # None where LLaMA-Factory's own key is to be read.
    pref_loss_type: dict | str | None = option(None, "Which comparison is used, in place of pref_loss.")
    beta: float | None = option(None, "The same as pref_beta.")
    label_smoothing: float | None = option(None, "The same as dpo_label_smoothing, for every loss that has one.")
    sft_weight: float | None = option(None, "The same as pref_ftx.")
    home_advantage: float | None = option(None, "The margin m; of pref_loss simpo: the same as simpo_gamma.")

    def __post_init__(self) -> None:
        FinetuningArguments.__post_init__(self)
        self.heads_source: str | None = None
        self.preference_config: PreferenceConfig | None = None
        if self.stage not in STAGES:
            for name in _ours_given(self):
                raise ValueError(f"{name} belongs to stage {', '.join(STAGES)}, got stage={self.stage!r}")
            return
        for name, value in _objective_fields(self).items():
            setattr(self, name, value)
        self.preference_config = objective = build_objective(self, self.stage)
        if self.stage != "rm":
            self.use_ref_model = objective.needs_reference or objective.beta_mode == "dynamic_scaling"
        _check_supported(self, objective)


def _ours_given(args: Any) -> list[str]:
    """fastpo's own fields that are not at their defaults."""
    theirs = {field.name for field in dataclasses.fields(FinetuningArguments)}
    own = [field for field in dataclasses.fields(args) if field.name in OBJECTIVE_NAMES and field.name not in theirs]
    return [field.name for field in own if getattr(args, field.name) != field.default]


def _objective_fields(args: Any) -> dict[str, Any]:
    """The fields of `PreferenceConfig` that have a key of LLaMA-Factory's beside them."""
    if args.stage == "rm":  # where LLaMA-Factory reads none of its own
        defaults = {name: getattr(PreferenceConfig, name) for name in ("pref_loss_type", "home_advantage", *TWINS)}
        return {name: value for name, value in defaults.items() if getattr(args, name) is None}
    fields = {ours: _either(args, ours, theirs) for ours, theirs in TWINS.items()}
    fields["home_advantage"] = 0.0 if args.home_advantage is None else args.home_advantage
    if args.pref_loss_type is not None:
        _either(args, "pref_loss_type", "pref_loss")
        if args.simpo_gamma != FinetuningArguments.simpo_gamma:
            raise ValueError(f"simpo_gamma belongs to pref_loss simpo, got pref_loss_type={args.pref_loss_type!r}")
        return fields
    if args.pref_loss not in LOSSES:
        raise ValueError(f"pref_loss must be one of {', '.join(LOSSES)} here, got {args.pref_loss!r}")
    if args.pref_loss == "simpo":
        fields["home_advantage"] = _either(args, "home_advantage", "simpo_gamma")
    return fields | LOSSES[args.pref_loss]


def _either(args: Any, ours: str, theirs: str) -> Any:
    """fastpo's value where it is given, else LLaMA-Factory's; both at once are an error."""
    own, other = getattr(args, ours), getattr(args, theirs)
    if own is None:
        return other
    if other != getattr(FinetuningArguments, theirs):
        raise ValueError(f"{ours} and {theirs} say the same: give one of them, got {own!r} and {other!r}")
    return own


def _check_supported(args: Any, objective: PreferenceConfig) -> None:
    """Refuse what would be left out of the loss or of the training of the heads."""
    if args.pref_bco_weight > 0:
        raise ValueError(
            f"pref_bco_weight must be 0 here, got {args.pref_bco_weight!r}: for a sum of losses give pref_loss_type a "
            "dictionary, such as {sigmoid: 1, bco_pair: 0.5}"
        )
    if args.ld_alpha is not None and objective.sft_weight != 0:
        raise ValueError(
            "ld_alpha and pref_ftx (sft_weight) must not be given together: LLaMA-Factory would discount the SFT term "
            "too, fastpo would not"
        )
    if objective.regularizers is not None and "confidence" in objective.regularizer_weights:
        raise ValueError("regularizers must not name 'confidence', whose scores LLaMA-Factory's data do not carry")
    if objective.contextual_scaling == "mallows" and objective.reference_free:
        raise ValueError("contextual_scaling='mallows' must have a reference here: reference_free must be False")
    if args.use_mca or args.use_hyper_parallel:
        raise ValueError("use_mca and use_hyper_parallel train by other programs: they must be False here")
    if objective.add_beta_head or objective.add_disco_head:
        for name in OWN_OPTIMIZERS:
            if getattr(args, name):
                raise ValueError(f"{name} must be False with add_beta_head or add_disco_head: it would miss the heads")


def check_model_arguments(model_args: Any) -> None:
    """Raise ValueError for ways of loading a model that put another forward in place of its own."""
    for name in ("use_unsloth", "use_kt", "mixture_of_depths"):
        if getattr(model_args, name):
            raise ValueError(
                f"{name} must be off here: it puts another forward in place of the model's, "
                f"got {getattr(model_args, name)!r}"
            )
