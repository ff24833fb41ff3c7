"""A study: which methods are compared on which data over which seeds, read from a plan in YAML and checked."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpo.config import PreferenceConfig
from fastpo.explain import explain
from fastpo.lab.planted_items import PlantedItems
from fastpo.lab.planted_text import PlantedText
from fastpo.lab.preference_file import PreferenceFile
from fastpo.lab.recommender import ItemTraining, check_objective
from fastpo.methods import METHODS
from fastpo.yaml_arguments import nearest, read_yaml

# What a plan's `task` names.
TASKS: dict[str, type] = {"text": PlantedText, "items": PlantedItems, "preferences": PreferenceFile}
OBJECTIVE_NAMES = {f.name for f in dataclasses.fields(PreferenceConfig)}


class Comparison(NamedTuple):
    """Methods that are held against one of them.

    Attributes:
        against: the method that others are measured by.
        methods: the others.
        about: what is asked, for the report.
    """

    against: str
    methods: tuple[str, ...]
    about: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How often and on how much a model is measured.

    Raises:
        ValueError: a field is out of its range.
    """

    points: int = 5  # during training, evenly spaced, besides its start; the last is at its end
    pairs: int = 256  # held-out pairs at each of them; at the end all
    prompts: int = 64  # held-out prompts that are answered at each of them
    final_prompts: int = 256  # and at the end
    max_completion_length: int = 24  # tokens
    batch_size: int = 64

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"evaluation's {f.name} must be an integer >= 1, got {value!r}")


@dataclass(frozen=True)
class DataPlan:
    """One of a study's data sets.

    Attributes:
        task: a key of `TASKS`.
        fields: of the task's class but for its seed, to which a run's seed is added.
        seed: see fields.
        methods: those that are run on it; None: all of the study's.
        base: settings of the base model in place of the study's.
        training: settings of all methods' runs beside the study's.
        about: for the report.
    """

    task: str
    fields: dict[str, Any]
    seed: int
    methods: tuple[str, ...] | None
    base: dict[str, Any]
    training: dict[str, Any]
    about: str

    def of(self, seed: int) -> Any:
        """The data of a run with this seed."""
        return TASKS[self.task](seed=self.seed + seed, **self.fields)


@dataclass(frozen=True)
class Study:
    """What `fastpo compare` runs; see docs/laboratory.md for the plan's keys."""

    name: str
    title: str
    about: str
    output_dir: str
    seeds: tuple[int, ...]
    processes: int
    threads: int
    keep_models: bool
    baseline: str
    data: dict[str, DataPlan]
    methods: dict[str, dict[str, Any]]
    comparisons: dict[str, Comparison]
    base: dict[str, Any]
    judge: dict[str, Any]
    training: dict[str, Any]
    evaluation: Evaluation

    def runs(self) -> list["Run"]:
        """All runs; those of one seed before those of the next, so that what is there early compares all methods."""
        return [
            Run(data, method, seed)
            for seed in self.seeds
            for data, plan in self.data.items()
            for method in (self.methods if plan.methods is None else plan.methods)
        ]

    def settings(self, run: "Run") -> dict[str, Any]:
        """Everything that a run's result depends on, as JSON."""
        plan = self.data[run.data]
        return {
            **self.base_settings(run.data, run.seed),
            "training": {
                **(self.training if plan.task != "items" else {}), **plan.training, **self.methods[run.method]
            },
            "evaluation": dataclasses.asdict(self.evaluation),
        }  # fmt: skip

    def base_settings(self, data: str, seed: int) -> dict[str, Any]:
        """Of these, what the methods' runs have in common: the data, the base model, the judge."""
        plan = self.data[data]
        judged = plan.fields.get("reward_model") == "train"
        return {
            "task": plan.task,
            "fields": plan.fields,
            "data_seed": plan.seed + seed,
            "base": {**self.base, **plan.base} if plan.task != "items" else {},
            "judge": self.judge if judged else {},
            "threads": self.threads,
        }

    def describe(self) -> dict[str, Any]:
        """study.json, which the report reads."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.about,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "data": {
                name: {"task": plan.task, "description": plan.about, "methods": list(plan.methods or self.methods)}
                for name, plan in self.data.items()
            },
            "methods": self.methods,
            "formulas": {name: explain(objective_of(settings)) for name, settings in self.methods.items()},
            "comparisons": {title: comparison._asdict() for title, comparison in self.comparisons.items()},
        }

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Study":
        fields = json.loads(text)
        data = {
            name: DataPlan(**{**plan, "methods": None if plan["methods"] is None else tuple(plan["methods"])})
            for name, plan in fields["data"].items()
        }
        comparisons = {
            title: Comparison(against, tuple(methods), about)
            for title, (against, methods, about) in fields["comparisons"].items()
        }
        own = {"seeds": tuple(fields["seeds"]), "data": data, "comparisons": comparisons}
        return cls(**{**fields, **own, "evaluation": Evaluation(**fields["evaluation"])})


class Run(NamedTuple):
    """One training run of a study."""

    data: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        """Its folder below the study's."""
        return f"runs/{self.data}/{self.method}/{self.seed}"


