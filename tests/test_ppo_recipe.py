"""Stage ppo from recipes: trained, evaluated, resumed and explained by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_model, tiny_pairs, tiny_tokenizer

from fastpo.cli import main
from fastpo.recipe import parse_recipe
from fastpo.reporting import read_metrics

REWARDS = """
def odd(completion_ids, **columns):
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    tiny_model().save_pretrained(tmp_path / "sft")
    tiny_tokenizer().save_pretrained(tmp_path / "sft")
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [json.dumps({"prompt": row["prompt"]}) for row in tiny_pairs(10)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return {
        "stage": "ppo", "model_name_or_path": str(tmp_path / "sft"), "dataset": str(tmp_path / "prompts.jsonl"),
        "reward_funcs": f"{tmp_path / 'rewards.py'}:odd", "num_generations": 4, "max_completion_length": 4,
        "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "eval_rows": 2,
        "save_steps": 2, "use_cpu": True, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def write(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.parametrize("part", ["full", "lora"])
def test_train_and_evaluate(part: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    heads = {"add_beta_head": True, "beta_mode": "dynamic_scaling", "kl_target": 1.0, "advantage": "gae"}
    path = write(tmp_path, recipe | {"use_peft": part == "lora"} | (heads if part == "lora" else {}))
    assert main(["train", path]) == 0
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert "kl/completion" in said and "reward " in said
    assert {"reward.png", "kl.png"} <= {file.name for file in out.iterdir()}
    rows = read_metrics(out / "metrics.jsonl")
    assert len([row for row in rows if "reward" in row]) == 4 and "eval_reward" in rows[-2]
    card = (out / "README.md").read_text()
    assert "The reward is `odd`." in card and "8 completions a step" in card and "8 prompts to train on" in card
    assert str(tmp_path) not in card
    assert (out / "value_head.safetensors").exists() is (out / "beta_head.safetensors").exists() is (part == "lora")

    assert main(["eval", path]) == 0
    metrics = json.loads((out / "eval_metrics.json").read_text())
    evaluated = next(row for row in reversed(rows) if "eval_reward" in row)
    for name in ("eval_reward", "eval_kl/completion", "eval_loss", "eval_beta/mean"):
        assert metrics[name] == pytest.approx(evaluated[name], rel=1e-4, abs=1e-5), name


def test_a_run_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = write(tmp_path, recipe)
    assert main(["train", whole, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main(["train", whole, "--max_steps", "2", "--lr_scheduler_type", "constant"]) == 0
    assert main(["train", whole, "--resume_from_checkpoint", "true", "--lr_scheduler_type", "constant"]) == 0
    found = [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert found == [1, 2, 3, 4]


def test_explain(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, recipe | {"advantage": "grpo", "epsilon_high": 0.3, "top_p": 0.9, "risk_aversion": 0.5})
    learned = ["--add_beta_head", "true", "--beta_mode", "dynamic_scaling"]
    assert main(["explain", path, *learned, "--kl_target", "3"]) == 0
    text = capsys.readouterr().out
    for words in (
        "stage ppo", "r_t   = -b * KL_t + [t is last] * r(x, y), KL_t = log pi - log ref (k1)",
        "mean - 0.5 * deviation", "b     = 0.1 * s(x)", "A     = (G - mean of the prompt's G)",
        "clip(ratio, 0.8, 1.3)", "-b * (KL - 3)", "4 completions are drawn of each prompt, of at most 4 tokens",
        "top_p 0.9", "for 1 optimiser step.", "rises where a prompt's KL is above 3 nats",
    ):  # fmt: skip
        assert words in text
    assert main(["explain", path, *learned, "--advantage", "gae", "--kl_estimator", "k3"]) == 0
    text = capsys.readouterr().out
    assert "ref/pi - 1 - log(ref/pi) (k3)" in text and "0.1 * (V - return)^2 / 2" in text and "is frozen" in text
    assert main(["explain", path, "--sft_weight", "1"]) == 1
    assert "sft_weight is not used in stage ppo" in capsys.readouterr().err


def test_the_stage_may_come_from_the_command_line(recipe: dict[str, Any], tmp_path: Path) -> None:
    own = {"model_name_or_path", "dataset", "max_steps", "use_cpu", "output_dir"}
    path = write(tmp_path, {name: value for name, value in recipe.items() if name in own})
    _, args = parse_recipe(path, ["--stage", "ppo", "--num_generations", "4", "--reward_funcs", "a:b", "c:d"])
    assert type(args).__name__ == "PPOTrainingArguments" and args.reward_funcs == ["a:b", "c:d"]
    _, args = parse_recipe(path, [])
    assert type(args).__name__ == "PreferenceTrainingArguments"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "dpo"}, "belongs to stage ppo, got stage='dpo'"),
        ({"num_generation": 4}, "did you mean 'num_generations'?"),
        ({"reward_funcs": "nowhere:odd"}, "reward_funcs 'nowhere:odd' cannot be imported"),
        ({"reward_funcs": None}, "reward_funcs or reward_model must name at least one reward"),
        ({"per_device_train_batch_size": 6}, "must be a multiple of num_generations=4, got 6"),
        ({"preset": "simpo"}, "is not used in stage ppo"),
        ({"max_completion_length": 1000000, "max_length": None}, "must fit"),
    ],
)
def test_mistakes(
    changes: dict[str, Any], words: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path, recipe | changes)
    assert main(["train", path]) == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
