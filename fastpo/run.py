"""What the commands do: train a recipe, evaluate what it left, from arguments to files."""

import json
import logging
from pathlib import Path
from typing import Any

from fastpo.architecture import load_heads
from fastpo.arguments import PreferenceTrainingArguments
from fastpo.callbacks import PeakMemory
from fastpo.checkpoints import clear_staging, is_complete, newest_checkpoint
from fastpo.dry_run import lengths_of
from fastpo.files import replacing
from fastpo.from_recipe import (
    build_model,
    build_peft_config,
    build_reference,
    build_tokenizer,
    check_output_dir,
    read_splits,
    tokenize_splits,
)
from fastpo.memory import hand_back_what_is_freed
from fastpo.plan import GB, PLANNED_STAGES, Planner
from fastpo.ppo_trainer import PPOTrainer
from fastpo.preemption import SaveOnSigterm
from fastpo.recipe import RecipeArguments
from fastpo.reporting import MetricsFile, draw_curves
from fastpo.reward_loading import load_reward_model
from fastpo.reward_trainer import RewardTrainer
from fastpo.stage_trainer import StageTrainer
from fastpo.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)


def prepare_training(recipe: RecipeArguments, args: PreferenceTrainingArguments) -> StageTrainer:
    """Everything before the first step. Whatever is wrong with the input is said here, as a ValueError or TypeError."""
    check_output_dir(args.output_dir)
    with args.main_process_first(desc="reading the dataset"):
        clear_staging(args.output_dir)
        args.resume_from_checkpoint = _checkpoint(args)
        train, held_out = read_splits(recipe, args.seed, args.stage)
        tokenizer = build_tokenizer(recipe, train, args.stage, saved_in=args.resume_from_checkpoint)
        train, held_out = tokenize_splits(recipe, args, tokenizer, train, held_out)
    peft_config = build_peft_config(recipe, args.stage)  # imports what is not weights, and so before the meter
    if args.device.type == "cpu":
        hand_back_what_is_freed()
    memory = PeakMemory(recipe, args.device)
    trainer = _trainer(
        recipe, args, build_model(recipe, args, tokenizer), build_reference(recipe), processing_class=tokenizer,
        train_dataset=train, eval_dataset=held_out, peft_config=peft_config,
        callbacks=[MetricsFile(args.output_dir), SaveOnSigterm(), memory],
    )  # fmt: skip
    trainer.dataset_name = recipe.dataset
    return trainer


def _trainer(
    recipe: RecipeArguments, args: PreferenceTrainingArguments, model: Any, reference: Any, **named: Any
) -> StageTrainer:
    """The stage's trainer."""
    if args.stage == "rm":
        return RewardTrainer(model=model, args=args, **named)
    if args.stage == "ppo":
        return PPOTrainer(model=model, ref_model=reference, args=args, **named)
    return PreferenceTrainer(model=model, ref_model=reference, args=args, **named)


def run_training(trainer: StageTrainer) -> list[Path]:
    """Train or go on, evaluate, save model, model card and curves; returns the pictures.

    Raises:
        FloatingPointError: a loss or a gradient is not finite.
        SaveError: something cannot be written.
        SystemExit: SIGTERM, as `SaveOnSigterm`.
    """
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:
        trainer.pop_callback(SaveOnSigterm).restore()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.create_model_card()
    if args.world_size == 1:
        _compare_memory(trainer)
    return draw_curves(args.output_dir) if trainer.is_world_process_zero() else []


def _compare_memory(trainer: StageTrainer) -> None:
    """Log the peak that `fastpo plan` predicts for the longest batch of the data beside the one that was measured; of
    a stage that it does not know, the latter alone."""
    memory = trainer.pop_callback(PeakMemory)
    if memory is None or memory.bytes is None:
        return
    if trainer.args.stage not in PLANNED_STAGES:
        logger.info("peak memory: measured %.2f GB", memory.bytes / GB)
        trainer.log({"memory/measured_gb": memory.bytes / GB})
        return
    rows, on_gpu = lengths_of(trainer.train_dataset), memory.meter.device.type == "cuda"
    try:
        predicted = Planner(memory.recipe, trainer.args, rows, on_gpu).predict().total
    except Exception as error:  # a forecast must not spoil the run, which is over and saved
        logger.warning("peak memory: measured %.2f GB; not predicted: %s", memory.bytes / GB, error)
        return
    logger.info("peak memory: predicted %.2f GB, measured %.2f GB", predicted / GB, memory.bytes / GB)
    trainer.log({"memory/predicted_gb": predicted / GB, "memory/measured_gb": memory.bytes / GB})


def evaluate(recipe: RecipeArguments, args: PreferenceTrainingArguments) -> dict[str, float]:
    """Metrics of the model saved in output_dir on held-out data, with the recipe's first model as reference.

    On the recipe's eval_dataset or held-out fraction; on the whole dataset where it has neither. They are also
    written to output_dir/eval_metrics.json.
    """
    saved = Path(args.output_dir)
    if not (saved / "config.json").is_file() and not (saved / "adapter_config.json").is_file():
        raise ValueError(f"output_dir must hold a trained model, got {args.output_dir!r} without one")
    train, held_out = read_splits(recipe, args.seed, args.stage)
    tokenizer = build_tokenizer(recipe, train, args.stage, saved_in=args.output_dir)
    rows = train if held_out is None else held_out
    _, rows = tokenize_splits(recipe, args, tokenizer, None, rows)
    model, reference = _load_trained(recipe, args, tokenizer)
    trainer = _trainer(recipe, args, model, reference, eval_dataset=rows, processing_class=tokenizer)
    metrics = trainer.evaluate()
    with replacing(saved / "eval_metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _load_trained(recipe: RecipeArguments, args: PreferenceTrainingArguments, tokenizer: Any) -> tuple[Any, Any]:
    """The trained model and its reference; for an adapter the reference is the model without it."""
    from transformers import AutoModelForCausalLM

    is_adapter = (Path(args.output_dir) / "adapter_config.json").is_file()
    if args.stage == "rm" and not is_adapter:
        return load_reward_model(args.output_dir, new_score=False, dtype=recipe.dtype), None
    base = build_model(recipe, args, tokenizer)
    if is_adapter:
        from peft import PeftModel

        trained = PeftModel.from_pretrained(base, args.output_dir)
        load_heads(trained, args.output_dir)  # a PeftModel does not know where it came from
        return trained, build_reference(recipe)
    trained = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=recipe.dtype)
    return trained, build_reference(recipe) or base


def _checkpoint(args: PreferenceTrainingArguments) -> str | None:
    """The checkpoint to go on from."""
    asked = args.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "false"):
        if not is_complete(Path(asked)):
            raise ValueError(f"resume_from_checkpoint must be a complete checkpoint, got {asked!r}")
        return str(asked)
    newest = newest_checkpoint(args.output_dir)
    if str(asked).lower() == "true":
        if newest is None:
            logger.warning("no checkpoint in %s: starting from the beginning", args.output_dir)
        return None if newest is None else str(newest)
    if newest is not None:
        raise ValueError(
            f"output_dir {args.output_dir!r} already holds {newest.name}: "
            "pass --resume_from_checkpoint true to go on, or another output_dir"
        )
    return None
