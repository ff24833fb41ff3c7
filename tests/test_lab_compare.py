"""Studies run: what is left of them, in one process and in several, stopped and gone on with."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import SHAPE

from fastpo.cli import main
from fastpo.lab.folder import Run
from fastpo.lab.jobs import Job, base_folder, do_all, do_job
from fastpo.lab.language import run_language
from fastpo.lab.plan_file import read_study
from fastpo.lab.probe import Probe
from fastpo.planted import planted_preferences

TEXT = {"task": "text", "train_pairs": 24, "held_out_pairs": 40, "base_responses": 24, "words": 16}
ITEMS = {"task": "items", "train_pairs": 64, "held_out_pairs": 64, "logged_slates": 64, "training": {"epochs": 1}}
PLAN: dict[str, Any] = {
    "seeds": 2,
    "data": {"items": ITEMS},
    "base": {
        "model_config": {"model_type": "qwen3", **SHAPE}, "tokenizer_vocab_size": 300, "max_steps": 3,
        "learning_rate": 1e-2, "use_cpu": True, "per_device_train_batch_size": 8,
    },
    "training": {
        "use_cpu": True, "max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 64,
    },
    "evaluation": {"points": 2, "pairs": 8, "prompts": 4, "final_prompts": 8, "max_completion_length": 6},
    "methods": {"dpo": {"preset": "dpo"}, "ledpo": {"preset": "ledpo"}},
    "comparisons": {"learned": {"against": "dpo", "methods": ["ledpo"]}},
}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "plan.yaml"
        said = {**PLAN, "output_dir": str(tmp_path / "study"), **changes}
        path.write_text(yaml.safe_dump(said, sort_keys=False))
        return str(path)

    return write


def results(folder: Path) -> dict[str, Any]:
    """What the runs found, by their folder; not how long they took."""
    found = {}
    for path in sorted(folder.glob("runs/*/*/*/result.json")):
        found[str(path.parent.relative_to(folder))] = {**json.loads(path.read_text()), "seconds": None}
    return found


def test_every_run_once_and_a_report(plan: Callable[..., str], tmp_path: Path, capsys: Any) -> None:
    study = tmp_path / "study"
    assert main(["compare", plan(), "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 runs" in said and "items: ledpo against dpo: " in said
    first = results(study)
    assert set(first) == {"runs/items/dpo/0", "runs/items/ledpo/0"}
    assert "s/reliability" in first["runs/items/ledpo/0"]["measures"]
    times = {path: path.stat().st_mtime_ns for path in study.rglob("result.json")}
    # More seeds and another method later: what is there is not done again.
    methods = {**PLAN["methods"], "ipo": {"preset": "ipo"}}
    assert main(["compare", plan(methods=methods), "--processes", "2"]) == 0
    assert len(results(study)) == 6 and {k: v for k, v in results(study).items() if k in first} == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (study / "report.html").unlink()
    assert main(["report", str(study)]) == 0
    assert (study / "report.html").stat().st_size > 10_000


def test_results_of_other_settings_are_not_taken_for_these(plan: Callable[..., str], capsys: Any) -> None:
    assert main(["compare", plan(), "--seeds", "1"]) == 0
    # Nor where only other methods are asked for: the report would have both.
    changed = plan(methods={"dpo": {"preset": "dpo", "beta": 0.2}, "ledpo": {"preset": "ledpo"}})
    assert main(["compare", changed, "--seeds", "1", "--methods", "ledpo"]) == 1
    assert "holds runs/items/dpo/0 with another training.beta" in capsys.readouterr().err
    assert main(["compare", plan(methods={"dpo": {"preset": "dpo", "beta": 0.2}}, comparisons={})]) == 1
    assert "holds runs/items/dpo/0 with another training.beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "recipe must be an existing YAML file"),
        (["PLAN", "--methods", "dpo,x"], "methods must be one of dpo, ledpo, got 'x'"),
        (["PLAN", "--data", "x"], "data must be one of items, got 'x'"),
        (["PLAN", "--processes", "0"], "processes must be an integer >= 1"),
    ],
)
def test_bad_arguments(plan: Callable[..., str], capsys: Any, arguments: list[str], message: str) -> None:
    assert main(["compare", *(plan() if word == "PLAN" else word for word in arguments)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "report"])
def test_packages_that_are_missing_are_named(
    plan: Callable[..., str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("fastpo.cli.importlib.util.find_spec", lambda name: None if name == "sacrebleu" else name)
    assert main([command, plan()]) == 1
    assert "need sacrebleu: pip install 'fastpo[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_method_that_is_no_recipe_is_named_before_any_run(plan: Callable[..., str], tmp_path: Path) -> None:
    methods = {"dpo": {"preset": "dpo"}, "bad": {"preset": "dpo", "learning_rat": 1.0}}
    assert main(["compare", plan(data={"text": TEXT}, methods=methods, comparisons={})]) == 1
    assert not (tmp_path / "study" / "base").exists() and not results(tmp_path / "study")


def test_a_run_that_fails_is_said_and_the_others_are_done(
    plan: Callable[..., str], tmp_path: Path, capsys: Any
) -> None:
    methods = {**PLAN["methods"], "wild": {"preset": "dpo", "beta": 1e30, "learning_rate": 1e30}}
    text = {**TEXT, "methods": ["wild"]}
    data = {"text": text, "items": {**ITEMS, "methods": ["dpo", "ledpo"]}}
    assert main(["compare", plan(data=data, methods=methods), "--seeds", "1"]) == 1
    error = capsys.readouterr().err
    assert "1 jobs failed" in error and "text wild seed 0: FloatingPointError" in error
    assert set(results(tmp_path / "study")) == {"runs/items/dpo/0", "runs/items/ledpo/0"}
    assert (tmp_path / "study" / "report.html").exists()


def test_a_process_that_dies_is_replaced(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes the study and one job, and dies of the second.
    code = "import sys; sys.stdin.readline(); sys.stdin.readline(); print('null', flush=True); sys.stdin.readline()"
    monkeypatch.setattr("fastpo.lab.jobs.WORKER", [sys.executable, "-c", f"{code}; sys.exit(3)"])
    study, found = read_study(plan(), processes=2), []
    with pytest.raises(FileNotFoundError):  # what goes wrong here and not in a job
        do_all(study, [Job("items", "dpo", seed) for seed in range(6)], found.append)
    Path(study.output_dir).mkdir()
    do_all(study, [Job("items", "dpo", seed) for seed in range(6)], found.append)
    assert {outcome.job.seed for outcome in found} == set(range(6))
    assert {outcome.error for outcome in found} == {None, "its process died with status 3"}


def test_killed_it_goes_on_to_the_same_results(plan: Callable[..., str], tmp_path: Path) -> None:
    data = {"items": {**ITEMS, "train_pairs": 1024, "training": {"epochs": 3}}}
    path, killed = plan(data=data), tmp_path / "killed"
    command = [sys.executable, "-m", "fastpo", "compare", path, "--output_dir", str(killed), "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("runs/items/*/*.lock")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(results(killed)) < 4
    assert main(["compare", path, "--output_dir", str(killed)]) == 0
    assert main(["compare", path, "--output_dir", str(tmp_path / "whole")]) == 0
    assert results(killed) == results(tmp_path / "whole") and len(results(killed)) == 4
    for name in ("summary.csv", "comparisons.csv"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# --- language models ------------------------------------------------------------------------------------------------


def run_text(path: str, method: str, data: str = "text", output_dir: str | None = None) -> dict[str, Any]:
    study = read_study(path, output_dir=output_dir)
    do_job(study, Job(data, None, 0))
    do_job(study, Job(data, method, 0))
    return results(Path(study.output_dir))[Run(data, method, 0).path]


def test_a_language_model_is_measured(plan: Callable[..., str], tmp_path: Path) -> None:
    found = run_text(plan(data={"text": TEXT}), "ledpo")
    measures = found["measures"]
    assert {"accuracy", "margin", "nll", "ece", "kl", "length", "reward", "win_rate", "bleu", "chrf", "rouge_l"} <= set(
        measures
    )
    assert 0 <= measures["accuracy"] <= 1 and measures["kl"] > 0 and 1 <= measures["length"] <= 6
    assert measures["s/min"] <= measures["s/mean"] <= measures["s/max"] and -1 <= measures["s/reliability"] <= 1
    assert sum(kind["pairs"] for kind in found["kinds"].values()) == 40
    right = sum(kind["pairs"] * kind["accuracy"] for kind in found["kinds"].values())
    assert right == pytest.approx(40 * measures["accuracy"])
    assert sum(len(kind["s"]) for kind in found["kinds"].values()) == 40
    start, middle, end = found["course"]
    assert (start["step"], middle["step"], end["step"], end["fraction"]) == (0, 2, 4, 1.0)
    # At the start policy and reference are one: there is no accuracy to speak of.
    assert start["kl"] == pytest.approx(0, abs=1e-5) and "accuracy" not in start and "accuracy" in end
    assert [log["step"] for log in found["training"]] == [1, 2, 3, 4] and "regularizers/pointwise" in end | found[
        "training"
    ][-1]


def test_accuracy_and_margin_are_those_of_the_trainer(plan: Callable[..., str], tmp_path: Path) -> None:
    study = read_study(plan(data={"text": TEXT}))
    do_job(study, Job("text", None, 0))
    seen: dict[str, float] = {}
    final = Probe.final

    def watched(self: Probe) -> dict[str, Any]:
        seen.update(self.trainer.evaluate())
        return final(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "final", watched)
        run = Run("text", "ledpo", 0)
        found = run_language(study, run, base_folder(study, "text", 0), tmp_path / "run")
    assert found["measures"]["accuracy"] == pytest.approx(seen["eval_rewards/accuracies"])
    assert found["measures"]["margin"] == pytest.approx(seen["eval_rewards/margins"], rel=1e-4)
    assert found["measures"]["s/mean"] * 0.1 == pytest.approx(seen["eval_beta/mean"], rel=1e-5)


@pytest.mark.parametrize("method", ["disco_dpo", "simpo"])
def test_other_objectives_and_adapters(plan: Callable[..., str], method: str) -> None:
    lora = {"use_peft": True, "lora_target_modules": "q_proj,v_proj", "lora_r": 4}
    path = plan(data={"text": TEXT}, methods={method: {"preset": method, **lora}}, comparisons={})
    measures = run_text(path, method)["measures"]
    assert measures["kl"] > 0 and measures["nll"] > 0


def test_a_checkpoint_is_gone_on_from_to_the_same_result(
    plan: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**PLAN["training"], "save_strategy": "steps", "save_steps": 2}
    path = plan(data={"text": TEXT}, training=training)
    whole = run_text(path, "ledpo", output_dir=str(tmp_path / "whole"))
    note = Probe._note

    def dies(self: Probe, state: Any, *fraction: float) -> None:
        if state.global_step == 4:
            raise RuntimeError("power cut")
        note(self, state, *fraction)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Probe, "_note", dies)
        run_text(path, "ledpo", output_dir=str(tmp_path / "cut"))
    folder = tmp_path / "cut" / "runs" / "text" / "ledpo" / "0"
    assert (folder / "checkpoint-2").is_dir() and not (folder / "result.json").exists()
    assert run_text(path, "ledpo", output_dir=str(tmp_path / "cut")) == whole
    assert not list(folder.glob("checkpoint-*"))


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    plan: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**PLAN["training"], "save_strategy": "steps", "save_steps": 2}

    def dies(self: Probe, state: Any, *fraction: float) -> None:
        if state.global_step == 4:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Probe, "_note", dies)
        run_text(plan(data={"text": TEXT}, training=training), "dpo")
    other = {**training, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match=r"holds runs/text/dpo/0 with another training\.learning_rate"):
        run_text(plan(data={"text": TEXT}, training=other), "dpo")


def test_measuring_changes_nothing(plan: Callable[..., str], tmp_path: Path) -> None:
    """Dropout is off while it measures, and what it draws, training does not see; nor does a batch move its beta."""
    lora = {"preset": "beta_dpo", "use_peft": True, "lora_dropout": 0.5, "lora_target_modules": "q_proj,v_proj"}
    found = []
    for points, batch in ((1, 8), (4, 3)):
        evaluation = {**PLAN["evaluation"], "points": points}
        training = {**PLAN["training"], "per_device_eval_batch_size": batch}
        path = plan(data={"text": TEXT}, methods={"m": lora}, comparisons={}, evaluation=evaluation, training=training)
        found.append(run_text(path, "m", output_dir=str(tmp_path / str(points)))["measures"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_preference_file_with_a_judge_of_its_own(plan: Callable[..., str], tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in planted_preferences(24, seed=1)))
    data = {"file": {"task": "preferences", "dataset": str(rows), "held_out": 8, "reward_model": "train"}}
    judge = {**PLAN["base"], "learning_rate": 1e-3}
    found = run_text(plan(data=data, judge=judge), "dpo", data="file")
    assert found["kinds"] == {} and {"win_rate", "reward", "chrf"} <= set(found["measures"])
    changed = planted_preferences(23, seed=1)
    rows.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(ValueError, match="with another content"):
        run_text(plan(data=data, judge=judge), "dpo", data="file")
    data["file"] |= {"reward_model": None, "reward_funcs": f"{Path(__file__)}:by_length"}
    measures = run_text(plan(data=data), "dpo", data="file", output_dir=str(tmp_path / "other"))["measures"]
    assert measures["reward"] >= 0


def by_length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(said[0]["content"])) for said in completions]


def test_data_that_differ_in_training_alone_share_a_base(plan: Callable[..., str], tmp_path: Path) -> None:
    data = {"a": TEXT, "b": {**TEXT, "training": {"learning_rate": 1e-4}}, "c": {**TEXT, "words": 17}}
    study = read_study(plan(data=data))
    assert base_folder(study, "a", 0) == base_folder(study, "b", 0)
    others = [base_folder(study, "a", 1), base_folder(study, "c", 0)]
    # The same rows, but weights that start from another seed.
    shifted = read_study(plan(data={"d": {**TEXT, "seed": 1}}))
    others.append(base_folder(shifted, "d", 0))
    assert base_folder(shifted, "d", 0) != base_folder(study, "a", 1)
    others.append(base_folder(read_study(plan(data=data, base={**PLAN["base"], "max_steps": 4})), "a", 0))
    assert base_folder(study, "a", 0) not in others
    do_job(study, Job("a", None, 0))
    weights = base_folder(study, "a", 0) / "model" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    do_job(study, Job("b", None, 0))
    assert weights.stat().st_mtime_ns == made


def test_the_global_generators_do_not_matter(plan: Callable[..., str], tmp_path: Path) -> None:
    first = run_text(plan(data={"text": TEXT}), "dpo", output_dir=str(tmp_path / "a"))
    torch.manual_seed(1234)
    Dataset.from_list([{"x": 1}]).shuffle(seed=3)
    assert run_text(plan(data={"text": TEXT}), "dpo", output_dir=str(tmp_path / "b")) == first