def objective_of(settings: Mapping[str, Any]) -> PreferenceConfig:
    """The objective that a method's settings state; other keys are not read.

    Raises:
        TypeError, ValueError: as `PreferenceConfig`.
    """
    preset = settings.get("preset")
    if preset is not None and preset not in METHODS:
        raise ValueError(f"preset must be one of {', '.join(METHODS)}, got {preset!r}")
    own = {name: value for name, value in settings.items() if name in OBJECTIVE_NAMES}
    return PreferenceConfig(**{**(METHODS[preset].settings if preset else {}), **own})


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
    known = {"name", "title", "about", "output_dir", "seeds", "processes", "threads", "keep_models", "baseline"}
    known |= {"data", "methods", "comparisons", "base", "judge", "training", "evaluation"}
    _check_keys(said, known, path)
    tables = {
        name: _table(said.get(name), name) for name in ("data", "methods", "comparisons", "base", "judge", "training")
    }
    evaluation = _build(Evaluation, _table(said.get("evaluation"), "evaluation"), "evaluation")
    for name in ("data", "methods"):
        if not tables[name]:
            raise ValueError(f"{path}: {name} must name at least one, got none")
    for key in sorted(OBJECTIVE_NAMES & set(tables["training"])):
        raise ValueError(f"{path}: training must leave {key!r} to the methods, whose presets set it")
    methods = {str(name): _table(settings, f"methods.{name}") for name, settings in tables["methods"].items()}
    for name, settings in methods.items():
        _named(objective_of, settings, f"methods.{name}")
    data = {
        str(name): _data_plan(name, _table(entry, f"data.{name}"), methods) for name, entry in tables["data"].items()
    }
    baseline = _choice("baseline", said.get("baseline", next(iter(methods))), methods)
    comparisons = {str(title): _comparison(title, entry, methods) for title, entry in tables["comparisons"].items()}
    study = Study(
        name=str(said.get("name", "study")), title=str(said.get("title", said.get("name", "study"))),
        about=str(said.get("about", "")), output_dir=_text("output_dir", said.get("output_dir")),
        seeds=_seeds(said.get("seeds", 3)), processes=_count("processes", said.get("processes", 1)),
        threads=_count("threads", said.get("threads", 1)), keep_models=bool(said.get("keep_models", False)),
        baseline=baseline, data=data, methods=methods, comparisons=comparisons, base=tables["base"],
        judge=tables["judge"], training=tables["training"], evaluation=evaluation,
    )  # fmt: skip
    return _only(study, keep["data"], keep["methods"])


