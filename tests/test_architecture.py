"""Heads in a model: which combinations train, where features come from, saving, loading, resuming."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_args, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo import PreferenceTrainer
from fastpo.architecture import attach_head, heads_of, load_heads
from fastpo.backbone import Wanted, install_stats_forward, model_stats
from fastpo.collation import PreferenceCollator
from fastpo.config import BetaHeadConfig
from fastpo.heads import BetaHead, DiscoHead
from fastpo.links import LINKS
from fastpo.recipe import parse_recipe

DYNAMIC: dict[str, Any] = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
DISCO: dict[str, Any] = {"add_disco_head": True, "pref_loss_type": "disco"}
BOTH = DYNAMIC | DISCO
# Exists and is not used.
IDLE: dict[str, Any] = {"add_beta_head": True, "add_disco_head": True}
# Of these every loss is a function of the batch alone: no running means.
STATELESS: dict[str, Any] = {"regularizers": {"pointwise": 0.1, "range": 1.0, "smooth": 0.01}}
HEAD_FILES = {f"{name}{end}" for name in ("beta_head", "disco_head") for end in (".safetensors", "_config.json")}


def ragged_pairs(rows: int = 8, seed: int = 0, **columns: Any) -> Dataset:
    """Tokenised pairs of random tokens in which no two prompts or responses need have the same length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, len(tiny_tokenizer()), (length,), generator=generator).tolist()

    data: dict[str, Any] = {"prompt_ids": [ids(2, 12) for _ in range(rows)]}
    data |= {side: [ids(1, 9) for _ in range(rows)] for side in ("chosen_ids", "rejected_ids")}
    return Dataset.from_dict({**data, "index": list(range(rows)), **columns})


def collate(data: Dataset, rows: list[int] | None = None) -> dict[str, Tensor]:
    return PreferenceCollator(tiny_tokenizer().pad_token_id)(list(data if rows is None else data.select(rows)))


def trainer_for(path: Path, model: Any = None, data: Dataset | None = None, **fields: Any) -> PreferenceTrainer:
    names = ("ref_model", "peft_config", "eval_dataset", "callbacks", "compute_metrics", "optimizers")
    extra = {name: fields.pop(name) for name in names if name in fields}
    return PreferenceTrainer(
        tiny_model() if model is None else model, args=tiny_args(path, **fields),
        train_dataset=ragged_pairs() if data is None else data, processing_class=tiny_tokenizer(), **extra,
    )  # fmt: skip


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **fields})


