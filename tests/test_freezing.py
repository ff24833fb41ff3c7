"""Which parameters of a model are trained."""

from typing import Any

import pytest
from tiny import tiny_model

from fastpo.freezing import train_only


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"layers": 1}, {"model.layers.2."}),
        ({"layers": -2}, {"model.layers.0.", "model.layers.1."}),
        ({"layers": 9}, {"model.layers."}),
        ({"layers": 1, "modules": ["mlp"]}, {"model.layers.2.mlp."}),
        ({"layers": 1, "extra_modules": ["norm", "lm_head"]}, {"model.layers.2.", "model.norm.", "lm_head."}),
    ],
)
def test_what_is_trained_of_a_model(options: dict[str, Any], trained: set[str]) -> None:
    model = tiny_model(num_hidden_layers=3, tie_word_embeddings=False)
    train_only(model, **options)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(tuple(trained)), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "freeze_trainable_layers must not be 0"),
        ({"layers": 1, "modules": ["attention"]}, "must be of all, input_layernorm, mlp"),
        ({"layers": 1, "extra_modules": ["lm_head"]}, "must be of embed_tokens, model, norm, got 'lm_head'"),
    ],
)
def test_what_cannot_be_trained_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_only(tiny_model(tie_word_embeddings=True), **options)
