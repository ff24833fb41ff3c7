"""The exact KL of responses against full logits in float64."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from fastpo.collation import padded
from fastpo.lab.divergence import response_kl


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = [torch.randint(1, len(tiny_tokenizer()), (n,)).tolist() for n in (4, 7, 2, 5, 3, 6)]
    return padded(ids[:3], [[ids[3], [], ids[5]]], 0)


def wanted(policy: Any, reference: Any, inputs: dict[str, Tensor]) -> Tensor:
    logs = []
    for model in (policy, reference):
        logits = model.double()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        logs.append(logits.log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    return torch.where(inputs["completion_mask"][:, 1:].bool(), kl[:, :-1], 0).sum(1)


def shaken(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_two_models_with_heads_of_their_own(model_type: str) -> None:
    reference = tiny_model(model_type)
    policy = shaken(copy.deepcopy(reference), 1)
    found = response_kl(policy, reference, batch())
    assert found[1] == 0 and (found[[0, 2]] > 0.01).all()  # the second response is empty
    assert torch.allclose(found.double(), wanted(policy, reference, batch()), rtol=1e-4, atol=1e-5)


def test_a_head_with_a_bias() -> None:
    reference = tiny_model("qwen3", tie_word_embeddings=False)
    reference.lm_head.bias = torch.nn.Parameter(torch.randn(reference.lm_head.out_features))
    policy = shaken(copy.deepcopy(reference), 1)
    found = response_kl(policy, reference, batch())
    assert torch.allclose(found.double(), wanted(policy, reference, batch()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_against_the_model_below_it(targets: list[str]) -> None:
    below = tiny_model(tie_word_embeddings=False)
    policy = get_peft_model(copy.deepcopy(below), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    shaken(policy, 2)
    found = response_kl(policy, None, batch())
    assert (found[[0, 2]] > 1e-3).all()
    assert torch.allclose(found.double(), wanted(policy, below, batch()), rtol=1e-4, atol=1e-5)
