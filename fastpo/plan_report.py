"""`fastpo plan`: what `fastpo.plan` finds, in words."""

from typing import Any

import torch

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.dry_run import Lengths, lengths_of
from fastpo.from_recipe import build_tokenizer, read_splits, tokenize_splits
from fastpo.plan import GB, Planner, Prediction, memory_of, parse_memory, switches, usable
from fastpo.recipe import RecipeArguments, parse_recipe

NO_DATASET = "(none)"


def plan(path: str, overrides: list[str], memory: str | None, gpu: str | None, on_cpu: bool, from_data: bool) -> str:
    """The plan of a recipe file, as lines for people.

    Raises:
        ValueError, TypeError: as `parse_recipe`, `parse_memory`, `memory_of` and `dry_run`.
    """
    size = _memory(memory, gpu, on_cpu)
    # Needs no data, and no GPU, whatever the recipe trains on.
    recipe, args = parse_recipe(path, [*overrides, "--use_cpu", "true", "--tf32", "false"], {"dataset": NO_DATASET})
    if from_data and recipe.dataset == NO_DATASET:
        raise ValueError("--from_data needs the recipe, or --dataset, to name a dataset")
    planner = Planner(recipe, args, _rows(recipe, args) if from_data else None, on_gpu=not on_cpu)
    prediction = planner.predict()
    batch, length = args.per_device_train_batch_size, args.max_length
    tokens = "any number of tokens" if length is None else f"at most {length} tokens"
    what = f"{batch} {'pairs' if args.stage == 'dpo' else 'rows'} of {tokens} a side"
    lines = [f"peak memory of {args.stage} with {what}, {'on a CPU' if on_cpu else 'on one GPU'}"]
    lines += [f"  {name:12} {bytes_ / GB:8.2f} GB" for name, bytes_ in prediction.parts.items() if bytes_]
    lines += [f"  {'total':12} {prediction.total / GB:8.2f} GB"]
    if size is None:
        return "\n".join([*lines, "Say --memory 24GB or --gpu NAME to hear whether it fits, and what is the most."])
    return "\n".join([*lines, *_verdict(planner, prediction, size)])


def _memory(memory: str | None, gpu: str | None, on_cpu: bool) -> int | None:
    if memory is not None and gpu is not None:
        raise ValueError(f"give either --memory or --gpu, got {memory!r} and {gpu!r}")
    if on_cpu and gpu is not None:
        raise ValueError(f"--cpu goes with --memory, got --gpu {gpu}")
    if memory is not None:
        return parse_memory(memory)
    if gpu is not None:
        return memory_of(gpu)
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.get_device_properties(0).total_memory
    return None


def _rows(recipe: RecipeArguments, args: PreferenceTrainingArguments) -> list[Lengths]:
    train, _ = read_splits(recipe, args.seed, args.stage)
    tokenizer = build_tokenizer(recipe, train, args.stage, saved_in=None)
    rows, _ = tokenize_splits(recipe, args, tokenizer, train, None)
    assert rows is not None
    return lengths_of(rows)


def _verdict(planner: Planner, prediction: Prediction, size: int) -> list[str]:
    budget, args = usable(size, planner.on_gpu), planner.args
    kept = "the CUDA context and holes between tensors" if planner.on_gpu else "Python and its libraries"
    lines = [f"  {size / GB:.1f} GB less {(size - budget) / GB:.1f} GB for {kept} leave {budget / GB:.1f} GB:"]
    if prediction.total <= budget:
        lines[-1] += " it fits"
    else:
        lines[-1] += " it does not fit"
        lines += _what_would_fit(planner, budget)
    for name, other in (("per_device_train_batch_size", "max_length"), ("max_length", "per_device_train_batch_size")):
        if name == "max_length" and planner.rows is not None:
            continue  # the data has the lengths that it has
        most = planner.largest(name, budget)
        at = f"with {other} {getattr(args, other)}"
        lines.append(f"largest {name} {at}: {'none fits' if most is None else most}")
    return lines


def _what_would_fit(planner: Planner, budget: int) -> list[str]:
    """Each switch alone; if none does, all of them from the first until it fits."""
    lines, one_is_enough = ["what would help:"], False
    found = switches(planner.recipe, planner.args)
    for changes in found:
        total = planner.predict(**changes).total
        one_is_enough |= total <= budget
        lines.append(f"  {_shown(changes):60} {total / GB:8.2f} GB{'  fits' if total <= budget else ''}")
    together: dict[str, Any] = {}
    for changes in () if one_is_enough else found:
        together |= changes
        total = planner.predict(**together).total
        if total <= budget:
            return [*lines, f"  together: {_shown(together)}: {total / GB:.2f} GB, fits"]
    return lines if one_is_enough else [*lines, "  all of it together does not fit: take a smaller model"]


def _shown(changes: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items()
    )
