"""PPO: what a step does, what training comes to, per-prompt beta, resumption, and what is refused."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

from fastpo import PPOTrainer, PPOTrainingArguments, load_heads
from fastpo.architecture import attach_head, heads_of
from fastpo.checkpoints import newest_checkpoint
from fastpo.generation import Completion
from fastpo.heads import BetaHead, DiscoHead
from fastpo.rollouts import PromptSampler
from fastpo.scoring import RewardModel
from fastpo.tokenization import tokenize_dataset

PROMPTS = (
    "Tell me of tea", "How is rice made", "Where do bees go", "Why read a map",
    "Give me a tip", "Explain chess", "What is a fern", "Who draws a cat",
)  # fmt: skip
LEARNED: dict[str, Any] = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}


def odd(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The number of odd tokens: half of all under an untrained model."""
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]


def prompts(**columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": list(PROMPTS), **columns})


def ppo_args(folder: Path, **fields: Any) -> PPOTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "max_completion_length": 4, "num_generations": 4,
        "per_device_train_batch_size": 16, "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": [], "beta": 0.5, "seed": 0,
    }  # fmt: skip
    return PPOTrainingArguments(**{**defaults, **fields})


def ppo(folder: Path, model: Any = None, *, reward_funcs: Any = odd, data: Any = None, **fields: Any) -> PPOTrainer:
    given = {name: fields.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in fields}
    return PPOTrainer(
        tiny_model() if model is None else model, args=ppo_args(folder, **fields), reward_funcs=reward_funcs,
        train_dataset=prompts() if data is None else data, processing_class=tiny_tokenizer(), **given,
    )  # fmt: skip


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row and name in row]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, x in found.items() if not torch.equal(x, wanted[name])] == []


def kl_of(trainer: PPOTrainer, rows: Sequence[int]) -> float:
    """KL(policy || reference) of completions of so many rows, estimated by 64 of each."""
    chosen = [row for row in trainer.train_dataset if row["index"] in rows]
    return float(trainer.roll_out(chosen, 64, seed=1)["kl"].sum(dim=1).mean())


# --- per-prompt beta --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_where_beta_is_doubled_the_kl_ends_lower(seed: int, tmp_path: Path) -> None:
    """Of e^(r/beta): 4 tokens, each odd with probability sigmoid(1/beta), have KL 1.3 at 0.5 and 0.44 at 1."""
    found = {}
    for scale in (2.0, 1.0):
        trainer = ppo(
            tmp_path, tiny_model(seed=seed), data=prompts(beta_scale=[scale, 1.0] * 4), seed=seed, max_steps=60,
            num_generations=8, per_device_train_batch_size=64,
        )  # fmt: skip
        trainer.train()
        found[scale] = kl_of(trainer, range(0, 8, 2)) / kl_of(trainer, range(1, 8, 2))
        rewards = logged(trainer, "reward")
        assert sum(rewards[-5:]) / 5 > rewards[0] + 0.8
    assert found[2.0] < 0.7
    assert 0.95 < found[1.0] < 1.05


def prompt_hidden(model: Any, prompt: str) -> Tensor:
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    return model(ids, output_hidden_states=True).hidden_states[-1][:, -1]


@pytest.mark.parametrize("second", [True, False], ids=["ref_model", "copy"])
def test_beta_of_each_row_is_the_base_times_s_of_its_prompt_times_the_column(second: bool, tmp_path: Path) -> None:
    reference = tiny_model(seed=5 if second else 0)
    given = {"ref_model": tiny_model(seed=5)} if second else {}
    trainer = ppo(tmp_path, data=prompts(beta_scale=[1.0, 3.0] * 4), **LEARNED, **given)
    head = heads_of(trainer.model)["beta_head"]
    with torch.no_grad():
        head.layers[-1].weight.normal_(std=0.1)
        head.layers[-1].bias.fill_(0.3)
    rows = list(trainer.train_dataset)[:3]
    rolled = trainer.roll_out(rows, 2, seed=3)
    with torch.no_grad():
        s = torch.cat([head(prompt_hidden(reference, row["prompt"])) for row in rows])
    wanted = 0.5 * s * torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(rolled["beta"], wanted.repeat_interleave(2), rtol=1e-4, atol=1e-6)
    assert len(set(s.tolist())) == 3


