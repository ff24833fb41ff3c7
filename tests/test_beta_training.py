"""Training with heads: optimizer groups, what is logged, schedules, the dataset's own columns, accumulation."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_architecture import (
    BOTH,
    DISCO,
    DYNAMIC,
    IDLE,
    collate,
    copied_heads,
    lora,
    ragged_pairs,
    same,
    scatter_heads,
    trainer_for,
)
from tiny import tiny_model, tiny_pairs
from torch import Tensor
from transformers import TrainerCallback

from fastpo.architecture import attach_head, heads_of
from fastpo.config import BetaHeadConfig
from fastpo.heads import BetaHead, DiscoHead

STILL: dict[str, Any] = {"learning_rate": 1e-12}  # so that what is logged does not move


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def set_log_s(trainer: Any, value: float) -> None:
    """The same s(x) for every prompt."""
    head = heads_of(trainer.model)["beta_head"]
    bound = None if head.config.s_max is None else math.log(head.config.s_max)
    with torch.no_grad():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.fill_(value if bound is None else bound * math.atanh(value / bound))


# --- the optimizer ----------------------------------------------------------------------------------------------------


class Rates(TrainerCallback):
    """Learning rates of all groups at each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("peft_config", [None, lora()])
@pytest.mark.parametrize("heads", [BOTH, DYNAMIC, DISCO, IDLE])
def test_every_trainable_parameter_is_in_one_group(tmp_path: Path, peft_config: Any, heads: dict[str, Any]) -> None:
    rates, config = Rates(), {"beta_head_config": {"lr_multiplier": 0.25, "kind": "mlp"}}
    trainer = trainer_for(
        tmp_path, peft_config=peft_config, callbacks=[rates], weight_decay=0.1, max_steps=3, warmup_steps=1,
        lr_scheduler_type="linear", **heads, **(config if "add_beta_head" in heads else {}),
    )  # fmt: skip
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert sorted(name for group in groups for name in group) == sorted(trainable)
    own = {name for name in trainable if "beta_head" in name}
    assert len(own) == (4 if heads in (BOTH, DYNAMIC) else 0) and len(groups) == 2 + bool(own)
    assert any("disco_head" in name for name in trainable) == (heads in (BOTH, DISCO))
    if own:
        assert groups[-1] == own and trainer.optimizer.param_groups[-1]["weight_decay"] == 0.0
        # The scheduler scales it as it does the policy's.
        assert all(seen[-1] == pytest.approx(0.25 * seen[0]) for seen in rates.seen)
    assert len({seen[0] for seen in rates.seen}) > 1


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_names_in_training_and_evaluation(tmp_path: Path) -> None:
    scores = {"score_chosen": [1.0] * 8, "score_rejected": [0.0] * 8}
    data = ragged_pairs(**scores)
    trainer = trainer_for(tmp_path, data=data, eval_dataset=data, **BOTH)
    trainer.train()
    found = trainer.evaluate()
    regularizers = ("pointwise", "range", "entropy", "confidence", "global", "smooth", "loss")
    names = {f"beta/{end}" for end in ("mean", "std", "min", "max")} | {f"regularizers/{name}" for name in regularizers}
    names |= {f"variance/{end}" for end in ("mean", "std", "min", "max")} | {"disco/prior", "disco/log_variance"}
    for prefix, row in (("", trainer.state.log_history[0]), ("eval_", found)):
        assert {prefix + name for name in names} <= set(row)
        shares = [value for name, value in row.items() if name.startswith(f"{prefix}beta/histogram/")]
        assert len(shares) == 7 and sum(shares) == pytest.approx(1)
    plain = trainer_for(tmp_path, eval_dataset=data, **IDLE)
    plain.train()
    assert not [name for name in plain.evaluate() if "regularizers" in name or "histogram" in name or "disco" in name]


