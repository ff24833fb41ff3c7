"""Beta and Disco heads inside LLaMA-Factory: trained, saved beside the adapter, loaded back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

BETA = {
    "add_beta_head": True,
    "beta_mode": "dynamic_scaling",
    "beta_head_config": {"features": ["hidden", "entropy"], "lr_multiplier": 10.0},
}
DISCO = {"add_disco_head": True, "pref_loss_type": "disco"}
REWARD = {"stage": "rm", "learning_rate": 1e-2}
FOLDERS = {"beta": "beta_head", "simpo beta": "beta_head", "full beta": "beta_head"} | dict.fromkeys(
    ("disco", "reward disco", "full reward disco"), "disco_head"
)


@pytest.fixture(scope="module")
def outputs(paths: dict[str, Path]) -> Path:
    return paths["root"] / "fastpo"


@pytest.fixture(scope="module")
def runs(train_all: Callable[..., Any], outputs: Path) -> dict[str, Any]:
    """name -> logged rows; the recipes named "again" start where another ended and learn nothing."""
    still = {"max_steps": 1, "learning_rate": 0.0}
    changes = {
        "beta": {**BETA, "save_steps": 4},
        "beta resumed": {**BETA, "resume_from_checkpoint": str(outputs / "beta" / "checkpoint-4")},
        "beta again": {**BETA, **still, "adapter_name_or_path": str(outputs / "beta")},
        "simpo beta": {**BETA, "pref_loss": "simpo", "beta": 2.0},
        "full beta": {**BETA, "finetuning_type": "full", "learning_rate": 1e-3},
        "disco": DISCO,
        "disco again": {**DISCO, **still, "adapter_name_or_path": str(outputs / "disco")},
        "reward disco": {**DISCO, **REWARD, "save_steps": 4, "val_size": 0.1, "do_eval": True},
        "reward disco again": {**DISCO, **REWARD, **still, "adapter_name_or_path": str(outputs / "reward disco")},
        "full reward disco": {**DISCO, "stage": "rm", "finetuning_type": "full", "learning_rate": 1e-3},
    }
    found = train_all("fastpo", changes)
    return {name: [row for row in run["log"] if "loss" in row] for name, run in found.items()}


def test_beta_is_learned(runs: dict[str, Any]) -> None:
    for name, base in (("beta", 0.1), ("simpo beta", 2.0), ("full beta", 0.1)):
        first, last = runs[name][0], runs[name][-1]
        assert first["beta/mean"] == pytest.approx(base) and first["beta/std"] == pytest.approx(0, abs=1e-7)
        assert last["beta/std"] > 1e-4 * base and last["log_s/mean"] != 0, name


def test_gaussian_rewards_are_learned(runs: dict[str, Any]) -> None:
    for name in ("disco", "reward disco", "full reward disco"):
        assert runs[name][-1]["loss"] < runs[name][0]["loss"]
        assert runs[name][-1]["variance/mean"] != pytest.approx(runs[name][0]["variance/mean"], abs=1e-4), name


@pytest.mark.parametrize("name", FOLDERS)
def test_heads_lie_beside_the_model(runs: dict[str, Any], outputs: Path, name: str) -> None:
    folders = [outputs / name] + [outputs / name / "checkpoint-4"] * (name in ("beta", "reward disco"))
    for folder in folders:
        [model] = [file for file in ("adapter_model.safetensors", "model.safetensors") if (folder / file).exists()]
        assert not [key for key in load_file(folder / model) if FOLDERS[name] in key]
        weights = load_file(folder / f"{FOLDERS[name]}.safetensors")
        assert any(value.abs().max() > 0 for value in weights.values())
        assert (folder / f"{FOLDERS[name]}_config.json").exists()


@pytest.mark.parametrize("name", ["beta", "disco", "reward disco"])
def test_heads_are_loaded_back(runs: dict[str, Any], outputs: Path, name: str) -> None:
    file = f"{FOLDERS[name]}.safetensors"
    before, after = load_file(outputs / name / file), load_file(outputs / f"{name} again" / file)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loaded_beta_head_is_used(runs: dict[str, Any]) -> None:
    assert abs(runs["beta again"][0]["log_s/mean"]) > 1e-3


def test_resumed_training_goes_on_as_if_uninterrupted(runs: dict[str, Any]) -> None:
    whole, resumed = runs["beta"], runs["beta resumed"]
    assert len(whole) == len(resumed) == 8
    for key in ("loss", "beta/mean", "log_s/mean", "rewards/margins"):
        expected = [row[key] for row in whole]
        assert [row[key] for row in resumed] == pytest.approx(expected, abs=1e-6, rel=1e-5), key


def test_the_value_head_is_the_mean(runs: dict[str, Any], outputs: Path) -> None:
    for name in ("reward disco", "full reward disco"):
        value = load_file(outputs / name / "value_head.safetensors")
        disco = load_file(outputs / name / "disco_head.safetensors")
        assert torch.equal(value["v_head.summary.weight"], disco["linear.weight"][:1]), name
        assert torch.equal(value["v_head.summary.bias"], disco["linear.bias"][:1]), name
