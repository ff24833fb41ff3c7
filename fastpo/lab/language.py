"""A study's runs on language models: the base model of a seed's data, and training from it by each method."""

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback

from fastpo.checkpoints import newest_checkpoint
from fastpo.data import Text
from fastpo.files import replacing
from fastpo.lab.folder import Run
from fastpo.lab.probe import HeldOut, Probe, Reward
from fastpo.lab.study import Study
from fastpo.preemption import SaveOnSigterm
from fastpo.recipe import parse_recipe
from fastpo.resumable import read_jsonl, write_jsonl
from fastpo.reward_functions import function_rewards, load_reward_function
from fastpo.run import prepare_training
from fastpo.scoring import RewardModel
from fastpo.stage_trainer import StageTrainer

READY = "ready.json"  # of a base: what it was made by
# What all runs have in common unless a plan says otherwise.
COMMON: dict[str, Any] = {
    "dtype": "float32", "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "logging_steps": 0.05,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def prepare_base(study: Study, data: str, seed: int, folder: Path) -> None:
    """Leave in `folder` what all methods' runs of this data and seed share: data files, the base model, the judge.

    What is there already stays, and training that was stopped goes on from its checkpoint, if it has one.
    """
    if is_ready(folder):
        return
    settings = study.base_settings(data, seed)
    rows = study.data[data].of(seed)
    write_jsonl(folder / "train.jsonl", rows.train_rows())
    write_jsonl(folder / "held_out.jsonl", rows.held_out_rows())
    if settings["base"]:
        write_jsonl(folder / "base.jsonl", rows.base_rows())
        recipe = {**COMMON, **settings["base"], "stage": "sft", "dataset": str(folder / "base.jsonl"), "seed": seed}
        _train({**recipe, "output_dir": str(folder / "model")}, folder / "base.yaml")
    if getattr(rows, "reward_model", None) == "train":
        write_jsonl(folder / "judged.jsonl", [*rows.train_rows(), *rows.held_out_rows()])
        recipe = {**COMMON, **settings["judge"], "stage": "rm", "dataset": str(folder / "judged.jsonl"), "seed": seed}
        _train({**recipe, "output_dir": str(folder / "judge")}, folder / "judge.yaml")
    with replacing(folder / READY) as aside:
        aside.write_text(json.dumps(settings) + "\n")
    drop_checkpoints(folder)


def is_ready(base: Path) -> bool:
    """Whether `prepare_base` has nothing to do."""
    return (base / READY).exists()


def drop_checkpoints(folder: Path) -> None:
    """Remove checkpoints below a folder, of training that is done."""
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def run_language(study: Study, run: Run, base: Path, folder: Path) -> dict[str, Any]:
    """Train by one method from the base, and measure.

    Args:
        base: what `prepare_base` left.
        folder: of the run; a checkpoint that is there is gone on from.

    Returns:
        measures, kinds, course and training of the result file, see docs/laboratory.md.
    """
    settings = study.settings(run)
    recipe = {
        **COMMON, "precompute_ref_log_probs": not settings["training"].get("use_peft", False),
        "reference_cache_dir": str(base / "reference"),
        **settings["training"], "stage": "dpo", "model_name_or_path": _start(settings, base),
        "dataset": str(base / "train.jsonl"), "eval_dataset": str(base / "held_out.jsonl"), "eval_strategy": "no",
        "seed": run.seed, "output_dir": str(folder),
    }  # fmt: skip
    probes: list[Probe] = []

    def watch(trainer: Any) -> None:
        reference = None if hasattr(trainer.model, "disable_adapter") else _load(recipe, trainer)
        data = study.data[run.data].of(run.seed)
        rows = list(read_jsonl(base / "held_out.jsonl"))
        held_out = HeldOut(
            rows=[rows[i] for i in trainer.eval_dataset["index"]], tokens=trainer.eval_dataset,
            kinds=getattr(data, "kinds", None), reward=_reward(data, base), language=getattr(data, "language", "en"),
        )  # fmt: skip
        probes.append(Probe(trainer, reference, held_out, study.evaluation, run.seed))
        trainer.add_callback(probes[0])

    trainer = _train(recipe, folder / "recipe.yaml", watch, save=study.keep_models)
    [probe] = probes
    steps = trainer.state.max_steps
    logs = [
        {"fraction": log["step"] / steps, **{k: v for k, v in log.items() if isinstance(v, int | float)}}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return {**probe.final(), "course": probe.course, "training": logs}


def check_recipe(study: Study, run: Run) -> None:
    """Raise ValueError or TypeError for a run whose settings are no recipe."""
    settings = study.settings(run)
    for part in ("training", "base", "judge"):
        if "model_name_or_path" in settings[part]:
            _check_model(settings[part]["model_name_or_path"])
    recipes = [{**settings["training"], "stage": "dpo", "model_name_or_path": _start(settings, Path("base"))}]
    if settings["base"]:
        recipes.append({**settings["base"], "stage": "sft"})
    if settings["judge"]:
        recipes.append({**settings["judge"], "stage": "rm"})
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            path = Path(folder, "recipe.yaml")
            path.write_text(yaml.safe_dump({**COMMON, "dataset": "train.jsonl", **recipe, "output_dir": folder}))
            parse_recipe(str(path), [])


@functools.cache
def _check_model(name: str) -> None:
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path must name a model, got {name!r}: {error}") from error


def _train(recipe: dict[str, Any], path: Path, watch: Any = None, save: bool = True) -> StageTrainer:
    """Train by a recipe, which is left at `path`; `watch` is called with the trainer before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    resume = ["--resume_from_checkpoint", "true"] if newest_checkpoint(recipe["output_dir"]) else []
    trainer = prepare_training(*parse_recipe(str(path), resume))
    trainer.remove_callback(PrinterCallback)  # hundreds of runs' logs: they are in the results
    try:
        if watch is not None:
            watch(trainer)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    finally:
        trainer.pop_callback(SaveOnSigterm).restore()
    if save:
        trainer.save_model(recipe["output_dir"])
    return trainer


def _start(settings: dict[str, Any], base: Path) -> str:
    """The model that methods start from."""
    return settings["training"].get("model_name_or_path") or str(base / "model")


def _load(recipe: dict[str, Any], trainer: StageTrainer) -> Any:
    """What the policy started from, a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=trainer.model.dtype)
    return model.to(trainer.args.device).eval().requires_grad_(False)


def _reward(data: Any, base: Path) -> Reward | None:
    if hasattr(data, "true_reward"):
        return data.true_reward
    if data.reward_funcs is not None:
        function = load_reward_function(data.reward_funcs)
        return lambda prompts, completions: function_rewards(function, prompts, completions, {}, range(len(prompts)))
    if data.reward_model is None:
        return None
    judge = RewardModel(base / "judge" if data.reward_model == "train" else data.reward_model)

    def score(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        return judge.score(prompts, completions).mean.tolist()

    return score
