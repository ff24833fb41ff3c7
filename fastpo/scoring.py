"""Rewards of completions under a reward model, as stage rm or any library with such models saved it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fastpo.architecture import load_heads
from fastpo.backbone import causal_lm
from fastpo.collation import padded
from fastpo.data import BadRowError, Text, common_beginning
from fastpo.reward_loading import load_reward_model
from fastpo.reward_model import check_reward_model, install_reward_forward, install_score_forward
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

    A Disco head that was saved without ever being trained is left aside.

    Args:
        name_or_path: a folder or a repository on the hub; of an adapter too, whose base model is then loaded.
        batch_size: completions at once.
        max_length: of prompt and completion, in tokens; a prompt keeps its last ones, as in training. None: no limit.
        device: where it works; None: the first GPU, or the CPU.
        dtype: of its weights, as in transformers.

    Attributes:
        gaussian: whether its rewards have variances.

    Raises:
        ValueError: what is saved there is no reward model, or an argument is out of range.
        OSError: transformers finds no model or no tokenizer of that name.
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
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be >= 2, or None, got {max_length!r}")
        self.model = load_reward_model(name_or_path, new_score=False, dtype=dtype)
        check_reward_model(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        head = load_heads(self.model, name_or_path).get("disco_head")
        self.gaussian = head is not None and bool(head.linear.weight.any())
        if self.gaussian:
            install_reward_forward(self.model)
        else:
            causal_lm(self.model).score.float()  # rewards of like responses would round to one in 16 bits
            install_score_forward(self.model)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        self.batch_size, self.max_length = batch_size, max_length

    @torch.no_grad()
    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Rewards:
        """Rewards of N completions of as many prompts, all text or all messages; a completion may be empty.

        They are what training computed of the same responses, but for a response that max_length cuts: in a pair the
        prompt makes room for the longer one.

        Raises:
            ValueError: there are not as many completions as prompts.
            BadRowError: as `fastpo.tokenization.encode_completion`; or more tokens than the model has positions.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"completions must be one of each prompt ({len(prompts)}), got {len(completions)}")
        rows = [self.encode(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        mean, variance = torch.empty(len(rows)), torch.empty(len(rows))
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            answer = self.model(**self._batch(rows[part]))
            mean[part] = answer["logits"][:, 0].float().cpu()
            if self.gaussian:
                variance[part] = answer["variance"].float().cpu()
        return Rewards(mean, variance if self.gaussian else None)

    def encode(self, prompt: Text, completion: Text) -> list[int]:
        """Token ids of a prompt and a completion, as `score` reads them.

        Raises:
            BadRowError: as `score`.
        """
        prompt_ids, whole = encode_completion(prompt, completion, self.tokenizer)
        if self.max_length is not None:
            length = common_beginning(prompt_ids, whole)  # as `tokenize_pair` cuts
            room = max(self.max_length - (len(whole) - length), self.max_length // 2, 1)
            whole = whole[max(length - room, 0) :][: self.max_length]
        positions = getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and len(whole) > positions:
            raise BadRowError(
                f"prompt and completion of {len(whole)} tokens must fit into the reward model's {positions} positions: "
                f"lower max_length, got {self.max_length}"
            )
        return whole

    def _batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Padded on the right; the mask says where."""
        batch = padded(rows, [[[]] * len(rows)], pad=0)
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
