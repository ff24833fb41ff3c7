"""What a recipe names: datasets, tokenizer, model, reference, adapter."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from fastpo.arguments import PreferenceTrainingArguments, own_columns
from fastpo.chat_templates import set_chat_template
from fastpo.data import PROMPT_NUMBER, find_form, read_dataset
from fastpo.freezing import train_only
from fastpo.integrations.llamafactory_recipes.datasets import CONVERSATION, read_named_datasets
from fastpo.ppo_arguments import PPOTrainingArguments
from fastpo.prompts import find_prompt
from fastpo.recipe import RecipeArguments
from fastpo.reward_loading import load_reward_model, new_reward_model
from fastpo.rollouts import tokenized_prompts
from fastpo.tokenization import tokenize_dataset
from fastpo.tokenizer import train_tokenizer


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
    train = _read_rows(recipe, recipe.dataset, recipe.dataset_split, seed, stage)
    if stage == "ppo":
        find_prompt(train.column_names, recipe.dataset)
    else:
        find_form(train.column_names, stage, recipe.dataset)
    # The rows' numbers in the file travel along, so that an error or a diverging loss names the right one.
    if "index" in train.column_names:
        train = train.remove_columns("index")
    train = train.add_column("index", list(range(len(train))))
    if recipe.max_samples is not None and recipe.dataset_info is None:
        train = train.select(range(min(recipe.max_samples, len(train))))
    if recipe.eval_dataset is not None:
        return train, _read_rows(recipe, recipe.eval_dataset, recipe.eval_split or recipe.dataset_split, seed, stage)
    held_out = recipe.eval_rows or recipe.eval_fraction
    if held_out == 0:
        return train, None
    units = _units(train)
    if len(units) < 2 or recipe.eval_rows >= len(units):
        name = "eval_rows" if recipe.eval_rows else "eval_fraction"
        raise ValueError(f"{name}={held_out} needs at least {max(2, recipe.eval_rows + 1)} rows, got {len(units)}")
    numbers = Dataset.from_dict({"unit": list(range(len(units)))}).train_test_split(test_size=held_out, seed=seed)
    kept, held = ([row for unit in numbers[part]["unit"] for row in units[unit]] for part in ("train", "test"))
    return train.select(kept), train.select(held)


def _units(rows: Dataset) -> list[list[int]]:
    """Positions of the rows that are held out together: those of one conversation or prompt, or each by itself."""
    shared = next((name for name in (CONVERSATION, PROMPT_NUMBER) if name in rows.column_names), None)
    if shared is None:
        return [[position] for position in range(len(rows))]
    units: dict[int, list[int]] = {}
    for position, number in enumerate(rows[shared]):
        units.setdefault(number, []).append(position)
    return list(units.values())


def _read_rows(recipe: RecipeArguments, name: str, split: str, seed: int, stage: str) -> Dataset:
    if recipe.dataset_info is None:
        return read_dataset(name, split)
    return read_named_datasets(name, recipe.dataset_info, stage, seed, recipe.max_samples, recipe.last_answer_only)


def build_tokenizer(recipe: RecipeArguments, rows: Dataset, stage: str, saved_in: str | None) -> Any:
    """The tokenizer that the recipe names, or one trained on the rows, or the one an earlier run so trained."""
    tokenizer = _tokenizer(recipe, rows, stage, saved_in)
    if recipe.chat_template is not None:
        set_chat_template(tokenizer, recipe.chat_template, recipe.default_system, recipe.enable_thinking)
    return tokenizer


def _tokenizer(recipe: RecipeArguments, rows: Dataset, stage: str, saved_in: str | None) -> Any:
    if recipe.tokenizer_vocab_size and not recipe.tokenizer_name_or_path:
        if saved_in is not None and Path(saved_in, "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(saved_in)
        form = find_form(rows.column_names, stage, str(recipe.dataset))
        return train_tokenizer((form(row) for row in rows), recipe.tokenizer_vocab_size)
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)


def build_model(recipe: RecipeArguments, args: PreferenceTrainingArguments, tokenizer: Any) -> Any:
    """The model that the recipe names, or a new one from its config class, the same for the same seed; what the recipe
    freezes asks for no gradient."""
    model, adapters = _model(recipe, args, tokenizer), _names(recipe.merge_adapters or [])
    for adapter in adapters:
        model = _merged(model, adapter, args.stage)
    model.merged_adapters = adapters  # for the model card: a new adapter does not load without them
    freeze(recipe, model)
    return model


def _merged(model: Any, adapter: str, stage: str) -> Any:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(adapter)
    if stage == "rm" and config.task_type == "CAUSAL_LM":
        config.task_type = None  # its layers are the backbone's, and what it has on an LM head has no place here
    return PeftModel.from_pretrained(model, adapter, config=config).merge_and_unload()


def freeze(recipe: RecipeArguments, model: Any) -> None:
    """Leave gradients to the layers that the recipe trains, where it names some."""
    if recipe.freeze_trainable_layers is not None:
        extra = _names(recipe.freeze_extra_modules or [])
        train_only(model, recipe.freeze_trainable_layers, _names(recipe.freeze_trainable_modules), extra)


def _model(recipe: RecipeArguments, args: PreferenceTrainingArguments, tokenizer: Any) -> Any:
    extra: dict[str, Any] = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    if recipe.load_in_4bit:
        extra["quantization_config"] = _four_bits(recipe.dtype)
    if recipe.model_name_or_path is not None:
        load = load_reward_model if args.stage == "rm" else AutoModelForCausalLM.from_pretrained
        return load(
            recipe.model_name_or_path, dtype=weights_dtype(recipe), trust_remote_code=recipe.trust_remote_code, **extra
        )
    config = model_config(recipe, tokenizer)
    set_seed(args.seed)
    dtype = {} if recipe.dtype == "auto" else {"dtype": recipe.dtype}
    make = new_reward_model if args.stage == "rm" else AutoModelForCausalLM.from_config
    return make(config, **dtype, **extra)


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


def build_peft_config(recipe: RecipeArguments, stage: str = "dpo") -> Any:
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
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        task_type="SEQ_CLS" if stage == "rm" else "CAUSAL_LM",
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
        None if rows is None else _tokenized(rows, str(source), args, tokenizer)
        for rows, source in zip(splits, sources, strict=True)
    ]


def _tokenized(rows: Dataset, source: str, args: PreferenceTrainingArguments, tokenizer: Any) -> Dataset:
    if isinstance(args, PPOTrainingArguments):
        return tokenized_prompts(rows, source, args, tokenizer)
    return tokenize_dataset(
        rows, tokenizer, stage=args.stage, max_length=args.max_length, source=source,
        skip_bad_rows=args.skip_bad_rows, num_proc=args.dataset_num_proc, own_columns=own_columns(args),
    )  # fmt: skip
