"""Recipes: a YAML file and command-line overrides become arguments, a model, a tokenizer and datasets."""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    set_seed,
)

from fastpo.arguments import (
    OBJECTIVE_NAMES,
    ObjectiveFields,
    PreferenceTrainingArguments,
    build_objective,
    own_columns,
    parse_dict,
)
from fastpo.config import PreferenceConfig, option
from fastpo.data import find_form, read_dataset, tokenize_dataset
from fastpo.methods import METHODS
from fastpo.stages import STAGES
from fastpo.tokenizer import train_tokenizer


@dataclass
class RecipeArguments:
    """What a recipe says beside the training arguments: model, data, adapter."""

    preset: str | None = option(None, "A method whose settings the recipe starts from: dpo, simpo, rainbowpo, ...")
    model_name_or_path: str | None = option(None, "The model to train, and the reference it starts from.")
    model_config: dict | str | None = option(None, "Build a new model instead: model_type and its config's fields.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer; default: the model's.")
    tokenizer_vocab_size: int | None = option(None, "Train a byte-level BPE tokenizer of this size on the dataset.")
    ref_model_name_or_path: str | None = option(None, "Another reference model.")
    dtype: str = option(
        "auto",
        "Weights: float32, bfloat16, float16, or auto: as saved under an adapter, float32 where all are trained.",
    )
    load_in_4bit: bool = option(False, "QLoRA: hold the frozen weights in 4 bits (NF4, by bitsandbytes).")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = option(False, "Allow code from the model's repository.")
    dataset: str | None = option(None, "A JSON, JSONL or Parquet file, or a dataset's name.")
    dataset_split: str = option("train", "Split of a named dataset.")
    eval_dataset: str | None = option(None, "Held-out data in the same forms.")
    eval_split: str | None = option(None, "Split of a named eval_dataset; default: dataset_split.")
    eval_fraction: float = option(0.0, "Hold out this fraction of the dataset where eval_dataset is not given.")
    max_samples: int | None = option(None, "Use the first so many rows.")
    use_peft: bool = option(False, "Train a LoRA adapter; the reference is the model without it.")
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "Scale: alpha / r.")
    lora_dropout: float = option(0.05, "Dropout of the adapter's input.")
    lora_target_modules: str = option("all-linear", "Modules to adapt: all-linear, or names separated by commas.")
    lora_modules_to_save: str | None = option(None, "Modules to train whole, separated by commas.")

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
        if self.load_in_4bit and not (self.use_peft and self.model_name_or_path):
            raise ValueError("load_in_4bit needs use_peft and model_name_or_path: what is quantised is not trained")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_recipe(
    path: str, overrides: list[str], defaults: dict[str, Any] | None = None
) -> tuple[RecipeArguments, PreferenceTrainingArguments]:
    """A recipe file with command-line overrides (``--key value``) into validated arguments.

    Precedence: overrides, then the file, then the preset, then `defaults`.

    Raises:
        ValueError, TypeError: an unknown key (naming the nearest), or a value out of range.
    """
    recipe, preset = _read_recipe(path, overrides)
    parser = _Parser((RecipeArguments, PreferenceTrainingArguments), allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    _set_defaults(parser, recipe, preset)
    return parser.parse_args_into_dataclasses(overrides, look_for_args_file=False)


def parse_objective(path: str, overrides: list[str]) -> tuple[PreferenceConfig, str, str | None]:
    """Objective, stage and preset of a recipe, without its model, data and device.

    Raises:
        ValueError, TypeError: as `parse_recipe`.
    """
    recipe, preset = _read_recipe(path, overrides)
    parser = _Parser(ObjectiveFields, allow_abbrev=False)
    parser.add_argument("--stage", default="dpo", choices=STAGES)
    _set_defaults(parser, {k: v for k, v in recipe.items() if k in (*OBJECTIVE_NAMES, "stage")}, preset)
    fields, others, _ = parser.parse_args_into_dataclasses(
        overrides, look_for_args_file=False, return_remaining_strings=True
    )
    return build_objective(fields, others.stage), others.stage, preset


def _read_recipe(path: str, overrides: list[str]) -> tuple[dict[str, Any], str | None]:
    """The file's keys, all known, and the preset that it or the command line names."""
    known = {f.name for kind in (RecipeArguments, PreferenceTrainingArguments) for f in dataclasses.fields(kind)}
    recipe = _read_yaml(path)
    for key in recipe:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
    for flag in overrides:
        name = flag.split("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name.removeprefix("no_") not in known and name not in known:
            raise ValueError(f"unknown option {flag.split('=')[0]!r}{_nearest(name, known)}")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default=recipe.get("preset"))
    preset = finder.parse_known_args(overrides)[0].preset
    if preset is not None and preset not in METHODS:
        raise ValueError(f"preset must be one of {', '.join(METHODS)}, got {preset!r}")
    return recipe, preset


def _set_defaults(parser: argparse.ArgumentParser, recipe: dict[str, Any], preset: str | None) -> None:
    parser.set_defaults(**(METHODS[preset].settings if preset else {}))
    # argparse converts a default only if it is a string: exactly YAML's 1e-5, which it reads as one.
    parser.set_defaults(**{k: json.dumps(v) if isinstance(v, dict) else v for k, v in recipe.items()})


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"recipe must be an existing YAML file, got {path!r}")
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(recipe).__name__}")
    return recipe


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_output_dir(output_dir: str) -> None:
    """Make the folder and prove that it can be written, before any work is done."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir must be a writable folder, got {output_dir!r}: {error.strerror}") from None


def read_splits(recipe: RecipeArguments, seed: int, stage: str) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows as they stand in the files; the held-out fraction depends on the seed alone."""
    assert recipe.dataset is not None
    train = read_dataset(recipe.dataset, recipe.dataset_split)
    find_form(train.column_names, stage, recipe.dataset)
    # The rows' numbers in the file travel along, so that an error or a diverging loss names the right one.
    if "index" in train.column_names:
        train = train.remove_columns("index")
    train = train.add_column("index", list(range(len(train))))
    if recipe.max_samples is not None:
        train = train.select(range(min(recipe.max_samples, len(train))))
    if recipe.eval_dataset is not None:
        return train, read_dataset(recipe.eval_dataset, recipe.eval_split or recipe.dataset_split)
    if recipe.eval_fraction == 0:
        return train, None
    if len(train) < 2:
        raise ValueError(f"eval_fraction={recipe.eval_fraction} needs at least 2 rows, got {len(train)}")
    parts = train.train_test_split(test_size=recipe.eval_fraction, seed=seed)
    return parts["train"], parts["test"]


