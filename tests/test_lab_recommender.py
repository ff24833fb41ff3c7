"""The planted recommender: statistics, KL and measures against float64 by hand, and every objective on slates."""

import json
import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fastpo import PreferenceConfig
from fastpo.lab.planted_items import FEATURES, PlantedItems
from fastpo.lab.recommender import (
    WIDTH,
    HeldOut,
    ItemModel,
    ItemTraining,
    Learner,
    Pairs,
    Slates,
    base_model,
    check_objective,
    slate_kl,
    train_items,
)
from fastpo.schedules import scheduled_beta

ITEMS = 24
DATA = PlantedItems(seed=900, train_pairs=96, held_out_pairs=64, logged_slates=256, items=ITEMS)
SHORT = ItemTraining(learning_rate=1e-2, epochs=8, batch_size=32, evaluations=2)
STAGED = {"points": [[0, 0.1], [1, 0.3]], "interpolation": "linear"}
PRESETS = (
    "dpo", "ln_dpo", "ipo", "slic", "simpo", "mallows_dpo", "rainbowpo", "ledpo", "disco_dpo", "beta_dpo",
    "ledpo_rainbowpo", "orpo", "cpo", "aot", "f_dpo",
)  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {name: {"preset": name} for name in PRESETS} | {
    "beta_schedule": {"preset": "dpo", "beta_schedule": STAGED},
    "ledpo_entropy": {"preset": "ledpo", "beta_head_config": {"kind": "mlp", "features": ["hidden", "entropy"]}},
    "ledisco": {"preset": "disco_dpo", "add_beta_head": True, "beta_mode": "dynamic_scaling"},
    "sft": {"preset": "dpo", "pref_loss_type": "sft"},
}
LEARNED = ("ledpo", "ledpo_rainbowpo", "ledpo_entropy", "ledisco")


def objective(name: str) -> PreferenceConfig:
    fields = dict(OBJECTIVES[name])
    return PreferenceConfig.preset(fields.pop("preset"), **fields)


@cache
def trained(name: str) -> dict[str, Any]:
    return train_items(DATA, objective(name), SHORT, seed=900)