def scatter_heads(model: Any, seed: int = 0, scale: float = 0.5) -> None:
    """Random weights in place of the zeros at which both heads start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in heads_of(model).values():
            for parameter in head.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def copied_heads(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().clone()
        for name, head in heads_of(model).items()
        for key, value in head.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- every combination ------------------------------------------------------------------------------------------------

REFUSED_WITH_DYNAMIC = {"ipo", "ipo_norm", "sppo_hard", "orpo", "aot", "aot_unpaired", "sft"}


def clashes(loss: str, add_beta_head: bool, beta_mode: str, add_disco_head: bool) -> list[tuple[str, str]]:
    """The pairs of settings that MATH.md says do not go together."""
    dynamic = beta_mode == "dynamic_scaling"
    return (
        [("dynamic_scaling", "add_beta_head")] * (dynamic and not add_beta_head)
        + [("disco", "add_disco_head")] * (loss == "disco" and not add_disco_head)
        + [("dynamic_scaling", loss)] * (dynamic and loss in REFUSED_WITH_DYNAMIC)
    )


@pytest.mark.parametrize("loss", LINKS)
def test_every_combination_is_refused_or_trains_what_it_uses(tmp_path: Path, loss: str) -> None:
    outcomes: dict[str, Any] = {}
    walk = itertools.product((False, True), ("fixed", "dynamic_scaling"), (False, True))
    for add_beta_head, beta_mode, add_disco_head in walk:
        fields = {
            "pref_loss_type": loss, "add_beta_head": add_beta_head, "beta_mode": beta_mode, "max_steps": 1,
            "add_disco_head": add_disco_head, "label_smoothing": 1e-3 if loss == "exo_pair" else 0.0,
        }  # fmt: skip
        if expected := clashes(loss, add_beta_head, beta_mode, add_disco_head):
            with pytest.raises(ValueError) as error:
                tiny_args(tmp_path, **fields)
            assert any(all(name in str(error.value) for name in pair) for pair in expected), str(error.value)
            continue
        # Another reference than the model, or h = 0 and s(x) has no gradient.
        trainer = trainer_for(tmp_path, ref_model=tiny_model(seed=7), **fields)
        before = copied_heads(trainer.model)
        assert set(heads_of(trainer.model)) == {
            name for name, exists in (("beta_head", add_beta_head), ("disco_head", add_disco_head)) if exists
        }
        trainer.train()
        used = {"beta_head": beta_mode == "dynamic_scaling", "disco_head": loss == "disco"}
        for name, head in heads_of(trainer.model).items():
            for key, parameter in head.named_parameters():
                changed = not torch.equal(parameter, before[f"{name}.{key}"])
                assert changed == used[name], (name, key, fields)
                assert parameter.requires_grad == used[name] == (parameter in trainer.optimizer.state)
                assert used[name] or parameter.grad is None
        # What exists and is not used changes nothing: not the loss, not where the model goes.
        model = {n: p for n, p in trainer.model.state_dict().items() if not re.match("beta_head|disco_head", n)}
        outcome = {"loss": torch.tensor(trainer.state.log_history[0]["loss"])} | model
        assert torch.isfinite(outcome["loss"])
        assert same(outcome, outcomes.setdefault(beta_mode, outcome)), fields
    assert set(outcomes) == {"fixed"} | ({"dynamic_scaling"} if loss not in REFUSED_WITH_DYNAMIC else set())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": "sft", "add_beta_head": True}, "add_beta_head belongs to stage dpo, ppo, got stage='sft'"),
        ({"stage": "sft", "add_disco_head": True}, "add_disco_head belongs to stage rm, dpo, got stage='sft'"),
        ({"regularizers": {"pointwise": 1.0}}, "regularizers .* beta_mode='fixed'"),
        ({"beta_head_config": {"kind": "mlp"}}, "beta_head_config must be None without add_beta_head"),
        ({"add_beta_head": True, "beta_head_config": {"widht": 3}}, "beta_head_config: .*'widht'"),
        (
            {"add_beta_head": True, "beta_head_config": "mlp"},
            "beta_head_config must be a dictionary in JSON, got 'mlp'",
        ),
        ({"pref_loss_type": '{"sigmoid": 1, "nonsense": 2}'}, "pref_loss_type must be one of .*'nonsense'"),
        ({"pref_loss_type": '{"sigmoid": 1, "ipo": 0.5}', **DYNAMIC}, "'ipo' cannot .*'dynamic_scaling'"),
        ({"pref_loss_type": {"sft": 1.0}, **DYNAMIC}, "dynamic_scaling.*pref_loss_type='sft'"),
    ],
)
def test_arguments_that_clash_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_args(tmp_path, **fields)


def test_dictionaries_come_as_json_from_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: x\ndataset: y\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    given = {
        "pref_loss_type": {"sigmoid": 1, "sft": 0.5}, "beta_head_config": {"kind": "mlp", "features": ["entropy"]},
        "regularizers": {"pointwise": 0.2}, "beta_schedule": {"points": [[0, 0.1], [1, 0.2]]},
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", json.dumps(value))]
    _, args = parse_recipe(str(recipe), [*flags, "--add_beta_head", "--beta_mode", "dynamic_scaling"])
    objective = args.preference_config
    assert objective.loss_weights == given["pref_loss_type"] and objective.comparisons == ("sigmoid",)
    assert objective.beta_head == BetaHeadConfig(kind="mlp", features=("entropy",))
    assert (objective.regularizers, objective.beta_schedule) == (given["regularizers"], given["beta_schedule"])
    recipe.write_text(recipe.read_text() + "pref_loss_type: {sigmoid: 1, sft: 0.25}\nbeta_schedule: none\n")
    objective = parse_recipe(str(recipe), [])[1].preference_config
    assert objective.loss_weights == {"sigmoid": 1, "sft": 0.25} and objective.beta_schedule is None


# --- where features come from -----------------------------------------------------------------------------------------


def by_hand(reference: Any, head: Any, data: Dataset) -> Tensor:
    """log s of each row from the reference's hidden state at the last token of the prompt alone, in float64."""
    wide = copy.deepcopy(reference).double().eval()
    hidden = [
        wide.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].detach() for ids in data["prompt_ids"]
    ]
    features = F.layer_norm(torch.stack(hidden), (len(hidden[0]),))
    layer = head.layers[-1]
    u = features @ layer.weight.double()[0] + layer.bias.double()
    bound = torch.tensor(4.0, dtype=torch.float64).log()
    return bound * torch.tanh(u / bound)


