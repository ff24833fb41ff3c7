import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.cli import main
from fastpo.planted import planted_preferences
from fastpo.recipe import parse_recipe
from fastpo.reporting import read_metrics

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {
    "stage": "dpo",
    "model_config": {"model_type": "qwen3", **SHAPE},
    "tokenizer_vocab_size": 300,
    "dtype": "float32",
    "use_cpu": True,
    "max_length": 64,
    "eval_fraction": 0.25,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-2",  # YAML reads 1e-2 as text; it must arrive as a number
    "max_steps": 6,
    "logging_steps": 1,
    "save_steps": 2,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in planted_preferences(24, seed=1)))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "dataset": str(data), "output_dir": str(tmp_path / "run")}))
    return path


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def test_train_leaves_model_metrics_and_pictures_and_eval_reads_them(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--beta", "0.3", "--save_strategy", "no"]) == 0
    printed = capsys.readouterr().out
    assert "held out" in printed and "rewards/accuracies" in printed
    assert len(losses(run)) == 6
    assert {p.name for p in run.glob("*.png")} == {"loss.png", "accuracy.png", "margin.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in run.glob("*.png"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.vocab_size == len(tokenizer)
    trained = next(row for row in reversed(read_metrics(run / "metrics.jsonl")) if "eval_loss" in row)
    assert main(["eval", str(recipe), "--beta", "0.3"]) == 0
    found = json.loads((run / "eval_metrics.json").read_text())
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert found["eval_rewards/margins"] == pytest.approx(trained["eval_rewards/margins"], rel=1e-4)


def test_a_second_run_does_not_overwrite_the_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 1
    assert "already holds checkpoint-6: pass --resume_from_checkpoint true" in capsys.readouterr().err


def test_lora_and_another_stage(recipe: Path, tmp_path: Path) -> None:
    sft = ["--stage", "sft", "--output_dir", str(tmp_path / "sft"), "--save_strategy", "no"]
    assert main(["train", str(recipe), *sft]) == 0
    adapted = yaml.safe_load(recipe.read_text())
    for key in ("model_config", "tokenizer_vocab_size"):
        del adapted[key]
    adapted |= {
        "model_name_or_path": str(tmp_path / "sft"),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "save_strategy": "no",
    }
    recipe.write_text(yaml.safe_dump(adapted))
    assert main(["train", str(recipe)]) == 0
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert main(["eval", str(recipe)]) == 0


def test_a_preset_stands_below_the_file_and_the_file_below_the_command_line(recipe: Path) -> None:
    chosen = yaml.safe_load(recipe.read_text()) | {"preset": "rainbowpo", "home_advantage": 0.7}
    recipe.write_text(yaml.safe_dump(chosen))
    _, args = parse_recipe(str(recipe), ["--beta", "3"])
    config = args.preference_config
    assert (config.beta, config.home_advantage, config.reference_mix) == (3.0, 0.7, 0.25)
    assert args.learning_rate == 1e-2
    _, args = parse_recipe(str(recipe), ["--preset=simpo", "--home_advantage", "0.5"])
    assert args.preference_config.reference_free and args.preference_config.beta == 2.0


def test_shipped_recipes_parse() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        parse_recipe(str(path), ["--dataset", "data.json", "--output_dir", "somewhere", "--use_cpu", "true"])


ROW = planted_preferences(1, seed=0)[0]
BAD_INPUT: dict[str, tuple[list[str], str]] = {
    # name: (overrides, what the one line must say); {x} are files made below
    "missing recipe": (["RECIPE=nowhere.yaml"], "recipe must be an existing YAML file, got 'nowhere.yaml'"),
    "recipe is not YAML": (["RECIPE={broken_yaml}"], "is not YAML"),
    "unknown key in recipe": (["RECIPE={unknown_key}"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    "unknown option": (["--bta", "1"], "unknown option '--bta'; did you mean 'beta'?"),
    "value of the wrong kind": (["--num_train_epochs", "many"], "--num_train_epochs"),
    "missing dataset": (["--dataset", "nowhere.jsonl"], "dataset must be an existing file or a dataset name"),
    "empty dataset": (["--dataset", "{empty}"], "must have at least one row"),
    "dataset of another kind": (["--dataset", "{text}"], "dataset must end in .json, .jsonl, .parquet"),
    "broken JSON": (["--dataset", "{broken}"], "not JSON at line 2"),
    "missing column": (["--dataset", "{no_rejected}"], "must have the columns of one of"),
    "row without a response": (["--dataset", "{hole}"], "hole.jsonl row 1: 'rejected' must be text or a list"),
    "empty response": (["--dataset", "{blank}"], "blank.jsonl row 1: a completion must not be empty"),
    "unknown loss": (
        ["--pref_loss_type", "sigmoidal"],
        "pref_loss_type must be one of sigmoid, sigmoid_norm, hinge",
    ),
    "beta of zero": (["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
    "negative beta": (["--beta=-1"], "beta must be a finite number > 0, got -1.0"),
    "dynamic beta without a head": (["--beta_mode", "dynamic_scaling"], "set add_beta_head=True, got False"),
    "disco without a head": (["--pref_loss_type", "disco"], "set add_disco_head=True, got False"),
    "reference_mix out of range": (["--reference_mix", "1.5"], "reference_mix must be in [0, 1], got 1.5"),
    "label smoothing out of range": (["--label_smoothing", "0.9"], "label_smoothing must be in [0, 0.5], got 0.9"),
    "unwritable output": (["--output_dir", "/dev/null/run"], "output_dir must be a writable folder"),
    "unknown stage": (["--stage", "ppo2"], "stage must be one of sft, rm, dpo, ppo, got 'ppo2'"),
    "smoothing of the other kind": (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must be 0 here"),
    "unknown preset": (["--preset=kto"], "preset must be one of dpo, ln_dpo"),
    "unknown model": (["--model_name_or_path", "/nowhere"], "either model_name_or_path or model_config, got both"),
    "unknown model type": (["--model_config", '{"model_type": "qwen99"}'], "qwen99"),
    "dictionary that is none": (["--model_config", "[1"], "model_config must be a dictionary in JSON"),
    "vocabulary too small": (["--tokenizer_vocab_size", "100"], "tokenizer_vocab_size must be at least 259, got 100"),
    "length too small": (["--max_length", "1"], "max_length must be an integer >= 2, or None, got 1"),
    "no such checkpoint": (["--resume_from_checkpoint", "nowhere"], "must be a complete checkpoint, got 'nowhere'"),
}


@pytest.fixture
def files(tmp_path: Path, recipe: Path) -> dict[str, str]:
    def lines(*rows: Any) -> str:
        return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)

    content = {
        "broken_yaml.yaml": "stage: [dpo",
        "unknown_key.yaml": recipe.read_text() + "learning_rat: 1\n",
        "empty.jsonl": "",
        "text.txt": "hello",
        "broken.jsonl": lines(ROW, "{not json"),
        "no_rejected.jsonl": lines({"prompt": "a", "chosen": "b"}),
        "hole.jsonl": lines(ROW, {**ROW, "rejected": None}),
        "blank.jsonl": lines(ROW, {**ROW, "rejected": [{"role": "assistant", "content": ""}]}),
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    return {Path(name).stem: str(tmp_path / name) for name in content}


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_clear_line_before_training(
    recipe: Path,
    files: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    path = str(recipe)
    filled = [o.format(**files) if "{" in o and "model_type" not in o else o for o in overrides]
    if filled[0].startswith("RECIPE="):
        path, filled = filled[0].removeprefix("RECIPE="), []
    assert main(["train", path, *filled]) == 1
    complaint = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastpo: error:")]
    assert len(complaint) == 1 and message in complaint[0], complaint
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_input_from_a_shell(recipe: Path) -> None:
    command = [sys.executable, "-m", "fastpo", "train", str(recipe), "--beta", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "fastpo: error: beta must be a finite number > 0, got 0.0"
    assert "Traceback" not in done.stderr


def test_eval_without_a_trained_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(recipe)]) == 1
    assert "output_dir must hold a trained model" in capsys.readouterr().err


def test_demo_learns_the_planted_preference(tmp_path: Path) -> None:
    """The README's first command, whole: about a minute."""
    command = [sys.executable, "-m", "fastpo", "demo", "--output_dir", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if "before dpo" in line)
    before, after = (float(part.split()[-1]) for part in line.split(","))
    assert after > 0.8 and after > before + 0.2
    fused, full = (
        float(line.split()[-2])
        for line in done.stdout.splitlines()
        if line.strip().startswith(("fused log", "full log"))
    )
    assert fused < 100 and full > 10 * fused