def drawn(model: torch.nn.Module, seed: int, scale: float = 0.3) -> Any:
    """The model with random weights."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return model


def ragged(seed: int, rows: int = 7) -> Slates:
    rng, users = random.Random(seed), torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))
    return Slates.of(list(users), [[rng.randrange(ITEMS) for _ in range(rng.randint(1, 6))] for _ in range(rows)])


# --- by hand, in float64 ----------------------------------------------------------------------------------------------


def naive_states(model: ItemModel, user: Tensor, slate: list[int]) -> Tensor:
    """(length + 1, D), one position after the other."""
    first, _, second = model.user
    inner = first.weight.double() @ user.double() + first.bias.double()
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    own = second.weight.double() @ inner + second.bias.double()
    return torch.stack([own + model.previous.weight[item].double() for item in (ITEMS, *slate)])


def naive_logps(model: ItemModel, user: Tensor, slate: list[int]) -> Tensor:
    """(length, V) log-probabilities before each item."""
    logits = naive_states(model, user, slate)[:-1] @ model.items.weight.double().T + model.items.bias.double()
    return logits.log_softmax(dim=1)


def rows_of(slates: Slates) -> list[tuple[Tensor, list[int]]]:
    items = [[item for item in row if item >= 0] for row in slates.items.tolist()]
    return list(zip(slates.users, items, strict=True))


@torch.no_grad()
def naive_stats(model: ItemModel, slates: Slates) -> tuple[Tensor, Tensor, Tensor]:
    """logps, lengths, entropy."""
    found = []
    for user, slate in rows_of(slates):
        logps = naive_logps(model, user, slate)
        entropy = -(logps.exp() * logps).sum(dim=1).mean()
        found.append((logps[range(len(slate)), slate].sum(), torch.tensor(len(slate)), entropy))
    return tuple(torch.stack(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


@torch.no_grad()
def naive_kl(policy: ItemModel, reference: ItemModel, slates: Slates) -> Tensor:
    found = []
    for user, slate in rows_of(slates):
        own, other = naive_logps(policy, user, slate), naive_logps(reference, user, slate)
        found.append((own.exp() * (own - other)).sum())
    return torch.stack(found)


# --- the model --------------------------------------------------------------------------------------------------------


def test_states_and_statistics_are_those_of_full_logits() -> None:
    model, slates = drawn(ItemModel(ITEMS), 900), ragged(900)
    states = model(slates)
    assert states.shape == (7, 7, WIDTH)
    for row, (user, slate) in zip(states, rows_of(slates), strict=True):
        truth = naive_states(model, user, slate)
        torch.testing.assert_close(row[: len(truth)].double(), truth, rtol=0, atol=1e-5)
    for value, truth in zip(model.stats(states, slates), naive_stats(model, slates), strict=True):
        torch.testing.assert_close(value.to(truth), truth, rtol=1e-6, atol=2e-5)


def test_padding_has_no_gradient_and_labels_all() -> None:
    model, slates = drawn(ItemModel(ITEMS), 900), ragged(901)
    model.stats(model(slates), slates).logps.sum().backward()
    read = {item for _, slate in rows_of(slates) for item in (ITEMS, *slate[:-1])}
    moved = model.previous.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert set(moved) == read


@torch.no_grad()
def test_kl_is_exact_for_two_heads_with_biases() -> None:
    policy, reference, slates = drawn(ItemModel(ITEMS), 900), drawn(ItemModel(ITEMS), 901), ragged(902)
    truth = naive_kl(policy, reference, slates)
    assert truth.min() > 0.1
    torch.testing.assert_close(slate_kl(policy, reference, slates).double(), truth, rtol=1e-5, atol=1e-5)
    assert slate_kl(policy, policy, slates).abs().max() < 1e-5


@torch.no_grad()
def test_samples_follow_the_model() -> None:
    model, count = drawn(ItemModel(ITEMS), 900), 20000
    user = torch.randn(FEATURES, generator=torch.Generator().manual_seed(900))
    users, lengths = user.expand(count, -1), torch.tensor([2]).expand(count)
    slates = model.sample(users, lengths, torch.Generator().manual_seed(900))
    first = naive_logps(model, user, [0])[0].exp()
    counts = slates.items[:, 0].bincount(minlength=ITEMS) / count
    assert ((counts - first).abs() <= 4 * (first * (1 - first) / count).sqrt() + 1e-3).all()
    favourite = int(first.argmax())
    after = slates.items[slates.items[:, 0] == favourite, 1]
    second = naive_logps(model, user, [favourite, 0])[1].exp()
    counts = after.bincount(minlength=ITEMS) / len(after)
    assert ((counts - second).abs() <= 4 * (second * (1 - second) / len(after)).sqrt() + 1e-3).all()


def test_samples_have_the_lengths_that_were_asked() -> None:
    lengths = torch.tensor([3, 1, 5])
    slates = ItemModel(ITEMS).sample(torch.zeros(3, FEATURES), lengths, torch.Generator())
    assert slates.items.shape == (3, 5) and torch.equal(slates.lengths, lengths)
    assert all(len(slate) == length for (_, slate), length in zip(rows_of(slates), [3, 1, 5], strict=True))


def test_the_base_model_learns_what_users_look_at_and_is_the_same_for_a_seed() -> None:
    first, again, other = (base_model(DATA, seed) for seed in (900, 900, 901))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.items.weight, other.items.weight)
    slates = Slates.of([row.user for row in DATA.held_out_rows()], [row.chosen for row in DATA.held_out_rows()])
    with torch.no_grad():
        stats = first.stats(first(slates), slates)
    assert -(stats.logps.sum() / stats.lengths.sum()).item() < math.log(ITEMS) - 0.05


# --- what is measured -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["dpo", "ln_dpo", "simpo", "disco_dpo", "ledpo_entropy", "ledisco"])
def test_measures_of_a_policy_by_hand(name: str) -> None:
    """Of random weights, so that nothing is 0."""
    config, rows, beta = objective(name), DATA.held_out_rows(), 0.7
    reference = drawn(ItemModel(ITEMS), 900)
    learner = drawn(Learner(reference, config), 901)
    held_out = HeldOut(DATA, reference, seed=900)
    measures, kinds = held_out.measure(learner, beta)

    users = [row.user for row in rows]
    states = [naive_states(reference, user, [])[0] for user in users]
    if learner.beta_head is not None:
        known = {"hidden": torch.stack(states).float()}
        if "entropy" in config.beta_head.features:
            first = [naive_logps(reference, user, [0])[0] for user in users]
            known["entropy"] = torch.tensor([-(p.exp() * p).sum().item() / math.log(ITEMS) for p in first])
        s = learner.beta_head(**known).double()
    else:
        s = torch.ones(len(rows), dtype=torch.float64)
    scores, variances = [], []
    for side in ("chosen", "rejected"):
        slates = Slates.of(users, [getattr(row, side) for row in rows])
        logps, lengths, _ = naive_stats(learner.policy, slates)
        logps = logps if config.reference_free else logps - naive_stats(reference, slates)[0]
        scores.append(logps / lengths if config.length_normalization else logps)
        if learner.disco_head is not None:
            last = [naive_states(learner.policy, user, slate)[-1] for user, slate in rows_of(slates)]
            variances.append(learner.disco_head(torch.stack(last).float())[1].double())
    margins = beta * s * (scores[0] - scores[1])
    by_rater = torch.tensor([row.rater_agrees for row in rows])
    z = torch.where(by_rater, margins, -margins)
    log_p = torch.special.log_ndtr(z / sum(variances).sqrt()) if variances else torch.nn.functional.logsigmoid(z)
    p = log_p.exp()
    assert measures["accuracy"] == (margins > 0).double().mean().item()
    assert measures["margin"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-5)
    assert measures["nll"] == pytest.approx(-log_p.mean().item(), rel=1e-4)
    sure = torch.maximum(p, 1 - p)
    bins = [(sure * 20).floor().clamp(max=19) == k for k in range(10, 20)]
    gaps = [((p > 0.5).double() - sure)[own].sum().abs().item() for own in bins]
    assert measures["ece"] == pytest.approx(sum(gaps) / len(rows), abs=1e-4)
    for kind in DATA.kinds.values():
        own = torch.tensor([row.kind == kind.name for row in rows])
        found = kinds[kind.name]
        assert (found["reliability"], found["hard"]) == (kind.reliability, kind.hard)
        assert found["pairs"] == own.sum() and found["accuracy"] == (margins > 0)[own].double().mean().item()
        assert ("s" in found) == (name in LEARNED)
        if name in LEARNED:
            assert found["s"] == pytest.approx(s[own].tolist(), abs=1e-4)
    if name in LEARNED:
        assert measures["s/mean"] == pytest.approx(s.mean().item(), rel=1e-4)
        assert measures["s/min"] == pytest.approx(s.min().item(), rel=1e-4)
        for key in ("reliability", "hard"):
            of_kind = [float(getattr(DATA.kinds[row.kind], key)) for row in rows]
            assert measures[f"s/{key}"] == pytest.approx(spearmanr(s.numpy(), of_kind).statistic, abs=1e-3)


def test_samples_are_measured_by_true_reward_against_the_reference() -> None:
    reference = base_model(DATA, 900).requires_grad_(False)
    held_out = HeldOut(DATA, reference, seed=900)
    learner = Learner(reference, objective("dpo"))
    rows = DATA.held_out_rows()
    loved = int(DATA.world.quality.argmax())
    learner.policy.items.bias.data[loved] += 50.0  # it shows nothing else
    measures, _ = held_out.measure(learner, 0.1)
    rewards = [DATA.true_reward(DATA.taste_of(row.user, row.kind), [loved] * len(row.chosen)) for row in rows]
    assert measures["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
    assert measures["win_rate"] == sum(
        (own > other) + (own == other) / 2 for own, other in zip(rewards, held_out.reference_rewards, strict=True)
    ) / len(rows)
    assert measures["win_rate"] > 0.9
    slates = Slates.of([row.user for row in rows], [[loved] * len(row.chosen) for row in rows])
    assert measures["kl"] == pytest.approx(naive_kl(learner.policy, reference, slates).mean().item(), rel=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_from_slates(name: str) -> None:
    result = trained(name)
    first, last = result["training"][0], result["training"][-1]
    start, end = result["course"][0], result["course"][-1]
    assert all(math.isfinite(x) for log in result["training"] for x in log.values())
    assert last["loss"] < first["loss"] or end["accuracy"] > start["accuracy"]
    assert last["rewards/accuracies"] > first["rewards/accuracies"]
    assert end["kl"] > 0.01
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ["dpo", "ledpo"])
def test_the_result_has_this_form(name: str) -> None:
    result, learned = trained(name), name == "ledpo"
    assert list(result) == ["measures", "kinds", "course", "training"]
    scales = {"s/reliability", "s/hard", "s/mean", "s/std", "s/min", "s/max"} if learned else set()
    assert set(result["measures"]) == {"accuracy", "margin", "nll", "ece", "win_rate", "reward", "kl"} | scales
    assert set(result["kinds"]) == set(DATA.kinds)
    for kind in result["kinds"].values():
        assert set(kind) == {"reliability", "hard", "pairs", "accuracy"} | ({"s"} if learned else set())
        assert not learned or len(kind["s"]) == kind["pairs"]
    assert [(point["step"], point["fraction"]) for point in result["course"]] == [(0, 0), (12, 0.5), (24, 1)]
    for point in result["course"]:
        assert set(point) == {"step", "fraction", "accuracy", "margin", "kl", "reward", "win_rate"}
    assert all(result["course"][-1][key] == result["measures"][key] for key in ("accuracy", "margin", "kl", "reward"))
    assert len(result["training"]) == 20 and result["training"][-1]["step"] == 24
    assert {"step", "fraction", "loss", "beta/mean", "rewards/margins"} <= set(result["training"][0])
    assert all(("log_s/mean" in log, "regularizers/loss" in log) == (learned, learned) for log in result["training"])
    assert not [key for key in result["training"][0] if key.startswith(("logps/", "entropy/"))]


def test_before_training_a_policy_is_its_reference() -> None:
    start = trained("dpo")["course"][0]
    # Margins are exactly 0: ties, which are not accurate.
    assert start["accuracy"] == 0 and start["margin"] == 0
    assert start["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(start["win_rate"] - 0.5) < 4 * 0.5 / DATA.held_out_pairs**0.5
    assert all(trained(name)["course"][0]["reward"] == start["reward"] for name in OBJECTIVES)


@pytest.mark.parametrize("name", ["ledpo_entropy", "ledisco"])
def test_the_same_arguments_give_the_same_result_and_leave_the_random_numbers_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = train_items(DATA, objective(name), SHORT, seed=900)
    assert torch.equal(before, torch.get_rng_state())
    assert again == trained(name)
    assert train_items(DATA, objective(name), SHORT, seed=901)["measures"] != again["measures"]


def test_the_number_of_evaluations_changes_nothing_but_the_course() -> None:
    other = train_items(DATA, objective("beta_dpo"), ItemTraining(1e-2, 8, 32, evaluations=7), seed=900)
    assert len(other["course"]) == 8
    assert {**other, "course": None} == {**trained("beta_dpo"), "course": None}


def test_beta_follows_its_schedule() -> None:
    # 24 steps, of which some share a log.
    steps = [0, *(log["step"] for log in trained("beta_schedule")["training"])]
    for log, first, last in zip(trained("beta_schedule")["training"], steps, steps[1:], strict=False):
        wanted = [scheduled_beta(STAGED, step / 24) for step in range(first, last)]
        assert log["beta/mean"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_beta_of_a_batch_remembers_the_batches_before() -> None:
    reference = base_model(DATA, 900)
    learner, state = drawn(Learner(reference, objective("beta_dpo")), 901), {}
    pairs = Pairs.of(DATA.train_rows(), reference)
    first, second = (learner.loss(pairs.take(torch.arange(8) + k), 0.1, state) for k in (0, 8))
    assert first.metrics["beta/mean"].item() == pytest.approx(0.1)  # it is its own mean
    mean = 0.9 * first.margins.mean() + 0.1 * 0.1 * (gap := (second.margins / second.metrics["beta/mean"]).mean())
    assert second.metrics["beta/mean"].item() == pytest.approx(0.1 * (1 + 0.6 * (0.1 * gap - mean).item()), rel=1e-4)
    assert trained("beta_dpo")["training"][-1]["beta/mean"] != pytest.approx(0.1, rel=1e-4)


def test_variances_and_scales_are_learned() -> None:
    for name in ("disco_dpo", "ledisco"):
        assert trained(name)["training"][-1]["variance/std"] > 0
    for name in LEARNED:
        assert trained(name)["measures"]["s/std"] > 0


def test_kinds_that_are_equally_reliable_have_no_rank_correlation() -> None:
    data = PlantedItems(seed=901, train_pairs=32, held_out_pairs=32, logged_slates=32, items=ITEMS, flips=(0.2,))
    measures = train_items(data, objective("ledpo"), ItemTraining(epochs=1), seed=900)["measures"]
    assert "s/reliability" not in measures and "s/hard" in measures


def test_the_beta_head_has_an_optimizer_group_of_its_own() -> None:
    config = PreferenceConfig.preset("ledpo", beta_head_config={"lr_multiplier": 0.25})
    learner = Learner(ItemModel(ITEMS), config)
    policy, head = learner.optimizer(0.1).param_groups
    assert (policy["lr"], head["lr"], head["weight_decay"]) == (0.1, 0.025, 0.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in learner.beta_head.parameters()}
    assert {id(p) for p in policy["params"]} == {id(p) for p in learner.policy.parameters()}
    [group] = Learner(ItemModel(ITEMS), objective("disco_dpo")).optimizer(0.1).param_groups
    assert len(group["params"]) == len(list(ItemModel(ITEMS).parameters())) + 2


def test_a_learner_leaves_the_reference_alone() -> None:
    reference = base_model(DATA, 900).requires_grad_(False)
    before = [parameter.clone() for parameter in reference.parameters()]
    learner = Learner(reference, objective("dpo"))
    pairs = Pairs.of(DATA.train_rows(), reference).take(torch.arange(8))
    assert pairs.slates.items.shape[0] == 16 and pairs.hidden.shape == (8, WIDTH) and pairs.entropy.shape == (8,)
    optimizer = learner.optimizer(0.1)
    learner.loss(pairs, 0.1, {}).loss.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    moved = zip(learner.policy.parameters(), reference.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in moved)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ld_alpha", PreferenceConfig.preset("ld_dpo")),
        ("use_weighting", PreferenceConfig.preset("wpo")),
        ("beta_head_config", PreferenceConfig.preset("ledpo", beta_head_config={"features": ["hidden", "perplexity"]})),
        ("regularizers", PreferenceConfig.preset("ledpo", regularizers={"confidence": 1.0})),
    ],
)
def test_an_objective_that_slates_cannot_have_is_refused(name: str, config: PreferenceConfig) -> None:
    for call in (check_objective, lambda config: train_items(DATA, config, SHORT, seed=900)):
        with pytest.raises(ValueError, match=f"^{name}.* for a recommender.*got "):
            call(config)


def test_heads_that_are_not_used_are_not_checked() -> None:
    check_objective(
        PreferenceConfig(add_beta_head=True, beta_head_config={"features": ["perplexity"]}, add_disco_head=True)
    )


@pytest.mark.parametrize(
    "fields",
    [
        *({"learning_rate": bad} for bad in (0.0, -1.0, math.inf, math.nan, True, "1e-3", None)),
        *({name: bad} for name in ("epochs", "batch_size", "evaluations") for bad in (0, 1.5, True)),
    ],
)
def test_a_bad_training_field_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be .*got "):
        ItemTraining(**fields)
