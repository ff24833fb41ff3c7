"""Model cards: what a run optimised, on which data and how, as the README.md beside the saved model."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Sized
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fastpo.adapters import REFERENCE_ADAPTER, has_reference_adapter
from fastpo.architecture import heads_of
from fastpo.backbone import causal_lm
from fastpo.config import PreferenceConfig
from fastpo.data import FILE_LOADERS
from fastpo.explain import explain
from fastpo.files import replacing
from fastpo.methods import METHODS
from fastpo.ppo_arguments import PPOFields
from fastpo.reporting import TABLE_ROWS

logger = logging.getLogger(__name__)

MARKER = "<!-- Written by fastpo, which replaces this file after training. Delete this line to keep the file. -->"
CARD_FILE = "README.md"
PACKAGES = ("fastpo", "torch", "transformers", "accelerate", "peft", "datasets")
# Told by name, without their folders.
_REWARDS = ("reward_model", "reward_funcs", "reward_weights")
# Fields of the objective with which a method is still that method.
ANY_VALUE = {"beta", "beta_schedule", "beta_head_config", "regularizers"}


def write_model_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Iterable[str]) -> None:
    """Write output_dir/README.md, unless there is one without fastpo's marker: a person's, which stays.

    Args:
        trainer: a `PreferenceTrainer`, before, during or after training.
        model_name: the title; default: the name of the repository or folder.
        dataset_name: a dataset of the hub, or a file, of which the name alone is told.
        tags: further tags.

    Raises:
        SaveError: it cannot be written.
    """
    card = Path(trainer.args.output_dir) / CARD_FILE
    if card.exists() and MARKER.encode() not in card.read_bytes():
        logger.warning("%s was not written by fastpo: it stays as it is, without a model card of this run", card)
        return
    text = model_card(trainer, model_name, dataset_name, tags)
    card.parent.mkdir(parents=True, exist_ok=True)
    with replacing(card) as path:
        path.write_text(text)


def model_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Iterable[str]) -> str:
    """The card's text; arguments as in `write_model_card`."""
    args, base = trainer.args, _hub_name(getattr(causal_lm(trainer.model).config, "_name_or_path", None))
    methods = methods_of(trainer.objective) if args.stage == "dpo" else []
    task = "text-classification" if args.stage == "rm" else "text-generation"
    dataset = _hub_name(dataset_name)
    data = ModelCardData(
        base_model=base, library_name="peft" if _adapters(trainer) else "transformers",
        tags=list(dict.fromkeys(["fastpo", args.stage, *methods, *heads_of(trainer.model), *tags])),
        datasets=None if dataset is None else [dataset], pipeline_tag=task,
    )  # fmt: skip
    title = model_name or str(args.hub_model_id or Path(args.output_dir).name).rpartition("/")[2]
    sections: dict[str, Iterable[str]] = {
        "Objective": _objective(trainer, methods),
        "Data": _data(trainer, dataset_name),
        "Training": _bullets(_training(trainer)),
        "Results": _results(trainer.state.log_history),
        "Use": _use(trainer),
        "Versions": [", ".join(_versions())],
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, lines in sections.items() if (text := "\n".join(lines)))
    made_from = (
        f"[{base}](https://huggingface.co/{base})" if base else f"a {causal_lm(trainer.model).config.model_type}"
    )
    intro = f"Trained from {made_from} with fastpo, stage `{args.stage}`."
    return f"---\n{data.to_yaml()}\n---\n{MARKER}\n\n# {title}\n\n{intro}\n\n{body}\n"


def methods_of(config: PreferenceConfig) -> list[str]:
    """The presets that an objective is: as they are, or with other numbers where they set any. The nearest ones."""
    distance = {}
    for name in METHODS:
        different = _changed(config, PreferenceConfig.preset(name))
        set_by_both = {field for field in _changed(config) if field in METHODS[name].settings}
        numbers = {field for field in set_by_both if type(getattr(config, field)) in (int, float)}
        if set(different) <= ANY_VALUE | numbers:
            distance[name] = len(different)
    return [name for name, far in distance.items() if far == min(distance.values())]