def test_a_frozen_head_stays_as_it_is(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, **LEARNED, max_steps=3)
    head = heads_of(trainer.model)["beta_head"]
    with torch.no_grad():
        head.layers[-1].weight.normal_(std=0.1)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    trainer.train()
    assert_same(dict(head.state_dict()), before)
    assert logged(trainer, "beta/std")[-1] > 0 and logged(trainer, "log_s/mean")[-1] != 0
    assert "dual_loss" not in trainer.state.log_history[0]


def test_a_head_that_lies_beside_the_model_says_s(tmp_path: Path) -> None:
    model = tiny_model()
    attach_head(model, BetaHead(32))
    with torch.no_grad():
        model.beta_head.layers[-1].bias.fill_(0.4)
    model.save_pretrained(tmp_path / "learned")
    trainer = ppo(tmp_path / "run", str(tmp_path / "learned"), **LEARNED)
    rolled = trainer.roll_out(list(trainer.train_dataset)[:1], 2, seed=0)
    bound = math.log(4)
    assert rolled["beta"].tolist() == pytest.approx([0.5 * math.exp(bound * math.tanh(0.4 / bound))] * 2)


def test_the_dual_update_lowers_s_where_the_kl_is_below_the_target(tmp_path: Path) -> None:
    """beta = 2 alone has KL 0.12; the target of 1 lets the policy further."""
    fields = {"beta": 2.0, "max_steps": 30, "num_generations": 8, "per_device_train_batch_size": 64}
    fixed = ppo(tmp_path / "fixed", **fields)
    fixed.train()
    trainer = ppo(tmp_path / "dual", kl_target=1.0, beta_head_config={"lr_multiplier": 4.0}, **LEARNED, **fields)
    trainer.train()
    assert logged(trainer, "log_s/mean")[-1] < -0.5
    assert kl_of(fixed, range(8)) < 0.35
    assert kl_of(trainer, range(8)) > 0.6


def test_the_dual_update_raises_s_where_the_kl_is_above_the_target(tmp_path: Path) -> None:
    reference = tiny_model(seed=7)
    with torch.no_grad():
        reference.lm_head.weight.mul_(10)
    trainer = ppo(
        tmp_path, ref_model=reference, kl_target=0.1, beta_head_config={"lr_multiplier": 3.0}, **LEARNED, max_steps=15
    )
    trainer.train()
    found = logged(trainer, "log_s/mean")
    assert found[0] == 0 and found[-1] > 0.2
    groups = trainer.optimizer.param_groups
    assert groups[-1]["lr"] == pytest.approx(3e-2) and groups[-1]["weight_decay"] == 0


def test_truncated_completions_count_for_the_kl_that_moves_s(tmp_path: Path) -> None:
    """They are left out of the policy's loss alone: otherwise their KL of 0 would lower s."""
    reference = tiny_model(seed=7)
    with torch.no_grad():
        reference.lm_head.weight.mul_(10)
    trainer = ppo(
        tmp_path, ref_model=reference, kl_target=0.1, beta_head_config={"lr_multiplier": 3.0}, **LEARNED, max_steps=4,
        mask_truncated_completions=True,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "completions/clipped_ratio")[0] > 0.9
    assert logged(trainer, "log_s/mean")[-1] > 0


def test_beta_follows_its_schedule(tmp_path: Path) -> None:
    schedule = {"points": [[0.0, 0.4], [0.5, 0.2]], "interpolation": "step"}
    trainer = ppo(tmp_path, beta_schedule=schedule, max_steps=4)
    trainer.train()
    assert logged(trainer, "beta/mean") == pytest.approx([0.4, 0.4, 0.2, 0.2])


# --- a step -----------------------------------------------------------------------------------------------------------


