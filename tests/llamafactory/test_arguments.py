"""LLaMA-Factory's keys and fastpo's, and the objective that they state together."""

import dataclasses
import json
from typing import Any

import pytest
from llamafactory.hparams import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
)
from transformers import HfArgumentParser

from fastpo.arguments import OBJECTIVE_NAMES
from fastpo.config import PreferenceConfig
from fastpo.integrations.llamafactory.arguments import PreferenceFinetuningArguments, check_model_arguments


def objective(stage: str = "dpo", **keys: Any) -> PreferenceConfig:
    found = PreferenceFinetuningArguments(stage=stage, **keys).preference_config
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({}, {}),
        ({"pref_beta": 0.3, "pref_ftx": 0.5, "dpo_label_smoothing": 0.1},
         {"beta": 0.3, "sft_weight": 0.5, "label_smoothing": 0.1}),
        ({"pref_loss": "hinge", "ld_alpha": 0.4}, {"pref_loss_type": "hinge", "ld_alpha": 0.4}),
        ({"pref_loss": "ipo"}, {"pref_loss_type": "ipo", "length_normalization": True}),
        ({"pref_loss": "orpo"}, {"pref_loss_type": "orpo"}),
        ({"pref_loss": "simpo", "pref_beta": 2.0},
         {"length_normalization": True, "reference_free": True, "beta": 2.0, "home_advantage": 0.5}),
        ({"pref_loss": "simpo", "simpo_gamma": 0.7},
         {"length_normalization": True, "reference_free": True, "home_advantage": 0.7}),
        ({"pref_loss": "hinge", "simpo_gamma": 0.7}, {"pref_loss_type": "hinge"}),
        ({"pref_loss_type": "cauchy", "beta": 0.5, "home_advantage": 0.2},
         {"pref_loss_type": "cauchy", "beta": 0.5, "home_advantage": 0.2}),
        ({"pref_loss_type": '{"sigmoid": 1, "hinge": 0.5}'}, {"pref_loss_type": {"sigmoid": 1, "hinge": 0.5}}),
        ({"stage": "rm", "pref_loss": "hinge", "pref_ftx": 1.0}, {}),  # of which LLaMA-Factory's rm reads neither
        ({"stage": "rm", "pref_loss_type": "hinge", "home_advantage": 0.2},
         {"pref_loss_type": "hinge", "home_advantage": 0.2}),
    ],
)  # fmt: skip
def test_objective(keys: dict[str, Any], fields: dict[str, Any]) -> None:
    assert objective(**keys) == PreferenceConfig(**fields)


def test_reference_model_is_wanted_where_it_is_read() -> None:
    beta_head = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
    cases = [
        ({}, True),
        ({"pref_loss": "simpo"}, False),
        ({"pref_loss": "simpo", **beta_head}, True),
        ({"reference_free": True}, False),
    ]
    for keys, wanted in cases:
        assert PreferenceFinetuningArguments(stage="dpo", **keys).use_ref_model is wanted, keys


@pytest.mark.parametrize("written", [{"kind": "mlp"}, '{"kind": "mlp"}'])
def test_beta_head_config(written: Any) -> None:
    """A dictionary in YAML; JSON on the command line."""
    keys = {"stage": "dpo", "add_beta_head": True, "beta_mode": "dynamic_scaling", "beta_head_config": written}
    parser = HfArgumentParser(PreferenceFinetuningArguments)
    [found] = parser.parse_dict(keys)
    if isinstance(written, str):
        shown = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
        [found] = parser.parse_args_into_dataclasses(shown)
    assert found.preference_config.beta_head.kind == "mlp"
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pref_loss_type": "sigmoid", "pref_loss": "ipo"}, "pref_loss_type and pref_loss say the same"),
        ({"beta": 0.2, "pref_beta": 0.3}, "beta and pref_beta say the same"),
        ({"sft_weight": 0.2, "pref_ftx": 0.3}, "sft_weight and pref_ftx say the same"),
        ({"label_smoothing": 0.2, "dpo_label_smoothing": 0.3}, "label_smoothing and dpo_label_smoothing"),
        ({"pref_loss": "simpo", "simpo_gamma": 0.2, "home_advantage": 0.3}, "home_advantage and simpo_gamma"),
        ({"pref_loss_type": "hinge", "simpo_gamma": 0.2}, "simpo_gamma belongs to pref_loss simpo"),
        ({"pref_loss": "kto_pair"}, "pref_loss must be one of .*'kto_pair'"),
        ({"pref_bco_weight": 0.5}, "pref_bco_weight must be 0"),
        ({"ld_alpha": 0.5, "pref_ftx": 0.5}, "ld_alpha and pref_ftx"),
        ({"pref_loss": "orpo", "ld_alpha": 0.5}, "ld_alpha is not used by pref_loss_type 'orpo'"),
        ({"use_mca": True}, "use_mca"),
        ({"add_beta_head": True, "beta_mode": "dynamic_scaling", "regularizers": {"confidence": 1.0}}, "'confidence'"),
        ({"contextual_scaling": "mallows", "reference_free": True}, "reference_free must be False"),
        ({"add_disco_head": True, "use_muon": True}, "use_muon must be False"),
        ({"pref_loss_type": "disco"}, "add_disco_head"),
        ({"beta_mode": "dynamic_scaling"}, "add_beta_head"),
        ({"stage": "sft", "add_beta_head": True}, "add_beta_head belongs to stage rm, dpo, got stage='sft'"),
        ({"stage": "rm", "add_beta_head": True}, "add_beta_head belongs to stage dpo"),
        ({"stage": "rm", "length_normalization": True}, "length_normalization is not used by a reward model"),
    ],
)  # fmt: skip
def test_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceFinetuningArguments(**{"stage": "dpo", **keys})


def test_names_are_no_other_arguments() -> None:
    """The parser gives a key to every class that has it."""
    others = {f.name for kind in (DataArguments, GeneratingArguments, ModelArguments, TrainingArguments)
              for f in dataclasses.fields(kind)}  # fmt: skip
    assert not others & set(OBJECTIVE_NAMES)
    assert set(OBJECTIVE_NAMES) & {f.name for f in dataclasses.fields(FinetuningArguments)} == {"ld_alpha"}


def test_other_stages_are_left_alone() -> None:
    assert PreferenceFinetuningArguments(stage="sft", ld_alpha=0.5).preference_config is None


def test_models_with_another_forward_are_refused() -> None:
    class Arguments:
        use_unsloth, use_kt, mixture_of_depths = False, False, None

    check_model_arguments(Arguments())
    Arguments.use_unsloth = True
    with pytest.raises(ValueError, match="use_unsloth must be off"):
        check_model_arguments(Arguments())
