"""A study's plan: YAML that becomes a checked `Study`, before anything is run."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fastpo.fingerprint import rows_fingerprint
from fastpo.lab.folder import Comparison
from fastpo.lab.kinds import check_sizes
from fastpo.lab.preference_file import PreferenceFile
from fastpo.lab.study import (
    OBJECTIVE_NAMES,
    TASKS,
    DataPlan,
    Evaluation,
    Study,
    check_keys,
    item_settings,
    objective_of,
)  # fmt: skip
from fastpo.yaml_arguments import read_yaml

Made = TypeVar("Made")

KEYS = {
    "name", "title", "about", "output_dir", "seeds", "processes", "threads", "keep_models", "baseline", "data",
    "methods", "comparisons", "base", "judge", "training", "evaluation",
}  # fmt: skip
# Keys of recipes that are the study's own to set, or would have it measure something else.
RESERVED = {
    "stage", "seed", "output_dir", "dataset", "dataset_info", "dataset_split", "eval_dataset", "eval_split",
    "eval_fraction", "eval_rows", "eval_strategy", "max_samples", "ref_model_name_or_path", "resume_from_checkpoint",
    "dataloader_drop_last", "dataloader_persistent_workers", "train_sampling_strategy",
}  # fmt: skip


def read_study(path: str, **overrides: Any) -> Study:
    """A plan file, with those overrides that are not None; see docs/laboratory.md for its keys.

    Args:
        overrides: output_dir, processes, seeds, and data and methods: names to keep.

    Raises:
        ValueError, TypeError: a key is unknown (naming the nearest) or missing, a value is of the wrong kind or out of
            range, or a name stands for nothing.
    """
    said = _with_numbers(read_yaml(path))
    keep = {name: overrides.pop(name, None) for name in ("data", "methods")}
    said |= {name: value for name, value in overrides.items() if value is not None}
    check_keys(said, KEYS, path)
    tables = {
        name: _table(said.get(name), name) for name in ("data", "methods", "comparisons", "base", "judge", "training")
    }
    for name in ("data", "methods"):
        if not tables[name]:
            raise ValueError(f"{path}: {name} must name at least one, got none")
        _check_names(name, tables[name])
    for key in sorted(OBJECTIVE_NAMES & set(tables["training"])):
        raise ValueError(f"{path}: training must leave {key!r} to the methods, whose presets set it")
    for name in ("base", "judge", "training"):
        _check_recipe_keys(name, tables[name])
    methods = {name: _table(settings, f"methods.{name}") for name, settings in tables["methods"].items()}
    for name, settings in methods.items():
        _check_recipe_keys(f"methods.{name}", settings)
        _named(objective_of, settings, f"methods.{name}")
    title = _text("title", said.get("title", said.get("name", "study")))
    study = Study(
        name=_text("name", said.get("name", "study")), title=title, about=str(said.get("about", "")),
        output_dir=_text("output_dir", said.get("output_dir")), seeds=_seeds(said.get("seeds", 3)),
        processes=_count("processes", said.get("processes", 1)), threads=_count("threads", said.get("threads", 1)),
        keep_models=_flag("keep_models", said.get("keep_models", False)),
        baseline=_choice("baseline", said.get("baseline", next(iter(methods))), methods),
        data={name: _data_plan(name, entry, methods) for name, entry in tables["data"].items()}, methods=methods,
        comparisons={
            str(title): _comparison(title, entry, methods) for title, entry in tables["comparisons"].items()
        },
        base=tables["base"], judge=tables["judge"], training=tables["training"],
        evaluation=_named(
            lambda fields: _build(Evaluation, fields), _table(said.get("evaluation"), "evaluation"), "evaluation"
        ),
    )  # fmt: skip
    _check_models(study)
    return _only(study, keep["data"], keep["methods"])


def _only(study: Study, data: Sequence[str] | None, methods: Sequence[str] | None) -> Study:
    """The part of a study that is asked for."""
    kept = {name: study.data[_choice("data", name, study.data)] for name in data or study.data}
    if methods is not None:
        chosen = [_choice("methods", name, study.methods) for name in methods]
        kept = {
            name: dataclasses.replace(plan, methods=tuple(m for m in study.methods_on(name) if m in chosen))
            for name, plan in kept.items()
        }
    return dataclasses.replace(study, data=kept)


def _data_plan(name: str, entry: Any, methods: Mapping[str, Any]) -> DataPlan:
    where = f"data.{name}"
    fields = _table(entry, where)
    if "task" not in fields:
        raise ValueError(f"{where} must have a task, one of {', '.join(TASKS)}, got none")
    task, own = _choice(f"{where}'s task", fields.pop("task"), TASKS), fields.pop("methods", None)
    plan = DataPlan(
        task=task, seed=fields.pop("seed", 0), about=str(fields.pop("about", "")),
        methods=None if own is None else _choices(f"{where}'s methods", own, methods),
        base=_table(fields.pop("base", None), f"{where}.base"),
        training=_table(fields.pop("training", None), f"{where}.training"), fields=fields,
    )  # fmt: skip
    if isinstance(plan.seed, bool) or not isinstance(plan.seed, int):
        raise ValueError(f"{where}'s seed must be an integer, got {plan.seed!r}")
    check_keys(fields, {f.name for f in dataclasses.fields(TASKS[task])} - {"seed"}, where)
    for part, settings in (("base", plan.base), ("training", plan.training)):
        _check_recipe_keys(f"{where}.{part}", settings)
    data = _named(lambda fields: TASKS[task](**fields), fields, where)
    if isinstance(data, PreferenceFile):
        _named(lambda _: data.check(), fields, where)
        plan = dataclasses.replace(plan, content=rows_fingerprint(data.rows))
    if not plan.trains_language:
        if plan.base:
            raise ValueError(f"{where} must have no base, which is of language models, got {plan.base!r}")
        for method in methods if plan.methods is None else plan.methods:
            _named(item_settings, {**plan.training, **methods[method]}, f"{where} with methods.{method}")
    return plan


def _check_models(study: Study) -> None:
    """Language models start from a base or from a named model, not both, and a judge is there where it is wanted."""
    judged = [name for name, plan in study.data.items() if plan.fields.get("reward_model") == "train"]
    if bool(judged) != bool(study.judge):
        raise ValueError(
            f"judge must hold the settings of a reward model where data have reward_model: train ({judged or 'none'}), "
            f"got {study.judge!r}"
        )
    for name, plan in study.data.items():
        if not plan.trains_language:
            continue
        base, named = {**study.base, **plan.base}, "model_name_or_path" in {**study.training, **plan.training}
        if bool(base) == named:
            raise ValueError(
                f"data.{name} must have either a base to train or training's model_name_or_path, got "
                f"{'both' if named else 'neither'}"
            )
        for where, settings in (("base", base), ("judge", study.judge)):
            if settings.get("use_peft"):
                raise ValueError(f"{where} must be trained whole, for methods to start from: use_peft must be unset")


def _comparison(title: str, entry: Any, methods: Mapping[str, Any]) -> Comparison:
    where = f"comparisons.{title}"
    fields = _table(entry, where)
    check_keys(fields, set(Comparison._fields), where)
    if not fields.get("methods") or "against" not in fields:
        raise ValueError(f"{where} must have against, a method, and methods, a list, got {fields!r}")
    others = _choices(where, fields["methods"], methods)
    return Comparison(_choice(where, fields["against"], methods), others, str(fields.get("about", "")))


def _check_names(what: str, names: Iterable[Any]) -> None:
    """Names become folders."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{what} must have names of letters, digits, _, - and ., got {name!r}")


