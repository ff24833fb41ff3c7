"""LLaMA-Factory's recipes: every key, ten recipes, what they train, and what is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from llamafactory_datasets import write_datasets
from llamafactory_table import PAGE, page_with_tables
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpo import SequenceStats, preference_loss
from fastpo.arguments import PreferenceTrainingArguments
from fastpo.chat_templates import CHAT_TEMPLATES
from fastpo.cli import main
from fastpo.from_recipe import build_model, build_peft_config, read_splits
from fastpo.integrations.llamafactory_recipes.keys import DATA, FINETUNING, GENERATING, KEYS, MODEL, TRAINING
from fastpo.recipe import RecipeArguments, parse_recipe, read_translation
from fastpo.reporting import read_metrics

# The fields of LLaMA-Factory 0.9.5's arguments with their defaults, read off its source.
FIELDS = {
    line.split(" ", 1)[0]: json.loads(line.split(" ", 1)[1])
    for line in (Path(__file__).parent / "llamafactory_keys.txt").read_text().splitlines()
}
# Of transformers, now or once, with a meaning of its own in such a recipe.
OF_TRANSFORMERS = {
    "bf16", "do_predict", "do_train", "evaluation_strategy", "fp16", "generation_config", "generation_max_length",
    "generation_num_beams", "group_by_length", "include_tokens_per_second", "logging_dir", "predict_with_generate",
    "save_safetensors", "sortish_sampler", "warmup_ratio",
}  # fmt: skip
# LLaMA-Factory's published example of a DPO LoRA, with a model and data of the test's own.
DPO_LORA = """
### model
model_name_or_path: {model}
trust_remote_code: true

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]

