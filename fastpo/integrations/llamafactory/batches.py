"""LLaMA-Factory's pairwise batches as fastpo's."""

from typing import Any

import torch
from torch import Tensor

from fastpo.layout import IGNORED

FIELDS = ("input_ids", "attention_mask", "labels")


def check_text(processor: Any) -> None:
    """Raise ValueError for a model that reads images, video or sound too."""
    if processor is not None:
        raise ValueError(f"model_name_or_path must be a model of text alone, got one with a {type(processor).__name__}")


def preference_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `PreferenceBatch` of 2B rows, the B chosen first, as `PairwiseDataCollatorWithPadding` lays them.

    Raises:
        ValueError: the batch holds what only the model's own forward would read.
    """
    unknown = sorted(set(batch) - set(FIELDS))
    if unknown:
        raise ValueError(f"the data collator must give {', '.join(FIELDS)} alone, got {', '.join(unknown)} too")
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "completion_mask": (batch["labels"] != IGNORED).long(),
        "index": torch.arange(len(batch["input_ids"]) // 2, device=batch["input_ids"].device),
    }