def logps(model: Any, data: Dataset, side: str) -> Tensor:
    """Summed log-probs of a side's tokens by the model's own logits, in float64."""
    wide, sums = copy.deepcopy(model).double().eval(), []
    for row in data:
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        with torch.no_grad():
            log_probs = wide(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(log_probs.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(sums)


def test_s_and_its_gradient_come_from_the_second_reference_model(tmp_path: Path) -> None:
    model, reference, data = tiny_model(), tiny_model(seed=7), ragged_pairs()
    sides = [[logps(x, data, side) for side in ("chosen_ids", "rejected_ids")] for x in (model, reference)]
    h = sides[0][0] - sides[0][1] - sides[1][0] + sides[1][1]
    trainer = trainer_for(tmp_path, model, data, ref_model=reference, beta=0.3, regularizers={}, **DYNAMIC)
    scatter_heads(trainer.model)
    head = heads_of(trainer.model)["beta_head"]
    output = trainer.loss_output(trainer.model, collate(data))
    output.loss.backward()
    found = {name: parameter.grad.double() for name, parameter in head.named_parameters()}
    head.zero_grad()
    losses = -F.logsigmoid(0.3 * by_hand(reference, head, data).exp() * h)
    losses.mean().backward()
    torch.testing.assert_close(output.losses.double(), losses.detach(), rtol=1e-4, atol=1e-6)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad.double(), rtol=1e-3, atol=1e-6)
    assert (by_hand(model, head, data) - by_hand(reference, head, data)).abs().min() > 1e-3  # they can be told apart


def test_with_lora_features_come_from_the_model_without_its_adapter(tmp_path: Path) -> None:
    base, data = tiny_model(), ragged_pairs()
    untouched = copy.deepcopy(base)
    trainer = trainer_for(tmp_path, base, data, peft_config=lora(), learning_rate=5e-2, **DYNAMIC)
    before = trainer.precompute_reference(data)
    trainer.train()
    assert trainer.ref_model is None
    assert trainer.loss_output(trainer.model, collate(data)).margins.abs().min() > 0  # the policy did move
    assert trainer.precompute_reference(data).to_dict() == before.to_dict()
    scatter_heads(trainer.model)
    expected = by_hand(untouched, heads_of(trainer.model)["beta_head"], data).exp()
    metrics = trainer.loss_output(trainer.model.eval(), collate(data)).metrics
    assert metrics["beta/mean"].item() == pytest.approx(0.1 * expected.mean().item(), rel=1e-4)
    assert metrics["beta/max"].item() == pytest.approx(0.1 * expected.max().item(), rel=1e-4)


@pytest.mark.parametrize("features", [["hidden"], ["perplexity", "entropy"], ["entropy", "hidden", "perplexity"]])
def test_precomputed_features_replace_the_reference(tmp_path: Path, features: list[str]) -> None:
    fields = {"reference_free": True, "beta_head_config": {"features": features}, "per_device_eval_batch_size": 3}
    model, reference, data = tiny_model(), tiny_model(seed=7), ragged_pairs()
    first = trainer_for(tmp_path, model, data, ref_model=reference, **fields, **DYNAMIC)
    assert first.ref_model is not None  # nothing else gives the prompt's features
    scatter_heads(first.model)
    rows = first.precompute_reference(data)
    assert {f"prompt_{name}" for name in features} <= set(rows.column_names)
    second = trainer_for(tmp_path, copy.deepcopy(model), rows, eval_dataset=rows, **fields, **DYNAMIC)
    assert second.ref_model is None
    a, b = first.loss_output(first.model, collate(data)), second.loss_output(second.model, collate(rows))
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    assert a.metrics["beta/std"] > 1e-4
    second.train()
    assert second.evaluate()["eval_beta/std"] > 0
    with pytest.raises(ValueError, match="prompt_"):  # late data without the columns, and no reference to ask
        second.evaluate(data)


def test_a_dataset_without_the_features_keeps_the_reference(tmp_path: Path) -> None:
    fields = {"reference_free": True, **DYNAMIC}
    rows = trainer_for(tmp_path, **fields).precompute_reference(ragged_pairs())
    trainer = trainer_for(tmp_path, data=rows, eval_dataset={"own": rows, "raw": ragged_pairs()}, **fields)
    assert trainer.ref_model is not None
    found = trainer.evaluate()
    assert found["eval_own_loss"] == pytest.approx(found["eval_raw_loss"], rel=1e-6)


def test_a_trainer_without_data_keeps_the_reference_for_what_comes_later(tmp_path: Path) -> None:
    args = tiny_args(tmp_path, reference_free=True, **DYNAMIC)
    trainer = PreferenceTrainer(tiny_model(), args=args, processing_class=tiny_tokenizer())
    assert {"prompt_hidden", "prompt_entropy"} <= set(trainer.precompute_reference(ragged_pairs()).column_names)
    assert trainer.evaluate(ragged_pairs())["eval_beta/mean"] == pytest.approx(0.1)


def test_the_response_does_not_reach_s(tmp_path: Path) -> None:
    fields = {"beta_head_config": {"features": ["hidden", "perplexity", "entropy"]}, **DYNAMIC}
    trainer = trainer_for(tmp_path, ref_model=tiny_model(seed=7), **fields)
    scatter_heads(trainer.model)
    data, swapped = ragged_pairs(1), ragged_pairs(1, seed=5)
    other = Dataset.from_list([{**data[0], **{k: swapped[0][k] for k in ("chosen_ids", "rejected_ids")}}])
    found = [trainer.loss_output(trainer.model, collate(rows)) for rows in (data, other, swapped)]
    s = [output.metrics["beta/mean"].item() for output in found]
    assert s[0] == pytest.approx(s[1], rel=1e-5) and s[0] != pytest.approx(s[2], rel=1e-2)
    assert found[0].loss != found[1].loss


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3", {}),
        ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.3}),
        ("phi", {}),  # its head has a bias
    ],
)
def test_perplexity_and_entropy_are_those_of_full_logits(
    tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    model, data = tiny_model(model_type, **fields).eval(), ragged_pairs(6)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # sharper than a new model, whose entropy is log V
    config = {"features": ["perplexity", "entropy"]}
    trainer = trainer_for(tmp_path, model, data, beta_head_config=config, **DYNAMIC)
    rows = trainer.precompute_reference(data)
    wide = copy.deepcopy(trainer.ref_model).double()
    for row in rows:
        ids = torch.tensor(row["prompt_ids"])
        with torch.no_grad():
            log_probs = wide(input_ids=ids[None]).logits[0].log_softmax(-1)
        surprise = -log_probs[:-1].gather(-1, ids[1:, None]).mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean() / torch.tensor(model.config.vocab_size).log()
        assert row["prompt_perplexity"] == pytest.approx(surprise.exp().item(), rel=1e-4)
        assert row["prompt_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert len(set(rows["prompt_entropy"])) == 6


@pytest.mark.parametrize("reference_free", [False, True])
def test_padding_does_not_reach_s(tmp_path: Path, reference_free: bool) -> None:
    # Without a reference in the loss the features come from prompts alone, cut to the longest.
    fields = {"reference_free": reference_free, "beta_head_config": {"features": ["hidden", "perplexity", "entropy"]}}
    data, found = ragged_pairs(), []
    for size in (1, 3, 8):
        trainer = trainer_for(tmp_path, per_device_eval_batch_size=size, **fields, **DYNAMIC)
        found.append(trainer.precompute_reference(data))
    for name in ("prompt_hidden", "prompt_perplexity", "prompt_entropy"):
        alone, *batched = (torch.tensor(rows[name]) for rows in found)
        for column in batched:
            torch.testing.assert_close(column, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_no_gradient_flows_through_s_into_the_backbone(tmp_path: Path, peft_config: Any) -> None:
    data = ragged_pairs(pair_weight=[0.0] * 8)  # leaves the regularisers, which only s(x) can answer to
    model = tiny_model()
    trainer = trainer_for(tmp_path, model, data, peft_config=peft_config, **DYNAMIC)
    scatter_heads(trainer.model)
    trainer.loss_output(trainer.model.train(), collate(data)).loss.backward()
    head = {id(p) for p in heads_of(trainer.model)["beta_head"].parameters()}
    for name, parameter in trainer.model.named_parameters():
        if id(parameter) in head:
            assert parameter.grad.abs().min() > 0
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


# --- saving and loading -----------------------------------------------------------------------------------------------


def next_loss(trainer: PreferenceTrainer) -> Tensor:
    with torch.no_grad():
        return trainer.loss_output(trainer.model.eval(), collate(ragged_pairs())).loss


def load_by_path(saved: Path) -> Any:
    return str(saved)


def load_as_object(saved: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved)


def load_into_another_model(saved: Path) -> Any:
    model = tiny_model()
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(saved).state_dict())
    assert set(load_heads(model, saved)) == {"beta_head", "disco_head"}
    return model


@pytest.mark.parametrize("load", [load_by_path, load_as_object, load_into_another_model])
def test_a_saved_model_goes_on_with_the_same_loss(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    config = {"kind": "mlp", "hidden_size": 5, "features": ["hidden", "entropy"], "s_max": 3.0}
    fields = {**BOTH, **STATELESS, "ref_model": tiny_model(seed=7), "beta_head_config": config, "learning_rate": 0.1}
    trainer = trainer_for(tmp_path, **fields)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = trainer_for(tmp_path, load(tmp_path / "saved"), **fields)
    assert same(copied_heads(loaded.model), copied_heads(trainer.model))
    assert torch.equal(next_loss(loaded), next_loss(trainer))
    # Both heads matter to that loss.
    for head in heads_of(loaded.model).values():
        list(head.parameters())[-1].data += 0.5
        assert not torch.equal(next_loss(loaded), next_loss(trainer))


def test_a_saved_adapter_goes_on_with_the_same_loss(tmp_path: Path) -> None:
    fields = {**BOTH, **STATELESS}
    trainer = trainer_for(tmp_path, peft_config=lora(), **fields)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert files_in(tmp_path / "saved") >= HEAD_FILES
    assert not [key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors") if "_head" in key]
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved"), is_trainable=True)
    load_heads(model, tmp_path / "saved")
    loaded = trainer_for(tmp_path, model, **fields)
    assert loaded.ref_model is None
    assert torch.equal(next_loss(loaded), next_loss(trainer))
    loaded.train()
    loaded.save_model(str(tmp_path / "again"))  # what was attached to a PeftModel is saved with it
    assert same(
        {f"beta_head.{k}": v for k, v in load_file(tmp_path / "again" / "beta_head.safetensors").items()}
        | {f"disco_head.{k}": v for k, v in load_file(tmp_path / "again" / "disco_head.safetensors").items()},
        copied_heads(loaded.model),
    )


def test_a_saved_head_brings_its_own_config(tmp_path: Path) -> None:
    config = {"features": ["hidden", "perplexity"], "s_max": 8.0, "direction": "unfamiliar", "lr_multiplier": 0.5}
    fields = {**DYNAMIC, "ref_model": tiny_model(seed=7), "regularizers": {"entropy": 1.0}}
    trainer = trainer_for(tmp_path, beta_head_config=config, **fields)
    scatter_heads(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    # `beta_head_config` says how a head is built; one that is there already may do without.
    loaded = trainer_for(tmp_path, str(tmp_path / "saved"), **fields)
    assert torch.equal(next_loss(loaded), next_loss(trainer))  # its features; s_max and direction in the regulariser
    loaded.create_optimizer()
    assert loaded.optimizer.param_groups[-1]["lr"] == pytest.approx(0.5e-2)


@pytest.mark.parametrize("kind", ["beta_head", "disco_head"])
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    fields = {"beta_head": DYNAMIC, "disco_head": DISCO}[kind]
    trainer_for(tmp_path, **fields).save_model(str(tmp_path / "saved"))
    small, attached, fitting = (tiny_model(hidden_size=16, head_dim=4) for _ in range(3))
    load_heads(attached, tmp_path / "saved")
    small.save_pretrained(tmp_path / "saved")  # a model that is no longer the one of the head beside it
    for model in (attached, str(tmp_path / "saved")):
        with pytest.raises(ValueError, match=f"{kind} must take hidden states of size 16, got one for size 32"):
            trainer_for(tmp_path, model, **fields)
    attach_head(fitting, BetaHead(16) if kind == "beta_head" else DiscoHead(16))
    with pytest.raises(ValueError, match=f"{kind}.* does not fit"):
        load_heads(fitting, tmp_path / "saved")


def test_the_beta_head_reads_a_reference_of_another_size(tmp_path: Path) -> None:
    reference = tiny_model(hidden_size=16, head_dim=4)
    trainer = trainer_for(tmp_path, ref_model=reference, **BOTH)
    assert [heads_of(trainer.model)[name].input_size for name in ("beta_head", "disco_head")] == [16, 32]
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="beta_head must take hidden states of size 32, got one for size 16"):
        trainer_for(tmp_path, str(tmp_path / "saved"), **BOTH)  # without that reference: its own hidden states


@pytest.mark.parametrize("given", [{"kind": "mlp"}, {"s_max": 5.0}, {"features": ["entropy"]}])
def test_a_saved_beta_head_of_another_config_is_an_error(tmp_path: Path, given: dict[str, Any]) -> None:
    trainer_for(tmp_path, **DYNAMIC).save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="beta_head_config must be None or that of the model's Beta head") as error:
        trainer_for(tmp_path, str(tmp_path / "saved"), beta_head_config=given, **DYNAMIC)
    assert repr(given) in str(error.value) and "kind='linear'" in str(error.value)
    trainer_for(tmp_path, str(tmp_path / "saved"), beta_head_config={"kind": "linear"}, **DYNAMIC)


def test_what_is_left_behind_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(tmp_path, **IDLE).save_model(str(tmp_path / "saved"))
    assert not caplog.records
    trainer = trainer_for(tmp_path, str(tmp_path / "saved"), add_beta_head=True)
    assert set(heads_of(trainer.model)) == {"beta_head"}
    assert "holds a disco_head; with add_disco_head=False it is left behind" in caplog.text
    assert "beta_head" not in caplog.text


def test_idle_heads_are_saved_and_loaded_as_they_are(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **IDLE)
    scatter_heads(trainer.model)
    weights = copied_heads(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = trainer_for(tmp_path, str(tmp_path / "saved"), **IDLE)
    loaded.train()
    assert same(copied_heads(loaded.model), weights)
    assert not any(p.requires_grad for head in heads_of(loaded.model).values() for p in head.parameters())
    used = trainer_for(tmp_path, str(tmp_path / "saved"), **BOTH)  # a later run may use them
    assert not heads_of(used.ref_model)  # they belong to the model, not to the reference copied from it
    used.train()
    assert all(not torch.equal(copied_heads(used.model)[name], value) for name, value in weights.items())


def test_sft_of_a_model_with_heads_leaves_them_as_they_are(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **BOTH)
    trainer.train()
    weights = copied_heads(trainer.model)
    again = trainer_for(tmp_path, trainer.model, stage="sft")
    again.train()
    again.save_model(str(tmp_path / "saved"))
    assert same(copied_heads(again.model), weights) and files_in(tmp_path / "saved") >= HEAD_FILES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_user", [False, True])
def test_the_language_model_is_saved_without_its_heads(tmp_path: Path, tied: bool, by_user: bool) -> None:
    trainer = trainer_for(tmp_path, tiny_model(tie_word_embeddings=tied), **BOTH)
    trainer.train()
    saved = tmp_path / "saved"
    if by_user:
        trainer.model.save_pretrained(saved)
    else:
        trainer.save_model(str(saved))
    plain = tiny_model(tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path / "plain")
    assert load_file(saved / "model.safetensors").keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert files_in(saved) >= HEAD_FILES
    assert not re.search("beta|disco|fastpo", (saved / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(plain) and not heads_of(loaded)
    batch = {name: collate(ragged_pairs())[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def test_shards_and_their_index_hold_no_heads(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **BOTH)
    trainer.model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert not [key for key in index["weight_map"] if re.search("beta_head|disco_head", key)]
    assert files_in(tmp_path / "saved") >= HEAD_FILES


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_a_deep_copy_saves_itself(tmp_path: Path, peft_config: Any) -> None:
    trainer = trainer_for(tmp_path, peft_config=peft_config, **BOTH)
    original = copied_heads(trainer.model)
    twin = copy.deepcopy(trainer.model)
    scatter_heads(twin)
    twin.save_pretrained(tmp_path / "twin")
    trainer.model.save_pretrained(tmp_path / "original")
    for folder, heads in (("twin", copied_heads(twin)), ("original", original)):
        for name in ("beta_head", "disco_head"):
            for key, value in load_file(tmp_path / folder / f"{name}.safetensors").items():
                assert torch.equal(value, heads[f"{name}.{key}"])
    assert not same(copied_heads(twin), original)


def test_merging_an_adapter_keeps_the_heads_working(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, peft_config=lora(), learning_rate=5e-2, **BOTH)
    trainer.train()
    scatter_heads(trainer.model)
    weights, batch = copied_heads(trainer.model), collate(ragged_pairs())
    prompt = {"hidden": torch.randn(8, 32)}
    with torch.no_grad():
        expected = model_stats(trainer.model.eval(), batch, Wanted(variance=True, log_s=True), prompt)
        merged = trainer.model.merge_and_unload()
        found = model_stats(merged, batch, Wanted(variance=True, log_s=True), prompt)
    assert torch.equal(found["log_s"], expected["log_s"])
    torch.testing.assert_close(found["variance"], expected["variance"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["logps"], expected["logps"], rtol=1e-4, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and set(load_heads(loaded, tmp_path / "merged")) == {"beta_head", "disco_head"}
    assert same(copied_heads(loaded), weights)


def trained_before(path: Path) -> Any:
    trainer = trainer_for(path, **BOTH)
    return trainer.model


def loaded_before(path: Path) -> Any:
    trainer_for(path, **BOTH).save_model(str(path / "base"))
    model = tiny_model()
    load_heads(model, path / "base")
    return model


@pytest.mark.parametrize("model_with_heads", [trained_before, loaded_before])
@pytest.mark.parametrize(
    ("wrapped_by_user", "targets"),
    # What a user's own get_peft_model wraps is theirs to say.
    [(False, "all-linear"), (False, ["q_proj", "v_proj"]), (True, ["q_proj", "v_proj"])],
)
def test_an_adapter_on_a_model_with_heads_leaves_them_whole_and_saves_them(
    tmp_path: Path, model_with_heads: Callable[[Path], Any], wrapped_by_user: bool, targets: Any
) -> None:
    model, config = model_with_heads(tmp_path), lora(target_modules=targets)
    fields = {} if wrapped_by_user else {"peft_config": config}
    trainer = trainer_for(tmp_path, get_peft_model(model, config) if wrapped_by_user else model, **fields, **BOTH)
    assert not [name for name, _ in trainer.model.named_parameters() if re.search("(beta|disco)_head.*lora", name)]
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert files_in(tmp_path / "saved") >= HEAD_FILES
    base = tiny_model()
    load_heads(base, tmp_path / "saved")
    assert same(copied_heads(base), copied_heads(trainer.model))


def test_lora_on_a_head_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(loaded_before(tmp_path), lora())  # a user's own all-linear takes in the heads' layers
    with pytest.raises(ValueError, match=r"LoRA on .*beta_head|beta_head.*LoRA"):
        trainer_for(tmp_path, model, **BOTH)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["weights", "autocast", "evaluation"])
def test_heads_stay_in_fp32(tmp_path: Path, how: str) -> None:
    model = tiny_model().to(torch.bfloat16) if how == "weights" else tiny_model()
    fields = {"autocast": {"bf16": True}, "evaluation": {"bf16_full_eval": True}}.get(how, {})
    trainer = trainer_for(tmp_path, model, eval_dataset=ragged_pairs(), **fields, **BOTH)
    scatter_heads(trainer.model, scale=0.1)
    expected = next_loss(trainer).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.03)
    if how != "evaluation":  # which casts all weights, heads or not
        trainer.train()
        assert {p.dtype for head in heads_of(trainer.model).values() for p in head.parameters()} == {torch.float32}


# --- checkpoints ------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {
    **BOTH, "batch_beta_coef": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
    "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 2e-2,
}  # fmt: skip
SCORES = {"score_chosen": [0.1 * i for i in range(16)], "score_rejected": [0.02 * i * i for i in range(16)]}


@pytest.mark.parametrize("peft_config", [None, lora()])
@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_resuming_continues_heads_optimizer_and_running_means(
    tmp_path: Path, peft_config: Any, restore_callbacks: bool
) -> None:
    def trainer() -> PreferenceTrainer:
        reference = None if peft_config else tiny_model(seed=7)
        return trainer_for(
            tmp_path, data=ragged_pairs(16, **SCORES), peft_config=peft_config, ref_model=reference, seed=3,
            restore_callback_states_from_checkpoint=restore_callbacks, **RESUMED,
        )  # fmt: skip

    whole = trainer()
    whole.train()
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]["Memory"]
    kept = kept["attributes"]["means"]
    assert set(kept) == {"gap", "entropy", "confidence", "global/mean", "global/square"}
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = ([row for row in x.state.log_history if "loss" in row] for x in (whole, resumed))
    assert [row["step"] for row in b] == [1, 2, 3, 4] and a == b
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.running_means, resumed.running_means)
    for one, two in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        assert one["lr"] == two["lr"]
        for p, q in zip(one["params"], two["params"], strict=True):
            assert same(whole.optimizer.state[p], resumed.optimizer.state[q])
    # The end is not where the checkpoint was.
    assert kept["gap"] != whole.running_means["gap"].item()
    for name in ("beta_head", "disco_head"):
        saved = load_file(tmp_path / "checkpoint-2" / f"{name}.safetensors")
        assert not same({f"{name}.{key}": value for key, value in saved.items()}, copied_heads(resumed.model))


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_the_best_model_comes_back_with_its_heads(
    tmp_path: Path, peft_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(
        tmp_path, eval_dataset=ragged_pairs(), peft_config=peft_config, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,  # the loss falls: the first is the "best"
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3, **BOTH,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    found = copied_heads(trainer.model)
    for name in ("beta_head", "disco_head"):
        own = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(name)}
        assert same(own, load_file(tmp_path / "checkpoint-1" / f"{name}.safetensors"))
        assert not same(own, load_file(tmp_path / "checkpoint-3" / f"{name}.safetensors"))
    assert "missing keys" not in caplog.text
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(
        next(row for row in trainer.state.log_history if "eval_loss" in row)["eval_rewards/margins"], rel=1e-6
    )
    assert evaluations[0] > evaluations[-1]


def test_a_model_without_a_head_takes_the_plain_forward(tmp_path: Path) -> None:
    # Attached heads do not stand in the way of generating, nor in the plain forward's gradient.
    model = tiny_model().eval()
    batch = {name: collate(ragged_pairs())[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**batch).logits
        attach_head(model, BetaHead(32))
        install_stats_forward(model)
        assert torch.equal(model(**batch).logits, before)
    assert model.generate(batch["input_ids"][:1, :2], max_new_tokens=2, do_sample=False).shape == (1, 4)
