"""Runs in an environment of its own: `make test-llamafactory`. Elsewhere there is nothing to collect."""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run

HERE = Path(__file__).parent
if not list(importlib.metadata.distributions(name="llamafactory")):  # not find_spec: this folder has its name
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the model, the data and what is trained."""
    from setting import write_data, write_model

    root = tmp_path_factory.mktemp("llamafactory")
    data = write_data(root / "data")
    return {"root": root, "data": data, "model": write_model(root / "model", data)}


@pytest.fixture(scope="session")
def make_recipe(paths: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """(output folder's name, changes) -> recipe."""
    from setting import recipe

    return lambda name, **changes: recipe(paths["model"], paths["data"], paths["root"] / name, **changes)


@pytest.fixture(scope="session")
def train_all(paths: dict[str, Path], make_recipe: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """(kind, changes by name) -> log and peak memory by name; recipes train in one process, into KIND/NAME."""

    def train(kind: str, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        jobs, results = paths["root"] / f"{kind}_jobs.json", paths["root"] / f"{kind}_results.json"
        jobs.write_text(json.dumps({name: make_recipe(f"{kind}/{name}", **own) for name, own in changes.items()}))
        done = run(sys.executable, HERE / "run_recipes.py", kind, jobs, results)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(results.read_text())

    return train
