"""Python functions as rewards: found by name, their answers checked.

They have the signature of TRL's reward functions: called with keyword arguments alone, `prompts` and `completions`
(each one text or a list of messages) and every further column of the dataset, all lists of one length; they
answer with as many numbers. A function that does not read all columns takes **kwargs.
"""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.data import Text, shown

RewardFunction = Callable[..., Sequence[float | None]]


def load_reward_function(name: str) -> RewardFunction:
    """The function called ``package.module:function`` or ``path/to/file.py:function``.

    Modules are looked for in the working directory too, where an installed command would not look.

    Raises:
        ValueError: there is none of that name; the file, or the module, cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"reward_funcs must be package.module:function or path/to/file.py:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(f"reward_funcs {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward_funcs must name a function of {place}, got {name!r}")
    return function


def function_rewards(
    function: RewardFunction,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    index: Sequence[int],
    *,
    some: bool = False,
) -> list[float]:
    """A reward function's answers for N completions.

    Args:
        function: see `load_reward_function`.
        prompts, completions: N of each; a prompt stands there once for each of its completions.
        columns: further ones of the dataset by name, N values each.
        index: dataset row of each completion, for errors.
        some: it may answer None where it does not apply, which becomes NaN.

    Raises:
        ValueError: it answers with no list, with another number of rewards, or with one that is not a finite number.
    """
    answer = function(prompts=list(prompts), completions=list(completions), **columns)
    name = getattr(function, "__name__", repr(function))
    if not isinstance(answer, Iterable):
        raise ValueError(f"reward_funcs {name} must give a list of numbers, got {shown(answer)}")
    rewards = list(answer)
    if len(rewards) != len(completions):
        raise ValueError(
            f"reward_funcs {name} must give one reward for each of {len(completions)} completions (dataset rows "
            f"{index[0]} to {index[-1]}), got {len(rewards)}"
        )
    found = []
    for row, reward in zip(index, rewards, strict=True):
        if some and reward is None:
            found.append(math.nan)
            continue
        try:
            found.append(float(reward))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ValueError(f"reward_funcs {name} must give finite numbers, got {shown(reward)} for dataset row {row}")
    return found


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"reward_functions_in_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for an imported module, which dataclasses and pickling look up there; under a name that shadows none.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
