"""The regularisers of log s against MATH.md: numpy formulas, running means, weights, gradients, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastpo import PreferenceConfig
from fastpo.regularizers import REGULARIZERS, regularizer_loss

Array = np.ndarray
K = math.log(4)
LEDPO = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
NEEDS = {"entropy": "prompt_entropy", "confidence": "confidence", "smooth": "features"}
DEFAULTS = {"pointwise": 0.1, "range": 1.0, "entropy": 0.1, "confidence": 0.1, "global": 1.0, "smooth": 0.01}


class Batch(NamedTuple):
    log_s: Array
    prompt_entropy: Array
    confidence: Array
    features: Array


class Target(NamedTuple):
    """What the numpy formulas know beside the batch: log s_max, the direction's sign, the running means."""

    bound: float = K
    sign: int = 1
    centre: float | None = None
    moments: tuple[float, float] | None = None


def familiarity(batch: Batch) -> Array:
    return np.log(-np.log(np.clip(batch.prompt_entropy, 1e-6, 1 - 1e-6)))


def entropy(x: Array, batch: Batch, target: Target) -> float:
    known = familiarity(batch)
    t = target.sign * 0.5 * (known - (known.mean() if target.centre is None else target.centre))
    return np.mean((x - np.clip(t, -target.bound, target.bound)) ** 2)


def confidence(x: Array, batch: Batch, target: Target) -> float:
    c = batch.confidence
    return np.mean((x + math.log(2) * (c - (c.mean() if target.centre is None else target.centre))) ** 2)


def global_(x: Array, batch: Batch, target: Target) -> float:
    mean, variance = (x.mean(), np.mean((x - x.mean()) ** 2)) if target.moments is None else target.moments
    return mean**2 + max(variance - 0.5, 0)


def smooth(x: Array, batch: Batch, target: Target) -> float:
    unit, above, below = [f / np.linalg.norm(f) for f in batch.features], 0.0, 0.0
    for i in range(len(x)):
        for j in range(len(x)):
            w = math.exp(-np.sum((unit[i] - unit[j]) ** 2) / (2 * 0.5**2)) * (i != j)
            above, below = above + w * (x[i] - x[j]) ** 2, below + w
    return above / below if below else 0.0


FORMULAS: dict[str, Callable[[Array, Batch, Target], float]] = {
    "pointwise": lambda x, batch, target: np.mean(x**2),
    "range": lambda x, batch, target: np.mean(np.maximum(x - K, 0) ** 2 + np.maximum(-K - x, 0) ** 2),
    "entropy": entropy,
    "confidence": confidence,
    "global": global_,
    "smooth": smooth,
}


def draw(rows: int, seed: int = 0, spread: float = 1.5, width: int = 5) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        spread * rng.normal(size=rows), rng.uniform(0.05, 0.95, rows), rng.uniform(size=rows),
        rng.normal(size=(rows, width)) * rng.uniform(0.1, 9, (rows, 1)),
    )  # fmt: skip


SIX = draw(6)
# Spread 0.3 has a variance below the free 0.5; alternating entropies of 0 and 1 clip the target on both sides.
BATCHES: dict[str, Batch] = {
    "usual": SIX,
    "narrow": draw(7, seed=1, spread=0.3),
    "one_row": draw(1, seed=2),
    "two_rows": draw(2, seed=3),
    "at_one": SIX._replace(log_s=np.zeros(6)),
    "certain_and_uniform_prompts": SIX._replace(prompt_entropy=np.array([0.0, 1.0, 0.0, 1.0, 0.5, 1e-9])),
    "out_of_range_entropies": SIX._replace(prompt_entropy=np.array([-0.1, 1.2, 0.3, 0.4, 0.5, 0.6])),
    "huge": SIX._replace(log_s=1e4 * SIX.log_s),
    "beyond_the_range_on_one_side": SIX._replace(log_s=np.array([1.3, 1.5, 2.0, -1.3, 0.0, 5.0])),
    "same_features": SIX._replace(features=np.ones((6, 5))),
    "same_directions": SIX._replace(features=np.outer([1.0, 2.0, 1e-3, 1e3, 5.0, 7.0], np.ones(5))),
    "opposite_features": SIX._replace(features=np.outer([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], [3.0, 4.0])),
}


