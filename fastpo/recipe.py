"""Recipes: a YAML file and command-line overrides become validated arguments."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpo.arguments import (
    ObjectiveFields,
    PreferenceTrainingArguments,
    build_objective,
    parse_dict,
)
from fastpo.chat_templates import check_chat_template
from fastpo.config import PreferenceConfig, option
from fastpo.integrations.llamafactory_recipes.keys import KEYS
from fastpo.integrations.llamafactory_recipes.translation import (
    Translation,
    is_llamafactory,
    split_overrides,
    translate,
)
from fastpo.methods import METHODS
from fastpo.ppo_arguments import PPOFields, PPOTrainingArguments, check_ppo_objective
from fastpo.stages import STAGES
from fastpo.yaml_arguments import Parser, check_known, nearest, read_yaml


@dataclass
class RecipeArguments:
    """What a recipe says beside the training arguments: model, data, adapter."""

    preset: str | None = option(None, "A method whose settings the recipe starts from: dpo, simpo, rainbowpo, ...")
    model_name_or_path: str | None = option(None, "The model to train, and the reference it starts from.")
    model_config: dict | str | None = option(None, "Build a new model instead: model_type and its config's fields.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer; default: the model's.")
    tokenizer_vocab_size: int | None = option(None, "Train a byte-level BPE tokenizer of this size on the dataset.")
    chat_template: str | None = option(None, "A template of fastpo.chat_templates in place of the tokenizer's own.")
    default_system: str | None = option(None, "The system message of conversations without one, with chat_template.")
    enable_thinking: bool = option(True, "Whether answers begin with a thought, with a chat_template that thinks.")
    ref_model_name_or_path: str | None = option(None, "Another reference model.")
    dtype: str = option(
        "auto",
        "Weights: float32, bfloat16, float16, or auto: as saved under an adapter, float32 where all are trained.",
    )
    load_in_4bit: bool = option(False, "QLoRA: hold the frozen weights in 4 bits (NF4, by bitsandbytes).")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = option(False, "Allow code from the model's repository.")
    dataset: str | None = option(None, "A JSON, JSONL or Parquet file, or a dataset's name.")
    dataset_info: str | None = option(
        None, "A folder with LLaMA-Factory's dataset_info.json: dataset and eval_dataset are names in it, with commas."
    )
    last_answer_only: bool = option(False, "Stage sft with dataset_info: of each conversation train the last answer.")
    dataset_split: str = option("train", "Split of a named dataset.")
    eval_dataset: str | None = option(None, "Held-out data in the same forms.")
    eval_split: str | None = option(None, "Split of a named eval_dataset; default: dataset_split.")
    eval_fraction: float = option(0.0, "Hold out this fraction of the dataset where eval_dataset is not given.")
    eval_rows: int = option(0, "Hold out so many rows instead.")
    max_samples: int | None = option(None, "Use the first so many rows; with dataset_info, of each dataset.")
    use_peft: bool = option(False, "Train a LoRA adapter; the reference is the model without it.")
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "Scale: alpha / r.")
    lora_dropout: float = option(0.05, "Dropout of the adapter's input.")
    lora_target_modules: str = option("all-linear", "Modules to adapt: all-linear, or names separated by commas.")
    lora_modules_to_save: str | None = option(None, "Modules to train whole, separated by commas.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r).")
    use_dora: bool = option(False, "Learn magnitude and direction apart (DoRA).")
    merge_adapters: str | None = option(None, "Saved adapters to merge into the model first, separated by commas.")
    freeze_trainable_layers: int | None = option(
        None, "Train the last so many layers alone, or the first so many where it is negative."
    )
    freeze_trainable_modules: str = option("all", "Parts of those layers to train, separated by commas.")
    freeze_extra_modules: str | None = option(None, "Modules outside the layers to train too, separated by commas.")

    def __post_init__(self) -> None:
        self.model_config = parse_dict("model_config", self.model_config)
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError(
                "a recipe must have either model_name_or_path or model_config, got "
                + ("neither" if self.model_config is None else "both")
            )
        if self.model_config is not None and "model_type" not in self.model_config:
            raise ValueError(f"model_config must name a model_type, got {self.model_config!r}")
        if self.model_config is not None and not (self.tokenizer_vocab_size or self.tokenizer_name_or_path):
            raise ValueError("model_config needs tokenizer_vocab_size or tokenizer_name_or_path, got neither")
        if self.dataset is None:
            raise ValueError("dataset must be a file or a dataset name, got none")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1), got {self.eval_fraction!r}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be >= 1, got {self.max_samples!r}")
        if self.eval_rows < 0 or (self.eval_rows and self.eval_fraction):
            raise ValueError(
                f"eval_rows must be >= 0, and 0 with eval_fraction={self.eval_fraction!r}, got {self.eval_rows!r}"
            )
        if self.chat_template is not None:
            check_chat_template(self.chat_template)
        elif self.default_system is not None or not self.enable_thinking:
            raise ValueError("default_system and enable_thinking=False need a chat_template, got none")
        if self.merge_adapters and (self.load_in_4bit or not self.model_name_or_path):
            raise ValueError("merge_adapters needs model_name_or_path without load_in_4bit: 4-bit weights take no sum")
        self._check_freezing()
        if self.load_in_4bit and not (self.use_peft and self.model_name_or_path):
            raise ValueError("load_in_4bit needs use_peft and model_name_or_path: what is quantised is not trained")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")

    def _check_freezing(self) -> None:
        if self.freeze_trainable_layers is None:
            if self.freeze_trainable_modules != "all" or self.freeze_extra_modules:
                raise ValueError("freeze_trainable_modules and freeze_extra_modules need freeze_trainable_layers")
        elif self.use_peft:
            raise ValueError("freeze_trainable_layers must be unset with use_peft, which freezes the whole model")


def parse_recipe(
    path: str, overrides: list[str], defaults: dict[str, Any] | None = None
) -> tuple[RecipeArguments, PreferenceTrainingArguments]:
    """A recipe file with command-line overrides (``--key value``) into validated arguments.

    A file of LLaMA-Factory's is translated first (`fastpo.integrations.llamafactory_recipes`). Precedence: overrides,
    then the file, then the preset, then LLaMA-Factory's defaults, then `defaults`.

    Raises:
        ValueError, TypeError: an unknown key (naming the nearest), or a value out of range.
    """
    read = _read_recipe(path, overrides)
    parser = Parser((RecipeArguments, _arguments_of(read.stage)), allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    _set_defaults(parser, read)
    recipe, args = parser.parse_args_into_dataclasses(read.overrides, look_for_args_file=False)
    _check_stage(recipe, args.stage)
    return recipe, args


def _check_stage(recipe: RecipeArguments, stage: str) -> None:
    if stage != "rm":
        return
    if recipe.ref_model_name_or_path is not None:
        raise ValueError(f"ref_model_name_or_path belongs to stage dpo, got stage={stage!r}")
    if recipe.merge_adapters and recipe.use_peft:
        raise ValueError(
            "merge_adapters must be unset with use_peft in stage rm: what loads the new adapter would not merge them"
        )


def parse_objective(path: str, overrides: list[str]) -> tuple[PreferenceConfig, str, str | None, PPOFields | None]:
    """Objective, stage and preset of a recipe, and in stage ppo what it does, without model, data and device.

    Raises:
        ValueError, TypeError: as `parse_recipe`.
    """
    read = _read_recipe(path, overrides)
    kinds = (ObjectiveFields, PPOFields) if read.stage == "ppo" else (ObjectiveFields,)
    parser = Parser(kinds, allow_abbrev=False)
    parser.add_argument("--stage", default="dpo", choices=STAGES)
    known = {"stage", *(f.name for kind in kinds for f in dataclasses.fields(kind))}
    recipe, defaults = ({k: v for k, v in keys.items() if k in known} for keys in (read.recipe, read.defaults))
    _set_defaults(parser, read._replace(recipe=recipe, defaults=defaults))
    fields, *ppo, others, _ = parser.parse_args_into_dataclasses(
        read.overrides, look_for_args_file=False, return_remaining_strings=True
    )
    objective = build_objective(fields, others.stage)
    for own in ppo:
        check_ppo_objective(objective, own)
    return objective, others.stage, read.preset, ppo[0] if ppo else None


def read_translation(path: str, overrides: list[str]) -> Translation | None:
    """What became of the keys of a LLaMA-Factory recipe; None for a recipe of fastpo's own.

    Raises:
        ValueError: as `parse_recipe`.
    """
    return _read_recipe(path, overrides).translation


class _Read(NamedTuple):
    """A recipe file in fastpo's keys, all known.

    Attributes:
        recipe: what the file says, and of a LLaMA-Factory recipe the overrides in its own keys.
        defaults: what holds where neither recipe nor preset says anything.
        overrides: the other ones, of fastpo's keys.
        preset, stage: that the file or the command line names.
        translation: of a LLaMA-Factory recipe.
    """

    recipe: dict[str, Any]
    defaults: dict[str, Any]
    overrides: list[str]
    preset: str | None
    stage: str | None
    translation: Translation | None


def _arguments_of(stage: str | None) -> type[PreferenceTrainingArguments]:
    return PPOTrainingArguments if stage == "ppo" else PreferenceTrainingArguments


def _read_recipe(path: str, overrides: list[str]) -> _Read:
    recipe, translation = read_yaml(path), None
    stage = _said("stage", recipe, overrides)
    own = {f.name: f.default for kind in (RecipeArguments, _arguments_of(stage)) for f in dataclasses.fields(kind)}
    foreign = is_llamafactory(recipe, own)
    known = {*own, *KEYS} if foreign else {*own}
    of_ppo = {f.name for f in dataclasses.fields(PPOFields)} - known
    for key in recipe:
        if key in of_ppo:
            raise ValueError(f"{path}: {key} belongs to stage ppo, got stage={stage or 'dpo'!r}")
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), {*own, *KEYS})}")
    check_known(overrides, known)
    if foreign:
        said, overrides = split_overrides(overrides)
        translation = translate(recipe | said, own)
        recipe = translation.settings
    preset = _said("preset", recipe, overrides)
    if preset is not None and preset not in METHODS:
        raise ValueError(f"preset must be one of {', '.join(METHODS)}, got {preset!r}")
    return _Read(recipe, translation.defaults if translation else {}, overrides, preset, stage, translation)


def _said(key: str, recipe: dict[str, Any], overrides: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{key}", default=recipe.get(key))
    return getattr(finder.parse_known_args(overrides)[0], key)


def _set_defaults(parser: argparse.ArgumentParser, read: _Read) -> None:
    for keys in (read.defaults, METHODS[read.preset].settings if read.preset else {}, read.recipe):
        # argparse converts a default only if it is a string: exactly YAML's 1e-5, which it reads as one.
        parser.set_defaults(**{k: json.dumps(v) if isinstance(v, dict) else v for k, v in keys.items()})