def _only(study: Study, data: Sequence[str] | None, methods: Sequence[str] | None) -> Study:
    """The part of a study that is asked for."""
    kept = {name: study.data[_choice("data", name, study.data)] for name in data or study.data}
    if methods is not None:
        chosen = {name: study.methods[_choice("methods", name, study.methods)] for name in methods}
        kept = {
            name: dataclasses.replace(plan, methods=tuple(m for m in plan.methods or study.methods if m in chosen))
            for name, plan in kept.items()
        }
    return dataclasses.replace(study, data=kept)


def _data_plan(name: str, entry: dict[str, Any], methods: Mapping[str, Any]) -> DataPlan:
    where, fields = f"data.{name}", dict(entry)
    if "task" not in fields:
        raise ValueError(f"{where} must have a task, one of {', '.join(TASKS)}, got none")
    task = _choice(f"{where}'s task", fields.pop("task"), TASKS)
    own = fields.pop("methods", None)
    plan = DataPlan(
        task=task, seed=fields.pop("seed", 0), about=str(fields.pop("about", "")),
        methods=None if own is None else tuple(_choice(f"{where}'s methods", method, methods) for method in own),
        base=_table(fields.pop("base", None), f"{where}.base"),
        training=_table(fields.pop("training", None), f"{where}.training"), fields=fields,
    )  # fmt: skip
    if isinstance(plan.seed, bool) or not isinstance(plan.seed, int):
        raise ValueError(f"{where}'s seed must be an integer, got {plan.seed!r}")
    _check_keys(fields, {f.name for f in dataclasses.fields(TASKS[task])} - {"seed"}, where)
    data = _named(lambda fields: TASKS[task](**fields), fields, where)
    if isinstance(data, PreferenceFile):
        _named(lambda _: data.check(), fields, where)
    if task == "items":
        for method in plan.methods or methods:
            _named(item_settings, {**plan.training, **methods[method]}, f"{where} with methods.{method}")
    return plan


def item_settings(settings: Mapping[str, Any]) -> tuple[PreferenceConfig, ItemTraining]:
    """What the recommender is trained by.

    Raises:
        TypeError, ValueError: a setting that it does not know or cannot do.
    """
    own = {f.name for f in dataclasses.fields(ItemTraining)}
    _check_keys(settings, {"preset", *OBJECTIVE_NAMES, *own}, "the recommender's settings")
    config = objective_of(settings)
    check_objective(config)
    return config, _build(ItemTraining, {k: v for k, v in settings.items() if k in own}, "training")


def _comparison(title: str, entry: Any, methods: Mapping[str, Any]) -> Comparison:
    where = f"comparisons.{title}"
    fields = _table(entry, where)
    _check_keys(fields, set(Comparison._fields), where)
    if not fields.get("methods") or "against" not in fields:
        raise ValueError(f"{where} must have against, a method, and methods, a list, got {fields!r}")
    others = tuple(_choice(where, name, methods) for name in fields["methods"])
    return Comparison(_choice(where, fields["against"], methods), others, str(fields.get("about", "")))


def _seeds(value: Any) -> tuple[int, ...]:
    """So many from 0, or those of a list."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or len(set(value)) < len(value):
        raise ValueError(f"seeds must be how many, or a list of different integers >= 0, got {value!r}")
    return tuple(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be given, got {value!r}")
    return value


def _table(value: Any, name: str) -> dict[str, Any]:
    """Keys and values, none of None."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must hold keys and values, got {value!r}")
    return dict(value or {})


def _choice(name: str, value: Any, known: Mapping[str, Any]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return str(value)


def _check_keys(said: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in said:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def _build(kind: type[Any], fields: dict[str, Any], where: str) -> Any:
    _check_keys(fields, {f.name for f in dataclasses.fields(kind)}, where)
    return kind(**fields)


def _with_numbers(value: Any) -> Any:
    """What YAML reads as text though it is a number, such as 1e-5, as one."""
    if isinstance(value, dict):
        return {name: _with_numbers(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_with_numbers(x) for x in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


def _named(make: Any, fields: dict[str, Any], where: str) -> Any:
    """What `make` makes; an error says where."""
    try:
        return make(fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