def config(weights: dict[str, float] | None, s_max: float | None = 4.0, direction: str = "familiar") -> Any:
    return PreferenceConfig(**LEDPO, regularizers=weights, beta_head_config={"s_max": s_max, "direction": direction})


def call(batch: Batch, names: Any, state: Any = None, **fields: Any) -> tuple[Any, dict[str, Any], Array]:
    """Loss and metrics of regularisers of weight 1, or those weights, and the gradient in log s."""
    weights = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
    log_s = torch.tensor(batch.log_s, requires_grad=True)
    others = {name: torch.tensor(value) for name, value in batch._asdict().items() if name != "log_s"}
    loss, metrics = regularizer_loss(log_s, config(weights, **fields), **others, state=state)
    return loss, metrics, torch.autograd.grad(loss, log_s)[0].numpy()


def slope(terms: Callable[[Array], float], x: Array) -> Array:
    """Fourth-order finite differences."""
    steps = 1e-3 * np.maximum(1, np.abs(x).max()) * np.eye(len(x))
    return np.array(
        [(8 * (terms(x + d) - terms(x - d)) - terms(x + 2 * d) + terms(x - 2 * d)) / (12 * d.sum()) for d in steps]
    )


def test_every_regulariser_has_its_row() -> None:
    assert set(FORMULAS) == set(REGULARIZERS)
    assert {name for name, regularizer in REGULARIZERS.items() if regularizer.weight != 0} == set(DEFAULTS)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient(name: str, batch: Batch) -> None:
    loss, metrics, gradient = call(batch, [name])
    want = FORMULAS[name](batch.log_s, batch, Target())
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(want, rel=1e-10, abs=1e-10)
    assert metrics[f"regularizers/{name}"].item() == loss.item()
    expected = slope(lambda x: FORMULAS[name](x, batch, Target()), batch.log_s)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("s_max", [1.5, 4.0, 100.0, None])
@pytest.mark.parametrize(("direction", "sign"), [("familiar", 1), ("unfamiliar", -1)])
def test_the_target_of_entropy(direction: str, sign: int, s_max: float | None) -> None:
    # Entropies that reach +-K, but not without a bound: there t is not clipped at all.
    batch = SIX._replace(prompt_entropy=np.array([0.0, 0.05, 0.4, 0.6, 0.99, 1.0]))
    target = Target(math.inf if s_max is None else math.log(s_max), sign)
    loss, _, gradient = call(batch, ["entropy"], s_max=s_max, direction=direction)
    assert loss.item() == pytest.approx(entropy(batch.log_s, batch, target), rel=1e-10)
    expected = slope(lambda x: entropy(x, batch, target), batch.log_s)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("direction", "larger"), [("familiar", True), ("unfamiliar", False)])
def test_low_entropy_pulls_s_up_where_familiar(direction: str, larger: bool) -> None:
    batch = Batch(np.zeros(2), np.array([0.1, 0.7]), np.zeros(2), np.ones((2, 1)))
    pull = -call(batch, ["entropy"], direction=direction)[2] * (1 if larger else -1)
    assert pull[0] > 0 > pull[1]


@pytest.mark.parametrize("direction", ["familiar", "unfamiliar"])
def test_sure_pairs_are_pulled_down_in_either_direction(direction: str) -> None:
    batch = Batch(np.zeros(2), np.array([0.1, 0.7]), np.array([0.9, 0.1]), np.ones((2, 1)))
    pull = -call(batch, ["confidence"], direction=direction)[2]
    assert pull == pytest.approx([-0.4 * math.log(2), 0.4 * math.log(2)])


def test_one_row_has_no_neighbour() -> None:
    loss, _, gradient = call(draw(1), ["smooth"])
    assert loss.item() == 0 and gradient == 0


def test_zero_features_are_all_alike() -> None:
    zero = SIX._replace(features=np.zeros((6, 5)))
    value, _, gradient = call(zero, ["smooth"])
    assert value.item() == pytest.approx(smooth(SIX.log_s, BATCHES["same_features"], Target()), rel=1e-10)
    one_zero = SIX._replace(features=SIX.features * np.arange(6)[:, None])
    assert np.isfinite(gradient).all() and np.isfinite(call(one_zero, ["smooth"])[2]).all()