def test_log_probs_kl_and_advantages_of_a_rollout(tmp_path: Path) -> None:
    """Against the models' own logits, at the sampling temperature."""
    policy, reference = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    trainer = ppo(tmp_path, tiny_model(seed=1).double(), ref_model=tiny_model(seed=2).double(), temperature=0.7)
    rolled = trainer._with_advantages(trainer.roll_out(list(trainer.train_dataset)[:2], 4, seed=11))
    mask = rolled["completion_mask"].bool()

    def logps(model: Any) -> Tensor:
        with torch.no_grad():
            logits = model(rolled["input_ids"], attention_mask=rolled["attention_mask"]).logits[:, :-1] / 0.7
        found = logits.log_softmax(dim=-1).gather(2, rolled["input_ids"][:, 1:, None])[:, :, 0]
        return torch.where(mask[:, 1:], found, 0)

    own, other = logps(policy), logps(reference)
    torch.testing.assert_close(rolled["old_logps"][:, 1:], own, rtol=0, atol=1e-9)
    torch.testing.assert_close(rolled["ref_logps"][:, 1:], other, rtol=0, atol=1e-9)
    returns = rolled["rewards"].double() - 0.5 * (own - other).sum(dim=1)
    wanted = torch.cat([group - (group.sum() - group) / 3 for group in returns.split(4)])
    torch.testing.assert_close(rolled["advantages"], torch.where(mask, wanted[:, None], 0.0), rtol=0, atol=1e-6)


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    fields = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 1, "advantage": "gae"}
    trainer = ppo(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=8, **fields)
    before = weights(trainer)
    trainer.train()
    first, second = trainer._rollouts
    assert not torch.equal(first["input_ids"], second["input_ids"])
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])

    def joined(name: str) -> Tensor:
        parts = [batch[name] for batch in (first, second)]
        if parts[0].dim() == 1:
            return torch.cat(parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    whole = {name: joined(name) for name, x in first.items() if isinstance(x, Tensor)}
    tokens = torch.cat([batch["advantages"][batch["completion_mask"].bool()] for batch in (first, second)])
    assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
    assert tokens.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    fresh = ppo(tmp_path, per_device_train_batch_size=16, **fields)
    assert_same(weights(fresh), before)
    output = fresh.loss_output(fresh.model, {**whole, "prompt": {}, "metrics": {}})
    output.loss.backward()  # type: ignore[no-untyped-call]
    for name, p in fresh.model.named_parameters():
        moved = before[name] - (0 if p.grad is None else 0.5 * p.grad)
        torch.testing.assert_close(weights(trainer)[name], moved, rtol=1e-4, atol=1e-6)
    assert output.loss.item() == pytest.approx(logged(trainer, "loss")[0], abs=1e-5)


class Watching(TrainerCallback):
    """Keeps the gradients of each step, and the weights that they were taken at."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})


def discounted(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages of one completion, from its end on; 0 outside."""
    found, later, value = torch.zeros_like(rewards), 0.0, 0.0
    for t in mask.nonzero().flatten().flip(0).tolist():
        later = float(rewards[t]) + gamma * value - float(values[t]) + gamma * lam * later
        found[t], value = later, float(values[t])
    return found


def test_the_second_step_on_rollouts_is_that_of_the_formulas_on_full_logits(tmp_path: Path) -> None:
    """With every argument away from its default, and completions of several lengths."""
    scales, model = [1.0, 2.0] * 4, tiny_model()
    model.generation_config.eos_token_id = list(range(60))
    trainer = ppo(
        tmp_path, model, data=prompts(beta_scale=scales), advantage="gae", temperature=1.7, epsilon=0.02,
        epsilon_high=0.05, gamma=0.9, lam=0.8, vf_coef=0.3, cliprange_value=0.01, kl_estimator="k3", kl_target=0.2,
        max_prompt_length=2,
        num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=8, max_completion_length=8,
        optim="sgd", learning_rate=0.5, max_grad_norm=0.0, ref_model=tiny_model(seed=4), **LEARNED,
        beta_schedule={"points": [[0, 0.5], [1, 0.1]]},
    )  # fmt: skip
    watching = Watching()
    trainer.add_callback(watching)
    trainer.train()
    rollouts = trainer._rollouts
    assert rollouts is not None and len({int(n) for b in rollouts for n in b["completion_mask"].sum(dim=1)}) > 3
    masks = [batch["completion_mask"].bool() for batch in rollouts]
    betas = [0.5 * torch.tensor(scales)[batch["index"]] for batch in rollouts]

    advantages, returns = [], []
    for batch, mask, beta in zip(rollouts, masks, betas, strict=True):
        assert (batch["attention_mask"] - batch["completion_mask"]).sum(dim=1).max() == 2
        difference = batch["ref_logps"] - batch["old_logps"]
        rewards = -(beta * batch["log_s"].exp())[:, None] * (difference.exp() - 1 - difference)
        last = mask.long().cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
        rewards += (last & mask) * batch["rewards"][:, None]
        rows = zip(rewards, batch["token_values"], mask, strict=True)
        advantages.append(torch.stack([discounted(*row, gamma=0.9, lam=0.8) for row in rows]))
        returns.append(advantages[-1] + batch["token_values"])
    every = torch.cat([x[mask] for x, mask in zip(advantages, masks, strict=True)])
    advantages = [(x - every.mean()) / every.std(correction=0) for x in advantages]

    lm = trainer.model
    lm.load_state_dict(watching.weights[1])
    lm.zero_grad()
    total, clipped, moved = torch.zeros(()), {False: 0, True: 0}, 0
    for batch, mask, beta, a, to_come in zip(rollouts, masks, betas, advantages, returns, strict=True):
        found = lm(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        logps = (found.logits / 1.7).log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        logps, values = (F.pad(x, (1, 0)) for x in (logps, lm.value_head.linear(found.hidden_states[-1])[:, :-1, 0]))
        ratio = (logps - batch["old_logps"]).exp()
        for up in clipped:
            clipped[up] += int(((ratio > 1.05) & (a > 0) if up else (ratio < 0.98) & (a < 0))[mask].sum())
        near = batch["token_values"] + (values - batch["token_values"]).clamp(-0.01, 0.01)
        errors = torch.maximum((values - to_come).square(), (near - to_come).square())
        moved += int((near != values)[mask].sum())
        losses = -torch.minimum(ratio * a, ratio.clamp(0.98, 1.05) * a) + 0.3 * errors / 2
        total = total + losses[mask].sum() / len(every)
        s = lm.beta_head(**batch["prompt"])
        total = total - (s * beta * (batch["kl"].sum(dim=1) - 0.2)).sum() / 16
    assert min(clipped.values()) > 0 and moved > 0
    total.backward()
    wanted = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    assert wanted.keys() == watching.gradients[1].keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(watching.gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_reference_with_dropout_answers_without(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model("gpt2"), ref_model=tiny_model("gpt2", resid_pdrop=0.5).train())
    batches = [trainer.roll_out(list(trainer.train_dataset)[:2], 2, seed=0) for _ in range(2)]
    assert torch.equal(batches[0]["ref_logps"], batches[1]["ref_logps"])
    assert batches[0]["kl"].abs().max() < 1e-5


def test_prompts_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    def order(**fields: Any) -> list[int]:
        trainer = ppo(tmp_path, **fields)
        return [row["index"] for batch in trainer.get_train_dataloader() for row in batch]

    assert order(train_sampling_strategy="sequential") == list(range(8))
    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=2)


def test_rollouts_are_used_num_iterations_times(tmp_path: Path) -> None:
    calls = []

    def counting(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        calls.append(len(completion_ids))
        return odd(completion_ids)

    trainer = ppo(tmp_path, reward_funcs=counting, num_iterations=3, max_steps=6, learning_rate=3e-2)
    trainer.train()
    assert calls == [16, 16]
    ratios = logged(trainer, "clip_ratio/region_mean")
    assert ratios[0] == ratios[3] == 0 and ratios[2] > 0 and ratios[5] > 0
    assert logged(trainer, "reward")[:3] == [logged(trainer, "reward")[0]] * 3


@pytest.mark.parametrize("advantage", ["grpo", "gae"])
def test_every_kind_of_advantage_raises_the_reward(advantage: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, advantage=advantage, beta=0.05, max_steps=30, per_device_train_batch_size=32)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > rewards[0] + 0.8
    if advantage == "gae":
        errors = logged(trainer, "value_loss")
        assert sum(errors[-5:]) < 0.5 * sum(errors[:5])
        trainer.save_model()
        fresh = tiny_model()
        load_heads(fresh, trainer.args.output_dir)
        assert_same(dict(fresh.value_head.state_dict()), dict(trainer.model.value_head.state_dict()))


def test_the_reference_below_an_adapter_is_that_of_a_copy(tmp_path: Path) -> None:
    found = {}
    for copied in (False, True):
        torch.manual_seed(3)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
        second = {"ref_model": tiny_model()} if copied else {}
        trainer = ppo(tmp_path, peft_config=adapter, max_steps=4, **second, **LEARNED, kl_target=0.5, num_iterations=2)
        assert (trainer.ref_model is None) is not copied
        assert {layer.p for layer in trainer.model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
        trainer.train()
        found[copied] = [logged(trainer, name) for name in ("loss", "kl", "grad_norm", "log_s/mean")]
    for below, copy in zip(found[False], found[True], strict=True):
        assert below == pytest.approx(copy, rel=1e-4, abs=1e-6)
    assert abs(found[False][1][-1]) > 1e-4


def test_dropout_that_stays_on_is_off_while_rollouts_are_made(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model(attention_dropout=0.5), disable_dropout=False)
    trainer.model.train()
    rows = list(trainer.train_dataset)[:2]
    first, second = (trainer.roll_out(rows, 2, seed=1) for _ in range(2))
    assert torch.equal(first["old_logps"], second["old_logps"]) and trainer.model.training


# --- completions and rewards ------------------------------------------------------------------------------------------


def give(monkeypatch: pytest.MonkeyPatch, *completions: Completion) -> None:
    """Have batches draw these in turn, whatever the prompts."""
    drawn = itertools.cycle(completions)

    def generate(model: Any, prompts: Sequence[Any], *args: Any, **named: Any) -> list[Completion]:
        return [next(drawn) for _ in prompts]

    monkeypatch.setattr("fastpo.rollouts.generate", generate)


def test_lengths_are_extremes_of_all_that_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = tiny_tokenizer().eos_token_id
    short, long = Completion([5, end], True), Completion([5, 6, 7, 8], False)
    give(monkeypatch, *[short] * 8, *[long] * 8)  # a micro-batch of each
    trainer = ppo(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=8, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert [row[f"completions/{name}_length"] for name in ("min", "mean", "max")] == [2, 3, 4]


def test_empty_completions_are_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = tiny_tokenizer().eos_token_id
    give(monkeypatch, Completion([end], True), Completion([5, 6, 7, 8], False))
    said: list[Any] = []

    def length(completions: list[Any], **columns: Any) -> list[float]:
        said.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = ppo(tmp_path, reward_funcs=length)
    before = weights(trainer)
    trainer.train()
    assert "" in said and all(math.isfinite(x) for x in logged(trainer, "loss"))
    row = trainer.state.log_history[0]
    assert (row["completions/min_length"], row["completions/max_length"], row["completions/clipped_ratio"]) == (
        1,
        4,
        0.5,
    )
    assert any(not torch.equal(x, before[name]) for name, x in weights(trainer).items())


@pytest.mark.parametrize("masked", [True, False])
def test_truncated_completions_may_be_left_out_of_the_loss(
    masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, Completion([5, 6, 7, 8], False), Completion([5, 7, 9, 8], False))
    trainer = ppo(tmp_path, mask_truncated_completions=masked, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "completions/mean_length") == [4]
    moved = any(not torch.equal(x, before[name]) for name, x in weights(trainer).items())
    assert moved is not masked


def test_reward_functions_see_prompts_completions_and_columns_in_the_form_of_the_data(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}

    def looking(**named: Any) -> list[float]:
        seen.update(named)
        return [0.0] * len(named["prompts"])

    trainer = ppo(tmp_path, reward_funcs=looking, data=tiny_pairs(4).add_column("topic", list("abcd")), max_steps=1)
    trainer.train()
    assert {"prompts", "completions", "completion_ids", "topic"} <= seen.keys() and "prompt_ids" not in seen
    assert [len(values) for values in seen.values()] == [16] * len(seen)
    assert seen["prompts"][0] == [{"role": "user", "content": seen["prompts"][0][0]["content"]}]
    assert seen["completions"][0][0]["role"] == "assistant"
    assert seen["topic"] == [topic for topic in dict.fromkeys(seen["topic"]) for _ in range(4)]
    tokens = seen["completion_ids"][0]
    text = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    assert seen["completions"][0] == [{"role": "assistant", "content": text}]

    text_trainer = ppo(tmp_path, reward_funcs=looking, max_steps=1)
    text_trainer.train()
    assert seen["prompts"][0] in PROMPTS and isinstance(seen["completions"][0], str)


def test_a_column_of_completions_is_not_what_a_function_gets(tmp_path: Path) -> None:
    def looking(completions: list[str], completion_ids: list[Any], **columns: Any) -> list[float]:
        assert "theirs" not in completions and "theirs" not in completion_ids
        return [0.0] * len(completions)

    named = {name: ["theirs"] * 8 for name in ("prompts", "completions", "completion_ids")}
    ppo(tmp_path, reward_funcs=looking, data=prompts(**named)).train()


def test_rewards_are_weighed_and_may_be_none(tmp_path: Path) -> None:
    def sometimes(prompts: list[str], **columns: Any) -> list[float | None]:
        return [10.0 if prompt == PROMPTS[0] else None for prompt in prompts]

    trainer = ppo(tmp_path, reward_funcs=[odd, sometimes], reward_weights=[1.0, 0.5], max_steps=4, logging_steps=4)
    rolled = trainer.roll_out(list(trainer.train_dataset)[:2], 2, seed=0)
    own = torch.tensor(
        odd(
            [
                row[mask.bool()].tolist()
                for row, mask in zip(rolled["input_ids"], rolled["completion_mask"], strict=True)
            ]
        )
    )
    assert rolled["rewards"].tolist() == (own + torch.tensor([5.0, 5.0, 0.0, 0.0])).tolist()
    trainer.train()
    assert logged(trainer, "rewards/sometimes/mean") == [10.0]


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of a scalar and of a Gaussian reward model."""
    folder = tmp_path_factory.mktemp("rewards")
    shape = tiny_model().config.to_diff_dict() | {"num_labels": 1}
    for kind in ("scalar", "gaussian"):
        torch.manual_seed(4)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**shape))
        if kind == "gaussian":
            attach_head(model, DiscoHead(32))
            torch.nn.init.normal_(model.disco_head.linear.weight)
        model.save_pretrained(folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
    return lambda kind: str(folder / kind)


def test_rewards_of_a_reward_model(reward_models: Callable[[str], str], tmp_path: Path) -> None:
    trainer = ppo(tmp_path, reward_funcs=None, reward_model=reward_models("scalar"))
    rolled = trainer.roll_out(list(trainer.train_dataset)[:2], 2, seed=0)
    said = [
        tiny_tokenizer().decode(row[mask.bool()], skip_special_tokens=True)
        for row, mask in zip(rolled["input_ids"], rolled["completion_mask"], strict=True)
    ]
    asked = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    wanted = RewardModel(reward_models("scalar")).score(asked, said).mean
    torch.testing.assert_close(rolled["rewards"], wanted)
    assert "rewards/scalar/mean" in rolled["metrics"] and "sigma/mean" not in rolled["metrics"]


def test_a_reward_model_that_cannot_read_messages_is_named(reward_models: Callable[[str], str], tmp_path: Path) -> None:
    source = RewardModel(reward_models("scalar"))
    source.tokenizer.chat_template = None
    told = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Why read a map"}]]})
    with pytest.raises(ValueError, match="reward model scalar cannot score: the chat template cannot render it"):
        ppo(tmp_path, data=told, reward_funcs=source).train()


def test_gaussian_rewards_pay_for_their_deviation(reward_models: Callable[[str], str], tmp_path: Path) -> None:
    model = RewardModel(reward_models("gaussian"))
    rolled = [
        ppo(tmp_path, reward_funcs=model, risk_aversion=kappa).roll_out(
            [{"prompt": PROMPTS[0], "prompt_ids": tiny_tokenizer()(PROMPTS[0])["input_ids"], "index": 0}], 4, seed=0
        )
        for kappa in (0.0, 2.0)
    ]
    sigma = (rolled[0]["rewards"] - rolled[1]["rewards"]) / 2
    assert sigma.min() > 0
    assert float(rolled[0]["metrics"]["sigma/mean"]) == pytest.approx(float(sigma.mean()), rel=1e-4)


# --- evaluation and logs ----------------------------------------------------------------------------------------------


def test_evaluation_is_the_same_each_time_and_changes_nothing(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, eval_dataset=prompts().select(range(5)), per_device_eval_batch_size=2)
    before = weights(trainer)
    found = [{k: v for k, v in trainer.evaluate().items() if not re.search("runtime|per_second", k)} for _ in range(2)]
    assert found[0] == found[1]
    assert_same(weights(trainer), before)
    assert {"eval_reward", "eval_kl", "eval_entropy", "eval_rewards/odd/mean", "eval_completions/mean_length"} <= set(
        found[0]
    )
    assert found[0]["eval_loss"] == pytest.approx(
        0.5 * found[0]["eval_kl/completion"] - found[0]["eval_reward"], abs=1e-5
    )
    assert found[0]["eval_reward"] > 0
    trainer.args.seed = 1
    assert (
        trainer.evaluate()["eval_kl/completion"] == found[0]["eval_kl/completion"] == 0
    )  # the policy is the reference
    assert trainer.evaluate()["eval_reward"] != found[0]["eval_reward"]


def test_predictions_of_prompts_are_an_evaluation_of_them(tmp_path: Path) -> None:
    trainer, held_out = ppo(tmp_path), prompts().select(range(3))
    assert trainer.predict(held_out).metrics["test_reward"] == trainer.evaluate(held_out)["eval_reward"]


def test_batches_of_an_evaluation_draw_apart(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def looking(completion_ids: Any, **columns: Any) -> list[float]:
        seen.extend(list(ids) for ids in completion_ids)
        return [0.0] * len(completion_ids)

    same = Dataset.from_dict({"prompt": [PROMPTS[0]] * 2})
    ppo(tmp_path, reward_funcs=looking, eval_dataset=same, per_device_eval_batch_size=1).evaluate()
    assert len(seen) == 2 and seen[0] != seen[1]


def test_every_step_draws_anew_and_every_run_the_same(tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    def looking(completion_ids: Any, **columns: Any) -> list[float]:
        seen.append([list(ids) for ids in completion_ids])
        return [0.0] * len(completion_ids)

    fields = {"reward_funcs": looking, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    one = prompts().select([0])  # all steps and micro-batches draw of the same prompt
    for _ in range(2):
        ppo(tmp_path, data=one, **fields).train()
    assert len(seen) == 8 and seen[:4] == seen[4:]
    assert len({json.dumps(drawn) for drawn in seen}) == 4


def test_the_sampler_gives_each_step_its_prompts_as_often_as_they_are_used() -> None:
    done = 0
    sampler = PromptSampler(5, 2, 3, seed=0, shuffle=True, steps_done=lambda: done)
    order = list(sampler)
    assert len(sampler) == len(order) == 18
    steps = [order[i : i + 2] for i in range(0, 18, 2)]
    assert steps[0] == steps[1] == steps[2] and steps[3] == steps[5] and steps[6] == steps[8]
    taken = steps[0] + steps[3] + steps[6]
    assert sorted(taken[:5]) == [0, 1, 2, 3, 4] and taken[5] == taken[0]
    done = 4  # in the first epoch still
    assert list(sampler) == order
    done = 9
    assert list(sampler) != order
    assert list(PromptSampler(1, 4, 1, seed=0, shuffle=False, steps_done=lambda: 0)) == [0] * 4


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [2, 3], ids=["between rollouts", "within their use"])
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(saved_at: int, tmp_path: Path) -> None:
    fields = {
        "num_iterations": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": saved_at, "save_total_limit": 1,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "advantage": "gae", "kl_target": 0.5,
        **LEARNED, "data": prompts().select(range(6)),
    }  # fmt: skip
    whole = ppo(tmp_path / "whole", **fields)
    whole.train()
    first = ppo(tmp_path / "part", **{**fields, "max_steps": saved_at})
    first.train()
    checkpoint = newest_checkpoint(tmp_path / "part")
    assert checkpoint is not None and (checkpoint / "rollouts_0.pt").exists() is (saved_at == 3)
    resumed = ppo(tmp_path / "part", tiny_model(seed=8), ref_model=tiny_model(), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(whole))
    times = ("epoch", "step")
    tails = [
        [{k: v for k, v in row.items() if k not in times} for row in t.state.log_history[:5]] for t in (resumed, whole)
    ]
    assert tails[0] == tails[1]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def counted(n: int) -> Callable[..., list[float]]:
    def rewards(**columns: Any) -> list[float]:
        return [0.0] * n

    return rewards


def not_finite(completions: list[str], **columns: Any) -> list[float]:
    return [math.nan] * len(completions)


def nothing(**columns: Any) -> None:
    """A function whose return was forgotten."""


def none_of_it(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        (counted(3), ["rewards", "16 completions", "got 3"]),
        (nothing, ["reward_funcs nothing must give a list of numbers, got None"]),
        (not_finite, ["not_finite", "finite", "nan", "row"]),
        (none_of_it, ["none_of_it", "at least one reward", "rows [0, 1, 2, 3]"]),
        ([none_of_it, odd, none_of_it], None),
    ],
    ids=["count", "nothing", "nan", "none", "some"],
)
def test_bad_rewards_are_named(rewards: Any, words: list[str] | None, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, reward_funcs=rewards, data=prompts().select(range(4)))
    if words is None:
        trainer.train()
        return
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert [word for word in words if word not in str(error.value)] == []


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"per_device_train_batch_size": 6}, "per_device_train_batch_size counts completions and must be a multiple of"),
    ({"num_generations": 1, "per_device_train_batch_size": 4}, "num_generations must be >= 2 with advantage='rloo'"),
    ({"num_iterations": 0}, "num_iterations must be >= 1, got 0"),
    ({"advantage": "gea"}, "advantage must be one of rloo, grpo, gae, got 'gea'"),
    ({"kl_estimator": "k2"}, "kl_estimator must be one of k1, k3, got 'k2'"),
    ({"kl_target": 1.0}, "kl_target trains s(x): it must be None without beta_mode='dynamic_scaling'"),
    ({"kl_target": -1.0, **LEARNED}, "kl_target must be a finite number"),
    ({"epsilon": 0.0}, "epsilon must be a finite number > 0"),
    ({"epsilon": 1.5}, "epsilon must be < 1"),
    ({"risk_aversion": -1.0}, "risk_aversion must be a finite number >= 0"),
    ({"lam": 0.5}, "lam is read with advantage='gae' alone"),
    ({"lam": 1.5, "advantage": "gae"}, "lam must be in [0, 1], got 1.5"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0"),
    ({"max_completion_length": 0}, "max_completion_length must be >= 1"),
    ({"max_length": 4}, "max_length must have room for a prompt"),
    ({"max_prompt_length": 0}, "max_prompt_length must be >= 1"),
    ({"reward_weights": [1.0], "reward_funcs": ["a:b", "c:d"]}, "reward_weights must have one number per reward, 2"),
    ({"use_vllm": True}, "use_vllm must be False"),
    ({"padding_free": True}, "padding_free must be unset in stage ppo"),
    ({"prefix_sharing": True}, "prefix_sharing belongs to stage dpo"),
    ({"fsdp": True}, "fsdp must be unset in stage ppo"),
    ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size must be unset in stage ppo"),
    ({"reference_cache_dir": "cache"}, "reference_cache_dir must be unset in stage ppo"),
    ({"pad_to_multiple_of": 8}, "pad_to_multiple_of must be unset in stage ppo"),
    ({"dataset_num_proc": 2}, "dataset_num_proc must be unset in stage ppo"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be unset in stage ppo"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size must be unset in stage ppo"),
    ({"reward_weights": 2.0}, "reward_weights must be a list of finite numbers, got 2.0"),
    ({"reward_weights": [math.nan]}, "reward_weights must be a list of finite numbers, got [nan]"),
    ({"sft_weight": 0.1}, "sft_weight is not used in stage ppo"),
    ({"regularizers": {"pointwise": 1.0}, **LEARNED}, "regularizers is not used in stage ppo"),
    ({"stage": "dpo"}, "stage must be ppo"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be random or sequential"),
]


@pytest.mark.parametrize(("fields", "words"), ARGUMENTS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_arguments_are_named(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ppo_args(tmp_path, **fields)


INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"reward_funcs": None}, "reward_funcs or reward_model must name at least one reward, got none"),
    ({"reward_funcs": [3]}, "reward_funcs must be functions, RewardModels or paths, got int"),
    ({"reward_funcs": odd, "reward_weights": [1.0, 2.0]}, "reward_weights must have one number per reward, 1"),
    ({"risk_aversion": 0.5}, "risk_aversion needs Gaussian rewards"),
    ({"data": Dataset.from_dict({"text": ["a"]})}, "train_dataset must have a column prompt"),
    (
        {"data": prompts(beta_scale=[1.0] * 7 + [-2.0])},
        "train_dataset row 7: 'beta_scale' must be a finite number >= 0",
    ),
    ({"data": [1, 2]}, "train_dataset must be a datasets.Dataset, got list"),
    ({"data": tokenize_dataset(tiny_pairs(4), tiny_tokenizer())}, "train_dataset must have a column prompt"),
    (
        {"data": prompts(prompt_ids=[[5]] * 8, index=list(range(8)), beta_scale=[-1.0] * 8)},
        "train_dataset row 0: 'beta_scale' must be a finite number >= 0",
    ),
    ({"reward_model": "a-model"}, "reward_funcs must be None where args names the rewards"),
]


@pytest.mark.parametrize(("given", "words"), INPUTS)
def test_bad_inputs_are_named(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        ppo(tmp_path, **given)
