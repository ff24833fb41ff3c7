"""Stage rm: the loss through the model, what is saved and found again, adapters, recipes, what is refused."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reward_ddp
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel
from test_architecture import copied_heads, same, scatter_heads
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpo import PreferenceTrainingArguments, RewardTrainer, load_heads
from fastpo.architecture import heads_of
from fastpo.calibration import expected_calibration_error
from fastpo.cli import main
from fastpo.heads import DiscoHead
from fastpo.planted import planted_preferences
from fastpo.reporting import read_metrics

DISCO: dict[str, Any] = {"add_disco_head": True, "pref_loss_type": "disco"}
MARGINS = [0.3 * i - 0.5 for i in range(8)]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a causal LM and its tokenizer."""
    folder = tmp_path_factory.mktemp("causal")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, **{"target_modules": "all-linear", "task_type": "SEQ_CLS", **fields})


def trainer_for(path: Path, model: Any, data: Dataset | None = None, **fields: Any) -> RewardTrainer:
    names = ("peft_config", "eval_dataset", "compute_metrics", "processing_class", "data_collator", "optimizers")
    others = {name: fields.pop(name) for name in names if name in fields}
    data = tiny_pairs() if data is None else data
    return RewardTrainer(model, tiny_args(path, stage="rm", **fields), train_dataset=data, **others)


def texts() -> Dataset:
    rows = [(f"What of {i}?", f" It is {i} and {i}.", " No" + "." * i) for i in range(8)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def with_margins() -> Dataset:
    return tiny_pairs().add_column("margin", MARGINS)


def batch_of(trainer: RewardTrainer, rows: int = 8) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def scatter_score(model: Any) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "score" in name.split("."):
                weight.copy_(torch.linspace(-0.5, 0.4, weight.numel()).view_as(weight))


def rewards_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"].flatten()


def losses(trainer: RewardTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"margin": True}, {"home_advantage": 0.7, "label_smoothing": 0.1, "center_rewards_coefficient": 0.2},
        {"pref_loss_type": "hinge"}, DISCO, {**DISCO, "margin": True, "disco_prior_weight": 0.3},
        {**DISCO, "pref_loss_type": {"disco": 1.0, "sigmoid": 0.5}, "center_rewards_coefficient": 0.2},
    ],
    ids=str,
)  # fmt: skip
def test_gradients_are_those_of_the_plain_formula_in_float64(
    tmp_path: Path, causal: str, fields: dict[str, Any]
) -> None:
    fields = dict(fields)
    data = with_margins() if fields.pop("margin", False) else tiny_pairs()
    trainer = trainer_for(tmp_path, causal, data, **fields)
    model = trainer.model.double()
    scatter_score(model)
    scatter_heads(model, scale=0.2)
    batch = batch_of(trainer)
    trainer.loss_output(model, batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # Row by row, each at its own length.
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    hidden = torch.stack([model.model(ids[i : i + 1, :n])[0][0, -1] for i, n in enumerate(lengths.tolist())])
    loss_type, eps = fields.get("pref_loss_type", "sigmoid"), fields.get("label_smoothing", 0.0)
    variance = torch.ones(16, dtype=torch.float64)
    if fields.get("add_disco_head"):
        reward, raw = (hidden @ model.disco_head.linear.weight.T + model.disco_head.linear.bias).unbind(1)
        variance = torch.log1p(raw.exp()) + 1e-3
    else:
        reward = hidden @ model.score.weight[0]
    w, l = reward[:8], reward[8:]  # noqa: E741
    m = torch.tensor(MARGINS).float().double() if "margin" in batch else fields.get("home_advantage", 0.0)
    z, sigma = w - l - m, (variance[:8] + variance[8:]).sqrt()
    sigmoid = (1 - eps) * torch.log1p((-z).exp()) + eps * torch.log1p(z.exp())
    disco = -torch.log(0.5 * (1 + torch.erf(z / sigma / math.sqrt(2))))
    loss = {"sigmoid": sigmoid, "hinge": (1 - z).clamp(min=0), "disco": disco}.get(str(loss_type))
    loss = disco + 0.5 * sigmoid if loss is None else loss
    total = loss.mean()
    if fields.get("add_disco_head"):
        prior = (variance + reward.square() - 1 - variance.log()) / 2
        total = total + fields.get("disco_prior_weight", 1e-3) * prior.mean()
    total = total + fields.get("center_rewards_coefficient", 0.0) * (w + l).square().mean()
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 10
    assert ("score.weight" in found) != bool(fields.get("add_disco_head"))
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"margin": True, "center_rewards_coefficient": 0.1}], ids=str)
def test_trl_s_numbers(tmp_path: Path, causal: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    fields = dict(fields)
    data = texts()
    data = data.add_column("margin", MARGINS) if fields.pop("margin", False) else data
    ours = trainer_for(tmp_path, causal, data, max_steps=4, **fields)
    scatter_score(ours.model)
    model = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1))
    scatter_score(model)
    args = trl.RewardConfig(
        str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=4,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", max_length=64, **fields,
    )  # fmt: skip
    theirs = trl.RewardTrainer(model, args, train_dataset=data, processing_class=copy.deepcopy(tiny_tokenizer()))
    ours.train()
    theirs.train()
    pairs = list(zip(ours.state.log_history, theirs.state.log_history, strict=True))[:4]
    for mine, other in pairs:
        for name, their_name in (("loss", "loss"), ("grad_norm", "grad_norm"), ("rewards/margins", "margin")):
            assert mine[name] == pytest.approx(other[their_name], rel=2e-4, abs=1e-5)
    assert len({mine["loss"] for mine, _ in pairs}) == 4