def _changed(config: PreferenceConfig, other: PreferenceConfig | None = None) -> dict[str, Any]:
    """Fields with other values than in `other`, or than their defaults."""
    fields = dataclasses.fields(config)
    plain = {field.name: field.default if other is None else getattr(other, field.name) for field in fields}
    return {name: getattr(config, name) for name in plain if getattr(config, name) != plain[name]}


def _objective(trainer: Any, methods: list[str]) -> Iterator[str]:
    stage, objective = trainer.args.stage, trainer.objective
    for name in methods:
        yield f"The preset **{name}** ({_linked(METHODS[name].source)}): `{METHODS[name].formula}`\n"
    yield f"This run, as `fastpo explain` says it:\n\n```\n{explain(objective, stage, ppo=trainer.args)}\n```"
    changed = _changed(objective) if stage != "sft" else {}
    if stage == "ppo":
        fields = [f for f in dataclasses.fields(PPOFields) if f.name not in _REWARDS]
        changed |= {f.name: x for f in fields if (x := getattr(trainer.args, f.name)) != f.default}
        yield f"\nThe reward is {_rewards(trainer.rewards)}."
    if changed:
        yield "\n| parameter | value |\n|---|---|"
        yield from (f"| `{name}` | `{value!r}` |" for name, value in changed.items())
        yield "\nAll others have their default values."
    for name in heads_of(trainer.model):
        yield f"\nA head lies beside the model: `{name}.safetensors`, `{name}_config.json`."
    if stage == "ppo" or trainer.reference.pairs or trainer.reference.features:
        yield f"\nReference: {_reference(trainer)}."


def _rewards(rewards: Any) -> str:
    pairs = zip(rewards.sources, rewards.weights, strict=True)
    return " + ".join(f"{weight:g} * `{name}`" if weight != 1 else f"`{name}`" for name, weight in pairs)


def _reference(trainer: Any) -> str:
    if trainer.args.stage == "dpo" and not trainer.reference.lacking(
        getattr(trainer.train_dataset, "column_names", [])
    ):
        return "its log-probs were computed before training"
    second = getattr(getattr(trainer.ref_model, "config", None), "_name_or_path", None)
    if second and second != getattr(causal_lm(trainer.model).config, "_name_or_path", None):
        return f"`{name}`" if (name := _hub_name(second)) else "another model"
    if has_reference_adapter(trainer.model):
        return "the adapter as it was before training"
    return "the model without its adapter" if _adapters(trainer) else "the model as it was before training"


def _data(trainer: Any, name: str | None) -> Iterator[str]:
    hub = _hub_name(name)
    if hub is not None:
        yield f"[{hub}](https://huggingface.co/datasets/{hub})\n"
    elif name is not None:
        yield f"`{Path(name).name}`\n"
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    uses = {"to train on": trainer.train_dataset}
    uses |= {"held out" + f" ({part})" * bool(part): rows for part, rows in held_out.items()}
    unit = "prompts" if trainer.args.stage == "ppo" else _unit(trainer)
    for use, rows in uses.items():
        if rows is not None:
            yield f"- {len(rows) if isinstance(rows, Sized) else 'streamed'} {unit} {use}"


def _training(trainer: Any) -> Iterator[str]:
    args = trainer.args
    yield f"{trainer.state.global_step} steps" + (f", {epochs:.2f} epochs" if (epochs := trainer.state.epoch) else "")
    per_device, accumulation, processes = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    yield (
        f"{per_device * accumulation * processes} {_unit(trainer)} a step: {per_device} a device, "
        f"{accumulation} accumulation steps, {processes} processes; at most {args.max_length} tokens each"
    )
    optimizer, schedule = (getattr(x, "value", x) for x in (args.optim, args.lr_scheduler_type))
    yield f"learning rate {args.learning_rate:g}, {schedule} schedule, optimizer {optimizer}, seed {args.seed}"
    if args.center_rewards_coefficient is not None:
        yield f"rewards centred: {args.center_rewards_coefficient:g} * (r_chosen + r_rejected)^2 in the loss"
    weights = str(next(causal_lm(trainer.model).parameters()).dtype).removeprefix("torch.")
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else weights
    yield f"weights in {weights}, computed in {computed}"
    for config in _adapters(trainer).values():
        targets = config.target_modules
        named = (
            targets if isinstance(targets, str) else ", ".join(sorted({x.rpartition(".")[2] for x in targets or ()}))
        )
        rank = f" of rank {config.r}, alpha {config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
        yield f"{config.peft_type.value}{rank}, on {named}"


