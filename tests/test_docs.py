"""The pages' code runs as printed, one block after the other, and their tables are whole."""

import dataclasses
import re
from pathlib import Path

import pytest
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from transformers import TrainingArguments

from fastpo import PPOTrainer, PPOTrainingArguments, PreferenceTrainer, PreferenceTrainingArguments, RewardTrainer
from fastpo.arguments import OBJECTIVE_NAMES
from fastpo.ppo_arguments import OBJECTIVE_READ, PPOFields

DOCS = Path(__file__).parents[1] / "docs"
TRAINER = (DOCS / "trainer.md").read_text()
PPO = (DOCS / "ppo.md").read_text()


@pytest.mark.parametrize("page", ["own-loop", "ppo", "reward-models", "trainer"])
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    scope: dict = {}
    for block in blocks:
        exec(block, scope)


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_argument_of_ours_is_listed() -> None:
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)} | set(OBJECTIVE_NAMES)
    ours = {field.name for field in dataclasses.fields(PreferenceTrainingArguments)} - theirs
    assert ours <= set(re.findall(r"`(\w+)`", TRAINER))


def test_every_logged_key_is_listed(tmp_path: Path) -> None:
    listed = set(re.findall(r"`([\w/]+)`", TRAINER))
    heads = {"add_beta_head": True, "beta_mode": "dynamic_scaling", "add_disco_head": True, "pref_loss_type": "disco"}
    pairs = tiny_pairs(4).add_column("pair_weight", [1.0] * 4)
    for fields in ({**heads, "skip_nonfinite_steps": True}, {"contextual_scaling": "mallows"}, {"stage": "sft"}):
        trainer = PreferenceTrainer(
            tiny_model(), args=tiny_args(tmp_path, max_steps=1, **fields), train_dataset=pairs,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.train()
        logged = {name for name in trainer.state.log_history[0] if not re.search("histogram|regularizers", name)}
        assert logged - {"step"} <= listed


def test_every_argument_of_ppo_is_listed() -> None:
    ours = {field.name for field in dataclasses.fields(PPOFields)} | set(OBJECTIVE_READ)
    assert ours <= set(re.findall(r"`(\w+)`", PPO))


def test_every_logged_key_of_ppo_is_listed(tmp_path: Path) -> None:
    listed = set(re.findall(r"`([\w/]+)`", PPO))
    heads = {"add_beta_head": True, "beta_mode": "dynamic_scaling", "kl_target": 1.0, "advantage": "gae"}
    args = PPOTrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, max_completion_length=4, save_strategy="no", **heads
    )
    trainer = PPOTrainer(
        tiny_model(), args=args, reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    logged = {name for name in trainer.state.log_history[0] if not re.search("histogram|rewards/", name)}
    assert logged - {"step"} <= listed


@pytest.mark.parametrize("heads", [{}, {"add_disco_head": True, "pref_loss_type": "disco"}], ids=["scalar", "disco"])
def test_every_logged_key_of_a_reward_model_is_listed(tmp_path: Path, heads: dict) -> None:
    listed = set(re.findall(r"`([\w/]+)`", TRAINER))
    tiny_model().save_pretrained(tmp_path / "causal")
    trainer = RewardTrainer(
        str(tmp_path / "causal"), tiny_args(tmp_path, stage="rm", max_steps=1, **heads), train_dataset=tiny_pairs(4),
        eval_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    evaluated = set(trainer.evaluate()) - speed - {"eval_ece"}
    assert {"eval_ece"} <= listed and {name.removeprefix("eval_") for name in evaluated} <= listed
    assert set(trainer.state.log_history[0]) - {"step"} <= listed
