"""LLaMA-Factory's recipes as they are: recognised, translated into fastpo's keys, and what became of each key, told.

A recipe is LLaMA-Factory's where it has a key that only LLaMA-Factory has: `finetuning_type`, `template`, `cutoff_len`,
`pref_beta`, ... Then LLaMA-Factory's meanings hold for the keys of `KEYS`, and its defaults for those that
are left out. Any other key is fastpo's or transformers' own and may stand beside them.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import yaml

from fastpo.integrations.llamafactory_recipes.keys import DATA, FINETUNING, KEYS, MODEL, OTHER_DEFAULTS
from fastpo.integrations.llamafactory_recipes.meanings import RefusedError, Settings, joined

_SECRET = ("token", "key", "secret", "url")


class Translation(NamedTuple):
    """A recipe in fastpo's keys.

    Attributes:
        settings: what the recipe says.
        defaults: what LLaMA-Factory takes where the recipe says nothing.
        trains: False where the recipe says `do_train: false`.
        report: what became of each key, as lines for people.
    """

    settings: Settings
    defaults: Settings
    trains: bool
    report: str


def is_llamafactory(names: Collection[str], own: Collection[str]) -> bool:
    """Whether one of a recipe's keys is LLaMA-Factory's alone.

    Args:
        names: the keys of the recipe.
        own: fastpo's.
    """
    return any(name in table and name not in own for table in (MODEL, DATA, FINETUNING) for name in names)


def split_overrides(overrides: Sequence[str]) -> tuple[Settings, list[str]]:
    """From a command line's ``--key value``: LLaMA-Factory's keys with their values, and what else there is."""
    said: Settings = {}
    rest: list[str] = []
    starts = [i for i, word in enumerate(overrides) if word.startswith("--")]
    rest += overrides[: starts[0] if starts else None]
    for start, end in itertools.pairwise([*starts, len(overrides)]):
        flag, equals, text = overrides[start].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name in KEYS:
            said[name] = yaml.safe_load(text if equals else " ".join(overrides[start + 1 : end]) or "true")
        else:
            rest += overrides[start:end]
    return said, rest


def translate(recipe: Mapping[str, Any], own: Mapping[str, Any]) -> Translation:
    """A LLaMA-Factory recipe into fastpo's keys.

    Args:
        recipe: its keys and values, all of them known; one of LLaMA-Factory's that is null is as good as left out.
        own: fastpo's keys with their defaults.

    Raises:
        ValueError: keys ask for what is not done here, all of them named with the reason; or two say the same thing.
    """
    said = {name: value for name, value in recipe.items() if value is not None}
    values = {name: said.get(name, key.default) for name, key in KEYS.items()}
    settings: Settings = {name: value for name, value in recipe.items() if name not in KEYS}
    defaults: Settings = {name: value for name, value in OTHER_DEFAULTS.items() if name not in said}
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True  # without which transformers refuses bf16 on a CPU
    mapped: dict[str, str] = {}
    harmless: dict[str, str] = {}
    clashes, refusals = [], []
    for name, value in ((name, value) for name, value in values.items() if value is not None):
        shown = f"{name}: {_shown(name, value)}"
        try:
            became = _become(name, value, values)
        except RefusedError as error:
            refusals.append(f"{shown} ({error})")
            continue
        if name not in said:
            defaults |= {} if isinstance(became, str) else became
        elif isinstance(became, str):
            harmless[name] = became
        else:
            beside = {ours for ours in became if ours in said and ours not in KEYS}
            if name not in became:  # else what it means besides is only what is taken where nothing is said
                differing = [ours for ours in beside if said[ours] != became[ours]]
                clashes += [f"{shown} is {ours}: {became[ours]}, beside {ours}: {said[ours]}" for ours in differing]
            became = {ours: setting for ours, setting in became.items() if ours not in beside}
            settings |= became
            if became != {name: value}:
                note = f" ({KEYS[name].why})" if KEYS[name].why else ""
                mapped[name] = f"{shown} -> {_settings(became)}{note}"
    if refusals:
        raise ValueError("keys of LLaMA-Factory that fastpo does not follow: " + "; ".join(refusals))
    if clashes:
        raise ValueError("the recipe says the same thing twice: " + "; ".join(clashes))
    as_it_is = [name for name in recipe if name not in mapped and name not in harmless]
    other = {name: value for name, value in defaults.items() if name not in settings and own.get(name) != value}
    report = _report(list(mapped.values()), as_it_is, harmless, other)
    return Translation(settings, defaults, said.get("do_train") is not False, report)


def _become(name: str, value: Any, values: Mapping[str, Any]) -> Settings | str:
    """The settings of ours that a key stands for, or why there are none."""
    key = KEYS[name]
    if key.kind == "harmless":
        return key.why
    if key.kind == "refused":
        if value == key.default or (key.default is None and value is False):
            return "off"
        raise RefusedError(key.why)
    if key.translate is None:
        return {key.ours or name: joined(value)}
    try:
        return key.translate(value, values)
    except RefusedError:
        raise
    except (TypeError, ValueError):
        raise RefusedError("it must be a number") from None


def _report(mapped: list[str], as_it_is: list[str], harmless: dict[str, str], other: Settings) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, why in harmless.items():
        by_reason.setdefault(why, []).append(name)
    sections = {
        "mapped": mapped,
        "as it is": [", ".join(as_it_is)] if as_it_is else [],
        "harmless": [f"{', '.join(names)} ({why})" for why, names in by_reason.items()],
        "default": [_settings({name: value}) for name, value in other.items()],
    }
    lines = ["a recipe of LLaMA-Factory; what became of its keys, and which of its defaults hold:"]
    for title, entries in sections.items():
        lines += [f"  {title if i == 0 else '':9} {entry}" for i, entry in enumerate(entries)]
    return "\n".join(lines)


def _settings(settings: Settings) -> str:
    return ", ".join(f"{name}: {_shown(name, value)}" for name, value in settings.items())


def _shown(name: str, value: Any) -> str:
    if name.endswith(_SECRET):
        return "..."
    return str(value).lower() if isinstance(value, bool) else str(value)