def _results(history: list[dict[str, Any]]) -> Iterator[str]:
    """The last training log and the last evaluation."""
    columns = {"training, last log": "", "held out": "eval_"}
    rows: list[dict[str, Any]] = [
        next((row for row in reversed(history) if f"{prefix}loss" in row), {}) for prefix in columns.values()
    ]
    if not any(rows):
        return
    yield f"| | {' | '.join(columns)} |\n|---|---|---|"
    for name in TABLE_ROWS:
        values = [row.get(prefix + name) for prefix, row in zip(columns.values(), rows, strict=True)]
        if any(value is not None for value in values):
            yield f"| {name} | {' | '.join('' if value is None else f'{value:.4g}' for value in values)} |"


def _unit(trainer: Any) -> str:
    return {"rm": "pairs", "dpo": "pairs", "ppo": "completions"}.get(trainer.args.stage, "rows")


def _use(trainer: Any) -> Iterator[str]:
    place = repr(trainer.args.hub_model_id or "path/to/this/folder").replace("'", '"')
    if trainer.args.stage == "rm":
        yield f"```python\nfrom fastpo.scoring import RewardModel\n\nrewards = RewardModel({place})"
        yield 'rewards.score(["a prompt"], ["a completion"])  # mean, and variance of Gaussian rewards\n```'
        kind = "peft.AutoPeftModel" if _adapters(trainer) else "transformers.AutoModel"
        about = ", whose score is the mean up to a constant" if trainer.gaussian else ""
        yield f"\nWithout fastpo: `{kind}ForSequenceClassification.from_pretrained({place}, num_labels=1)`{about}."
        return
    merged = getattr(causal_lm(trainer.model), "merged_adapters", [])
    library, kind, loading = "transformers", "AutoModelForCausalLM", []
    if _adapters(trainer) and merged:
        library, kind, loading = "peft", "PeftModel", _merging(trainer, merged)
    elif _adapters(trainer):
        library, kind = "peft", "AutoPeftModelForCausalLM"
    heads = ", ".join(heads_of(trainer.model))
    yield "```python" + "\nimport fastpo" * bool(heads)
    yield f"from transformers import AutoTokenizer\nfrom {library} import {kind}" + "\n" * (not loading)
    yield from loading
    yield f"model = {kind}.from_pretrained({'model, ' * bool(loading)}{place})"
    yield f"tokenizer = AutoTokenizer.from_pretrained({place})"
    if heads:
        yield f"heads = fastpo.load_heads(model, {place})  # {heads}"
    yield "```"


def _merging(trainer: Any, adapters: list[str]) -> list[str]:
    """Code that makes the model on which an adapter was trained: one into which others had been merged."""
    base = _hub_name(causal_lm(trainer.model).config._name_or_path) or "path/to/the/first/model"
    names = [_hub_name(name) or f"path/to/{Path(name).name}" for name in adapters]
    return [
        "from transformers import AutoModelForCausalLM\n",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        f"for merged in {names}:  # as before training, or this adapter lies on another model",
        "    model = PeftModel.from_pretrained(model, merged).merge_and_unload()",
    ]


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _adapters(trainer: Any) -> dict[str, Any]:
    """Those that are trained and saved."""
    configs = getattr(trainer.model, "peft_config", {})
    return {name: config for name, config in configs.items() if name != REFERENCE_ADAPTER}


def _hub_name(name: Any) -> str | None:
    """A name as the hub has them, or None of what is a path, or no name."""
    if not name or Path(name).exists() or Path(name).suffix in FILE_LOADERS:
        return None
    return str(name) if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) else None


def _linked(source: str) -> str:
    return re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _bullets(lines: Iterable[str]) -> Iterator[str]:
    return (f"- {line}" for line in lines)