def test_rewards_are_read_where_transformers_reads_them(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(tmp_path, causal)
    scatter_score(trainer.model)
    plain = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
    scatter_score(plain)
    batch = batch_of(trainer)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = [plain.eval()(ids[i : i + 1, :n]).logits.item() for i, n in enumerate(mask.sum(1).tolist())]
    assert rewards_of(trainer.model, batch).tolist() == pytest.approx(expected, abs=1e-5)
    # Padded on the left, the mask says so.
    turned = [torch.cat((row[n:], row[:n])) for row, n in zip(ids, mask.sum(1).tolist(), strict=True)]
    left = {"input_ids": torch.stack(turned), "attention_mask": mask.flip(1)}
    assert rewards_of(trainer.model, left).tolist() == pytest.approx(expected, abs=1e-5)


def test_uneven_micro_batches_make_the_step_of_one_batch(tmp_path: Path, causal: str) -> None:
    fields: dict[str, Any] = {"center_rewards_coefficient": 0.3, "max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    found = []
    for size, steps in ((6, 1), (4, 2)):
        trainer = trainer_for(
            tmp_path, causal, tiny_pairs(6), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential", **fields,
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer), trainer.model.score.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def test_bf16_does_not_round_rewards(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(tmp_path, causal, bf16=True)
    scatter_score(trainer.model)
    with torch.autocast("cpu", torch.bfloat16):
        rewards = rewards_of(trainer.model, batch_of(trainer))
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


# --- learning and metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, DISCO], ids=["scalar", "disco"])
def test_it_learns_and_says_how_well(tmp_path: Path, causal: str, fields: dict[str, Any]) -> None:
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"own": 1.0}

    trainer = trainer_for(
        tmp_path, causal, tiny_pairs(32), max_steps=30, eval_dataset=tiny_pairs(10, seed=5), compute_metrics=keep,
        per_device_eval_batch_size=4, **fields,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["nll"] == pytest.approx(math.log(2))  # whatever the seed
    found = trainer.evaluate()
    assert losses(trainer)[-1] < 0.3 and found["eval_rewards/accuracies"] >= 0.7 and found["eval_own"] == 1
    # Of all pairs at once, with the probabilities that the formula gives.
    rows = trainer.data_collator(list(trainer.eval_dataset))
    answer = trainer.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    w, l = answer["logits"][:, 0].double().chunk(2)  # noqa: E741
    p = torch.sigmoid(w - l)
    if fields:
        p = 0.5 * (1 + torch.erf((w - l) / torch.add(*answer["variance"].double().chunk(2)).sqrt() / math.sqrt(2)))
    assert found["eval_nll"] == pytest.approx(-p.log().mean().item(), rel=1e-4)
    assert found["eval_ece"] == pytest.approx(expected_calibration_error(p.detach()), abs=1e-4)
    torch.testing.assert_close(torch.tensor(seen[0]), torch.stack((w, l), 1).float(), rtol=1e-4, atol=1e-5)
    assert {f"eval_{name}" for name in ("rewards/margins", "rewards/chosen", "rewards/rejected")} <= set(found)
    assert ("eval_variance/mean" in found and "eval_disco/prior" in found) == bool(fields)


def test_nll_and_ece_leave_the_margin_out(tmp_path: Path, causal: str) -> None:
    found = []
    for data in (tiny_pairs(), with_margins()):
        trainer = trainer_for(tmp_path, causal, data, eval_dataset=data)
        scatter_score(trainer.model)
        found.append(trainer.evaluate())
    plain, margins = found
    for name in ("eval_nll", "eval_ece"):
        assert plain[name] == pytest.approx(margins[name])
    assert (
        plain["eval_loss"] == pytest.approx(plain["eval_nll"]) and abs(plain["eval_loss"] - margins["eval_loss"]) > 0.01
    )


def test_several_eval_datasets_and_predict(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(tmp_path, causal, eval_dataset={"a": tiny_pairs(3), "b": tiny_pairs(5)})
    assert {"eval_a_ece", "eval_b_nll"} <= set(trainer.evaluate())
    assert "test_ece" in trainer.predict(tiny_pairs(3)).metrics


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "policy")
    here = Path(reward_ddp.__file__).parent
    paths = {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, "-m", *launch, reward_ddp.__file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reward_ddp.main(str(tmp_path))
    alone, *both = (torch.load(tmp_path / f"found.{name}") for name in ("alone", "0", "1"))
    for found in both:
        for case, expected in alone.items():
            assert found[case]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            # Each of the five held-out pairs once, though three batches of two have six places.
            assert found[case]["found"] == pytest.approx(expected["found"], rel=1e-3)
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(found[case]["weights"][name], weight, rtol=1e-3, atol=1e-5)


# --- saved, loaded, resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, DISCO], ids=["scalar", "disco"])
def test_a_saved_model_is_a_plain_one(tmp_path: Path, causal: str, fields: dict[str, Any]) -> None:
    trainer = trainer_for(tmp_path, causal, **fields)
    trainer.train()
    trainer.save_model()
    loaded, found = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert loaded.config.pad_token_id == tiny_tokenizer().pad_token_id and loaded.config.num_labels == 1
    batch = batch_of(trainer)
    ours, plain = rewards_of(trainer.model, batch), rewards_of(loaded, batch)
    assert ours.std() > 0.01
    if fields:  # the score is the mean without its constant
        shift = heads_of(trainer.model)["disco_head"].linear.bias[0].item()
        assert abs(shift) > 1e-4
        plain = plain + shift
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == tiny_tokenizer().eos_token
    again = trainer_for(tmp_path / "again", str(tmp_path), **fields)
    torch.testing.assert_close(rewards_of(again.model, batch), ours)
    assert same(copied_heads(again.model), copied_heads(trainer.model))


@pytest.mark.parametrize("fields", [{}, DISCO], ids=["scalar", "disco"])
def test_an_adapter_is_found_again(tmp_path: Path, causal: str, fields: dict[str, Any]) -> None:
    trainer = trainer_for(tmp_path / "run", causal, peft_config=lora(), max_steps=3, **fields)
    trainer.train()
    trainer.save_model()
    batch = batch_of(trainer)
    expected = rewards_of(trainer.model, batch)
    assert expected.std() > 0.01
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    auto.config.pad_token_id = tiny_tokenizer().pad_token_id
    base = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
    base.config.pad_token_id = tiny_tokenizer().pad_token_id
    for plain in (auto, PeftModel.from_pretrained(base, tmp_path / "run")):
        shift = heads_of(trainer.model)["disco_head"].linear.bias[0].item() if fields else 0.0
        torch.testing.assert_close(rewards_of(plain, batch) + shift, expected, rtol=1e-4, atol=1e-5)
    # Training goes on in it.
    again = trainer_for(tmp_path / "again", str(tmp_path / "run"), **fields)
    torch.testing.assert_close(rewards_of(again.model, batch), expected)
    again.train()
    assert not torch.equal(rewards_of(again.model, batch), expected)
    names = {name.split(".")[-2] for name, p in again.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name, p in again.model.named_parameters() if p.requires_grad), names


@pytest.mark.parametrize("fields", [{}, DISCO, {"peft_config": True}, {**DISCO, "peft_config": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, causal: str, fields: dict[str, Any]) -> None:
    fields = {**fields, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def make() -> RewardTrainer:
        adapter = {"peft_config": lora(lora_dropout=0.0)} if "peft_config" in fields else {}
        torch.manual_seed(3)
        return trainer_for(tmp_path, causal, **{**fields, **adapter})

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 4
    a, b = ({n: p.detach() for n, p in trainer.model.named_parameters()} for trainer in (whole, resumed))
    differ = [name for name in a if not torch.equal(a[name], b[name]) and "score" not in name]
    assert a.keys() == b.keys() and not differ
    if "add_disco_head" in fields:
        assert heads_of(resumed.model)["disco_head"].linear.weight.abs().min() > 0


def test_the_best_model_comes_with_its_head(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(
        tmp_path, causal, eval_dataset=tiny_pairs(4), save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_ece", greater_is_better=True,
        max_steps=3, **DISCO,
    )  # fmt: skip
    trainer.train()
    best = DiscoHead.from_pretrained(Path(trainer.state.best_model_checkpoint))
    assert torch.equal(best.linear.weight, heads_of(trainer.model)["disco_head"].linear.weight)


def test_a_head_that_is_not_used_is_kept(tmp_path: Path, causal: str) -> None:
    idle = trainer_for(tmp_path / "idle", causal, add_disco_head=True)
    plain = trainer_for(tmp_path / "plain", causal)
    scatter_heads(idle.model)
    before = copied_heads(idle.model)
    for trainer in (idle, plain):
        trainer.train()
    assert losses(idle) == losses(plain) and same(copied_heads(idle.model), before)
    idle.save_model()
    assert set(load_heads(tiny_model(), tmp_path / "idle")) == {"disco_head"}


# --- models and tokenizers --------------------------------------------------------------------------------------------


def test_a_trained_head_does_not_stay_beside_a_score_that_trains(tmp_path: Path, causal: str) -> None:
    """What loads the model would take its rewards from the head."""
    trainer = trainer_for(tmp_path / "gaussian", causal, **DISCO)
    trainer.train()
    trainer.save_model()
    again = str(tmp_path / "gaussian")
    with pytest.raises(ValueError, match="model has a trained Disco head"):
        trainer_for(tmp_path / "again", again, add_disco_head=True)
    assert not heads_of(trainer_for(tmp_path / "again", again).model)
    assert trainer_for(tmp_path / "again", again, **DISCO).gaussian


def test_the_first_model_does_not_depend_on_the_seed(tmp_path: Path, causal: str) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        trainer = trainer_for(tmp_path, causal)
        assert not trainer.model.score.weight.any() and trainer.model.score.weight.requires_grad


def test_a_model_of_16_bits_has_a_score_of_32(tmp_path: Path) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    full = trainer_for(tmp_path, str(tmp_path / "half"))
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    adapted = trainer_for(tmp_path, str(tmp_path / "half"), peft_config=lora())
    assert {p.dtype for name, p in adapted.model.named_parameters() if p.requires_grad} == {torch.float32}
    adapted.train()


def test_gpt2_whose_pad_token_is_its_eos_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    trainer = trainer_for(tmp_path / "run", str(tmp_path / "gpt2"), texts(), processing_class=tokenizer)
    assert "one row at a time" in caplog.text
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    batch = batch_of(trainer)
    expected = rewards_of(trainer.model, batch)
    for ids, mask, reward in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert ids[mask.sum() - 1] == tokenizer.eos_token_id  # where the reward is read
        torch.testing.assert_close(loaded(ids[None, : mask.sum()]).logits[0, 0], reward, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="padding token"):  # rather than another reward
        loaded(input_ids=batch["input_ids"])


def test_a_model_that_knows_its_padding_keeps_it(tmp_path: Path) -> None:
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, 7
    model = AutoModelForSequenceClassification.from_config(config)
    before = model.score.weight.detach().clone()
    trainer = trainer_for(tmp_path, model, processing_class=tiny_tokenizer())
    assert torch.equal(trainer.model.score.weight, before)
    trainer.train()
    assert model.config.pad_token_id == 7


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage": "rm", "padding_free": True}, "padding_free must be False in stage rm"),
        ({"stage": "rm", "prefix_sharing": True}, "prefix_sharing belongs to stage dpo, got stage='rm'"),
        ({"stage": "rm", "split_responses": True}, "split_responses belongs to stage dpo"),
        ({"stage": "rm", "precompute_ref_log_probs": True}, "precompute_ref_log_probs belongs to stage dpo"),
        ({"stage": "rm", "pref_loss_type": "ipo"}, "must be a function of z alone for a reward model, got 'ipo'"),
        ({"stage": "rm", "length_normalization": True}, "length_normalization is not used by a reward model"),
        ({"stage": "rm", "add_beta_head": True}, "add_beta_head belongs to stage dpo, ppo, got stage='rm'"),
        ({"stage": "rm", "pref_loss_type": "disco"}, "add_disco_head"),
        ({"stage": "rm", "center_rewards_coefficient": -1.0}, "center_rewards_coefficient must be >= 0 and finite"),
        ({"stage": "rm", "center_rewards_coefficient": math.nan}, "center_rewards_coefficient must be >= 0"),
        ({"stage": "dpo", "center_rewards_coefficient": 0.1}, "center_rewards_coefficient belongs to stage rm"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        PreferenceTrainingArguments(str(tmp_path), use_cpu=True, **fields)
    assert words in str(error.value)


def test_models_and_data_that_do_not_fit(tmp_path: Path, causal: str) -> None:
    with pytest.raises(TypeError, match="args must be PreferenceTrainingArguments, got dict"):
        RewardTrainer(causal, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"args\.stage must be rm for a RewardTrainer, got 'dpo'"):
        RewardTrainer(causal, tiny_args(tmp_path))
    with pytest.raises(ValueError, match=r"num_labels=1 .* got Qwen3ForCausalLM with num_labels=2"):
        trainer_for(tmp_path, tiny_model())
    two = AutoModelForSequenceClassification.from_config(tiny_model().config)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="a reward model must have num_labels=1, got 2 in"):
        trainer_for(tmp_path, str(tmp_path / "two"))
    with pytest.raises(ValueError, match="must hold a saved model, got no such folder"):
        trainer_for(tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="task_type SEQ_CLS, which trains the score, got CAUSAL_LM"):
        trainer_for(tmp_path, causal, peft_config=lora(task_type="CAUSAL_LM"))
    adapted = trainer_for(tmp_path, causal, peft_config=lora()).model
    with pytest.raises(ValueError, match="peft_config must be None"):
        trainer_for(tmp_path, adapted, peft_config=lora(), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="must have the columns of one of"):
        trainer_for(tmp_path, causal, Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(ValueError, match=r"row 0: 'margin' must be a finite number, got 'much'"):
        trainer_for(tmp_path, causal, tiny_pairs(4).add_column("margin", ["much"] * 4))
    gaussian = trainer_for(tmp_path, causal, **DISCO).model
    with pytest.raises(ValueError, match="answers with its Disco head"):
        trainer_for(tmp_path, gaussian, processing_class=tiny_tokenizer(), add_disco_head=True)


def test_an_optimizer_without_the_head(tmp_path: Path, causal: str) -> None:
    model = trainer_for(tmp_path, causal).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers must hold the disco_head's parameters"):
        trainer_for(tmp_path, model, processing_class=tiny_tokenizer(), optimizers=(optimizer, None), **DISCO)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(planted_preferences(40, seed=0)))
    return path


@pytest.mark.parametrize("recipe", ["rm", "rm_disco"])
def test_the_recipe_trains_is_evaluated_and_explained(
    tmp_path: Path, pairs: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    quick = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "4"]
    words = [f"recipes/{recipe}.yaml", "--dataset", str(pairs), "--output_dir", str(run), *quick]
    assert main(["train", *words]) == 0
    table = capsys.readouterr().out
    assert "\nnll" in table and "\nece" in table and (run / "ece.png").is_file()
    rows = read_metrics(run / "metrics.jsonl")
    assert "memory/measured_gb" in rows[-1] and "memory/predicted_gb" not in rows[-1]
    trained = next(row for row in reversed(rows) if "eval_nll" in row)
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "RewardModel(" in card and "- 36 pairs to train on" in card
    assert main(["eval", *words]) == 0
    found = json.loads((run / "eval_metrics.json").read_text())
    for name in ("eval_nll", "eval_ece", "eval_rewards/margins"):
        assert found[name] == pytest.approx(trained[name], rel=1e-4)
    capsys.readouterr()
    assert main(["explain", words[0], "--home_advantage", "0.5"]) == 0
    said = capsys.readouterr().out
    mean = "mu" if recipe == "rm_disco" else "r"
    assert (
        f"z     = {mean}_w - {mean}_l - m" in said and "or 0.5 where there is none" in said and "D_policy" not in said
    )
    assert ("KL(reward || N(0, 1))" in said) == (recipe == "rm_disco")
    assert main(["plan", words[0], "--cpu"]) == 1
    assert "a memory plan knows the stages sft, dpo, got stage='rm'" in capsys.readouterr().err


def test_an_adapter_of_a_recipe(tmp_path: Path, causal: str, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(
        f"stage: rm\nmodel_name_or_path: {causal}\nuse_peft: true\ndataset: {pairs}\nmax_steps: 3\nuse_cpu: true\n"
        f"output_dir: {tmp_path / 'run'}\nlearning_rate: 1.0e-2\neval_fraction: 0.2\nadd_disco_head: true\n"
        "pref_loss_type: disco\nmax_length: 64\nsave_steps: 2\n"
    )
    assert main(["train", str(recipe)]) == 0
    trained = next(row for row in reversed(read_metrics(tmp_path / "run" / "metrics.jsonl")) if "eval_nll" in row)
    capsys.readouterr()
    assert main(["eval", str(recipe)]) == 0
    found = json.loads((tmp_path / "run" / "eval_metrics.json").read_text())
    assert found["eval_nll"] == pytest.approx(trained["eval_nll"], rel=1e-4) and found["eval_nll"] < 0.69
    assert main(["train", str(recipe), "--ref_model_name_or_path", causal]) == 1
    assert "ref_model_name_or_path belongs to stage dpo" in capsys.readouterr().err
    assert main(["train", str(recipe), "--merge_adapters", str(tmp_path / "run")]) == 1
    assert "merge_adapters must be unset with use_peft in stage rm" in capsys.readouterr().err


def test_the_adapter_of_a_causal_lm_is_merged_into_the_backbone(tmp_path: Path, causal: str, pairs: Path) -> None:
    from peft import get_peft_model

    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "sft")
    merged = adapted.merge_and_unload().state_dict()
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(
        f"stage: rm\nmodel_name_or_path: {causal}\nmerge_adapters: {tmp_path / 'sft'}\ndataset: {pairs}\nmax_steps: 1\n"
        f"use_cpu: true\noutput_dir: {tmp_path / 'run'}\nlearning_rate: 1.0e-2\nmax_length: 64\n"
    )
    assert main(["train", str(recipe)]) == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"  # whose gradient is 0 in the first step
    torch.testing.assert_close(found[name], merged[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged[name], tiny_model().state_dict()[name], atol=1e-4)


def test_the_loss_of_the_metrics_is_finite_or_said(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(tmp_path, causal)
    with torch.no_grad():
        trainer.model.score.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is not finite at step 0"):
        trainer.train()


def test_margins_of_hinge_are_those_of_the_formula(tmp_path: Path, causal: str) -> None:
    trainer = trainer_for(tmp_path, causal, with_margins(), pref_loss_type="hinge")
    scatter_score(trainer.model)
    output = trainer.loss_output(trainer.model, batch_of(trainer))
    expected = F.relu(1 - (output.margins - torch.tensor(MARGINS, dtype=torch.float32)))
    torch.testing.assert_close(output.losses.detach(), expected)
