"""`DPOConfig`: every field of TRL's, with its default and meaning, and every field of fastpo's."""

from dataclasses import dataclass
from typing import Any

import trl

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.config import PreferenceConfig, option
from fastpo.links import LINKS

# TRL's losses that have another name here.
RENAMED = {"ipo": "ipo_norm"}


@dataclass
class DPOConfig(trl.DPOConfig, PreferenceTrainingArguments):  # type: ignore[misc, unused-ignore]
    """Arguments of `fastpo.integrations.trl.DPOTrainer`.

    `loss_type` and `loss_weights` say what is optimised, as in TRL, and `loss_type` may also name fastpo's other
    losses; `pref_loss_type` says it in fastpo's names, in their place. What TRL would ignore is an error.

    Raises:
        TypeError, ValueError: as `PreferenceTrainingArguments`; or a field asks for what is not done here.
    """

    pref_loss_type: dict | str | None = option(None, "The loss in fastpo's names, in place of loss_type.")
    padding_free: bool = option(False, "Lay a batch's sequences end to end in one row, without padding.")
    precompute_ref_batch_size: int | None = option(None, "Pairs at once for it; default: per_device_eval_batch_size.")
    remove_unused_columns: bool = option(False, "Without effect: the collator picks its columns.")

    def __post_init__(self) -> None:
        self._refuse()
        if isinstance(self.pad_to_multiple_of, str):  # as TRL's default and the command line have it
            text = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = None if text in ("auto", "none", "null") else int(text)
        self._objective()  # whose errors say more than TRL's
        super().__post_init__()

    @property
    def preference_config(self) -> PreferenceConfig:
        given, self.pref_loss_type = self.pref_loss_type, self._objective()
        try:
            return super().preference_config
        finally:
            self.pref_loss_type = given  # so that loss_type can be changed, in a copy too

    def _objective(self) -> str | dict[str, float] | None:
        """`pref_loss_type` as `loss_type` and `loss_weights` state it, unless it is given itself."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.pref_loss_type is not None:
            if names != ["sigmoid"] or self.loss_weights is not None:
                raise ValueError(
                    f"pref_loss_type must be None where loss_type or loss_weights is given, got "
                    f"{self.pref_loss_type!r} beside {names!r} with weights {self.loss_weights!r}"
                )
            return self.pref_loss_type
        weights = [1.0] * len(names) if self.loss_weights is None else self.loss_weights
        if not names or len(weights) != len(names):
            raise ValueError(f"loss_weights must hold one number for each loss_type, got {weights!r} for {names!r}")
        sums: dict[str, float] = {}
        for name, weight in zip(names, weights, strict=True):
            if name not in LINKS:
                raise ValueError(f"loss_type must name some of {', '.join(LINKS)}, got {name!r}")
            link = RENAMED.get(name, name)
            if self.label_smoothing and LINKS[link].of == "score":
                raise ValueError(
                    f"label_smoothing is ignored by TRL's {name!r}: set it to 0, or say pref_loss_type={link!r} in "
                    f"place of loss_type, with which the labels are smoothed; got {self.label_smoothing!r}"
                )
            sums[link] = sums.get(link, 0.0) + weight
        return next(iter(sums)) if list(sums.values()) == [1.0] else sums

    def _refuse(self) -> None:
        """Raise ValueError for what TRL has and this trainer has not."""
        refused: dict[str, tuple[Any, str]] = {
            "stage": ("dpo", "DPOTrainer trains on preferences (PreferenceTrainer has the other stages)"),
            "truncation_mode": ("keep_start", "chosen and rejected would see different prompts, and TRL drops it too"),
            "activation_offloading": (
                False, "it has not been tried with the fused head; gradient_checkpointing and split_responses save more"
            ),
        }  # fmt: skip
        for name, (only, reason) in refused.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} must be {only!r} ({reason}), got {getattr(self, name)!r}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference: precompute_ref_log_probs must be False, got True")