@pytest.mark.parametrize(
    ("s", "bin_"),
    [(0.3, "0.25-0.37"), (0.8, "0.55-0.82"), (0.98, "0.82-1.22"), (1.02, "0.82-1.22"), (3.9, "2.69-4.00")],
)
def test_the_histogram_counts_s(tmp_path: Path, s: float, bin_: str) -> None:
    trainer = trainer_for(tmp_path, **DYNAMIC)
    set_log_s(trainer, math.log(s))
    metrics = trainer.loss_output(trainer.model, collate(ragged_pairs())).metrics
    assert {name for name, x in metrics.items() if "histogram" in name and x == 1} == {f"beta/histogram/{bin_}"}
    assert metrics["beta/mean"].item() == pytest.approx(0.1 * s, rel=1e-5)


def test_the_outer_bins_are_open(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, beta_head_config={"s_max": None}, **DYNAMIC)
    for log_s, name in ((-7.0, "0.25-0.37"), (7.0, "2.69-4.00")):
        set_log_s(trainer, log_s)
        assert trainer.loss_output(trainer.model, collate(ragged_pairs())).metrics[f"beta/histogram/{name}"] == 1


def test_evaluation_in_uneven_batches_is_that_of_one(tmp_path: Path) -> None:
    # `range` and `pointwise` are means of rows; extremes and shares must come out the same as well.
    fields = {**DYNAMIC, "regularizers": {"pointwise": 0.1, "range": 1.0}, "eval_dataset": ragged_pairs()}
    found = []
    for size in (8, 3):
        trainer = trainer_for(tmp_path, per_device_eval_batch_size=size, **fields)
        scatter_heads(trainer.model)
        found.append(trainer.evaluate())
    whole, parts = ({k: v for k, v in x.items() if "second" not in k and "runtime" not in k} for x in found)
    for name in ("eval_beta/std", "eval_loss"):  # of a batch; the Trainer's own mean of losses is by batches too
        assert parts.pop(name) > 0 and whole.pop(name) > 0
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["eval_beta/min"] < whole["eval_beta/mean"] < whole["eval_beta/max"]
    assert whole["eval_regularizers/range"] + whole["eval_regularizers/pointwise"] > 0


def test_one_log_of_several_steps_keeps_their_extremes(tmp_path: Path) -> None:
    fine, coarse = (
        trainer_for(tmp_path, max_steps=4, logging_steps=steps, learning_rate=0.1, **DYNAMIC) for steps in (1, 4)
    )
    for trainer in (fine, coarse):
        scatter_heads(trainer.model)
        trainer.train()
    (row,) = [row for row in coarse.state.log_history if "beta/min" in row]
    assert row["beta/min"] == min(logged(fine, "beta/min")) < max(logged(fine, "beta/min"))
    assert row["beta/max"] == max(logged(fine, "beta/max"))
    assert row["beta/mean"] == pytest.approx(sum(logged(fine, "beta/mean")) / 4)


@pytest.mark.parametrize(
    ("s_max", "log_s", "word"),
    [
        (4.0, 1.3, "blows up"), (4.0, -1.3, "collapses"), (4.0, 1.2, None), (4.0, -0.5, None), (4.0, 0.0, None),
        (2.0, 0.65, "blows up"), (None, 2.2, "blows up"), (None, -2.2, "collapses"), (None, 2.0, None),
    ],
)  # fmt: skip
def test_a_runaway_beta_is_said_once_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, s_max: float | None, log_s: float, word: str | None
) -> None:
    trainer = trainer_for(
        tmp_path, max_steps=3, beta_head_config={"s_max": s_max}, regularizers={"pointwise": 0.25}, **STILL, **DYNAMIC
    )
    set_log_s(trainer, log_s)
    with caplog.at_level(logging.WARNING, "fastpo"):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if "log s(x)" in record.getMessage()]
    assert len(logged(trainer, "log_s/mean")) == 3 and len(found) == (word is not None)
    if word is not None:
        assert f"beta {word} at step 1: 100%" in found[0] and f"mean log s(x) is {log_s:.2f}" in found[0]
        for remedy in ("'pointwise'", "'global'", "0.25", "lr_multiplier"):
            assert remedy in found[0]