def test_hundreds_of_unlike_rows_stay_finite_in_float32() -> None:
    batch = draw(200, width=64)
    arguments = [torch.tensor(value, dtype=torch.float32) for value in batch]
    weights = dict.fromkeys(FORMULAS, 1.0)
    given = dict(zip(Batch._fields[1:], arguments[1:], strict=True))
    loss, metrics = regularizer_loss(arguments[0], config(weights), **given)
    assert loss.dtype == torch.float32
    for name, formula in FORMULAS.items():
        want = formula(batch.log_s, batch, Target())
        assert metrics[f"regularizers/{name}"].item() == pytest.approx(want, rel=1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_among_the_arguments_leave_the_loss_in_that_of_log_s(dtype: torch.dtype) -> None:
    given = {name: torch.tensor(value).to(dtype) for name, value in SIX._asdict().items() if name != "log_s"}
    loss, metrics = regularizer_loss(torch.tensor(SIX.log_s).float(), config(None), **given)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), *((name,) for name in NEEDS), tuple(NEEDS)], ids=str)
def test_defaults_are_those_whose_argument_is_given(given: tuple[str, ...]) -> None:
    arguments = {NEEDS[name]: torch.tensor(getattr(SIX, NEEDS[name])) for name in given}
    loss, metrics = regularizer_loss(torch.tensor(SIX.log_s), config(None), **arguments)
    names = {"pointwise", "range", "global", *given}
    assert set(metrics) == {f"regularizers/{name}" for name in (*names, "loss")}
    want = {name: FORMULAS[name](SIX.log_s, SIX, Target()) for name in names}
    for name in names:  # unweighted
        assert metrics[f"regularizers/{name}"].item() == pytest.approx(want[name], rel=1e-10)
    total = sum(DEFAULTS[name] * want[name] for name in names)
    assert loss.item() == metrics["regularizers/loss"].item() == pytest.approx(total, rel=1e-10)


def test_a_dict_is_those_weights_and_no_others() -> None:
    weights = {"smooth": 0.7, "range": 0.25}
    loss, metrics, gradient = call(SIX, weights)

    def terms(x: Array) -> float:
        return sum(weight * FORMULAS[name](x, SIX, Target()) for name, weight in weights.items())

    assert loss.item() == pytest.approx(terms(SIX.log_s), rel=1e-10)
    np.testing.assert_allclose(gradient, slope(terms, SIX.log_s), rtol=1e-6, atol=1e-9)
    assert set(metrics) == {"regularizers/smooth", "regularizers/range", "regularizers/loss"}


@pytest.mark.parametrize(
    "objective",
    [PreferenceConfig(**LEDPO, regularizers={}), PreferenceConfig(), PreferenceConfig(add_beta_head=True)],
    ids=["empty_dict", "fixed", "fixed_with_a_head"],
)
def test_none_at_all(objective: PreferenceConfig) -> None:
    loss, metrics = regularizer_loss(torch.tensor(SIX.log_s), objective, features=torch.ones(6, 2))
    assert loss.shape == () and loss.item() == 0 and not any(value.item() for value in metrics.values())


def test_a_weight_of_zero_is_not_formed() -> None:
    loss, _ = regularizer_loss(torch.tensor([1e200]).double(), config({"pointwise": 0, "entropy": 0.0}))
    assert loss.item() == 0


# --- gradient and state ---------------------------------------------------------------------------------------------


def test_nothing_but_log_s_carries_gradient() -> None:
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in SIX._asdict().items()}
    log_s, state = leaves.pop("log_s"), {}
    for _ in range(2):
        loss, metrics = regularizer_loss(log_s, config(None), **leaves, state=state)
        loss.backward()
    assert log_s.grad.abs().min() > 0 and all(leaf.grad is None for leaf in leaves.values())
    assert not any(value.requires_grad or value.shape != () for value in (*metrics.values(), *state.values()))


STEPS = [draw(rows, seed, spread=1.2) for seed, rows in enumerate((6, 3, 1, 5), 10)]


def running(values: list[float]) -> list[float]:
    means = [values[0]]
    for value in values[1:]:
        means.append(0.99 * means[-1] + 0.01 * value)
    return means


