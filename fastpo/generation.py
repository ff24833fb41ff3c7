"""Completions of prompts, sampled by transformers' `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from fastpo.config import option


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Raises:
        ValueError: a field is out of its range.
    """

    max_completion_length: int = option(256, "Longest completion, in tokens.")
    temperature: float = option(1.0, "What logits are divided by.")
    top_p: float = option(1.0, "Draw from the likeliest tokens of this total probability.")
    top_k: int = option(0, "Draw from the so many likeliest tokens; 0: from all.")

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be >= 1, got {self.max_completion_length!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k!r}")


class Completion(NamedTuple):
    """Token ids of a completion, its end-of-sequence token included, and whether it came to that one."""

    ids: list[int]
    finished: bool


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, pad_token_id: int, eos_token_id: int
) -> list[Completion]:
    """One completion of each prompt; the same ones for the same batch and seed.

    Args:
        model: a causal LM, possibly with adapters; it is left in the mode in which it came.
        prompts: token ids, none empty; a prompt that is wanted more than once stands there more than once.
        sampling: how to draw.
        seed: of this batch; torch's own generators are left as they were.
        pad_token_id, eos_token_id: of the tokenizer.
    """
    width, training = max(map(len, prompts)), model.training
    ids = torch.full((len(prompts), width), pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, where a decoder's padding is
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=sampling.max_completion_length, do_sample=True, temperature=sampling.temperature,
        top_p=sampling.top_p, top_k=sampling.top_k, pad_token_id=pad_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    model.eval()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        model.train(training)
    return [_until_end(row, eos_token_id) for row in whole[:, width:]]


def _until_end(row: Tensor, eos_token_id: int) -> Completion:
    ids = row.tolist()
    if eos_token_id in ids:
        return Completion(ids[: ids.index(eos_token_id) + 1], True)
    return Completion(ids, False)
