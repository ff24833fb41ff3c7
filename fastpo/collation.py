"""Rows of tokenised pairs into batches: padded, or laid end to end without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastpo.data import NUMBER_COLUMNS, VECTOR_COLUMNS
from fastpo.types import PreferenceBatch

# Prefix sharing is worth its more numerous, smaller attention calls when it saves this share of the padded tokens.
WORTH_SHARING = 0.125


@dataclass
class PreferenceCollator:
    """Rows of `tokenize_dataset` into a `PreferenceBatch`.

    Args:
        pad_token_id: fills the padding; it is masked from attention and loss.
        stage: "dpo": chosen rows, then rejected rows; "sft": chosen rows alone.
        padding_free: lay prompts and responses end to end in one row, with paths in place of masks.
        prefix_sharing: the same, with each prompt once for both its responses (stage "dpo"). None: where that saves
            an eighth of the tokens that the batch would have otherwise.
        pad_to_multiple_of: what the width of a padded batch is a multiple of.
    """

    pad_token_id: int
    stage: str = "dpo"
    padding_free: bool = False
    prefix_sharing: bool | None = False
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        _check_vectors(rows)
        prompts = [row["prompt_ids"] for row in rows]
        responses = [[row[f"{side}_ids"] for row in rows] for side in ("chosen", "rejected")[: 1 + self._pairs]]
        if self._shares(prompts, responses):
            tokens = _shared(prompts, responses)
        elif self.padding_free:
            tokens = _packed(prompts, responses)
        else:
            tokens = padded(prompts, responses, self.pad_token_id, self.pad_to_multiple_of or 1)
        own = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
            for name in (*NUMBER_COLUMNS, *VECTOR_COLUMNS)
            if name in rows[0]
        }
        index = torch.tensor([row["index"] for row in rows])  # first: the Trainer reads the batch size off it
        return cast(PreferenceBatch, {"index": index, **tokens, **own})

    @property
    def _pairs(self) -> bool:
        return self.stage != "sft"

    def _shares(self, prompts: list[list[int]], responses: list[list[list[int]]]) -> bool:
        if self.prefix_sharing is not None or not self._pairs:
            return bool(self.prefix_sharing) and self._pairs
        lengths = [len(p) + len(y) for side in responses for p, y in zip(prompts, side, strict=True)]
        otherwise = sum(lengths) if self.padding_free else len(lengths) * max(lengths)
        shared = sum(lengths) - sum(map(len, prompts))
        return shared <= (1 - WORTH_SHARING) * otherwise


def padded(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad: int, multiple: int = 1
) -> dict[str, Tensor]:
    """Prompt + response, padded on the right: input_ids, attention_mask, completion_mask, each (R, T) int64.

    Args:
        prompts: token ids of B prompts.
        responses: of each side, token ids of its B responses; R rows in all, side by side. They may be empty.
        pad: fills the padding.
        multiple: what T is a multiple of.
    """
    pairs = [(prompt, response) for side in responses for prompt, response in zip(prompts, side, strict=True)]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    shape = (len(pairs), -(-width // multiple) * multiple)
    input_ids = torch.full(shape, pad, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros((2, *shape), dtype=torch.int64)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor([*prompt, *response])
        attention_mask[i, :end] = 1
        completion_mask[i, len(prompt) : end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def _packed(prompts: list[list[int]], responses: list[list[list[int]]]) -> dict[str, Tensor]:
    """Prompt + response, prompt + response, ..."""
    ids: list[int] = []
    paths = []
    for side in responses:
        for prompt, response in zip(prompts, side, strict=True):
            start = len(ids)
            paths.append((start, start + len(prompt), start + len(prompt), start + len(prompt) + len(response)))
            ids += [*prompt, *response]
    return {"input_ids": torch.tensor([ids]), "paths": torch.tensor(paths)}


def _shared(prompts: list[list[int]], responses: list[list[list[int]]]) -> dict[str, Tensor]:
    """Prompt + chosen + rejected, prompt + chosen + rejected, ..."""
    ids: list[int] = []
    paths: list[list[tuple[int, ...]]] = [[] for _ in responses]
    for prompt, *both in zip(prompts, *responses, strict=True):
        start, end = len(ids), len(ids) + len(prompt)
        ids += prompt
        for side, response in zip(paths, both, strict=True):
            side.append((start, end, len(ids), len(ids) + len(response)))
            ids += response
    return {"input_ids": torch.tensor([ids]), "paths": torch.tensor([path for side in paths for path in side])}


def _check_vectors(rows: list[dict[str, Any]]) -> None:
    for name in VECTOR_COLUMNS:
        for row in rows:
            if name in row and len(row[name]) != len(rows[0][name]):
                raise ValueError(
                    f"{name!r} must have one length in all rows, got {len(row[name])} in row {row['index']} and "
                    f"{len(rows[0][name])} in row {rows[0]['index']}"
                )
