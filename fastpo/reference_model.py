"""Where the reference's statistics come from: columns of the data, a second model, or the policy below its adapter."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.adapters import as_reference
from fastpo.backbone import StatsOutput, Wanted, causal_lm, model_stats
from fastpo.config import PreferenceConfig
from fastpo.data import REFERENCE_COLUMNS
from fastpo.layout import prompts_alone, responses
from fastpo.types import AnySequenceStats, ExtendedSequenceStats

SIDES = ("chosen", "rejected")


class Lacking(NamedTuple):
    """What the objective reads of the reference and the data does not hold."""

    pairs: bool  # the statistics of both responses
    features: tuple[str, ...]  # of the prompt

    def __bool__(self) -> bool:
        return self.pairs or bool(self.features)

    def columns(self) -> list[str]:
        return [*REFERENCE_COLUMNS * self.pairs, *(f"prompt_{name}" for name in self.features)]


class Reference:
    """What an objective reads of the reference, and the second model that knows it, where there is one."""

    def __init__(self, objective: PreferenceConfig, stage: str) -> None:
        self.pairs = stage == "dpo" and objective.needs_reference
        self.features: tuple[str, ...] = ()
        if stage == "dpo" and objective.beta_mode == "dynamic_scaling":
            regularizers_read = {"entropy"} & set(objective.regularizer_weights)
            self.features = tuple(sorted(set(objective.beta_head.features) | regularizers_read))
        self.model: Any = None
        self.let_go = False  # there was a second model

    def lacking(self, columns: Iterable[str]) -> Lacking:
        features = tuple(name for name in self.features if f"prompt_{name}" not in columns)
        return Lacking(self.pairs and not set(REFERENCE_COLUMNS) <= set(columns), features)

    def known(self, batch: dict[str, Any]) -> tuple[AnySequenceStats | None, dict[str, Tensor]]:
        """From a batch's columns: the statistics of the chosen and then the rejected responses, and prompt features."""
        prompt = {name: batch[f"prompt_{name}"] for name in self.features if f"prompt_{name}" in batch}
        if not self.pairs or self.lacking(batch).pairs:
            return None, prompt
        found = {
            name: torch.cat([batch[f"ref_{side}_{name}"] for side in SIDES])
            for name in ("logps", "entropy", "shared_logps")
        }
        return ExtendedSequenceStats(lengths=responses(batch).lengths, **found), prompt

    @torch.no_grad()
    def ask(self, policy: Any, unwrapped: Any, batch: dict[str, Any], lacking: Lacking) -> StatsOutput:
        """The reference's own forward, over whole pairs or over their prompts alone.

        Args:
            policy, unwrapped: the model that is trained, as it is called and without its wrappers; it answers without
                its adapter where there is no second model.
        """
        count = len(batch["index"])
        wanted = Wanted(shared_logps=lacking.pairs, prompt=lacking.features, prompt_rows=count)
        rows = batch if lacking.pairs else prompts_alone(batch, count)
        if self.model is not None:
            self.model.eval()  # an engine's returns None
            return model_stats(self.model, rows, wanted)
        self.check_adapter(unwrapped, lacking)
        with as_reference(causal_lm(unwrapped)):
            return model_stats(policy, rows, wanted)

    def columns(self, policy: Any, unwrapped: Any, batch: dict[str, Any], lacking: Lacking) -> dict[str, Tensor]:
        """What is lacking, as columns of the data; each (B,) or (B, D)."""
        found = self.ask(policy, unwrapped, batch, lacking)
        columns = {f"prompt_{name}": x for name, x in found.prompt_features().items()}
        sides = found.sequence_stats().split() if lacking.pairs else ()
        for side, stats in zip(SIDES, sides, strict=False):
            columns |= {f"ref_{side}_{name}": getattr(stats, name) for name in ("logps", "entropy", "shared_logps")}
        return columns

    @staticmethod
    def check_adapter(unwrapped: Any, lacking: Lacking) -> None:
        """Raise ValueError where neither the data nor a model knows the reference."""
        if not hasattr(unwrapped, "disable_adapter"):
            raise ValueError(f"dataset must have the columns {', '.join(lacking.columns())}, as the others have")
