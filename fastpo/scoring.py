"""Rewards of completions under a reward model, as stage rm or any library with such models saved it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpo.architecture import load_heads
from fastpo.data import Text
from fastpo.reward_model import check_reward_model, install_reward_forward
from fastpo.tokenization import encode_completion


class Rewards(NamedTuple):
    """Of N completions, fp32 on the CPU.

    Attributes:
        mean: (N,).
        variance: (N,) of Gaussian rewards; None for scalar ones.
    """

    mean: Tensor
    variance: Tensor | None


class RewardModel:
    """A sequence classification model with one label, or one with a Disco head, and its tokenizer.

    Args:
        name_or_path: a folder or a repository on the hub; of an adapter too, whose base model is then loaded.
        batch_size: completions at once.
        max_length: of prompt and completion, in tokens; a prompt keeps its last ones, as in training. None: no limit.
        device: where it works; None: the first GPU, or the CPU.
        dtype: of its weights, as in transformers.

    Raises:
        ValueError: what is saved there is no reward model.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        batch_size: int = 16,
        max_length: int | None = 1024,
        device: Any = None,
        dtype: str = "auto",
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        self.model = AutoModelForSequenceClassification.from_pretrained(name_or_path, dtype=dtype, num_labels=1)
        check_reward_model(self.model)
        self.gaussian = "disco_head" in load_heads(self.model, name_or_path)
        if self.gaussian:
            install_reward_forward(self.model)
        self.model.to(device).eval()
        self.batch_size, self.max_length = batch_size, max_length

    @torch.no_grad()
    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Rewards:
        """Rewards of N completions of as many prompts, all text or all messages; a completion may be empty.

        Raises:
            BadRowError: as `fastpo.tokenization.encode_completion`.
        """
        rows = [self._encode(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        means, variances = [], []
        for first in range(0, len(rows), self.batch_size):
            output = self.model(**self._batch(rows[first : first + self.batch_size]))
            means.append(output["logits"][:, 0].float().cpu())
            if self.gaussian:
                variances.append(output["variance"].float().cpu())
        return Rewards(torch.cat(means), torch.cat(variances) if self.gaussian else None)

    def _encode(self, prompt: Text, completion: Text) -> list[int]:
        # What tokenize_pair makes of a response by itself.
        prompt_ids, whole = encode_completion(prompt, completion, self.tokenizer)
        if self.max_length is None:
            return whole
        room = max(self.max_length - (len(whole) - len(prompt_ids)), self.max_length // 2, 1)
        return whole[max(len(prompt_ids) - room, 0) :][: self.max_length]

    def _batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id, device=self.model.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}