def build_tokenizer(recipe: RecipeArguments, rows: Dataset, stage: str, saved_in: str | None) -> Any:
    """The tokenizer that the recipe names, or one trained on the rows, or the one an earlier run so trained."""
    if recipe.tokenizer_vocab_size and not recipe.tokenizer_name_or_path:
        if saved_in is not None and Path(saved_in, "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(saved_in)
        form = find_form(rows.column_names, stage, str(recipe.dataset))
        return train_tokenizer((form(row) for row in rows), recipe.tokenizer_vocab_size)
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)


def build_model(recipe: RecipeArguments, args: PreferenceTrainingArguments, tokenizer: Any) -> Any:
    """The model that the recipe names, or a new one from its config class, the same for the same seed."""
    extra: dict[str, Any] = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    if recipe.load_in_4bit:
        extra["quantization_config"] = _four_bits(recipe.dtype)
    if recipe.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(
            recipe.model_name_or_path, dtype=weights_dtype(recipe), trust_remote_code=recipe.trust_remote_code, **extra
        )
    config = model_config(recipe, tokenizer)
    set_seed(args.seed)
    dtype = {} if recipe.dtype == "auto" else {"dtype": recipe.dtype}
    return AutoModelForCausalLM.from_config(config, **dtype, **extra)


def model_config(recipe: RecipeArguments, tokenizer: Any) -> Any:
    """The config of the model that the recipe names or describes."""
    if recipe.model_name_or_path is not None:
        return AutoConfig.from_pretrained(recipe.model_name_or_path, trust_remote_code=recipe.trust_remote_code)
    assert isinstance(recipe.model_config, dict)
    fields = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if "vocab_size" not in recipe.model_config:
        fields["vocab_size"] = len(tokenizer)
    return AutoConfig.for_model(**{**fields, **recipe.model_config})


def weights_dtype(recipe: RecipeArguments) -> str:
    """Steps of AdamW at preference learning rates are below the resolution of 16-bit weights and would be lost."""
    return "float32" if recipe.dtype == "auto" and not recipe.use_peft else recipe.dtype


def _four_bits(dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
    )  # fmt: skip


def build_reference(recipe: RecipeArguments) -> Any:
    """Another reference model where the recipe names one, else None (the trainer's own choice)."""
    if recipe.ref_model_name_or_path is None:
        return None
    return AutoModelForCausalLM.from_pretrained(
        recipe.ref_model_name_or_path, dtype=weights_dtype(recipe), trust_remote_code=recipe.trust_remote_code
    )


def build_peft_config(recipe: RecipeArguments) -> Any:
    if not recipe.use_peft:
        return None
    from peft import LoraConfig

    targets = _names(recipe.lora_target_modules)
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=_names(recipe.lora_modules_to_save) if recipe.lora_modules_to_save else None,
        task_type="CAUSAL_LM",
    )


def _names(value: str | list[str]) -> list[str]:
    """Names separated by commas, or a list as YAML writes it."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def tokenize_splits(
    recipe: RecipeArguments, args: PreferenceTrainingArguments, tokenizer: Any, *splits: Dataset | None
) -> list[Dataset | None]:
    """Tokenise here rather than in the trainer, so that rows are named by their file."""
    sources = (recipe.dataset, recipe.eval_dataset or recipe.dataset)
    return [
        None if rows is None else tokenize_dataset(
            rows, tokenizer, stage=args.stage, max_length=args.max_length, source=str(source),
            skip_bad_rows=args.skip_bad_rows, num_proc=args.dataset_num_proc, own_columns=own_columns(args),
        )
        for rows, source in zip(splits, sources, strict=True)
    ]  # fmt: skip