def _check_recipe_keys(where: str, settings: Mapping[str, Any]) -> None:
    for key in sorted(RESERVED & set(settings)):
        raise ValueError(f"{where} must leave {key!r} to the study, got {settings[key]!r}")


def _seeds(value: Any) -> tuple[int, ...]:
    """So many from 0, or those of a list."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or len(set(value)) < len(value):
        raise ValueError(f"seeds must be how many, or a list of different integers >= 0, got {value!r}")
    return tuple(value)


def _count(name: str, value: Any) -> int:
    check_sizes(**{name: value})
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be given, as text, got {value!r}")
    return value


def _table(value: Any, name: str) -> dict[str, Any]:
    """Keys and values, none of None."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must hold keys and values, got {value!r}")
    return dict(value or {})


def _choice(name: str, value: Any, known: Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def _choices(name: str, values: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of {', '.join(known)}, got {values!r}")
    return tuple(_choice(name, value, known) for value in values)


def _build(kind: Callable[..., Made], fields: dict[str, Any]) -> Made:
    check_keys(fields, {f.name for f in dataclasses.fields(kind)}, "its fields")  # type: ignore[arg-type]
    return kind(**fields)


def _with_numbers(value: Any) -> Any:
    """What YAML reads as text though it is a number, such as 1e-5, as one."""
    if isinstance(value, dict):
        return {name: _with_numbers(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_with_numbers(x) for x in value]
    number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if number else value


def _named(make: Callable[[dict[str, Any]], Made], fields: dict[str, Any], where: str) -> Made:
    """What `make` makes; an error says where."""
    try:
        return make(fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
