"""How much memory a recipe's training needs, what would make it fit, and the most that fits.

The figures come from a run of the training itself on tensors without data (`fastpo.dry_run`): of all its layers and of
the whole batch where these are few, else of two and of four, through which each stretch of the run has a straight line.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastpo.arguments import PreferenceTrainingArguments
from fastpo.dry_run import EIGHT_BIT_OPTIMIZERS, PARTS, Lengths, dry_run, lengths_at, longest_batches, planned_config
from fastpo.recipe import RecipeArguments

GB = 10**9
PLANNED_STAGES = ("sft", "dpo")
FEW, MORE = 2, 4  # layers, and rows of a batch
# Memory of cards, in GB, as they are sold.
GPUS = {
    "T4": 16, "V100": 16, "RTX-3090": 24, "RTX-4090": 24, "L4": 24, "A10G": 24, "A100-40GB": 40, "L40S": 48,
    "A100-80GB": 80, "H100": 80, "H200": 141,
}  # fmt: skip
# On a GPU, what the allocator cannot give to tensors: CUDA's context, and holes between tensors as a share of the card.
CONTEXT, HOLES = 600 * 10**6, 0.05
# On a CPU, what libraries take once training begins, measured with a model of next to no size; and before that.
LIBRARIES, IMPORTS = 24 * 2**20, 500 * 10**6
LENGTH_STEP = 64
MOST_ROWS, MOST_TOKENS = 4096, 1 << 20


class Prediction(NamedTuple):
    """Bytes in use at the highest moment of training, by part; a GPU's CUDA context is in none."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Planner:
    """Predicts a recipe and variants of it.

    Args:
        recipe, args: as `parse_recipe` gives them.
        rows: lengths of the dataset's rows. None: every row fills max_length, half of it prompt.
        on_gpu: whether the fused head and a GPU's allocator are meant; the computation itself needs none.

    Raises:
        ValueError, TypeError: the recipe cannot be planned; see `dry_run`.
    """

    def __init__(
        self,
        recipe: RecipeArguments,
        args: PreferenceTrainingArguments,
        rows: Sequence[Lengths] | None = None,
        on_gpu: bool = True,
    ) -> None:
        if args.stage not in PLANNED_STAGES:
            raise ValueError(f"a memory plan knows the stages {', '.join(PLANNED_STAGES)}, got stage={args.stage!r}")
        if rows is None and args.max_length is None:
            raise ValueError("max_length must be given for a plan without the data, got none")
        self.recipe, self.args, self.on_gpu = recipe, args, on_gpu
        self.rows = None if rows is None else list(rows)
        self._known: dict[Any, list[dict[str, int]]] = {}

    def predict(self, **changes: Any) -> Prediction:
        """Of the recipe with some of its fields changed."""
        recipe, args = self._changed(changes)
        config = planned_config(recipe)
        # The size of a batch says no more than its rows.
        variant = repr(sorted((name, x) for name, x in changes.items() if name != "per_device_train_batch_size"))

        def stretches(layers: int, rows: list[Lengths]) -> list[dict[str, int]]:
            key = (variant, layers, tuple(rows))
            if key not in self._known:
                own = _with_layers(config, layers) if layers else config
                self._known[key] = dry_run(recipe, args, rows, own, self.on_gpu)
            return self._known[key]

        highest = max((self._highest(stretches, rows, config) for rows in self._batches(args)), key=_total)
        parts = {name: highest.get(name, 0) for name in PARTS}
        return Prediction(parts if self.on_gpu else parts | {"libraries": LIBRARIES})

    def _highest(
        self, stretches: Callable[[int, list[Lengths]], list[dict[str, int]]], rows: list[Lengths], config: Any
    ) -> dict[str, int]:
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)

        def of_rows(count: int) -> list[dict[str, int]]:
            part = rows[len(rows) - count :]
            # Beyond a few trained layers, models of a few layers do not have the frozen ones.
            if layers > MORE and _uniform(config) and abs(self.recipe.freeze_trainable_layers or 0) <= FEW:
                return _straight(lambda n: stretches(n, part), layers)
            return stretches(0, part)

        # The data's rows are not alike, and so in no straight line.
        by_rows = len(rows) > MORE and self.rows is None
        return max(_straight(of_rows, len(rows)) if by_rows else of_rows(len(rows)), key=_total)

    def _changed(self, changes: dict[str, Any]) -> tuple[RecipeArguments, PreferenceTrainingArguments]:
        of_recipe = {field.name for field in dataclasses.fields(self.recipe)} & set(changes)
        recipe = dataclasses.replace(self.recipe, **{name: changes[name] for name in of_recipe})
        args = copy.copy(self.args)
        for name in set(changes) - of_recipe:
            setattr(args, name, changes[name])
        return recipe, args

    def _batches(self, args: PreferenceTrainingArguments) -> list[list[Lengths]]:
        size = args.per_device_train_batch_size
        if self.rows is not None:
            return longest_batches(self.rows, size)
        assert args.max_length is not None
        # A row a token shorter, because hardly a real batch is without padding.
        return longest_batches([lengths_at(args.max_length)] * size + [lengths_at(args.max_length - 1)], size)[:1]

    def largest(self, name: str, budget: int) -> int | None:
        """The largest per_device_train_batch_size or max_length whose prediction is within `budget` bytes."""
        step, most = (LENGTH_STEP, MOST_TOKENS) if name == "max_length" else (1, MOST_ROWS)
        if name == "max_length":
            positions = getattr(planned_config(self.recipe).get_text_config(), "max_position_embeddings", None)
            most = most if positions is None else min(most, positions)
        guess = getattr(self.args, name) / step
        found = _largest_within(lambda n: self.predict(**{name: n * step}).total, budget, guess, most // step)
        return None if found == 0 else found * step


def _largest_within(cost: Callable[[int], int], budget: int, guess: float, most: int) -> int:
    """The largest n in 1 .. most with cost(n) <= budget, 0 if none; cost rises, nearly in a straight line."""
    known = {n: cost(n) for n in sorted({1, min(most, max(2, round(guess)))})}
    width = math.inf
    while True:
        below = max((n for n in known if known[n] <= budget), default=0)
        above = min((n for n in known if known[n] > budget), default=most + 1)
        if above - below <= 1:
            return below
        # Where the line through the two nearest meets the budget; where the last such step did not halve the bracket,
        # its middle.
        a, b = sorted(sorted(known, key=lambda n: abs(known[n] - budget))[:2])
        rise = known[b] - known[a]
        n = a + (budget - known[a]) * (b - a) // rise if rise > 0 else most
        if above - below > width / 2:
            n, width = (above + below) // 2, math.inf
        else:
            width = above - below
        n = min(max(n, below + 1), above - 1)
        known[n] = cost(n)


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _uniform(config: Any) -> bool:
    """Whether every layer is like the others, as far as the config says."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    experts = any("expert" in name for name in text.to_dict())
    return text is config and not experts and (kinds is None or len(set(kinds)) == 1)


def _with_layers(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]
    return config


def _straight(at: Callable[[int], list[dict[str, int]]], count: int) -> list[dict[str, int]]:
    """The stretches at `count`, on the straight lines through those at a few and at some more."""
    steps = (count - FEW) / (MORE - FEW)
    return [
        {name: round(few.get(name, 0) + steps * (more.get(name, 0) - few.get(name, 0))) for name in {*few, *more}}
        for few, more in zip(at(FEW), at(MORE), strict=True)
    ]


def usable(memory: int, on_gpu: bool) -> int:
    """Bytes of a card or machine of so many bytes that tensors can have."""
    return round(memory * (1 - HOLES)) - CONTEXT if on_gpu else memory - IMPORTS


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24GiB" or "24".

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|)\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory must be a number of GB such as 24GB or 22.5GiB, got {text!r}")
    unit = {"gib": 2**30, "mb": 10**6, "mib": 2**20}.get(match[2].lower(), GB)
    return round(float(match[1]) * unit)


def memory_of(gpu: str) -> int:
    """Bytes of a card by its name.

    Raises:
        ValueError: it is not in the table.
    """
    names = {name.lower(): size for name, size in GPUS.items()}
    if gpu.lower().replace(" ", "-") not in names:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)} (or give --memory), got {gpu!r}")
    return names[gpu.lower().replace(" ", "-")] * GB


def switches(recipe: RecipeArguments, args: PreferenceTrainingArguments) -> list[dict[str, Any]]:
    """What a recipe could change to need less memory, the least intrusive first."""
    found: list[dict[str, Any]] = []
    batch = args.per_device_train_batch_size
    if not args.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    if not (args.bf16 or args.fp16) and recipe.dtype in ("auto", "float32"):
        found.append({"bf16": True})
    if args.stage == "dpo":
        has_second_model = not recipe.use_peft or recipe.ref_model_name_or_path
        if args.preference_config.needs_reference and has_second_model and not args.precompute_ref_log_probs:
            found.append({"precompute_ref_log_probs": True})
    if batch > 1:
        accumulated = batch * args.gradient_accumulation_steps
        found.append({"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated})
    if args.stage == "dpo" and not args.split_responses and not args.prefix_sharing:
        found.append({"split_responses": True})
    if not recipe.use_peft and args.optim not in EIGHT_BIT_OPTIMIZERS:
        found.append({"optim": "adamw_8bit"})
    if not recipe.use_peft and recipe.freeze_trainable_layers is None:
        found.append({"use_peft": True, "dtype": "bfloat16"})
    if args.max_length is not None and args.max_length >= 2 * LENGTH_STEP:
        found.append({"max_length": args.max_length // 2})
    return found
