"""A study: which methods are compared on which data over which seeds, and what each run depends on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.config import PreferenceConfig
from fastpo.explain import explain
from fastpo.lab.folder import Comparison, Run
from fastpo.lab.kinds import check_sizes
from fastpo.lab.planted_items import PlantedItems
from fastpo.lab.planted_text import PlantedText
from fastpo.lab.preference_file import PreferenceFile
from fastpo.lab.recommender import ItemTraining, check_objective
from fastpo.methods import METHODS
from fastpo.yaml_arguments import nearest

# What a plan's `task` names.
TASKS: dict[str, type] = {"text": PlantedText, "items": PlantedItems, "preferences": PreferenceFile}
OBJECTIVE_NAMES = {f.name for f in dataclasses.fields(PreferenceConfig)}


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
        check_sizes(**dataclasses.asdict(self))


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
        content: of a preference file, a digest.
    """

    task: str
    fields: dict[str, Any]
    seed: int
    methods: tuple[str, ...] | None
    base: dict[str, Any]
    training: dict[str, Any]
    about: str
    content: str | None = None

    @property
    def trains_language(self) -> bool:
        """Whether the task is one of language models, which have a base and are trained by recipes."""
        return self.task != "items"

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

    def runs(self) -> list[Run]:
        """All runs; those of one seed before those of the next, so that what is there early compares all methods."""
        return [
            Run(data, method, seed) for seed in self.seeds for data in self.data for method in self.methods_on(data)
        ]

    def methods_on(self, data: str) -> Sequence[str]:
        """Those that are run on a data set."""
        own = self.data[data].methods
        return list(self.methods) if own is None else own

    def settings(self, run: Run) -> dict[str, Any]:
        """Everything that a run's result depends on, as JSON."""
        plan = self.data[run.data]
        return {
            **self.base_settings(run.data, run.seed),
            "training": {
                **(self.training if plan.trains_language else {}), **plan.training, **self.methods[run.method]
            },
            **({"evaluation": dataclasses.asdict(self.evaluation)} if plan.trains_language else {}),
        }  # fmt: skip

    def base_settings(self, data: str, seed: int) -> dict[str, Any]:
        """Of these, what the methods' runs have in common: the data, the base model, the judge."""
        plan = self.data[data]
        judged = plan.fields.get("reward_model") == "train"
        return {
            "task": plan.task,
            "fields": plan.fields,
            "data_seed": plan.seed + seed,
            "base": {**self.base, **plan.base} if plan.trains_language else {},
            "judge": self.judge if judged else {},
            "threads": self.threads,
            **({} if plan.content is None else {"content": plan.content}),
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
                name: {"task": plan.task, "description": plan.about, "methods": list(self.methods_on(name))}
                for name, plan in self.data.items()
            },
            "methods": self.methods,
            "formulas": {name: explain(objective_of(settings)) for name, settings in self.methods.items()},
            "comparisons": {title: comparison._asdict() for title, comparison in self.comparisons.items()},
        }


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


def item_settings(settings: Mapping[str, Any]) -> tuple[PreferenceConfig, ItemTraining]:
    """What the recommender is trained by.

    Raises:
        TypeError, ValueError: a setting that it does not know or cannot do.
    """
    own = {f.name for f in dataclasses.fields(ItemTraining)}
    check_keys(settings, {"preset", *OBJECTIVE_NAMES, *own}, "the recommender's settings")
    config = objective_of(settings)
    check_objective(config)
    return config, ItemTraining(**{name: value for name, value in settings.items() if name in own})


def check_keys(said: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ValueError for a key that is none of the known ones, naming the nearest."""
    for key in said:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
