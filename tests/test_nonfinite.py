"""NaN and infinity: a step stops the run, or is skipped as if its rows had not been there."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from transformers import TrainerCallback

from fastpo.reporting import MetricsFile, read_metrics
from fastpo.tokenization import tokenize_dataset
from fastpo.trainer import PreferenceTrainer

SKIP: dict[str, Any] = {"skip_nonfinite_steps": True, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
SKIP |= {"max_steps": -1, "lr_scheduler_type": "linear", "weight_decay": 0.1, "per_device_train_batch_size": 2}
# All of what a step changes: weights, the optimizer's state, the head's, and the objective's running means.
LEDPO: dict[str, Any] = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}


def pairs(bad: dict[int, float], rows: list[int] | None = None) -> Dataset:
    """Twelve pairs or some of them; `bad`: what the losses of rows are multiplied by."""
    all_rows = tokenize_dataset(tiny_pairs(12), tiny_tokenizer(), stage="dpo", max_length=64, source="pairs").to_list()
    for row in all_rows:
        row["context_scale"] = bad.get(row["index"], 1.0)
    return Dataset.from_list([all_rows[i] for i in (range(12) if rows is None else rows)])


def trainer_for(output_dir: Path, dataset: Dataset, *callbacks: Any, **fields: Any) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_model(), args=tiny_args(output_dir, **fields), train_dataset=dataset, processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )  # fmt: skip


def left_by(trainer: PreferenceTrainer) -> list[torch.Tensor]:
    """All numbers that steps change."""
    state = trainer.optimizer.state_dict()["state"]
    moments = [state[key][name] for key in sorted(state) for name in sorted(state[key])]
    return [*trainer.model.state_dict().values(), *moments, *trainer.running_means.values()]


class Poison(TrainerCallback):
    """Makes the gradient of one parameter infinite at a step, with finite losses."""

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.now = step, 0
        model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * self.factor())

    def factor(self) -> float:
        return float("inf") if self.now == self.step else 1.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step


def test_a_bad_loss_stops_before_the_step_and_names_its_rows(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, pairs({5: float("nan")}), **(SKIP | {"skip_nonfinite_steps": False}))
    seen: list[torch.Tensor] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen[:] = [p.detach().clone() for p in trainer.model.parameters()]

    trainer.add_callback(Look())
    with pytest.raises(FloatingPointError, match=r"not finite at step 2: dataset rows \[5\], losses \[nan\]"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(seen, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("value", "fault"), [("nan", "loss is not finite"), ("inf", "gradient is not finite")])
def test_a_skipped_step_is_as_if_its_rows_had_not_been_there(
    tmp_path: Path, accumulation: int, value: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields = SKIP | LEDPO | {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant"}
    size = 2 * accumulation
    skipping = trainer_for(tmp_path / "skipping", pairs({size + 1: float(value)}), **fields)
    with caplog.at_level(logging.WARNING):
        skipping.train()
    rest = [row for row in range(12) if row // size != 1]
    without = trainer_for(tmp_path / "without", pairs({}, rest), **fields)
    without.train()
    assert skipping.state.global_step == without.state.global_step + 1
    for found, expected in zip(left_by(skipping), left_by(without), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    [warning] = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert f"{fault} at step 1:" in warning and str(size + 1) in warning and "step skipped" in warning


def test_the_schedule_waits_for_a_skipped_step_and_logs_count_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, pairs({2: float("nan"), 7: float("nan")}), MetricsFile(str(tmp_path)), **SKIP)
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2]
    # As fp16's skipped steps: global_step goes on, the schedule does not.
    assert trainer.state.global_step == 6 and trainer.lr_scheduler.last_epoch == 4
    assert [row["step"] for row in rows] == [1, 3, 5, 6] and all("rewards/margins" in row for row in rows)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_logged_means_leave_skipped_steps_out(tmp_path: Path) -> None:
    bad = pairs({5: float("nan")})
    skipping = trainer_for(tmp_path / "skipping", bad, **(SKIP | {"logging_steps": 6, "learning_rate": 0.0}))
    skipping.train()
    rest = pairs({}, [row for row in range(12) if row not in (4, 5)])
    without = trainer_for(tmp_path / "without", rest, **(SKIP | {"logging_steps": 5, "learning_rate": 0.0}))
    without.train()
    found, expected = skipping.state.log_history[0], without.state.log_history[0]
    for name in ("loss", "logps/chosen", "rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_the_count_of_skipped_steps_survives(tmp_path: Path) -> None:
    fields = SKIP | {"save_strategy": "steps", "save_steps": 4}
    whole = trainer_for(tmp_path, pairs({2: float("nan")}), **fields).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["skipped_steps"] == 1
    resumed = trainer_for(tmp_path, pairs({2: float("nan")}), **fields)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert output.training_loss == pytest.approx(whole.training_loss, rel=1e-6)
    assert [row["skipped_steps"] for row in resumed.state.log_history if "loss" in row] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_a_bad_step_too(tmp_path: Path, max_grad_norm: float) -> None:
    fields = SKIP | {"max_grad_norm": max_grad_norm, "lr_scheduler_type": "constant"}
    stopping = trainer_for(tmp_path / "stopping", pairs({}), **(fields | {"skip_nonfinite_steps": False}))
    stopping.add_callback(Poison(stopping.model, step=3))
    with pytest.raises(FloatingPointError, match=r"gradient .* at step 3: .* finite losses of dataset rows \[6, 7\]"):
        stopping.train()
    skipping = trainer_for(tmp_path / "skipping", pairs({}), **fields)
    skipping.add_callback(Poison(skipping.model, step=3))
    skipping.train()
    without = trainer_for(tmp_path / "without", pairs({}, [row for row in range(12) if row not in (6, 7)]), **fields)
    without.train()
    for found, expected in zip(left_by(skipping), left_by(without), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_bad_loss_with_a_finite_gradient_is_a_bad_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path, pairs({}), **(SKIP | {"skip_nonfinite_steps": False}))
    compute = trainer.loss_output

    def with_a_constant(model: Any, inputs: Any, totals: Any = None) -> Any:
        output = compute(model, inputs, totals)
        added = torch.where(inputs["index"] == 8, torch.inf, 0.0)
        return output._replace(losses=output.losses + added, loss=output.loss + added.sum())

    monkeypatch.setattr(trainer, "loss_output", with_a_constant)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 4: dataset rows \[8\], losses \[inf\]"):
        trainer.train()


def test_a_bad_loss_of_the_evaluation_stops_unless_such_are_passed_over(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, pairs({}))
    with pytest.raises(FloatingPointError, match=r"dataset rows \[3\], losses \[nan\]"):
        trainer.evaluate(pairs({3: float("nan")}))
    trainer = trainer_for(tmp_path, pairs({}), skip_nonfinite_steps=True)
    assert math.isnan(trainer.evaluate(pairs({3: float("nan")}))["eval_loss"])
