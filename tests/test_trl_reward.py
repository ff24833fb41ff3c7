"""fastpo's RewardTrainer in place of TRL's: the same numbers where TRL has the loss, and Gaussian rewards beside it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from tiny import SHAPE, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, training_args

from fastpo import DiscoHead, load_heads
from fastpo.architecture import attach_head, heads_of
from fastpo.integrations.trl.reward import RewardConfig, RewardTrainer
from fastpo.reward_model import install_reward_forward

DISCO: dict[str, Any] = {"add_disco_head": True, "pref_loss_type": "disco"}
TEXTS = ["a cat sat", "the dog ran home", "it rained", "a long day at the sea", "no", "yes we did so"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry


def reward_model(model_type: str = "qwen3", seed: int = 0, **fields: Any) -> Any:
    tokenizer = tiny_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(
        model_type, **{**SHAPE, **special, "vocab_size": len(tokenizer), "num_labels": 1, **fields}
    )
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def texts(margins: bool = False) -> Dataset:
    rows = [{"prompt": a, "chosen": " " + b, "rejected": " " + c} for a, b, c in zip(TEXTS, TEXTS[1:], TEXTS[2:] * 2)]  # noqa: B905
    return Dataset.from_list([{**row, "margin": 0.3 * i - 0.4} if margins else row for i, row in enumerate(rows)])


def trainer_for(path: Path, model: Any = None, kind: Any = RewardTrainer, data: Any = None, **fields: Any) -> Any:
    others = {name: fields.pop(name) for name in ("peft_config", "optimizers") if name in fields}
    defaults: dict[str, Any] = {
        "output_dir": str(path), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = (RewardConfig if kind is RewardTrainer else trl.RewardConfig)(**{**defaults, **fields})
    data = texts() if data is None else data
    return kind(
        reward_model() if model is None else model, args, train_dataset=data, eval_dataset=data,
        processing_class=copy.deepcopy(tiny_tokenizer()), **others,
    )  # fmt: skip


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    trainer.evaluate()
    unlike = ("runtime", "per_second", "total_flos")  # of these the last counts a head's parameters
    return [{k: v for k, v in row.items() if not k.endswith(unlike)} for row in trainer.state.log_history]


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", **fields})


# --- TRL's loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"center_rewards_coefficient": 0.1, "gradient_accumulation_steps": 2},
        {"margins": True},
        {"margins": True, "bf16": True, "center_rewards_coefficient": 0.1},
        {"peft_config": True},
    ],
    ids=lambda fields: ", ".join(fields) or "default",
)
def test_trl_s_numbers_are_trl_s(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    data = texts(fields.pop("margins", False))
    found = {}
    for kind in (trl.RewardTrainer, RewardTrainer):
        more = {**fields, **({"peft_config": adapter()} if "peft_config" in fields else {})}
        trainer = trainer_for(tmp_path, kind=kind, data=data, **more)
        found[kind] = history(trainer), trainer.model.state_dict()
    (theirs, their_weights), (ours, our_weights) = found.values()
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert len({row["loss"] for row in ours[:4]}) == 4 and ours[0]["grad_norm"] > 1e-3
    assert our_weights.keys() == their_weights.keys()
    for name, value in our_weights.items():
        # Adam divides by a gradient's size: what is next to 0 rounds to either side.
        torch.testing.assert_close(value, their_weights[name], rtol=1e-2, atol=2e-3)


def test_objectives_that_trl_has_not(tmp_path: Path) -> None:
    outputs = {"logits": torch.tensor([[0.9], [-0.2], [0.3], [0.4]])}
    fields = {"home_advantage": 0.5, "label_smoothing": 0.1}
    trainer = trainer_for(tmp_path, **fields, center_rewards_coefficient=0.01)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    for margin, m in ((None, (0.5, 0.5)), (torch.tensor([0.1, 0.2]), (0.1, 0.2))):
        zs = (0.6 - m[0], -0.6 - m[1])
        want = sum(0.9 * softplus(-z) + 0.1 * softplus(z) for z in zs) / 2 + 0.01 * (1.2**2 + 0.2**2) / 2
        assert trainer.loss_output(outputs, margin).loss.item() == pytest.approx(want, rel=1e-6)
    hinge = trainer_for(tmp_path, pref_loss_type={"hinge": 0.5, "sigmoid": 2.0})
    want = sum(0.5 * max(0.0, 1 - z) + 2 * softplus(-z) for z in (0.6, -0.6)) / 2
    assert hinge.loss_output(outputs).loss.item() == pytest.approx(want, rel=1e-6)


# --- Gaussian rewards -------------------------------------------------------------------------------------------------


def filled_head(model: Any, size: int = 32) -> DiscoHead:
    head = DiscoHead(size)
    torch.nn.init.normal_(head.linear.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(head.linear.bias, generator=torch.Generator().manual_seed(2))
    attach_head(model, head)
    return head


def by_hand(model: Any, head: DiscoHead, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sequence alone, without padding."""
    rows = []
    with torch.no_grad():
        for ids in sequences:
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            rows.append(head.linear.weight @ hidden + head.linear.bias)
    means, spreads = torch.stack(rows).unbind(1)
    return means, torch.log1p(spreads.exp()) + 1e-3


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gpt2"])
def test_mean_and_variance_are_of_the_last_token(model_type: str) -> None:
    """Also where it is the padding token, and where the padding is on the left."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else {}
    model = reward_model(model_type, **shape).eval()
    head, pad = filled_head(model), tiny_tokenizer().pad_token_id
    install_reward_forward(model)
    sequences = [[7, 8, 9, pad], [11, 12], [13, 14, 15]]
    mean, variance = by_hand(model, head, sequences)
    assert mean.std() > 0.05 and variance.std() > 0.05
    for left in (False, True):
        rows = [([pad] * (4 - len(s)) + s) if left else s + [pad] * (4 - len(s)) for s in sequences]
        masks = [([0] * (4 - len(s)) + [1] * len(s)) if left else [1] * len(s) + [0] * (4 - len(s)) for s in sequences]
        mask = torch.tensor(masks)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=torch.tensor(rows), attention_mask=mask, position_ids=positions, margin=None)
        torch.testing.assert_close(found.logits, mean[:, None], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.variance, variance, atol=1e-5, rtol=1e-5)
    alone = model(torch.tensor([sequences[1]]))
    torch.testing.assert_close(alone.variance, variance[1:2], atol=1e-5, rtol=1e-5)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.disco_head.linear.weight)
    assert not torch.equal(copied(torch.tensor([sequences[1]])).logits, alone.logits)


def test_the_loss_and_metrics_of_gaussian_rewards(tmp_path: Path) -> None:
    model = reward_model()
    head = filled_head(model)
    data = Dataset.from_list(
        [
            {"chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 10, 11], "margin": 0.2},
            {"chosen_ids": [12, 5], "rejected_ids": [9], "margin": -0.4},
        ]
    )
    fields = {**DISCO, "disco_prior_weight": 0.05, "label_smoothing": 0.1, "center_rewards_coefficient": 0.01}
    trainer = trainer_for(tmp_path, model, data=data, **fields)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)]))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    sequences = [*data["chosen_ids"], *data["rejected_ids"]]
    mean, variance = (x.double() for x in by_hand(trainer.model, head, sequences))
    z = (mean[:2] - mean[2:] - torch.tensor([0.2, -0.4])) / (variance[:2] + variance[2:]).sqrt()
    f = lambda x: -torch.special.ndtr(x).log()  # noqa: E731
    prior = ((variance + mean.square() - 1 - variance.log()) / 2).mean()
    centred = (mean[:2] + mean[2:]).square().mean()
    want = (0.9 * f(z) + 0.1 * f(-z)).mean() + 0.05 * prior + 0.01 * centred
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert outputs.logits.shape == (4, 1)
    metrics = trainer._metrics["eval"]
    expected = {
        "variance/mean": variance.sum() / 2, "disco/prior": prior, "min_reward": mean.min(), "max_reward": mean.max(),
        "mean_reward": mean.mean(), "margin": (mean[:2] - mean[2:]).mean(),
        "accuracy": (mean[:2] > mean[2:]).double().mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == [pytest.approx(value.item(), rel=1e-4, abs=1e-6)], name
    loss.backward()
    assert head.linear.weight.grad.abs().min() > 0
    # What trains and has no part in the loss would stop DistributedDataParallel.
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.model.model.embed_tokens.weight.grad.abs().sum() > 0 and trainer.model.score.weight.grad is None


def planted(pairs: int) -> Dataset:
    """After token 5 the answer 10 beats 11; after token 6 either does, as often."""
    rows = []
    for i in range(pairs):
        noisy, filler = i % 2 == 1, 20 + i % 7
        answers = (10, 11) if not noisy or i % 4 == 1 else (11, 10)
        chosen, rejected = ([5 + noisy, filler, answer] for answer in answers)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("lora", [False, True])
def test_disco_learns_what_is_preferred_and_where_that_is_noise(tmp_path: Path, lora: bool) -> None:
    fields = {"peft_config": adapter(r=8, lora_dropout=0.0)} if lora else {}
    trainer = trainer_for(
        tmp_path, data=planted(64), **DISCO, **fields, max_steps=60, per_device_train_batch_size=16,
        learning_rate=2e-2 if lora else 3e-3, logging_steps=60, gradient_checkpointing=lora,
    )  # fmt: skip
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[c, 22, a] for c in (5, 6) for a in (10, 11)]))
    (good, bad), (one, other) = found.logits.view(2, 2).tolist()
    clean, noisy = found.variance.view(2, 2).sum(1)
    assert good - bad > 1.0 and abs(one - other) < 0.3 * (good - bad)
    assert noisy > 1.5 * clean
    logged = trainer.state.log_history[0]
    assert logged["accuracy"] > 0.6 and logged["variance/mean"] > 0


# --- saved, found again, resumed --------------------------------------------------------------------------------------


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, lora: bool) -> None:
    fields = {**DISCO, "save_strategy": "steps", "save_steps": 2}
    more = lambda: {"peft_config": adapter()} if lora else {}  # noqa: E731
    whole = trainer_for(tmp_path, **fields, **more())
    whole.train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"disco_head.safetensors", "disco_head_config.json"} < files
    again = trainer_for(tmp_path, reward_model(), **fields, **more())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = weights_of(whole.model), weights_of(again.model)
    assert expected.keys() == found.keys() and any("disco_head" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert heads_of(again.model)["disco_head"].linear.weight.abs().min() > 0


def test_the_best_model_comes_with_its_head(tmp_path: Path) -> None:
    fields = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(
        tmp_path, **DISCO, **fields, load_best_model_at_end=True, metric_for_best_model="margin", learning_rate=1.0,
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    saved = DiscoHead.from_pretrained(best)
    assert torch.equal(saved.linear.weight, heads_of(trainer.model)["disco_head"].linear.weight)


def test_a_saved_model_is_a_plain_one_and_finds_its_head(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", **DISCO)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as weights:
        assert not any("disco" in name for name in weights.keys())  # noqa: SIM118
    ids = torch.tensor([[7, 8, 9]])
    expected = trainer.model.eval()(ids)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert plain(ids).logits.shape == (1, 1) and not heads_of(plain)
    assert set(load_heads(plain, tmp_path / "saved")) == {"disco_head"}
    install_reward_forward(plain)
    torch.testing.assert_close(plain(ids).logits, expected.logits)
    torch.testing.assert_close(plain(ids).variance, expected.variance)

    again = trainer_for(tmp_path / "run", str(tmp_path / "saved"), **DISCO)
    torch.testing.assert_close(again.model.eval()(ids).variance, expected.variance)


def test_a_head_that_is_not_used_is_kept_and_left_untrained(tmp_path: Path) -> None:
    model = reward_model()
    head = filled_head(model)
    before = copy.deepcopy(head.state_dict())
    trainer = trainer_for(tmp_path, model, add_disco_head=True, peft_config=adapter())
    assert not any(p.requires_grad for p in head.parameters())
    plain = trainer_for(tmp_path, kind=trl.RewardTrainer, peft_config=adapter())
    for ours, theirs in zip(history(trainer), history(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    saved = DiscoHead.from_pretrained(tmp_path / "saved").state_dict()
    for name, value in before.items():
        assert torch.equal(saved[name], value) and torch.equal(head.state_dict()[name], value)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_yaml_as_trl_reads_it(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nadd_disco_head: true\npref_loss_type: disco\n"
        "center_rewards_coefficient: 0.01\n"
    )
    parser = trl.TrlParser((trl.ScriptArguments, RewardConfig, trl.ModelConfig))
    arguments = ["--config", str(tmp_path / "reward.yaml"), "--dataset_name", "x"]
    _, args, _ = parser.parse_args_and_config(arguments)
    assert args.preference_config.pref_loss_type == "disco" and args.center_rewards_coefficient == 0.01
    assert args.learning_rate == 1e-4 and args.variance_floor == 1e-6
    _, args, _ = parser.parse_args_and_config([*arguments, "--pref_loss_type", '{"sigmoid": 1.0, "disco": 0.5}'])
    assert args.preference_config.loss_weights == {"sigmoid": 1.0, "disco": 0.5}


def test_defaults_are_trl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)  # TRL's default is bf16
    model = reward_model()
    model.config._name_or_path = "some/model"
    tokenizer = copy.deepcopy(tiny_tokenizer())
    trainer = RewardTrainer(model, train_dataset=texts(), processing_class=tokenizer)
    assert trainer.args.output_dir == "model-Reward" and trainer.args.pref_loss_type == "sigmoid"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pref_loss_type": "disco"}, "pref_loss_type.*disco.*add_disco_head"),
        ({"pref_loss_type": "ipo"}, "pref_loss_type must be a function of z alone for a reward model, got 'ipo'"),
        ({"variance_floor": 1e-3}, "variance_floor is not used by pref_loss_type 'sigmoid'"),
        ({"label_smoothing": 0.7}, "label_smoothing must be"),
    ],
)
def test_objectives_that_no_reward_model_has(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(output_dir=str(tmp_path), **fields)


def test_models_and_arguments_that_do_not_fit(tmp_path: Path) -> None:
    bert = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1,
        vocab_size=len(tiny_tokenizer()), pad_token_id=tiny_tokenizer().pad_token_id,
    )  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_config(bert)
    with pytest.raises(ValueError, match="model must be a sequence classification model with num_labels=1 and a score"):
        trainer_for(tmp_path, classifier, **DISCO)
    with pytest.raises(TypeError, match="args must be fastpo's RewardConfig, got trl"):
        RewardTrainer(reward_model(), trl.RewardConfig(str(tmp_path), use_cpu=True), train_dataset=texts())
    wide = reward_model()
    attach_head(wide, DiscoHead(16))
    with pytest.raises(ValueError, match="disco_head must take hidden states of size 32, got one for size 16"):
        trainer_for(tmp_path, wide, **DISCO)
    model = reward_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizers must hold the disco_head's parameters"):
        trainer_for(tmp_path, model, **DISCO, optimizers=(optimizer, None))
    used = trainer_for(tmp_path, **DISCO).model
    with pytest.raises(ValueError, match="model answers with its Disco head"):
        trainer_for(tmp_path, used, add_disco_head=True)
    with pytest.raises(ValueError, match="model must have a Disco head"):
        install_reward_forward(reward_model())
    with pytest.raises(ValueError, match=r"model must be a sequence classification model.*got Qwen3ForCausalLM"):
        install_reward_forward(tiny_model())
