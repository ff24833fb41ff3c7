"""The pipeline's script, command by command, on a little data; and the reward that it is judged by."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastpo.cli import main
from fastpo.planted_rewards import graded_preferences, graded_responses, true_reward

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "pipeline" / "run.sh"
SMALL = {
    "train": ["--num_train_epochs", "1", "--save_strategy", "no"],
    "sample": ["--num_generations", "3", "--max_completion_length", "6"],
    "rso": ["--keep_unfinished", "true"],
}
SMALL_PPO = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--max_completion_length", "6"]


def commands(folder: Path) -> list[list[str]]:
    """What the script would run, as bash expands it."""
    log = folder / "commands"
    for name in ("fastpo", "python"):
        stand_in = folder / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(
            f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> {shlex.quote(str(log))}\necho >> {log}\n'
        )
        stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run([SCRIPT, folder / "the out", "0.02"], cwd=ROOT, env=env, check=True)
    return [shlex.split(line) for line in log.read_text().splitlines()]


def test_every_command_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(tmp_path)
    assert Counter(command[1] for command in found)["train"] == 7
    for program, *arguments in found:
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        small = SMALL.get(arguments[0], []) + (SMALL_PPO if "ppo.yaml" in arguments[1] else [])
        assert main([*arguments, *small]) == 0, arguments
    report = json.loads((tmp_path / "the out" / "report.json").read_text())
    assert list(report) == ["sft", "best_of_4", "dpo", "rso_dpo", "ppo", "ppo_disco"]
    assert (tmp_path / "the out" / "pipeline.png").stat().st_size > 10_000


def test_an_output_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is there already" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_true_reward() -> None:
    def reward(question: str, response: str) -> float:
        chat = [[{"role": "user", "content": question}]], [[{"role": "assistant", "content": response}]]
        return true_reward(*chat)[0]

    asked = "Can you help me with brewing tea?"
    assert reward(asked, "For brewing tea my advice is to take your time and check each part twice.") == 3
    assert reward(asked, "For riding a horse my advice is to take your time and check each part twice.") == 1
    assert reward(asked, "On riding a horse opinions differ, so everyone has a view and none is wrong.") == -3
    assert reward(asked, "For brewing brewing my advice is to everyone has a view and none is wrong.") == 0
    assert reward(asked, "For brewing tea my advice") == 0
    assert reward(asked, "") == 0
    with pytest.raises(ValueError, match="must be questions of graded_responses"):
        reward("Why?", "For brewing tea")


def test_responses_are_mixed_and_labels_follow_bradley_and_terry() -> None:
    rows = graded_responses(2000, seed=0)
    rewards = true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert set(rewards) == {-3, -1, 1, 3}
    assert sum(rewards) / 2000 == pytest.approx(0.2, abs=0.12)  # 2 * 0.6 - 1, five standard errors of it wide
    pairs = graded_preferences(4000, seed=1)
    chosen, rejected = (
        true_reward([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs])
        for side in ("chosen", "rejected")
    )
    gaps = Counter(int(a - b) for a, b in zip(chosen, rejected, strict=True))
    for gap, right in ((2, 0.881), (4, 0.982)):
        total = gaps[gap] + gaps[-gap]
        assert gaps[gap] / total == pytest.approx(right, abs=4 * (right * (1 - right) / total) ** 0.5)
    assert graded_preferences(5, seed=1) == graded_preferences(5, seed=1)
