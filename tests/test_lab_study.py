"""Plans of studies: what they say, and how they say that something is wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpo.lab.folder import Run
from fastpo.lab.plan_file import read_study
from fastpo.lab.recommender import ItemTraining
from fastpo.lab.study import item_settings, objective_of

ROOT = Path(__file__).parents[1]
PLAN: dict[str, Any] = {
    "output_dir": "runs/x",
    "seeds": 2,
    "data": {"text": {"task": "text", "seed": 5}, "items": {"task": "items", "training": {"epochs": 1}}},
    "base": {"learning_rate": "1e-2"},
    "training": {"learning_rate": 1e-3},
    "methods": {"dpo": {"preset": "dpo"}, "low": {"preset": "dpo", "beta": 0.05, "learning_rate": 1e-4}},
    "comparisons": {"both": {"against": "dpo", "methods": ["low"]}},
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return str(path)


def test_a_plan_becomes_runs_with_all_that_they_depend_on(tmp_path: Path) -> None:
    study = read_study(write(tmp_path))
    # One seed after the other, so that what is there early compares all.
    assert study.runs()[:5] == [
        *(Run(data, method, 0) for data in ("text", "items") for method in ("dpo", "low")),
        Run("text", "dpo", 1),
    ]
    settings = study.settings(Run("text", "low", 1))
    assert settings["data_seed"] == 6 and settings["base"] == {"learning_rate": 0.01}
    assert settings["training"] == {"preset": "dpo", "beta": 0.05, "learning_rate": 1e-4}
    # The recommender has none of the language model's settings.
    items = study.settings(Run("items", "low", 1))
    assert items["base"] == {} and items["training"] == {"epochs": 1, **PLAN["methods"]["low"]}
    config, training = item_settings(items["training"])
    assert config.beta == 0.05 and training == ItemTraining(epochs=1, learning_rate=1e-4)
    assert study.baseline == "dpo" and study.data["text"].of(1).seed == 6
    assert pickle.loads(pickle.dumps(study)) == study  # as workers are told of it


def test_parts_of_a_plan(tmp_path: Path) -> None:
    study = read_study(write(tmp_path), data=["items"], methods=["low"], seeds=[4], output_dir="elsewhere")
    assert study.runs() == [Run("items", "low", 4)] and study.output_dir == "elsewhere"
    assert list(study.methods) == ["dpo", "low"]  # the report still knows them all


def test_a_preset_and_what_is_said_besides() -> None:
    config = objective_of({"preset": "rainbowpo", "home_advantage": 0.0, "learning_rate": 1e-3})
    assert (config.beta, config.home_advantage, config.reference_mix) == (10.0, 0.0, 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"seeds": 0}, "seeds must be how many"),
        ({"seeds": [1, 1]}, "seeds must be how many"),
        ({"processes": 0}, "processes must be an integer >= 1, got 0"),
        ({"output_dir": None}, "output_dir must be given"),
        ({"data": {}}, "data must name at least one"),
        ({"methods": None}, "methods must name at least one"),
        ({"data": {"a": {}}}, "data.a must have a task, one of text, items, preferences"),
        ({"data": {"a": {"task": "txt"}}}, "data.a's task must be one of text, items, preferences, got 'txt'"),
        ({"data": {"a": {"task": "text", "word": 3}}}, "data.a: unknown key 'word'; did you mean 'words'"),
        ({"data": {"a": {"task": "text", "flips": [0.7]}}}, "data.a: flips must be"),
        ({"data": {"a": {"task": "text", "seed": "x"}}}, "data.a's seed must be an integer"),
        ({"data": {"a": {"task": "text", "methods": ["x"]}}}, "data.a's methods must be one of dpo, low, got 'x'"),
        ({"data": {"a": {"task": "items", "training": {"epoch": 3}}}}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({"data": {"a": {"task": "preferences", "dataset": "none.json"}}}, "data.a: .*no such file"),
        ({"methods": {"dpo": {"preset": "dpoo"}}}, "methods.dpo: preset must be one of"),
        ({"methods": {"dpo": {"beta": -1.0}}}, "methods.dpo: beta must be"),
        ({"baseline": "ipo"}, "baseline must be one of dpo, low, got 'ipo'"),
        ({"training": {"beta": 0.5}}, "training must leave 'beta' to the methods"),
        ({"training": {"seed": 3}}, "training must leave 'seed' to the study"),
        ({"methods": {"a": {"ref_model_name_or_path": "x"}}}, "methods.a must leave 'ref_model_name_or_path'"),
        ({"methods": {"../a": {}}}, "methods must have names of letters"),
        ({"methods": ["dpo"]}, "methods must hold keys and values"),
        ({"data": {"a": {"task": "text", "methods": "dpo"}}}, "data.a's methods must be a list of dpo, low"),
        ({"data": {"a": {"task": "text", "methods": []}}}, "data.a's methods must be a list of dpo, low"),
        ({"data": {"a": {"task": "items", "base": {"max_steps": 3}}}}, "data.a must have no base"),
        ({"data": {"a": {"task": "items", "items": 12}}}, "data.a: items must be > 12"),
        ({"baseline": ["dpo"]}, "baseline must be one of dpo, low"),
        ({"keep_models": "no"}, "keep_models must be true or false"),
        ({"base": {}}, "data.text must have either a base to train or training's model_name_or_path, got neither"),
        ({"training": {"model_name_or_path": "x"}}, "data.text must have either a base .* got both"),
        ({"base": {"use_peft": True}}, "base must be trained whole"),
        ({"judge": {"max_steps": 3}}, "judge must hold the settings of a reward model where data have"),
        ({"evaluation": {"points": 0}}, "evaluation: points must be an integer >= 1"),
        ({"comparisons": {"a": {"methods": ["low"]}}}, "comparisons.a must have against"),
        ({"comparisons": {"a": {"against": "dpo", "methods": ["x"]}}}, "comparisons.a must be one of dpo, low"),
        (
            {"methods": {"ld": {"ld_alpha": 0.5}}, "comparisons": {}},
            "data.items with methods.ld: ld_alpha must be None",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, **changes))


def test_a_file_is_split_by_its_prompts(tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"question {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"a": {"task": "preferences", "dataset": str(rows), "held_out": 8}}
    with pytest.raises(ValueError, match=r"data.a: held_out must leave some of the 8 rows"):
        read_study(write(tmp_path, data=data))
    file = read_study(write(tmp_path, data={"a": {**data["a"], "held_out": 3}})).data["a"].of(0)
    train, held_out = file.train_rows(), file.held_out_rows()
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, {**pairs[0], "chosen": None}]))
    with pytest.raises(ValueError, match=r"data.a: .*pairs.jsonl row 8: 'chosen' must be text"):
        read_study(write(tmp_path, data=data))
    # Rows of one prompt are held out together.
    assert len(train) == 4 and len(held_out) == 4 and len(file.base_rows()) == 8
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}


@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_repository(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpo.lab.preference_file.PreferenceFile.check", lambda self: None)  # no such files here
    monkeypatch.setattr("fastpo.lab.preference_file.PreferenceFile.rows", [])
    assert read_study(str(path)).runs()