@pytest.mark.parametrize(("name", "source"), [("entropy", familiarity), ("confidence", lambda b: b.confidence)])
def test_targets_are_centred_on_the_running_mean(name: str, source: Callable[[Batch], Array]) -> None:
    state: dict[str, Any] = {}
    for batch, centre in zip(STEPS, running([source(batch).mean() for batch in STEPS]), strict=True):
        loss, _, gradient = call(batch, [name], state)
        target = Target(centre=centre)
        assert loss.item() == pytest.approx(FORMULAS[name](batch.log_s, batch, target), rel=1e-10)
        expected = slope(lambda x, b=batch, t=target: FORMULAS[name](x, b, t), batch.log_s)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spread", [1.0, 0.3], ids=["variance_above_a_half", "below"])
def test_global_has_running_moments_in_value_and_the_batchs_in_gradient(spread: float) -> None:
    state: dict[str, Any] = {}
    batches = [batch._replace(log_s=spread * batch.log_s) for batch in STEPS]
    means = running([batch.log_s.mean() for batch in batches])
    squares = running([np.mean(batch.log_s**2) for batch in batches])
    above = [square - mean**2 > 0.5 for mean, square in zip(means, squares, strict=True)]
    assert all(above) or not any(above)
    for batch, mean, square in zip(batches, means, squares, strict=True):
        loss, _, gradient = call(batch, ["global"], state)
        want = global_(batch.log_s, batch, Target(moments=(mean, square - mean**2)))
        assert loss.item() == pytest.approx(want, rel=1e-10)
        # d(mean l)/dl = 1/B and d(mean l^2)/dl = 2 l/B, not the 100th part that the running mean lets through.
        expected = 2 * mean / len(batch.log_s) + above[0] * 2 * (batch.log_s - mean) / len(batch.log_s)
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12)


def test_regularisers_of_one_state_keep_out_of_each_others_way() -> None:
    together: dict[str, Any] = {}
    apart: dict[str, dict[str, Any]] = {name: {} for name in FORMULAS}
    for batch in STEPS:
        metrics = call(batch, [*FORMULAS], together)[1]
        for name, state in apart.items():
            assert metrics[f"regularizers/{name}"].item() == call(batch, [name], state)[0].item()
    # All of it is in the dictionary, so that a checkpoint may hold it: a copy goes on as the original does.
    copy = {name: value.clone() for name, value in together.items()}
    assert call(SIX, [*FORMULAS], copy)[0].item() == call(SIX, [*FORMULAS], together)[0].item()


def test_without_state_nothing_is_remembered() -> None:
    first = call(SIX, [*FORMULAS])[0].item()
    call(STEPS[0], [*FORMULAS])
    # The first batch of a state is its own mean; global's two ways to the variance differ in rounding alone.
    assert call(SIX, [*FORMULAS])[0].item() == first == pytest.approx(call(SIX, [*FORMULAS], {})[0].item(), rel=1e-14)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDS)
def test_a_named_regulariser_wants_its_argument(name: str) -> None:
    given = {need: torch.tensor(getattr(SIX, need)) for other, need in NEEDS.items() if other != name}
    with pytest.raises(ValueError, match=rf"{name}.*\b{NEEDS[name]}\b"):
        regularizer_loss(torch.tensor(SIX.log_s), config({"pointwise": 0.1, name: 0.1}), **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("log_s", value) for value in (torch.ones(6, 1), torch.ones(()), torch.ones(0), torch.ones(6).long(), 0.3)),
        *((name, torch.ones(shape)) for name in ("prompt_entropy", "confidence") for shape in ((5,), (6, 1), (), (1,))),
        *((name, 0.5) for name in ("prompt_entropy", "confidence", "features")),
        *(("features", torch.ones(shape)) for shape in ((6,), (5, 2), (6, 2, 2), (1, 2))),
    ],
    ids=str,
)
def test_a_misshapen_argument_is_named(name: str, value: Any) -> None:
    good = {field: torch.tensor(array) for field, array in SIX._asdict().items()}
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        regularizer_loss(**good | {name: value}, config=config(None))


@pytest.mark.parametrize(
    ("mentions", "weights"),
    [
        ("regularizers pointwisely smooth", {"pointwisely": 0.1}),
        ("regularizers pointwise -0.1", {"pointwise": -0.1}),
        ("regularizers global nan", {"global": math.nan}),
        ("regularizers smooth inf", {"smooth": math.inf}),
        ("regularizers range '1'", {"range": "1"}),
        ("regularizers entropy True", {"entropy": True}),
    ],
)
def test_weights_that_make_no_sense_are_refused(mentions: str, weights: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        config(weights)
    assert all(word in str(error.value) for word in mentions.split())