### dataset
dataset: dpo_en_demo
dataset_dir: {data}
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: {output}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: dpo_en_demo
# val_size: 0.1
# per_device_eval_batch_size: 1
# eval_strategy: steps
# eval_steps: 500
"""
LEAST = {"model_name_or_path": "some/model", "dataset": "demo", "finetuning_type": "lora", "stage": "dpo"}


def parse(
    tmp_path: Path, fields: dict[str, Any], *overrides: str
) -> tuple[RecipeArguments, PreferenceTrainingArguments]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "output_dir": str(tmp_path / "run"), **fields}))
    return parse_recipe(str(path), [*overrides, "--use_cpu", "true"])


def report(tmp_path: Path, fields: dict[str, Any]) -> str:
    parse(tmp_path, fields)
    translation = read_translation(str(tmp_path / "recipe.yaml"), [])
    assert translation is not None
    return translation.report


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_key_has_one_line_with_its_default() -> None:
    assert set(KEYS) == set(FIELDS) | OF_TRANSFORMERS
    assert len(KEYS) == sum(map(len, (MODEL, DATA, FINETUNING, TRAINING, GENERATING)))
    # Beside these: what refuses any value, being something else here.
    defaults = {name: key.default for name, key in KEYS.items() if key.kind != "harmless" and name in FIELDS}
    assert {name: value for name, value in defaults.items() if value != FIELDS[name]} == {"max_length": None}


def test_the_page_has_the_table_of_the_code() -> None:
    assert PAGE.read_text() == page_with_tables(PAGE.read_text()), "run python tests/llamafactory_table.py"
    names = [name for name in CHAT_TEMPLATES if name not in PAGE.read_text().split("### Templates")[1].split("###")[0]]
    assert names == []


# A value that switches each refused key on; True where it is a switch.
ON = {
    name: True if key.default is False else {True: False, "bnb": "hqq", "nf4": "fp4"}.get(key.default, "some")
    for name, key in KEYS.items()
    if key.kind == "refused"
}


@pytest.mark.parametrize("name", ON)
def test_a_refused_key_is_named_with_its_reason_and_harmless_when_it_is_off(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not follow") as error:
        parse(tmp_path, {name: ON[name]})
    assert f"{name}: " in str(error.value) and KEYS[name].why in str(error.value)
    if KEYS[name].default is not None:
        assert f"harmless  {name} (off)" in report(tmp_path, {name: KEYS[name].default})


def test_all_refused_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not follow") as error:
        parse(tmp_path, {**ON, "stage": "kto", "pref_loss": "kto_pair"})
    assert [name for name in [*ON, "stage", "pref_loss"] if f"{name}: " not in str(error.value)] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"stage": "ppo", "reward_model": "some", "ppo_epochs": 2},
            "stage: ppo (LLaMA-Factory's PPO is not translated",
        ),
        ({"stage": "rm", "ref_model": "some"}, "ref_model_name_or_path belongs to stage dpo"),
        ({"stage": "pt"}, "fastpo has the stages"),
        ({"finetuning_type": "oft"}, "fastpo trains lora, full or freeze"),
        ({"pref_loss": "kto_pair"}, "bco_pair"),
        ({"pref_loss": "dpo"}, "the losses are sigmoid, hinge, ipo, orpo, simpo"),
        ({"pref_loss": "hinge", "dpo_label_smoothing": 0.1}, "goes with pref_loss: sigmoid"),
        ({"pref_ftx": 1.0, "ld_alpha": 0.5}, "with ld_alpha"),
        ({"mask_history": True}, "goes with stage: sft"),
        ({"val_size": 0.1, "eval_dataset": "pairs"}, "eval_dataset names the held-out rows already"),
        ({"quantization_bit": 8}, "in 4 bits"),
        ({"template": "qwen9"}, "chat_template must be one of alpaca"),
        ({"adapter_name_or_path": "some"}, "create_new_adapter: true"),
        ({"adapter_name_or_path": "some", "finetuning_type": "full"}, "finetuning_type: lora"),
        ({"flash_attn": "fa9"}, "it must be auto, disabled"),
        ({"dataset_dir": "REMOTE:some/data"}, "a folder with a dataset_info.json"),
        ({"lora_rank": "eight"}, "it must be a number"),
        ({"hf_hub_token": "hf_secret"}, "hf_hub_token: ... (set HF_TOKEN"),
        ({"pref_beta": 0.2, "beta": 0.1}, "pref_beta: 0.2 is beta: 0.2, beside beta: 0.1"),
        ({"lora_rang": 8}, "did you mean 'lora_rank'?"),
        ({"betta": 8}, "did you mean 'beta'?"),
    ],
)
def test_what_cannot_be_is_said(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        parse(tmp_path, fields)
    assert words in str(error.value) and "hf_secret" not in str(error.value)


# --- recipes --------------------------------------------------------------------------------------------------------

# A recipe -> fields that it must come to, of the recipe or of the arguments; LEAST is in all of them.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "what is left out": (
        {},
        {
            "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": "all-linear",
            "max_length": 2048, "beta": 0.1, "pref_loss_type": "sigmoid", "sft_weight": 0.0, "learning_rate": 5e-5,
            "logging_steps": 500, "gradient_checkpointing": True, "dataset_info": "data", "dtype": "auto",
            "gradient_checkpointing_kwargs": {"use_reentrant": False}, "disable_dropout": True, "skip_bad_rows": True,
            "attn_implementation": None, "chat_template": None, "eval_fraction": 0.0, "load_in_4bit": False,
        },
    ),
    "adapter": (
        {
            "lora_rank": 4, "lora_alpha": 7, "lora_dropout": 0.1, "lora_target": "q_proj,v_proj", "use_rslora": True,
            "use_dora": True, "additional_target": ["embed_tokens", "lm_head"], "adapter_name_or_path": "a,b",
            "create_new_adapter": True, "bf16": True, "disable_gradient_checkpointing": True, "flash_attn": "sdpa",
        },
        {
            "lora_r": 4, "lora_alpha": 7, "lora_dropout": 0.0, "lora_target_modules": "q_proj,v_proj",
            "use_rslora": True, "use_dora": True, "lora_modules_to_save": "embed_tokens,lm_head",
            "merge_adapters": "a,b", "bf16": True, "dtype": "bfloat16", "gradient_checkpointing": False,
            "attn_implementation": "sdpa",
        },
    ),
    "sft": (
        {
            "stage": "sft", "lora_dropout": 0.1, "mask_history": True, "pref_beta": 3.0, "pref_loss": "simpo",
            "template": "llama3", "default_system": "Be kind.", "quantization_bit": 4, "upcast_layernorm": True,
            "warmup_ratio": 0.03, "evaluation_strategy": "steps", "eval_steps": 5, "val_size": 12,
        },
        {
            "stage": "sft", "lora_dropout": 0.1, "last_answer_only": True, "beta": 0.1, "disable_dropout": False,
            "pref_loss_type": "sigmoid", "chat_template": "llama3", "default_system": "Be kind.", "load_in_4bit": True,
            "warmup_steps": 0.03, "eval_strategy": "steps", "eval_rows": 12, "eval_fraction": 0.0,
        },
    ),
    "full": (
        {
            "finetuning_type": "full", "lora_rank": 4, "ref_model": "other/model", "pref_beta": 0.3, "bf16": True,
            "dpo_label_smoothing": 0.1, "pref_ftx": 0.5, "flash_attn": "fa2", "val_size": 0.2, "optim": "adamw_8bit",
            "deepspeed": None, "enable_liger_kernel": True, "disable_shuffling": True,
        },
        {
            "use_peft": False, "lora_r": 16, "ref_model_name_or_path": "other/model", "beta": 0.3, "dtype": "auto",
            "label_smoothing": 0.1, "sft_weight": 0.5, "sft_reduction": "mean", "eval_fraction": 0.2, "eval_rows": 0,
            "attn_implementation": "flash_attention_2", "optim": "adamw_8bit", "use_liger_kernel": True,
            "train_sampling_strategy": "sequential",
        },
    ),
    "freeze": (
        {
            "finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_trainable_modules": "mlp,self_attn",
            "freeze_extra_modules": "lm_head", "pure_bf16": True, "flash_attn": "disabled",
        },
        {
            "use_peft": False, "freeze_trainable_layers": -3, "freeze_trainable_modules": "mlp,self_attn",
            "freeze_extra_modules": "lm_head", "dtype": "bfloat16", "bf16": False, "attn_implementation": "eager",
        },
    ),
    "freeze by default": ({"finetuning_type": "freeze"}, {"freeze_trainable_layers": 2, "use_peft": False}),
    "hinge": ({"pref_loss": "hinge", "ld_alpha": 0.5}, {"pref_loss_type": "hinge", "ld_alpha": 0.5}),
    "ipo": ({"pref_loss": "ipo"}, {"pref_loss_type": "ipo", "length_normalization": True, "reference_free": False}),
    "simpo": (
        {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.5},
        {
            "pref_loss_type": "sigmoid", "length_normalization": True, "reference_free": True, "beta": 2.0,
            "home_advantage": 1.5, "margin_units": "reward",
        },
    ),
    "simpo by default": ({"pref_loss": "simpo"}, {"home_advantage": 0.5, "beta": 0.1}),
    "orpo": ({"pref_loss": "orpo", "simpo_gamma": 2.0}, {"pref_loss_type": "orpo", "home_advantage": 0.0}),
    "V7.1 beside it": (
        {
            "add_beta_head": True, "beta_mode": "dynamic_scaling", "beta_head_config": {"kind": "mlp"}, "beta": 0.7,
            "regularizers": {"pointwise": 0.2}, "template": "qwen3", "enable_thinking": False, "padding_free": True,
        },
        {
            "add_beta_head": True, "beta_mode": "dynamic_scaling", "beta_head_config": {"kind": "mlp"}, "beta": 0.7,
            "regularizers": {"pointwise": 0.2}, "chat_template": "qwen3", "enable_thinking": False,
            "padding_free": True,
        },
    ),
    "disco": (
        {"add_disco_head": True, "pref_loss_type": "disco"}, {"add_disco_head": True, "pref_loss_type": "disco"}
    ),
    "preset": (
        {"preset": "rainbowpo"}, {"beta": 10.0, "reference_mix": 0.25, "length_normalization": True, "lora_r": 8}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_parse_to_the_right_configuration(name: str, tmp_path: Path) -> None:
    fields, wanted = RECIPES[name]
    recipe, args = parse(tmp_path, fields)
    found = {key: getattr(recipe if hasattr(recipe, key) else args, key) for key in wanted}
    assert found == wanted


def test_the_published_example_comes_to_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(DPO_LORA.format(model="some/model", data="data", output=tmp_path))
    recipe, args = parse_recipe(str(path), ["--use_cpu", "true"])
    assert (recipe.lora_r, recipe.lora_alpha, recipe.max_samples, recipe.dtype) == (8, 16, 1000, "bfloat16")
    assert (args.beta, args.learning_rate, args.warmup_steps, args.max_length) == (0.1, 5e-6, 0.1, 2048)
    assert (args.gradient_accumulation_steps, args.lr_scheduler_type, args.num_train_epochs) == (8, "cosine", 3.0)


def test_what_became_of_each_key_is_told(tmp_path: Path) -> None:
    fields = {"lora_rank": 4, "overwrite_cache": True, "learning_rate": 1e-6, "preprocessing_num_workers": 16}
    text = report(tmp_path, {**fields, "use_galore": False, "finetuning_type": "lora"})
    for line in (
        "mapped    finetuning_type: lora -> use_peft: true",
        "lora_rank: 4 -> lora_r: 4, lora_alpha: 8",
        "harmless  overwrite_cache (nothing tokenised is cached)",
        "preprocessing_num_workers (of speed alone",
        "use_galore (off)",
        "default   logging_steps: 500",
        "max_length: 2048",
    ):
        assert line in text
    [as_it_is] = [line for line in text.splitlines() if line.startswith("  as it is")]
    assert {"learning_rate", "output_dir", "dataset"} <= set(as_it_is.removeprefix("  as it is").strip().split(", "))
    told = [name for name in {**LEAST, **fields, "use_galore": False} if text.count(name) == 0]
    assert told == []


def test_fastpo_s_own_recipes_are_not_taken_for_llamafactory_s(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    own = {"model_name_or_path": "m", "dataset": "d.json", "stage": "dpo", "lora_alpha": 4, "max_samples": 3}
    path.write_text(yaml.safe_dump({**own, "freeze_trainable_layers": 2, "do_train": True}))
    recipe, args = parse_recipe(str(path), ["--use_cpu", "true"])
    assert read_translation(str(path), []) is None
    assert (args.learning_rate, args.max_length, recipe.lora_r) == (1e-6, 1024, 16)
    with pytest.raises(ValueError, match="unknown option '--cutoff_len'"):
        parse_recipe(str(path), ["--cutoff_len", "7"])
    path.write_text(yaml.safe_dump({**own, "warmup_ratio": 0.1}))
    with pytest.raises(ValueError, match="unknown key 'warmup_ratio'"):
        parse_recipe(str(path), [])


def test_the_command_line_speaks_both_vocabularies(tmp_path: Path) -> None:
    overrides = ["--cutoff_len=128", "--lora_rank", "2", "--dpo_label_smoothing", "0.1", "--beta", "0.4", "--use_dora"]
    recipe, args = parse(tmp_path, {"pref_beta": 0.2}, *overrides, "--learning_rate", "1e-3")
    assert (args.max_length, recipe.lora_r, args.label_smoothing, args.beta) == (128, 2, 0.1, 0.4)
    assert recipe.use_dora and args.learning_rate == 1e-3
    recipe, args = parse(tmp_path, {"bf16": True, "dtype": "float32", "packing": False})
    assert args.bf16 and recipe.dtype == "float32"
    _, args = parse(tmp_path, {}, "--preset", "simpo")
    assert (args.beta, args.reference_free) == (2.0, True)


def _ratio(pair: tuple[torch.Tensor, ...], per_token: bool = False) -> torch.Tensor:
    lengths = pair[4:] * 2 if per_token else (1, 1, 1, 1)
    chosen, rejected, ref_chosen, ref_rejected = (x / n for x, n in zip(pair[:4], lengths, strict=True))
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def _orpo(pair: tuple[torch.Tensor, ...]) -> torch.Tensor:
    chosen, rejected = pair[0] / pair[4], pair[1] / pair[5]
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen - 0.3 * F.logsigmoid(odds)


# pref_loss -> LLaMA-Factory's loss of a pair: policy w, l, reference w, l, lengths w, l; beta 0.3, gamma 0.7.
LOSSES: dict[str, Callable[[Any], torch.Tensor]] = {
    "sigmoid": lambda p: -0.9 * F.logsigmoid(0.3 * _ratio(p)) - 0.1 * F.logsigmoid(-0.3 * _ratio(p)),
    "hinge": lambda p: torch.relu(1 - 0.3 * _ratio(p)),
    "ipo": lambda p: (_ratio(p, True) - 1 / 0.6) ** 2,
    "simpo": lambda p: -F.logsigmoid(0.3 * (p[0] / p[4] - p[1] / p[5] - 0.7 / 0.3)),
    "orpo": _orpo,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ftx", [0.0, 0.25])
def test_losses_are_the_same_numbers(name: str, ftx: float, tmp_path: Path) -> None:
    smoothing = {"dpo_label_smoothing": 0.1} if name == "sigmoid" else {}
    _, args = parse(tmp_path, {"pref_loss": name, "pref_beta": 0.3, "simpo_gamma": 0.7, "pref_ftx": ftx, **smoothing})
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 9, 5]), torch.tensor([7, 2, 5])
    sides = [-n * torch.rand(3, generator=generator, dtype=torch.float64) for n in (*lengths, *lengths)]
    stats = [SequenceStats(x, n, torch.ones(3, dtype=torch.float64)) for x, n in zip(sides, lengths * 2, strict=True)]
    loss = preference_loss(
        stats[0], stats[1], args.preference_config, ref_chosen=stats[2], ref_rejected=stats[3], vocab_size=9
    )
    wanted = LOSSES[name]((*sides, *lengths)) - ftx * sides[0] / lengths[0]
    torch.testing.assert_close(loss.losses, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.loss, wanted.mean(), rtol=1e-12, atol=1e-12)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_datasets(tmp_path / "data")


def test_held_out_rows_are_a_number_or_a_fraction(data: Path, tmp_path: Path) -> None:
    for value, count in ((5, 5), (0.25, 6)):
        recipe, args = parse(tmp_path, {"dataset": "dpo_en_demo", "dataset_dir": str(data), "val_size": value})
        train, held_out = read_splits(recipe, args.seed, "dpo")
        assert held_out is not None and (len(train), len(held_out)) == (24 - count, count)
    recipe, args = parse(tmp_path, {"dataset": "dpo_en_demo", "dataset_dir": str(data), "eval_dataset": "pairs"})
    train, held_out = read_splits(recipe, args.seed, "dpo")
    assert held_out is not None and (len(train), len(held_out)) == (24, 5)
    for names in ("dpo_en_demo,pairs", ["dpo_en_demo", "pairs"]):
        recipe, args = parse(tmp_path, {"dataset": names, "dataset_dir": str(data), "max_samples": 4})
        assert len(read_splits(recipe, args.seed, "dpo")[0]) == 8
    recipe, args = parse(tmp_path, {"dataset": "dpo_en_demo", "dataset_dir": str(data), "val_size": 24})
    with pytest.raises(ValueError, match="eval_rows=24 needs at least 25 rows, got 24"):
        read_splits(recipe, args.seed, "dpo")


def test_a_conversation_is_held_out_with_all_its_answers(tmp_path: Path) -> None:
    """The conversations are those that LLaMA-Factory holds out, which splits before it looks into them."""
    turns = [
        [{"from": ("human", "gpt")[i % 2], "value": f"{k} {i}"} for i in range(2 + 2 * (k % 3))] for k in range(20)
    ]
    (tmp_path / "turns.json").write_text(json.dumps([{"conversations": turn} for turn in turns]))
    entry = {"file_name": "turns.json", "formatting": "sharegpt"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"first": entry, "second": entry}))
    fields = {"stage": "sft", "dataset": "first,second", "dataset_dir": str(tmp_path), "val_size": 0.25}
    recipe, args = parse(tmp_path, fields)
    train, held_out = read_splits(recipe, args.seed, "sft")
    assert held_out is not None
    split = Dataset.from_dict({"k": [*range(20), *range(20)]}).train_test_split(test_size=0.25, seed=args.seed)
    for rows, part in ((train, "train"), (held_out, "test")):
        assert [row["prompt"][0]["content"] for row in rows] == [
            f"{k} 0" for k in split[part]["k"] for _ in range(1 + k % 3)
        ]


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, data: Path) -> Path:
    """The published example with a tiny Qwen3 on disk."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "example.yaml"
    path.write_text(DPO_LORA.format(model=tmp_path / "model", data=data, output=tmp_path / "run"))
    return path


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
def test_the_published_example_trains_unchanged_and_is_evaluated(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["--use_cpu", "true"]
    assert main(["train", str(example), *cpu]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a recipe of LLaMA-Factory") and "lora_rank: 8 -> lora_r: 8, lora_alpha: 16" in printed
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 9  # three epochs of 24 pairs, eight a step
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (8, 16, 0.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<|im_end|>"
    assert main(["eval", str(example), *cpu, "--do_train", "false"]) == 0
    assert "eval_rewards/accuracies" in capsys.readouterr().out
    assert main(["train", str(example), *cpu, "--do_train", "false"]) == 1
    assert "do_train must not be false" in capsys.readouterr().err


def test_explain_and_plan_need_neither_model_weights_nor_data(
    example: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in [*data.rglob("*.json"), tmp_path / "model" / "model.safetensors"]:
        file.unlink()
    assert main(["plan", str(example), "--cpu", "--cutoff_len", "64"]) == 0
    printed = capsys.readouterr().out
    assert "cutoff_len: 64 -> max_length: 64" in printed and "peak memory of dpo with 1 pairs of at most 64" in printed
    (tmp_path / "model" / "config.json").unlink()
    assert main(["explain", str(example), "--pref_loss", "simpo", "--simpo_gamma", "1.5"]) == 0
    printed = capsys.readouterr().out
    assert "pref_loss: simpo -> pref_loss_type: sigmoid" in printed and "z     = b * h - 1.5" in printed


def shorter(example: Path, *overrides: str) -> list[str]:
    quick = ["--use_cpu", "true", "--max_steps", "2", "--dataloader_num_workers", "0", "--bf16", "false"]
    return [str(example), *quick, "--learning_rate", "1e-2", "--save_strategy", "no", *overrides]


def test_freeze_moves_the_layers_it_names_alone(example: Path, tmp_path: Path) -> None:
    frozen = ["--finetuning_type", "freeze", "--freeze_trainable_layers", "1", "--freeze_extra_modules", "norm"]
    assert main(["train", *shorter(example, *frozen)]) == 0
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith(("model.layers.1.", "model.norm."))}


def test_a_merged_adapter_is_the_base_of_a_new_one(example: Path, tmp_path: Path) -> None:
    assert main(["train", *shorter(example)]) == 0
    adapter = tmp_path / "run"
    merging = ["--adapter_name_or_path", str(adapter), "--create_new_adapter", "true", "--use_rslora", "true"]
    path, *overrides = shorter(example, *merging, "--output_dir", str(tmp_path / "second"))
    recipe, args = parse_recipe(path, overrides)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    merged = build_model(recipe, args, tiny_tokenizer())
    name = "model.layers.0.mlp.up_proj"
    weights = load_file(adapter / "adapter_model.safetensors")
    update = 2 * weights[f"base_model.model.{name}.lora_B.weight"] @ weights[f"base_model.model.{name}.lora_A.weight"]
    assert update.abs().max() > 1e-3
    found = merged.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-6)
    assert build_peft_config(recipe).use_rslora
    assert main(["train", path, *overrides]) == 0
    card = (tmp_path / "second" / "README.md").read_text()
    assert str(tmp_path) not in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    places = {"path/to/the/first/model": "model", "path/to/run": "run", "path/to/this/folder": "second"}
    for place, name in places.items():
        code = code.replace(place, str(tmp_path / name))
    scope: dict[str, Any] = {}
    exec(code, scope)
    ids = torch.tensor([[1, 2, 3]])
    trained = PeftModel.from_pretrained(merged, tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](ids).logits, trained(ids).logits)


def test_sft_of_conversations(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = ["--stage", "sft", "--dataset", "alpaca,roles,parts", "--template", "qwen", "--max_steps", "1"]
    assert main(["train", *shorter(example, *sft)]) == 0
    [row] = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train_loss" in row]
    assert row["train_loss"] > 0
    assert main(["train", *shorter(example, *sft, "--skip_bad_rows", "false")]) == 1
    assert "roles row 1: user and assistant must take turns" in capsys.readouterr().err


def test_a_reward_model_of_preferences(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of preferences' own keys LLaMA-Factory reads none in this stage.
    unread = ["--pref_loss", "simpo", "--simpo_gamma", "2.0", "--pref_ftx", "1.0", "--val_size", "8"]
    assert main(["train", *shorter(example, "--stage", "rm", "--logging_steps", "1", *unread)]) == 0
    assert "(read in stage dpo alone)" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and "eval_ece" in rows[-2]
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and "score" in saved["modules_to_save"]
    assert main(["train", *shorter(example, "--stage", "rm", "--dataset", "alpaca")]) == 1
    assert "stage rm needs preferences (ranking: true)" in capsys.readouterr().err
    for stage, dropout in (("rm", False), ("dpo", True)):
        path, *overrides = shorter(example, "--stage", stage)
        assert parse_recipe(path, overrides)[1].disable_dropout is dropout


def test_freezing_leaves_the_score_of_a_reward_model_to_train(example: Path, tmp_path: Path) -> None:
    # Of the first step the schedule makes nothing, and after the second the score is no longer 0.
    frozen = ["--stage", "rm", "--finetuning_type", "freeze", "--freeze_trainable_layers", "1", "--max_steps", "3"]
    assert main(["train", *shorter(example, *frozen)]) == 0
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").state_dict()
    moved = {name for name, weight in after.items() if name != "score.weight" and not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.1.")} and after["score.weight"].any()


def test_a_learned_beta_beside_llamafactory_s_keys(example: Path, tmp_path: Path) -> None:
    learned = ["--add_beta_head", "true", "--beta_mode", "dynamic_scaling", "--logging_steps", "1"]
    assert main(["train", *shorter(example, *learned, "--max_steps", "4")]) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["beta/mean"] == pytest.approx(0.1) and abs(rows[-1]["beta/mean"] - 0.1) > 1e-4