def test_s_at_both_its_bounds_is_a_runaway_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its mean alone would look sane."""
    trainer = trainer_for(tmp_path, max_steps=1, **STILL, **DYNAMIC)
    head = heads_of(trainer.model)["beta_head"]
    hidden = torch.tensor(trainer.precompute_reference(ragged_pairs())["prompt_hidden"])
    centred = torch.nn.functional.layer_norm(hidden, hidden.shape[1:])
    with torch.no_grad():
        head.layers[-1].weight.copy_(1e3 * (centred[:4].mean(0) - centred[4:].mean(0)))
    with caplog.at_level(logging.WARNING, "fastpo"):
        trainer.train()
    share = logged(trainer, "log_s/runaway")[0]
    assert share > 0.5 and [
        x for x in caplog.records if "100% of s(x)" in x.getMessage() or "s(x) are" in x.getMessage()
    ]


# --- beta over training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected", "end"),
    [
        ({"points": [[0, 0.1], [1, 0.5]]}, [0.1, 0.2, 0.3, 0.4], 0.5),
        ({"points": [[0, 0.1], [0.5, 0.3]], "interpolation": "step"}, [0.1, 0.1, 0.3, 0.3], 0.3),
        ({"points": [[0.25, 0.2], [0.75, 0.4]], "interpolation": "cosine"}, [0.2, 0.2, 0.3, 0.4], 0.4),
    ],
)
def test_the_schedule_sets_beta_by_the_step(
    tmp_path: Path, schedule: dict[str, Any], expected: list[float], end: float
) -> None:
    fields = {"max_steps": 4, "beta_schedule": schedule, "per_device_train_batch_size": 8, **STILL}
    plain = trainer_for(tmp_path, eval_dataset=ragged_pairs(), **fields)
    # Two micro-batches a step: the schedule goes by steps. Every batch has all prompts, so the mean of s is one number.
    learned = trainer_for(
        tmp_path, data=Dataset.from_list([*ragged_pairs(), *ragged_pairs()]), eval_dataset=ragged_pairs(),
        **DYNAMIC, **fields, gradient_accumulation_steps=2,
    )  # fmt: skip
    set_log_s(learned, math.log(2.5))
    for trainer, s in ((plain, 1.0), (learned, 2.5)):
        trainer.train()
        assert logged(trainer, "beta/mean") == pytest.approx([s * beta for beta in expected], rel=1e-5)
        assert trainer.evaluate()["eval_beta/mean"] == pytest.approx(s * end, rel=1e-5)


def test_a_resumed_run_goes_on_in_the_schedule(tmp_path: Path) -> None:
    fields = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **STILL, "eval_strategy": "steps", "eval_steps": 1,
        "beta_schedule": {"points": [[0, 0.1], [1, 0.5]]}, "eval_dataset": ragged_pairs(),
    }  # fmt: skip
    trainer_for(tmp_path, **fields).train()
    resumed = trainer_for(tmp_path, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "beta/mean") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert logged(resumed, "eval_beta/mean") == pytest.approx([0.2, 0.3, 0.4, 0.5])  # after the step that was made


def test_the_batch_gap_moves_beta(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, max_steps=5, batch_beta_coef=0.6, beta=0.2, learning_rate=3e-2, eval_dataset=ragged_pairs()
    )
    trainer.train()
    betas, margins = logged(trainer, "beta/mean"), logged(trainer, "rewards/margins")
    mean = None
    for beta, margin in zip(betas, margins, strict=True):
        gap = margin / beta * 0.2
        mean = gap if mean is None else 0.9 * mean + 0.1 * gap
        assert beta == pytest.approx(0.2 * (1 + 0.6 * (gap - mean)), rel=1e-4)
    assert betas[0] == pytest.approx(0.2) and max(betas) - min(betas) > 1e-3
    assert trainer.running_means["gap"].item() == pytest.approx(mean, rel=1e-4)
    before = dict(trainer.running_means)
    assert trainer.evaluate()["eval_beta/mean"] != pytest.approx(0.2, rel=1e-4)  # it reads the running mean
    assert same(trainer.running_means, before)  # and leaves it


def test_evaluation_is_not_remembered(tmp_path: Path) -> None:
    fields = {**DYNAMIC, "batch_beta_coef": 0.5, "max_steps": 3, "learning_rate": 3e-2, "per_device_eval_batch_size": 2}
    scores = {"score_chosen": [0.3 * i for i in range(8)], "score_rejected": [0.0] * 8}
    data = ragged_pairs(**scores)
    silent = trainer_for(tmp_path, data=data, **fields)
    watched = trainer_for(
        tmp_path, data=data, eval_dataset=ragged_pairs(5, seed=4), eval_strategy="steps", eval_steps=1, **fields
    )
    for trainer in (silent, watched):
        trainer.train()
    assert set(silent.running_means) == {"gap", "entropy", "confidence", "global/mean", "global/square"}
    assert same(silent.running_means, watched.running_means)
    assert logged(silent, "loss") == logged(watched, "loss")


# --- the dataset's own columns ----------------------------------------------------------------------------------------


def test_pair_weights_and_context_scales_reach_the_loss(tmp_path: Path) -> None:
    weights, scales = [0.0, 0.5, 2.0, 1.0, 3.0, 1.0, 0.25, 1.0], [0.1 * i for i in range(1, 9)]
    model, reference = tiny_model(), tiny_model(seed=7)
    found = {}
    for name, columns in {
        "plain": {}, "weighed": {"pair_weight": weights}, "scaled": {"context_scale": scales},
    }.items():  # fmt: skip
        data = ragged_pairs(**columns)
        trainer = trainer_for(tmp_path, model, data, ref_model=reference, beta=1.0)
        found[name] = trainer.loss_output(model, next(iter(trainer.get_eval_dataloader(data))))
    plain, weighed, scaled = found.values()
    torch.testing.assert_close(weighed.losses, torch.tensor(weights) * plain.losses)
    torch.testing.assert_close(weighed.loss, (torch.tensor(weights) * plain.losses).sum() / 8)
    z = plain.margins * torch.tensor(scales)
    torch.testing.assert_close(scaled.losses, -torch.nn.functional.logsigmoid(z))
    assert scaled.metrics["phi/mean"].item() == pytest.approx(sum(scales) / 8)


def test_columns_of_raw_rows_reach_the_loss(tmp_path: Path) -> None:
    columns = {
        "pair_weight": [0.5, 2.0, 1.0, 0.0], "unheard_of": ["a", "b", "c", "d"],
        "score_chosen": [3.0, 1.0, 0.5, 0.0], "score_rejected": [0.0, 1.0, 1.0, 4.0],
    }  # fmt: skip
    data = tiny_pairs(4)
    for name, values in columns.items():
        data = data.add_column(name, values)
    trainer = trainer_for(tmp_path, data=data, **DYNAMIC)
    assert set(columns) & set(trainer.train_dataset.column_names) == set(columns) - {"unheard_of"}
    output = trainer.loss_output(trainer.model, collate(trainer.train_dataset))
    torch.testing.assert_close(output.losses, math.log(2) * torch.tensor(columns["pair_weight"]))
    c = [
        2 * abs(1 / (1 + math.exp(r - w)) - 0.5)
        for w, r in zip(columns["score_chosen"], columns["score_rejected"], strict=True)
    ]
    targets = [-math.log(2) * (x - sum(c) / 4) for x in c]  # s = 1: log s = 0
    expected = sum(t * t for t in targets) / 4
    assert output.metrics["regularizers/confidence"].item() == pytest.approx(expected, rel=1e-5)
    # Nobody reads scores where beta is not learned.
    assert "score_chosen" not in trainer_for(tmp_path, data=data).train_dataset.column_names


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("pair_weight", [1.0, 1.0, float("nan"), 1.0], "nan"),
        ("context_scale", [1.0, 1.0, float("inf"), 1.0], "inf"),
        ("score_chosen", [1.0, 1.0, None, 1.0], "None"),
        ("score_rejected", ["1", "1", "2", "1"], "'2'"),
        ("pair_weight", [True, True, False, True], "False"),
        ("prompt_entropy", [0.5, 0.5, float("nan"), 0.5], "nan"),
        ("prompt_hidden", [[0.0] * 32, [0.0] * 32, [0.0] * 31 + [float("nan")], [0.0] * 32], "[0.0, "),
        ("prompt_hidden", [[0.0] * 32, [0.0] * 32, [], [0.0] * 32], "[]"),
    ],
)
def test_bad_values_are_named_by_row(tmp_path: Path, name: str, values: list[Any], shown: str) -> None:
    data = tiny_pairs(4).add_column(name, values)
    if name == "score_chosen":
        data = data.add_column("score_rejected", [0.0] * 4)
    if name == "score_rejected":
        data = data.add_column("score_chosen", [0.0] * 4)
    with pytest.raises(ValueError, match=f"train_dataset row 2: '{name}' must be") as error:
        trainer_for(tmp_path, data=data, **DYNAMIC)
    assert f"got {shown}" in str(error.value)
    assert "train_dataset row 0" not in str(error.value) or {type(x) for x in values} <= {str, bool}


def test_bad_values_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_pairs(4).add_column("pair_weight", [1.0, float("nan"), 3.0, 4.0])
    trainer = trainer_for(tmp_path, data=data, skip_bad_rows=True)
    assert trainer.train_dataset["index"][:] == [0, 2, 3]
    assert trainer.train_dataset["pair_weight"][:] == [1.0, 3.0, 4.0] and "row 1: 'pair_weight'" in caplog.text


@pytest.mark.parametrize("name", ["context_scale", "pair_weight"])
def test_a_column_that_the_loss_does_not_read_is_refused_before_training(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of train_dataset is not used by pref_loss_type 'aot'"):
        trainer_for(tmp_path, data=ragged_pairs(**{name: [1.0] * 8}), pref_loss_type="aot")


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_alone_are_no_pairs(tmp_path: Path, rows: int) -> None:
    """What the objective wants of pairs is not asked of a reference that sees the prompts only."""
    objective = {**DYNAMIC, "ld_alpha": 0.5, "reference_free": True}
    trainer = trainer_for(tmp_path, data=ragged_pairs(rows), per_device_train_batch_size=rows, **objective)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_the_head_s_parameters_must_be_in_an_optimizer_of_the_caller_s(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers must hold the beta_head's parameters"):
        trainer_for(tmp_path, model, optimizers=(optimizer, None), **DYNAMIC)
    attach_head(model, BetaHead(32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer_for(tmp_path, model, optimizers=(optimizer, None), **DYNAMIC)


@pytest.mark.parametrize("lacking", ["score_chosen", "score_rejected"])
def test_confidence_needs_scores_only_where_it_is_asked_for(tmp_path: Path, lacking: str) -> None:
    (there,) = {"score_chosen", "score_rejected"} - {lacking}
    data = ragged_pairs(**{there: [1.0] * 8})
    asked = {"regularizers": {"confidence": 0.1}, **DYNAMIC}
    with pytest.raises(ValueError, match=f"'confidence', which needs a {lacking} column in train_dataset"):
        trainer_for(tmp_path, data=data, **asked)
    with pytest.raises(ValueError, match=f"'confidence', which needs a {lacking} column in held_out"):
        trainer_for(tmp_path, data=data.add_column(lacking, [0.0] * 8), eval_dataset={"held_out": data}, **asked)
    by_default = trainer_for(tmp_path, data=data, **DYNAMIC)
    by_default.train()
    assert not logged(by_default, "regularizers/confidence") and logged(by_default, "regularizers/global")
    without = trainer_for(tmp_path, data=data, regularizers={"confidence": 0}, **DYNAMIC)  # a weight of 0 asks nothing
    without.train()
    assert not logged(without, "regularizers/confidence")


# --- accumulation -----------------------------------------------------------------------------------------------------


def model_with_heads() -> Any:
    model = tiny_model()
    attach_head(model, BetaHead(32, BetaHeadConfig(lr_multiplier=1.0)))
    attach_head(model, DiscoHead(32))
    scatter_heads(model, scale=0.2)
    return model


def moved_by(path: Path, **fields: Any) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What one SGD step of rate 1 moves the parameters by, and the rows of its micro-batches."""
    model, batches = model_with_heads(), []
    trainer = trainer_for(
        path, model, optim="sgd", max_grad_norm=0.0, max_steps=1, learning_rate=1.0, ref_model=tiny_model(seed=7),
        beta=1.0, **fields,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    collator = trainer.data_collator

    def spying(rows: list[dict[str, Any]]) -> Any:
        batches.append([row["index"] for row in rows])
        return collator(rows)

    trainer.data_collator = spying
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, batches


def assert_same_step(a: dict[str, Tensor], b: dict[str, Tensor], heads: tuple[str, ...]) -> None:
    for name, step in a.items():
        assert (step - b[name]).norm() <= 2e-5 * max(step.norm().item(), 1e-3), name
    for head in heads:
        assert all(step.norm() > 1e-4 for name, step in a.items() if head in name and "linear.weight" not in name), head


PER_PAIR: dict[str, Any] = {"regularizers": {}, "pref_loss_type": {"sigmoid": 1.0, "sft": 0.5}}


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        (DYNAMIC | PER_PAIR, ("beta_head",)),
        (DYNAMIC | {"regularizers": {"pointwise": 0.5, "range": 1.0}, "pref_loss_type": "hinge"}, ("beta_head",)),
        (DISCO | {"disco_prior_weight": 0.0}, ("disco_head",)),
        (DISCO | {"disco_prior_weight": 1.0}, ("disco_head",)),  # a mean over rows, as the loss is
        (DISCO | {"pref_loss_type": {"disco": 1.0, "sigmoid": 0.3, "sft": 0.5}}, ("disco_head",)),
    ],
)  # fmt: skip
def test_accumulation_is_exact_for_what_is_per_pair_or_per_token(
    tmp_path: Path, fields: dict[str, Any], heads: tuple[str, ...]
) -> None:
    whole, _ = moved_by(tmp_path, per_device_train_batch_size=8, **fields)
    for size, steps in ((4, 2), (3, 3)):
        parts, batches = moved_by(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **fields
        )
        assert len(batches) == steps
        assert_same_step(whole, parts, heads)


