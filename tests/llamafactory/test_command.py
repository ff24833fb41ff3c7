"""`fastpo-llamafactory` as people run it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import run

# Regularisers of a batch as a whole would see other batches on two processes.
BETA = {
    "add_beta_head": True,
    "beta_mode": "dynamic_scaling",
    "beta_head_config": {"lr_multiplier": 10.0},
    "regularizers": {"pointwise": 0.1},
}
COMMAND = Path(sys.executable).with_name("fastpo-llamafactory")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


@pytest.fixture
def write_recipe(tmp_path: Path, make_recipe: Callable[..., dict[str, Any]]) -> Callable[..., tuple[Path, Path]]:
    """(name, changes) -> recipe file, output folder."""

    def write(name: str, **changes: Any) -> tuple[Path, Path]:
        keys = make_recipe(f"command/{name}", **changes)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(keys))
        return file, Path(keys["output_dir"])

    return write


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def test_train_here_and_on_two_processes(write_recipe: Callable[..., tuple[Path, Path]]) -> None:
    """Two processes of one batch each see the rows that one process sees in two batches."""
    one, one_output = write_recipe("one", **BETA)
    two, two_output = write_recipe("two", **BETA, gradient_accumulation_steps=1)
    done = run(COMMAND, "train", one, "max_steps=3")
    assert done.returncode == 0, done.stderr[-4000:]
    done = run(*TORCHRUN, "-m", "fastpo.integrations.llamafactory", "train", two, "max_steps=3")
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(one_output)) == 3
    assert losses(two_output) == pytest.approx(losses(one_output), abs=1e-5)
    assert (two_output / "beta_head.safetensors").exists()


def test_refused_before_anything_is_loaded(write_recipe: Callable[..., tuple[Path, Path]]) -> None:
    file, output = write_recipe("refused", pref_loss="ipo", pref_loss_type="sigmoid")
    done = run(COMMAND, "train", file)
    assert done.returncode != 0 and "pref_loss_type and pref_loss say the same" in done.stderr
    assert not output.exists()


@pytest.mark.parametrize("arguments", [(), ("chat", "recipe.yaml")])
def test_usage(arguments: tuple[str, ...]) -> None:
    done = run(COMMAND, *arguments)
    assert done.returncode != 0 and "usage: fastpo-llamafactory train RECIPE.yaml" in done.stderr
