"""What a reward model with Gaussian rewards learns of planted label noise, beside one with a score."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from tiny import SHAPE, tiny_args
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from fastpo import RewardTrainer
from fastpo.data import from_prompt_pair
from fastpo.planted import RATERS, noisy_preferences
from fastpo.reward_loading import new_reward_model
from fastpo.scoring import RewardModel
from fastpo.tokenizer import train_tokenizer

DISCO: dict[str, Any] = {"add_disco_head": True, "pref_loss_type": "disco", "disco_prior_weight": 0.1}


class Learned(NamedTuple):
    """Of held-out pairs, (N, 2): of the truly better response, of the worse one."""

    mean: Tensor
    sigma: Tensor | None
    noise: Tensor  # (N,) flip probability of the prompt's rater

    @property
    def accuracy(self) -> float:
        return (self.mean[:, 0] > self.mean[:, 1]).double().mean().item()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((from_prompt_pair(row) for row in noisy_preferences(400, seed=99)), 500)


def learn(folder: Path, seed: int, **fields: Any) -> Learned:
    special = {"pad_token_id": tokenizer().pad_token_id, "eos_token_id": tokenizer().eos_token_id, "bos_token_id": None}
    shape = {**SHAPE, **special, "num_hidden_layers": 1, "vocab_size": len(tokenizer())}
    torch.manual_seed(seed)
    model = new_reward_model(AutoConfig.for_model("qwen3", **shape))
    args = tiny_args(
        folder, stage="rm", seed=seed, max_steps=200, learning_rate=5e-3, lr_scheduler_type="linear",
        per_device_train_batch_size=64, logging_steps=50, **fields,
    )  # fmt: skip
    rows = Dataset.from_list(noisy_preferences(3000, seed))
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    trainer.save_model()
    held_out = noisy_preferences(300, seed + 1000)
    sides = [
        [row["chosen" if (row["score_chosen"] > row["score_rejected"]) == better else "rejected"] for row in held_out]
        for better in (True, False)
    ]
    prompts = [row["prompt"] for row in held_out]
    mean, variance = RewardModel(folder, batch_size=100).score(prompts * 2, sides[0] + sides[1])
    noise = torch.tensor([row["flip_probability"] for row in held_out])
    return Learned(mean.view(2, -1).T, None if variance is None else variance.sqrt().view(2, -1).T, noise)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of (N,) and (N,), ties at their mean rank."""
    ranks = [((x[None] < x[:, None]).sum(1) + (x[None] <= x[:, None]).sum(1)).double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@pytest.mark.parametrize("seed", range(5))
def test_sigma_orders_the_raters_and_accuracy_is_that_of_a_score(tmp_path: Path, seed: int) -> None:
    scalar = learn(tmp_path / "scalar", seed)
    disco = learn(tmp_path / "disco", seed, **DISCO)
    assert scalar.sigma is None and disco.sigma is not None
    # Of four levels many responses share a rank: 0.97 is the most there is. Measured: 0.91 to 0.97.
    assert spearman(disco.sigma.flatten(), disco.noise[:, None].expand(-1, 2).flatten()) > 0.8
    levels = [disco.sigma[disco.noise == noise].mean().item() for noise in RATERS.values()]
    assert levels == sorted(levels) and levels[0] < 0.7 * levels[-1]
    # Measured: 0.96 to 0.98, where the scores have 0.93 to 0.96; the noise of 300 pairs is about 0.015.
    assert disco.accuracy > 0.9 and disco.accuracy > scalar.accuracy - 0.03