def test_accumulation_averages_what_is_per_batch(tmp_path: Path) -> None:
    # Default regularisers with their running means, the prior, and the gauge of both heads, on batches of 3, 3 and 2.
    found, batches = moved_by(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3, **BOTH)
    model = model_with_heads()
    trainer = trainer_for(tmp_path, model, ref_model=tiny_model(seed=7), beta=1.0, **BOTH)
    assert [len(rows) for rows in batches] == [3, 3, 2]
    for rows in batches:
        loss = trainer.loss_output(model.train(), collate(ragged_pairs(), rows)).loss
        (loss * len(rows) / 8).backward()
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert_same_step(expected, found, ("beta_head", "disco_head"))


def test_the_token_mean_of_a_sum_is_over_the_steps_tokens(tmp_path: Path) -> None:
    fields = {"pref_loss_type": {"sigmoid": 1.0, "sft": 0.5}, "logging_steps": 1}
    losses = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = trainer_for(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **fields
        )
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batch = collate(ragged_pairs())
    untrained = trainer_for(tmp_path, **fields)
    output = untrained.loss_output(untrained.model, batch)
    tokens = batch["completion_mask"][:8].sum()
    expected = math.log(2) - 0.5 * output.metrics["logps/chosen"] * 8 / tokens
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_can_be_told_what_happened_from_its_state(tmp_path: Path) -> None:
    # Everything that the log holds is a number, so that trainer_state.json and metrics.jsonl can be read back.
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=1, **BOTH)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(isinstance(x, int | float) and math.isfinite(x) for row in state["log_history"] for x in row.values())
    assert not same(copied_heads(trainer.model), copied_heads(trainer_for(tmp_path, **BOTH).model))
