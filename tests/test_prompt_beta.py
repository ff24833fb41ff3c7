"""s(x) of prompts outside of training: what the trainer makes of the same prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from test_architecture import DYNAMIC, collate, lora, ragged_pairs, scatter_heads, trainer_for
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo import objective_trainer
from fastpo.architecture import heads_of
from fastpo.heads import BetaHead
from fastpo.prompt_beta import PromptScaler, prompt_scales

FEATURES = [("hidden",), ("perplexity", "entropy"), ("hidden", "perplexity", "entropy")]
PAD = tiny_tokenizer().pad_token_id


def sharp_model(seed: int) -> Any:
    """One whose prompts differ in perplexity and entropy."""
    model = tiny_model(seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """What log s the trainer hands to its loss."""
    seen: list[Tensor] = []
    stage = objective_trainer.dpo_stage

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["log_s"].detach())
        return stage(*args, **kwargs)

    with patch.object(objective_trainer, "dpo_stage", watching):
        yield seen


def of_trainer(trainer: Any, data: Any) -> Tensor:
    with watched() as seen:
        trainer.preference_output(trainer.model, collate(data))
    return seen[0].exp()


@pytest.mark.parametrize("features", FEATURES)
def test_it_is_what_the_trainer_computes(tmp_path: Path, features: tuple[str, ...]) -> None:
    reference, data = sharp_model(7), ragged_pairs(9)
    config = {"features": list(features), "kind": "mlp"}
    trainer = trainer_for(tmp_path, ref_model=reference, data=data, beta_head_config=config, **DYNAMIC)
    scatter_heads(trainer.model, scale=0.2)
    wanted = of_trainer(trainer, data)
    assert wanted.max() / wanted.min() > 1.1
    head = heads_of(trainer.model)["beta_head"]
    for batch_size in (1, 4, 9, 100):
        found = prompt_scales(sharp_model(7), head, data["prompt_ids"], batch_size=batch_size, pad_token_id=PAD)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    other = prompt_scales(sharp_model(8), head, data["prompt_ids"], batch_size=4, pad_token_id=PAD)
    assert not torch.allclose(other, wanted, rtol=1e-2)


def test_of_an_adapter_it_reads_the_model_below(tmp_path: Path) -> None:
    data = ragged_pairs(5)
    trainer = trainer_for(tmp_path, data=data, peft_config=lora(), **DYNAMIC)
    scatter_heads(trainer.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model, head = trainer.model, heads_of(trainer.model)["beta_head"]
    wanted = of_trainer(trainer, data)
    model.train()
    found = prompt_scales(model, head, data["prompt_ids"], batch_size=2, pad_token_id=PAD)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    below = prompt_scales(tiny_model(), head, data["prompt_ids"], batch_size=2, pad_token_id=PAD)
    torch.testing.assert_close(found, below, rtol=1e-5, atol=0)
    # Left as it came.
    assert model.training and not any(layer.disable_adapters for layer in model.modules() if hasattr(layer, "lora_A"))
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="head must take hidden states of size 32, the reference's, got one for 31"):
        prompt_scales(tiny_model(), BetaHead(31), [[1]], batch_size=2, pad_token_id=PAD)
    with pytest.raises(ValueError, match="prompt_ids must have at least one token each, got none in 1"):
        prompt_scales(tiny_model(), BetaHead(32), [[5], []], batch_size=2, pad_token_id=PAD)
    assert prompt_scales(tiny_model(), BetaHead(32), [], batch_size=2, pad_token_id=PAD).shape == (0,)


def test_of_saved_folders_and_of_messages(tmp_path: Path) -> None:
    reference, head = tiny_model(seed=7), BetaHead(32)
    torch.nn.init.normal_(head.layers[-1].weight)
    for thing in (reference, tiny_tokenizer()):
        thing.save_pretrained(tmp_path / "reference")
    head.save_pretrained(tmp_path / "policy")
    scaler = PromptScaler.load(str(tmp_path / "policy"), str(tmp_path / "reference"), max_length=6, batch_size=2)
    messages = [{"role": "user", "content": "How do I start baking bread?"}]
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert len(ids) > 6 and scaler.encode(messages) == ids[-6:]
    wanted = prompt_scales(reference, head, [ids[-6:], [7, 8]], batch_size=1, pad_token_id=PAD)
    assert scaler([ids[-6:], [7, 8]]) == pytest.approx(wanted.tolist(), rel=1e-5)
    scaler.max_length = None
    assert scaler.encode(messages) == ids


def test_of_a_saved_adapter_it_reads_the_base(tmp_path: Path) -> None:
    base = tiny_model(seed=7)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(init_lora_weights=False))
    for thing in (adapted, tiny_tokenizer()):
        thing.save_pretrained(tmp_path / "adapter")
    head = BetaHead(32)
    torch.nn.init.normal_(head.layers[-1].weight)
    head.save_pretrained(tmp_path / "adapter")
    scaler = PromptScaler.load(str(tmp_path / "adapter"), str(tmp_path / "adapter"), max_length=6, batch_size=2)
    wanted = prompt_scales(base, head, [[5, 6], [7, 8, 9]], batch_size=2, pad_token_id=PAD)
    assert scaler([[5, 6], [7, 8, 9]]) == pytest.approx(wanted.tolist(), rel=1e-5)
