"""Which parameters of a model are trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE, tiny_model

from fastpo.freezing import train_only
from fastpo.plan import Planner
from fastpo.recipe import parse_recipe


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


@pytest.mark.parametrize("layers", [1, 3])
def test_a_plan_counts_the_gradients_of_what_is_trained(layers: int, tmp_path: Path) -> None:
    shape = {**SHAPE, "model_type": "qwen3", "vocab_size": 300, "num_hidden_layers": 6}
    fields = {"model_config": shape, "tokenizer_vocab_size": 300, "dataset": "none", "max_length": 64, "use_cpu": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**fields, "freeze_trainable_layers": layers, "output_dir": str(tmp_path)}))
    recipe, args = parse_recipe(str(path), [])
    model = tiny_model(num_hidden_layers=6)
    train_only(model, layers)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    parts = Planner(recipe, args, on_gpu=False).predict(per_device_train_batch_size=1).parts
    assert parts["optimizer"] == pytest.approx(2 * trained, rel=0.05)
