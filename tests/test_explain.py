"""`fastpo explain` and `fastpo methods`: every preset in words, without model, data or network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo import PreferenceConfig
from fastpo.cli import main
from fastpo.explain import bad_pairings, explain
from fastpo.links import LINKS
from fastpo.methods import METHODS

ROOT = Path(__file__).parents[1]
LEARNED = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}


def explained(preset: str, **fields: object) -> str:
    return explain(PreferenceConfig.preset(preset, **fields), preset=preset)


# preset and overrides -> what must stand there
SAID = [
    ("dpo", {}, ["h     = D_policy - D_reference", "z     = b * h", "b     = 0.1", "loss  = sigmoid", "2305.18290"]),
    ("simpo", {}, ["h     = D_policy_bar\n", "z     = b * h - 1", "No reference model"]),
    ("rainbowpo", {}, ["D_policy_bar - 0.25 D_reference_bar", "phi(x) * b * (h - 0.075)", "-0.29 * log", "weigh LESS"]),
    ("rainbowpo", {"margin_units": "reward"}, ["phi(x) * (b * h - 0.075)"]),
    ("orpo", {}, ["loss  = orpo", "logodds", "No reference model"]),
    ("cpo", {}, ["sigmoid + 1 * SFT (token)"]),
    ("f_dpo", {}, ["g(h_w) - g(h_l), g of js_divergence"]),
    ("beta_dpo", {}, ["max(0.1 * (1 + 0.6 * (gap - its running mean)), 1e-3)"]),
    ("wpo", {}, ["loss  = w * sigmoid"]),
    ("ld_dpo", {}, ["beyond the shorter response of a pair count 0.5"]),
    ("cdpo", {}, ["[0.9 f(z) + 0.1 f(-z)]"]),
    ("dpo", {"pref_loss_type": {"sigmoid": 1.0, "sft": 0.5}}, ["sigmoid + 0.5 * sft", "mean over the batch's chosen"]),
    ("dpo", {"beta_schedule": {"points": [[0, 0.3], [1, 0.1]]}}, ["linear schedule (0.3 at 0%, 0.1 at 100%)"]),
    ("ledpo", {}, ["b     = 0.1 * s(x)", "0.1 * pointwise(log s)", "between 0.25 and 4", "familiar (low entropy)"]),
    ("ledpo", {"beta_head_config": {"direction": "unfamiliar", "s_max": None}}, ["unfamiliar (", "without a bound"]),
    ("dpo", {"add_beta_head": True, "add_disco_head": True}, ["Beta head exists", "Disco head exists", "not used"]),
    ("disco_dpo", {}, ["log Phi", "0.001 * KL(reward || N(0, 1))", "Gaussian"]),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "fields", "said"), SAID, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_said(preset: str, fields: dict, said: list[str]) -> None:
    text = explained(preset, **fields)
    assert [words for words in said if words not in text] == []
    assert "Warnings" not in text


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_is_explained_with_its_source_and_its_links(name: str) -> None:
    text = explained(name)
    assert METHODS[name].source in text
    for link in PreferenceConfig.preset(name).loss_weights:
        assert f"{link}: {LINKS[link].f.__doc__.splitlines()[0]}" in text


@pytest.mark.parametrize(
    ("preset", "fields", "words"),
    [
        ("ledpo", {"regularizers": {}}, "without a regulariser"),
        ("ledpo", {"regularizers": {"pointwise": 0.0}}, "without a regulariser"),
        ("rainbowpo", LEARNED, "contextual_scaling"),
        ("rso", {"length_normalization": True}, "RSO"),
    ],
)
def test_bad_pairings_are_warned_of(preset: str, fields: dict, words: str) -> None:
    [warning] = bad_pairings(PreferenceConfig.preset(preset, **fields), preset)
    assert words in warning and warning in explained(preset, **fields)


@pytest.mark.parametrize("name", METHODS)
def test_presets_have_no_bad_pairing(name: str) -> None:
    assert bad_pairings(PreferenceConfig.preset(name), name) == []


def test_ipo_with_a_learned_s_is_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: ledpo\npref_loss_type: ipo\n")
    assert main(["explain", str(recipe)]) == 1
    assert "'ipo'" in (error := capsys.readouterr().err) and "ipo_scaled" in error


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_explained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(recipe)]) == 0
    assert "loss  = " in (text := capsys.readouterr().out) and "Warnings" not in text


def test_explain_needs_neither_model_nor_data_nor_this_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of other hardware and names that exist nowhere do not matter; overrides do, and unknown keys are errors."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: dpo\nmodel_name_or_path: no/such-model\ndataset: no_such_file.json\nbf16: true\n")
    overrides = ["--pref_loss_type", json.dumps({"sigmoid": 1.0, "sft": 0.5}), "--learning_rate", "1e-5"]
    assert main(["explain", str(recipe), *overrides]) == 0
    assert "sigmoid + 0.5 * sft" in capsys.readouterr().out
    assert main(["explain", str(recipe), "--preset", "simpo"]) == 0
    assert "2405.14734" in capsys.readouterr().out
    assert main(["explain", str(recipe), "--stage", "sft"]) == 0
    assert "stage sft" in capsys.readouterr().out
    assert main(["explain", str(recipe), "--betta", "1"]) == 1
    assert "betta" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "none.yaml")]) == 1


def test_methods_lists_formula_source_and_settings_of_each_and_loads_no_torch_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name, method in METHODS.items():
        settings = ", ".join(f"{key}={value!r}" for key, value in method.settings.items())
        assert all(part in text for part in (f"\n{name} ", method.formula, method.source, settings))
    code = "import sys; from fastpo.cli import main; main(['methods']); sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
