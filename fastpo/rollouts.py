"""Rollouts: which prompts a step takes, the completions drawn of them, and the padded batch they make."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from fastpo.collation import padded
from fastpo.data import Text
from fastpo.generation import Completion, Sampling, generate, said
from fastpo.ppo_arguments import PPOTrainingArguments
from fastpo.prompts import tokenize_prompts

BETA_SCALE = "beta_scale"  # column of the dataset


def tokenized_prompts(dataset: Any, source: str, args: PPOTrainingArguments, tokenizer: Any) -> Any:
    """Prompts as `PPOTrainer` takes them, None for None; `source` is what errors call them.

    Raises:
        TypeError, ValueError: no dataset, or rows of it cannot be used.
    """
    if dataset is None:
        return None
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{source} must be a datasets.Dataset, got {type(dataset).__name__}")
    rows = dataset
    if not {"prompt", "prompt_ids", "index"} <= set(dataset.column_names):
        rows = tokenize_prompts(
            dataset, tokenizer, max_length=args.prompt_limit, source=source, skip_bad_rows=args.skip_bad_rows
        )
    if BETA_SCALE in rows.column_names:
        for index, scale in zip(rows["index"], rows[BETA_SCALE], strict=True):
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
                raise ValueError(f"{source} row {index}: {BETA_SCALE!r} must be a finite number >= 0, got {scale!r}")
    return rows


class PromptSampler(Sampler[int]):
    """Dataset rows in the order in which steps take them: each step's prompts, as often as its rollouts are used.

    The last step of an epoch is filled up with the first prompts of the same order. Where an epoch starts depends on
    the steps that are done, so that a resumed run goes on in the same order.

    Args:
        rows: of the dataset.
        per_step: prompts of a step, on all processes and in all micro-batches.
        repeats: steps that use the same rollouts.
        seed: of the order.
        shuffle: whether there is another order in every epoch, or that of the dataset.
        steps_done: called when an epoch starts.
    """

    def __init__(
        self, rows: int, per_step: int, repeats: int, seed: int, shuffle: bool, steps_done: Callable[[], int]
    ) -> None:
        self.rows, self.per_step, self.repeats = rows, per_step, repeats
        self.seed, self.shuffle, self.steps_done = seed, shuffle, steps_done

    def __len__(self) -> int:
        return math.ceil(self.rows / self.per_step) * self.per_step * self.repeats

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() * self.per_step // len(self)
        order = list(range(self.rows))
        if self.shuffle:
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
        for first in range(0, self.rows, self.per_step):
            step = [order[i % self.rows] for i in range(first, first + self.per_step)]
            yield from step * self.repeats


def rollout_seed(*parts: int | str) -> int:
    """A seed of its own for each batch that completions are drawn of."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


class Drawn(NamedTuple):
    """R completions, those of a prompt one after the other.

    Attributes:
        rows: (R) dataset rows, with prompt, prompt_ids, index.
        completions: (R) token ids, and whether each is finished.
        texts: (R) the same in the form of the prompt, text or one message.
    """

    rows: list[Mapping[str, Any]]
    completions: list[Completion]
    texts: list[Text]

    def columns(self) -> dict[str, list[Any]]:
        """Further columns of the dataset, for reward functions, but for those named like what they are given anyway."""
        own = ("prompt", "prompt_ids", "prompts", "completions", "completion_ids")
        names = [name for name in self.rows[0] if name not in own]
        return {name: [row[name] for row in self.rows] for name in names}


def draw(
    model: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, sampling: Sampling, *, generations: int, seed: int
) -> Drawn:
    """So many completions of each row's prompt.

    Args:
        model, sampling, seed: as in `generate`.
        rows: with prompt and prompt_ids, as `tokenize_prompts` makes them.
        generations: completions of each prompt.
    """
    repeated = [row for row in rows for _ in range(generations)]
    completions = generate(
        model, [row["prompt_ids"] for row in repeated], sampling, seed=seed, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    texts = [
        said(tokenizer, row["prompt"], row["prompt_ids"], completion)
        for row, completion in zip(repeated, completions, strict=True)
    ]
    return Drawn(repeated, completions, texts)


def batch_of(drawn: Drawn, device: Any) -> dict[str, Tensor]:
    """input_ids, attention_mask, completion_mask (R, T) int64, padded on the right with 0, and index (R,)."""
    tokens = padded([row["prompt_ids"] for row in drawn.rows], [[one.ids for one in drawn.completions]], pad=0)
    batch = tokens | {"index": torch.tensor([row["index"] for row in drawn.rows])}
    return {name: x.to(device) for name, x in batch.items()}
