"""A preference file as a study's data: no planted truth, labels as they are, other rows held out for each seed."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastpo.data import BadRowError, Pair, find_form, read_dataset
from fastpo.lab.kinds import check_sizes
from fastpo.reward_functions import load_reward_function


@dataclass(frozen=True)
class PreferenceFile:
    """The rows of a file or of a named dataset, split by the seed.

    Args:
        dataset: a JSON, JSONL or Parquet file, or a dataset's name, in any form of `fastpo.data` that has pairs.
        seed: of the split.
        dataset_split: of a named dataset.
        max_samples: use the first so many rows.
        held_out: rows to measure on.
        reward_model: what scores samples: a reward model's folder or name, or ``train``: one trained on all rows
            (settings: the study's `judge`), held-out ones included, whose labels no policy sees.
        reward_funcs: MODULE:FUNCTION instead, with TRL's signature.
        language: two-letter code, for the text measures.

    Raises:
        ValueError: a field is out of its range.
    """

    dataset: str
    seed: int = 0
    dataset_split: str = "train"
    max_samples: int | None = None
    held_out: int = 64
    reward_model: str | None = None
    reward_funcs: str | None = None
    language: str = "en"

    def __post_init__(self) -> None:
        check_sizes(held_out=self.held_out, **({} if self.max_samples is None else {"max_samples": self.max_samples}))
        if self.reward_model and self.reward_funcs:
            raise ValueError("reward_model must be None with reward_funcs, got both")

    def check(self) -> None:
        """Read the file, and find the reward function.

        Raises:
            ValueError: it cannot be read, has no pairs, or too few rows; or there is no such function.
        """
        if self.reward_funcs is not None:
            load_reward_function(self.reward_funcs)
        if len(self._held_out) == len(self.rows):
            raise ValueError(
                f"held_out must leave some of the {len(self.rows)} rows of {self.dataset}, got {self.held_out}"
            )

    def base_rows(self) -> list[dict[str, Any]]:
        """prompt and completion: both responses of the rows to train on."""
        pairs = [self._form(row) for row in self.train_rows()]
        return [{"prompt": pair.prompt, "completion": side} for pair in pairs for side in (pair.chosen, pair.rejected)]

    def train_rows(self) -> list[dict[str, Any]]:
        return [row for i, row in enumerate(self.rows) if i not in self._held_out]

    def held_out_rows(self) -> list[dict[str, Any]]:
        """So many rows, or a few more: those of one prompt are held out together."""
        return [row for i, row in enumerate(self.rows) if i in self._held_out]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Those that are used, as they stand in the file."""
        rows = read_dataset(self.dataset, self.dataset_split)
        return (rows if self.max_samples is None else rows.select(range(min(self.max_samples, len(rows))))).to_list()

    @cached_property
    def _form(self) -> Callable[[Mapping[str, Any]], Pair]:
        return find_form(list(self.rows[0]), "dpo", self.dataset)

    @cached_property
    def _held_out(self) -> set[int]:
        of_prompt: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            try:
                prompt = self._form(row).prompt
            except BadRowError as error:
                raise ValueError(f"{self.dataset} row {i}: {error}") from None
            of_prompt.setdefault(json.dumps(prompt), []).append(i)
        order, found = list(of_prompt.values()), set[int]()
        random.Random(f"split {self.seed}").shuffle(order)
        for rows in order:
            if len(found) >= self.held_out:
                break
            found.update(rows)
        return found
