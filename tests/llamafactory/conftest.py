"""Runs in an environment of its own: `make test-llamafactory`. Elsewhere there is nothing to collect."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STUBS = HERE / "stubs"
if not list(importlib.metadata.distributions(name="llamafactory")):  # not find_spec: this folder has its name
    collect_ignore_glob = ["test_*.py"]
if importlib.util.find_spec("torchaudio") is None:
    sys.path.append(str(STUBS))

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path[-1:]])),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    """A finished process of this environment."""
    return subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, check=False)


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
