"""The examples as a newcomer runs them: from a shell, in a folder of their own, without a download."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import tiny_args

from fastpo import PreferenceTrainer
from fastpo.planted import planted_preferences
from fastpo.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
# trl_dpo needs a file of data; test_trl_swap runs it.
EXAMPLES = [example for example in sorted((ROOT / "examples").glob("*.py")) if example.stem != "trl_dpo"]
OWN_DATA = [example for example in EXAMPLES if '"--model"' in example.read_text()]


def losses(cwd: Path, *command: str | Path) -> list[float]:
    """What a command prints of the training loss, one number a step."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(number) for number in re.findall(r"\bloss\W+(\d[\d.e-]*)", done.stdout)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs_and_learns_in_under_60_lines(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) < 60
    found = losses(tmp_path, example)
    assert len(found) > 2 and found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("example", OWN_DATA, ids=lambda path: path.stem)
def test_takes_a_model_and_data_of_ones_own(example: Path, tmp_path: Path) -> None:
    rows = planted_preferences(24, seed=3)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in tiny_model(Dataset.from_list(rows)):
        part.save_pretrained(tmp_path / "model")
    found = losses(tmp_path, example, "--model", tmp_path / "model", "--dataset", tmp_path / "pairs.jsonl")
    assert found[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: the policy is its reference
    assert found[-1] == pytest.approx(found[0], abs=0.05)  # and a learning rate for real models moves it little


def test_the_plain_trainer_makes_the_steps_of_ours(tmp_path: Path) -> None:
    rows = Dataset.from_list(planted_preferences(256, seed=1))
    model, tokenizer = tiny_model(rows)
    args = tiny_args(
        tmp_path, learning_rate=1e-3, lr_scheduler_type="linear", per_device_train_batch_size=8, max_length=512,
        max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model, None, args, train_dataset=rows.train_test_split(0.1, seed=0)["train"], processing_class=tokenizer
    )
    trainer.train()
    ours = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses(tmp_path, ROOT / "examples" / "plain_trainer.py") == pytest.approx(ours, rel=5e-3, abs=1e-4)


def test_the_accelerate_loop_makes_the_same_steps_on_two_processes(tmp_path: Path) -> None:
    """Losses that are equal after many large steps come of equal gradients."""
    example = ROOT / "examples" / "accelerate_loop.py"
    # `accelerate launch --cpu` starts one process, however many it is asked for.
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    assert losses(tmp_path, *launch, example) == pytest.approx(losses(tmp_path, example), rel=1e-3, abs=2e-4)
