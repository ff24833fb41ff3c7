"""What a model card says, and which README.md it may replace."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import SHAPE, tiny_args, tiny_model, tiny_pairs, tiny_tokenizer

from fastpo import PreferenceConfig, PreferenceTrainer
from fastpo.methods import METHODS
from fastpo.model_card import MARKER, methods_of
from fastpo.planted import planted_preferences
from fastpo.recipe import parse_recipe
from fastpo.run import prepare_training, run_training

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def trainer_for(folder: Path, model: Any = None, lora: bool = False, **fields: Any) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_model() if model is None else model, args=tiny_args(folder, **fields), train_dataset=tiny_pairs(8),
        eval_dataset=tiny_pairs(4, seed=2), processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_run_is_told(tmp_path: Path) -> None:
    fields = {**METHODS["ledpo"].settings, "beta": 0.3, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = trainer_for(tmp_path, lora=True, eval_strategy="epoch", **fields)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("my-model", "some/pairs", tags="mine")
    card = card_of(tmp_path)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["fastpo", "dpo", "ledpo", "beta_head", "mine"] and card.data.datasets == ["some/pairs"]
    assert card.data.base_model is None  # a model without a name
    last, evaluation = trainer.state.log_history[0], trainer.state.log_history[1]
    for said in (
        "# my-model", f"`{METHODS['ledpo'].formula}`", "b     = 0.3 * s(x)", "| `beta` | `0.3` |",
        "beta_head.safetensors",
        "Reference: the model without its adapter.", "- 8 pairs to train on", "- 4 pairs held out", "- 1 steps",
        "8 pairs a step: 4 a device, 2 accumulation steps, 1 processes", "learning rate 0.01, constant schedule",
        "weights in float32, computed in float32", "LORA of rank 4, alpha 8, on q_proj, v_proj",
        f"| loss | {last['loss']:.4g} | {evaluation['eval_loss']:.4g} |", "beta/mean", "transformers 5",
    ):  # fmt: skip
        assert said in card.text, said


@pytest.mark.parametrize("lora", [False, True])
def test_the_code_of_the_card_loads_the_model(tmp_path: Path, lora: bool) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = type(tiny_model()).from_pretrained(tmp_path / "base")
    trainer = trainer_for(tmp_path / "run", model, lora, add_disco_head=True, pref_loss_type="disco", max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = card_of(tmp_path / "run").text
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block.replace("path/to/this/folder", str(tmp_path / "run")), scope)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert list(scope["heads"]) == ["disco_head"] and len(scope["tokenizer"]) == len(tiny_tokenizer())
    assert str(tmp_path) not in text  # where things lay here is nobody's business


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({}, "Reference: the model as it was before training."),
        ({"precompute_ref_log_probs": True}, "Reference: its log-probs were computed before training."),
        ({"reference_free": True}, None),
    ],
)
def test_the_reference_is_told(tmp_path: Path, fields: dict[str, Any], reference: str | None) -> None:
    trainer_for(tmp_path, **fields).create_model_card()
    text = card_of(tmp_path).text
    assert reference in text if reference else "Reference:" not in text
    assert "## Results" not in text  # nothing has been trained


def test_a_models_name_is_told_and_a_files_folder_is_not(tmp_path: Path) -> None:
    model = tiny_model()
    model.config._name_or_path = "Qwen/Qwen3-0.6B"
    trainer_for(tmp_path, model, stage="sft").create_model_card(dataset_name="/home/me/pairs.jsonl")
    card = card_of(tmp_path)
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.library_name == "transformers"
    assert card.data.tags == ["fastpo", "sft"] and card.data.datasets is None
    assert "`pairs.jsonl`" in card.text and "/home/me" not in card.text and "8 rows to train on" in card.text


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_recognised(name: str) -> None:
    same = [other for other, method in METHODS.items() if method.settings == METHODS[name].settings]
    assert methods_of(PreferenceConfig.preset(name)) == same
    assert methods_of(PreferenceConfig.preset(name, beta=0.37)) == same


def test_a_preset_with_other_numbers_is_still_it_and_other_choices_are_not() -> None:
    assert methods_of(PreferenceConfig.preset("simpo", home_advantage=1.4)) == ["simpo"]
    assert methods_of(PreferenceConfig(label_smoothing=0.2)) == ["cdpo"]
    assert methods_of(PreferenceConfig.preset("simpo", pref_loss_type="hinge")) == []
    assert methods_of(PreferenceConfig(pref_loss_type={"sigmoid": 1.0, "sft": 0.5})) == []


# --- which file it may replace ----------------------------------------------------------------------------------------


def test_what_a_person_wrote_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, lora=True)
    mine = "à moi\n".encode("latin-1")  # no UTF-8
    (tmp_path / "README.md").write_bytes(mine)
    trainer.save_model()  # PEFT has a card of its own
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == mine and "stays as it is" in caplog.text


def test_its_own_is_replaced_until_the_marker_goes(tmp_path: Path) -> None:
    trainer, card = trainer_for(tmp_path), tmp_path / "README.md"
    for name in ("one", "two"):
        trainer.create_model_card(name)
        assert f"# {name}" in card.read_text()
    card.write_text(card.read_text().replace(MARKER, ""))
    trainer.create_model_card("three")
    assert "# two" in card.read_text()


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_the_command_leaves_one(tmp_path: Path) -> None:
    rows = planted_preferences(16, seed=1)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "preset": "simpo", "model_config": {"model_type": "qwen3", **SHAPE}, "tokenizer_vocab_size": 300,
        "dataset": str(tmp_path / "pairs.jsonl"), "eval_fraction": 0.25, "output_dir": str(tmp_path / "run"),
        "max_steps": 1, "max_length": 64, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_training(prepare_training(*parse_recipe(str(tmp_path / "recipe.yaml"), [])))
    text = (tmp_path / "run" / "README.md").read_text()
    assert "[arXiv:2405.14734](https://arxiv.org/abs/2405.14734)" in text and "`pairs.jsonl`" in text
    assert "- 12 pairs to train on\n- 4 pairs held out" in text and "| loss |" in text
