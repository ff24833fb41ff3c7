"""The objectives against MATH.md: a numpy oracle, closed forms, identities, edges and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preference_oracle import LINK_SLOPES, LINKS, Array, Evaluation, Objective, Responses, evaluate, smoothed

from fastpo import LossOutput, PreferenceConfig, SequenceStats, preference_loss

VOCAB = 1000
UNIFORM = math.log(VOCAB)
LN = {"length_normalization": True}
MALLOWS = {"contextual_scaling": "mallows", "contextual_scaling_coef": 0.29}
LEDPO = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
REFERENCES = [{}, {"reference_free": True}, *({"reference_mix": mix} for mix in (0.0, 0.25, 1.0))]
SIDES = ("chosen", "rejected", "ref_chosen", "ref_rejected")
Fields = dict[str, Any]


def draw_sides(seed: int, pairs: int, empty: bool = False) -> dict[str, Responses]:
    """Random sides; with `empty`, pair 0 is empty on both sides and pair 1 on the chosen one."""
    rng, sides = np.random.default_rng(seed), {}
    for name in ("chosen", "rejected"):
        lengths = rng.integers(1, 20, pairs)
        if empty:
            lengths[: 2 if name == "chosen" else 1] = 0
        for prefix in ("", "ref_"):
            logps, entropy = -rng.uniform(1, 12, pairs), rng.uniform(0.05, 0.9, pairs) * UNIFORM
            sides[prefix + name] = Responses(logps * (lengths > 0), lengths, entropy * (lengths > 0))
    return sides


def stats(logps: Any, lengths: Any = None, entropy: Any = None, dtype: Any = torch.float64) -> SequenceStats:
    """Stats from arrays or lists: five tokens a response, 1 nat a token unless told; log-probs are leaves."""
    logps = torch.tensor(logps, dtype=dtype, requires_grad=True)
    lengths = torch.full(logps.shape, 5) if lengths is None else torch.tensor(lengths)
    entropy = torch.ones(logps.shape, dtype=dtype) if entropy is None else torch.tensor(entropy, dtype=dtype)
    return SequenceStats(logps=logps, lengths=lengths, entropy=entropy)


def to_stats(sides: dict[str, Responses], dtype: Any = torch.float64) -> dict[str, SequenceStats]:
    return {name: stats(side.logps, side.lengths, side.entropy, dtype) for name, side in sides.items()}


def run(sides: dict[str, Responses], fields: Fields, **kwargs: Any) -> LossOutput:
    """The implementation's answer; arrays among the arguments become tensors."""
    kwargs = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    return preference_loss(**to_stats(sides), config=PreferenceConfig(**fields), vocab_size=VOCAB, **kwargs)


def oracle(sides: dict[str, Responses], fields: Fields, **kwargs: Any) -> Evaluation:
    return evaluate(**sides, objective=Objective(**fields), vocab_size=VOCAB, **kwargs)


def assert_matches(out: LossOutput, want: Evaluation, message: Any = "") -> None:
    margins = want.chosen_rewards - want.rejected_rewards
    got = [out.losses, out.loss, out.chosen_rewards, out.rejected_rewards, out.margins]
    expected = [want.losses, want.loss, want.chosen_rewards, want.rejected_rewards, margins]
    for value, target in zip(got, expected, strict=True):
        assert value.shape == np.shape(target)
        np.testing.assert_allclose(value.detach(), target, rtol=1e-10, atol=1e-12, err_msg=str(message))


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
@pytest.mark.parametrize("link", LINKS)
def test_values_over_every_combination_of_options(link: str, reference: Fields) -> None:
    sides = draw_sides(seed=1, pairs=5, empty=True)
    beta, own_phi = np.array([0.05, 0.3, 1.0, 2.0, 0.7]), np.array([0.2, 1.0, 1.7, 0.0, 0.6])
    # The caller's phi comes along with "mallows": it has to win.
    scalings = [({}, None), (MALLOWS, own_phi)] + [(MALLOWS, None)] * ("reference_free" not in reference)
    sft = [(0.0, "mean"), (0.4, "mean"), (0.4, "sum"), (0.4, "token")]
    for normalized, units, eps, (scaling, phi), (sft_weight, sft_reduction) in product(
        [False, True], ["reward", "logratio"], [0.0, 0.1], scalings, sft
    ):
        fields = reference | scaling | {"pref_loss_type": link, "home_advantage": 0.3, "hinge_delta": 1.3}
        fields |= {"length_normalization": normalized, "margin_units": units, "label_smoothing": eps}
        fields |= {"sft_weight": sft_weight, "sft_reduction": sft_reduction}
        given = {"beta": beta, "context_scale": phi}
        assert_matches(run(sides, fields, **given), oracle(sides, fields, **given), fields)


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    reference = draw(st.sampled_from(REFERENCES) | st.builds(dict, reference_mix=st.floats(0, 1)))
    return Objective(
        pref_loss_type=draw(st.sampled_from(list(LINKS))),
        beta=draw(st.floats(0.05, 3)),
        length_normalization=draw(st.booleans()),
        home_advantage=draw(st.sampled_from([0.0, 0.1, 1.0])),
        margin_units=draw(st.sampled_from(["reward", "logratio"])),
        sft_weight=draw(st.sampled_from([0.0, 0.2])),
        sft_reduction=draw(st.sampled_from(["mean", "sum", "token"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        hinge_delta=draw(st.sampled_from([1.0, 2.5])),
        **reference | draw(st.sampled_from([{}, {} if "reference_free" in reference else MALLOWS])),
    )


def finite_differences(terms: Callable[[Array], Array], x: Array, steps: Array) -> Array:
    """Fourth-order gradient of terms(x).sum(), differenced term by term so large terms cost no digits."""
    gradient = np.empty_like(x)
    for j, step in enumerate(steps):
        d = np.zeros_like(x)
        d[j] = step
        near, far = terms(x + d) - terms(x - d), terms(x + 2 * d) - terms(x - 2 * d)
        gradient[j] = np.sum(8 * near - far) / (12 * step)
    return gradient


@settings(max_examples=250, derandomize=True, deadline=None, database=None)
@given(objectives(), st.integers(2, 4), st.sampled_from(["config", "float", "tensor"]), st.integers(0, 10**6))
def test_drawn_objectives_in_value_and_gradient(o: Objective, pairs: int, beta_from: str, seed: int) -> None:
    sides, rng = draw_sides(seed, pairs, empty=seed % 4 == 0), np.random.default_rng(seed)
    own_phi = rng.uniform(0.1, 2, pairs) if seed % 3 == 0 else None
    b = rng.uniform(0.05, 3, pairs) if beta_from == "tensor" else np.full(pairs, o.beta)

    def at(x: Array) -> Evaluation:
        w, r, beta = np.split(x, 3)
        moved = {"chosen": replace(sides["chosen"], logps=w), "rejected": replace(sides["rejected"], logps=r)}
        return oracle(sides | moved, vars(o), beta=beta, context_scale=own_phi)

    x = np.concatenate([sides["chosen"].logps, sides["rejected"].logps, b])
    want = at(x)
    # Where finite differences hold: no overflow, and no kink of a hinge within reach of a step.
    assume(np.abs(want.z).max() < 150 and np.abs(np.abs(want.z) - o.hinge_delta).min() > 0.05)

    tensors, beta = to_stats(sides), torch.tensor(b, requires_grad=True)
    passed = {"config": None, "float": o.beta, "tensor": beta}[beta_from]
    phi = None if own_phi is None else torch.tensor(own_phi)
    config = PreferenceConfig(**vars(o))
    out = preference_loss(**tensors, config=config, beta=passed, context_scale=phi, vocab_size=VOCAB)
    assert_matches(out, want)

    leaves = [tensors["chosen"].logps, tensors["rejected"].logps] + [beta] * (beta_from == "tensor")
    got = torch.cat(torch.autograd.grad(out.loss, leaves)).numpy()
    steps = 2e-4 * np.concatenate([np.ones(2 * pairs), b])
    expected = finite_differences(lambda x: np.append(at(x).losses / pairs, at(x).token_sft), x, steps)
    np.testing.assert_allclose(got, expected[: got.size], rtol=1e-6, atol=1e-9)


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


# Each paper's loss, from the log-ratio difference (total, per token), its policy and reference parts, and phi
PAPERS: dict[str, Callable[[SimpleNamespace], Array]] = {
    "dpo": lambda d: softplus(-0.1 * d.ratio),
    "ln_dpo": lambda d: softplus(-2 * d.mean_ratio),
    "ipo": lambda d: (d.mean_ratio - 1 / (2 * 0.1)) ** 2,
    "slic": lambda d: np.maximum(0, 1 - 0.1 * d.ratio),
    "simpo": lambda d: softplus(-(2 * d.mean_pi - 1)),
    "mallows_dpo": lambda d: softplus(-d.phi * 0.1 * d.ratio),
    "rainbowpo": lambda d: softplus(-d.phi * 10 * (d.mean_pi - 0.25 * d.mean_ref - 0.75 * 0.1)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_preset_is_its_papers_loss(name: str) -> None:
    sides = draw_sides(seed=2, pairs=7)
    w, r, ref_w, ref_r = (sides[name].logps for name in SIDES)
    n_w, n_r = sides["chosen"].lengths, sides["rejected"].lengths
    d = SimpleNamespace(ratio=(w - ref_w) - (r - ref_r), mean_ratio=(w - ref_w) / n_w - (r - ref_r) / n_r)
    d.mean_pi, d.mean_ref = w / n_w - r / n_r, ref_w / n_w - ref_r / n_r
    d.phi = -0.29 * np.log((sides["ref_chosen"].entropy + sides["ref_rejected"].entropy) / (2 * UNIFORM))
    want = PAPERS[name](d)
    out = preference_loss(**to_stats(sides), config=PreferenceConfig.preset(name), vocab_size=VOCAB)
    np.testing.assert_allclose(out.losses.detach(), want, rtol=1e-10)
    assert out.loss.item() == pytest.approx(want.mean(), rel=1e-10)


def test_preset_overrides_win_and_later_methods_have_configs() -> None:
    simpo = PreferenceConfig(beta=2.5, **LN, reference_free=True, home_advantage=1.0)
    assert PreferenceConfig.preset("simpo", beta=2.5) == simpo
    assert PreferenceConfig.preset("ledpo") == PreferenceConfig(**LEDPO)
    disco = {"add_disco_head": True, "pref_loss_type": "disco"}
    assert PreferenceConfig.preset("disco_dpo") == PreferenceConfig(**disco)
    with pytest.raises(ValueError, match=r"disco|variance"):
        run(draw_sides(2, 3), disco)


MARGIN = LN | {"beta": 2.0, "home_advantage": 0.7, "margin_units": "logratio"}
REWARD_MARGIN = LN | {"beta": 2.0, "home_advantage": 1.4}
IPO = {"pref_loss_type": "ipo", "beta": 1.0}
IDENTITIES: dict[str, tuple[Fields, Fields]] = {
    "alpha_1_is_ln_dpo_without_margin": (MARGIN | {"reference_mix": 1.0}, LN | {"beta": 2.0}),
    "alpha_0_is_simpo": (MARGIN | {"reference_mix": 0.0}, REWARD_MARGIN | {"reference_free": True}),
    "reward_margin_is_beta_times_the_log_ratio_one": (MARGIN, REWARD_MARGIN),
    "ipo_scaled_is_ipo_at_beta_1": (IPO, IPO | {"pref_loss_type": "ipo_scaled"}),
}


@pytest.mark.parametrize(("left", "right"), IDENTITIES.values(), ids=IDENTITIES)
def test_identity(left: Fields, right: Fields) -> None:
    sides = draw_sides(3, 6, empty=True)
    torch.testing.assert_close(run(sides, left).losses, run(sides, right).losses, rtol=1e-12, atol=1e-12)


def test_phi_of_one_removes_scaling() -> None:
    sides, mallows = draw_sides(3, 6, empty=True), {"contextual_scaling": "mallows"}
    for name in ("ref_chosen", "ref_rejected"):
        sides[name] = replace(sides[name], entropy=np.full(6, UNIFORM / math.e))
    want = run(sides, {}).losses
    torch.testing.assert_close(run(sides, mallows).losses, want, rtol=1e-12, atol=0)
    assert torch.equal(run(sides, mallows, context_scale=np.ones(6)).losses, want)


def test_mixing_at_zero_needs_no_reference_and_rewards_take_zero_for_it() -> None:
    sides, fields = draw_sides(3, 6), {"reference_mix": 0.0, "home_advantage": 0.2}
    policy = {name: sides[name] for name in ("chosen", "rejected")}
    assert_matches(run(policy, fields), oracle(policy, fields))
    assert_matches(run(sides, fields), oracle(sides, fields))


def test_first_step_has_loss_log_2_and_half_betas_gradient() -> None:
    out, chosen_grad, rejected_grad = loss_at([0.0, 0.0], beta=0.1)
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert chosen_grad.tolist() == pytest.approx([-0.05] * 2)
    assert rejected_grad.tolist() == pytest.approx([0.05] * 2)


@pytest.mark.parametrize("units", ["reward", "logratio"])
@pytest.mark.parametrize("link", LINKS)
def test_gradient_in_s_is_the_stated_formula(link: str, units: str) -> None:
    sides, s = draw_sides(4, 6), np.array([0.25, 0.5, 1.0, 1.5, 3.0, 4.0])
    fields = MALLOWS | {"pref_loss_type": link, "home_advantage": 0.3, "margin_units": units}
    want = oracle(sides, fields, beta=0.2 * s)
    leaf = torch.tensor(s, requires_grad=True)
    run(sides, fields, beta=0.2 * leaf).losses.sum().backward()
    lever = want.h if units == "reward" else want.h - 0.3
    slope = LINK_SLOPES[link](want.z, 0.2 * s, 1.0) * want.phi * 0.2 * lever
    expected = slope - 2 * want.losses / s if link == "ipo" else slope
    np.testing.assert_allclose(leaf.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("link", [link for link in LINKS if link != "ipo"])
@pytest.mark.parametrize("units", ["reward", "logratio"])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_s_gets_no_gradient_where_policy_is_reference(link: str, units: str, margin: float) -> None:
    sides = draw_sides(5, 4)
    sides |= {"ref_chosen": sides["chosen"], "ref_rejected": sides["rejected"]}
    beta = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    fields = {"pref_loss_type": link, "home_advantage": margin, "margin_units": units}
    run(sides, fields, beta=beta).loss.backward()
    assert bool((beta.grad == 0).all()) is (margin == 0 or units == "reward")


SCALES = np.array([0.5, 5.0, 30.0, 100.0, 1e3, 1e4])
LADDER = np.concatenate([-SCALES[::-1], [0.0], SCALES])


def loss_at(z: Any, dtype: Any = torch.float64, **fields: Any) -> tuple[LossOutput, Array, Array]:
    """Loss of reference-free pairs with h = z and no log-prob above 0; its gradients in both log-probs."""
    chosen, rejected = stats(np.minimum(z, 0), dtype=dtype), stats(-np.maximum(z, 0), dtype=dtype)
    out = preference_loss(chosen, rejected, PreferenceConfig(reference_free=True, **fields))
    out.losses.sum().backward()
    return out, chosen.logps.grad.numpy(), rejected.logps.grad.numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("link", LINKS)
def test_links_are_exact_up_to_z_of_1e4(link: str, eps: float, dtype: torch.dtype) -> None:
    fields = {"pref_loss_type": link, "beta": 1.0, "label_smoothing": eps}
    out, chosen_grad, rejected_grad = loss_at(LADDER, dtype, **fields)
    value = smoothed(LINKS, LADDER, np.ones(13), Objective(**fields), mirror=1.0)
    slope = smoothed(LINK_SLOPES, LADDER, np.ones(13), Objective(**fields), mirror=-1.0)
    rtol, tiny = 1e-10 if dtype == torch.float64 else 1e-5, torch.finfo(dtype).tiny
    for got, want in [(out.losses.detach().numpy(), value), (chosen_grad, slope), (rejected_grad, -slope)]:
        assert link == "exponential" or np.isfinite(got).all()
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(got, want.astype(got.dtype), rtol=rtol, atol=tiny)


def test_sigmoid_with_infinite_log_probs() -> None:
    out, chosen_grad, rejected_grad = loss_at([-math.inf, math.inf], beta=0.1)
    assert out.losses.tolist() == [math.inf, 0.0]
    assert chosen_grad.tolist() == [-0.1, 0.0] and rejected_grad.tolist() == [0.1, 0.0]


@pytest.mark.parametrize("link", ["sigmoid", "hinge", "truncated_square", "exponential", "savage", "cauchy"])
def test_without_smoothing_the_mirrored_link_is_not_formed(link: str) -> None:
    assert loss_at([math.inf], pref_loss_type=link)[0].losses.item() == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_without_sft_weight_the_sft_term_is_not_formed(reduction: str) -> None:
    assert loss_at([-math.inf], sft_reduction=reduction)[0].loss.item() == math.inf


@pytest.mark.parametrize("fields", [{"reference_free": True}, {"reference_mix": 0.0}], ids=str)
def test_unused_references_are_never_read(fields: Fields) -> None:
    sides, nan = draw_sides(6, 4), np.full(4, math.nan)
    poison = {name: replace(sides[name], logps=nan, entropy=nan) for name in ("ref_chosen", "ref_rejected")}
    tensors = to_stats(sides | poison)
    out = preference_loss(**tensors, config=PreferenceConfig(**fields))
    out.loss.backward()
    assert torch.equal(out.losses, run(sides, fields).losses)
    assert tensors["chosen"].logps.grad.isfinite().all() and tensors["rejected"].logps.grad.isfinite().all()
    if "reference_free" in fields:
        assert out.margins.isfinite().all() and all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("sft_reduction", ["mean", "sum", "token"])
def test_a_pair_of_empty_responses_is_finite(sft_reduction: str) -> None:
    empty = stats([0.0], [0], [0.0])
    config = PreferenceConfig.preset("ln_dpo", sft_weight=1.0, sft_reduction=sft_reduction)
    out = preference_loss(empty, empty, config, ref_chosen=empty, ref_rejected=empty)
    assert out.loss.item() == pytest.approx(math.log(2)) and out.margins.item() == 0.0


# (tokens, entropy) of the reference's chosen and rejected response -> phi / kappa
PHI: dict[str, tuple[tuple[int, float], tuple[int, float], float]] = {
    "both_empty": ((0, 0.0), (0, 0.0), 1.0),
    "chosen_empty": ((0, 0.0), (4, UNIFORM / 2), math.log(2)),
    "rejected_empty": ((4, UNIFORM / 4), (0, 0.0), math.log(4)),
    "mean_of_two_not_weighted_by_length": ((1, UNIFORM / 2), (9, UNIFORM / 4), math.log(8 / 3)),
    "certain": ((3, 0.0), (3, 0.0), math.log(1e6)),
    "uniform": ((3, UNIFORM), (3, UNIFORM), 0.0),
    "above_log_v": ((3, 2 * UNIFORM), (3, 2 * UNIFORM), 0.0),
}


@pytest.mark.parametrize(("chosen", "rejected", "phi"), PHI.values(), ids=PHI)
def test_mallows_phi(chosen: tuple[int, float], rejected: tuple[int, float], phi: float) -> None:
    ref_chosen, ref_rejected = (stats([-1.0], [n], [nats]) for n, nats in (chosen, rejected))
    call = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected, "vocab_size": VOCAB}
    policy = stats([-3.0], [chosen[0]]), stats([-1.5], [rejected[0]])
    out = preference_loss(*policy, PreferenceConfig(**MALLOWS), **call)
    assert out.metrics["phi/mean"].item() == pytest.approx(0.29 * phi, rel=1e-12, abs=1e-12)
    assert out.losses.item() == pytest.approx(softplus(0.29 * phi * 0.1 * 1.5), rel=1e-12)


@pytest.mark.parametrize("beta", [None, 0.3, torch.tensor([0.1, 0.2, 3.0])], ids=str)
@pytest.mark.parametrize("name", PAPERS)
def test_float32_stays_float32(name: str, beta: float | torch.Tensor | None) -> None:
    sides, config = draw_sides(8, 3), PreferenceConfig.preset(name, sft_weight=0.1, label_smoothing=0.1)
    single, double = (
        preference_loss(**to_stats(sides, dtype), config=config, beta=beta, vocab_size=VOCAB)
        for dtype in (torch.float32, torch.float64)
    )
    outputs = single.loss, single.losses, single.chosen_rewards, single.rejected_rewards, single.margins
    assert all(value.dtype == torch.float32 for value in outputs)
    torch.testing.assert_close(single.losses.double(), double.losses, rtol=1e-5, atol=1e-5)


def test_metrics_are_batch_means() -> None:
    sides, b = draw_sides(9, 8), np.linspace(0.1, 2.0, 8)
    fields = LN | MALLOWS | {"reference_mix": 0.25}
    want, metrics = oracle(sides, fields, beta=b), run(sides, fields, beta=b).metrics
    expected = {"rewards/chosen": want.chosen_rewards, "rewards/rejected": want.rejected_rewards}
    expected["rewards/margins"] = want.chosen_rewards - want.rejected_rewards
    expected["rewards/accuracies"] = expected["rewards/margins"] > 0
    for side in ("chosen", "rejected"):
        expected |= {f"logps/{side}": sides[side].logps, f"entropy/{side}": sides[side].entropy}
    expected |= {"beta/mean": b, "phi/mean": want.phi}
    for name, values in expected.items():
        assert metrics[name].shape == ()
        assert metrics[name].item() == pytest.approx(values.mean(), rel=1e-12), name
    assert 0 < metrics["rewards/accuracies"] < 1


def test_phi_is_reported_only_where_something_scales() -> None:
    sides = draw_sides(9, 3)
    assert "phi/mean" not in run(sides, {}).metrics
    assert run(sides, {}, context_scale=np.array([1.0, 2.0, 6.0])).metrics["phi/mean"] == 3


def test_a_tie_is_not_accurate() -> None:
    chosen, rejected = stats([-1.0, -4.0, -3.0, -5.0]), stats([-2.0, -4.0, -2.0, -5.0])
    out = preference_loss(chosen, rejected, PreferenceConfig(reference_free=True))
    assert out.metrics["rewards/accuracies"].item() == 0.25


def test_what_carries_gradient_and_what_does_not() -> None:
    sides = to_stats(draw_sides(9, 3))
    entropies = [side.entropy.requires_grad_() for side in sides.values()]
    beta, own_phi = (torch.full((3,), x, dtype=torch.float64, requires_grad=True) for x in (0.2, 1.0))
    for phi in (None, own_phi):
        config = PreferenceConfig(**MALLOWS)
        out = preference_loss(**sides, config=config, beta=beta, context_scale=phi, vocab_size=VOCAB)
        rewards = out.chosen_rewards, out.rejected_rewards, out.margins
        assert not any(value.requires_grad for value in (*rewards, *out.metrics.values()))
        out.loss.backward()
    assert all(leaf.grad is None for leaf in (own_phi, *entropies))
    assert all(leaf.grad.abs().min() > 0 for leaf in (beta, sides["chosen"].logps, sides["rejected"].logps))


THREE, ONE = stats([-1.0, -2.0, -3.0]), stats([-1.0])
PHI_WANTED = PreferenceConfig(**MALLOWS)
BAD_CALLS: list[tuple[str, Fields]] = [
    *((side, {side: torch.zeros(3)}) for side in SIDES),
    *((side, {side: ONE}) for side in SIDES[1:]),
    *((side, {side: None}) for side in SIDES),
    ("config", {"config": "dpo"}),
    *(("beta", {"beta": beta}) for beta in (0.0, -0.1, math.nan, "0.1")),
    *(("beta", {"beta": torch.ones(shape)}) for shape in ((1,), (3, 1))),
    *(("context_scale", {"context_scale": torch.ones(shape)}) for shape in ((1,), (3, 1))),
    ("context_scale", {"context_scale": 1.0}),
    *(("vocab_size", {"config": PHI_WANTED, "vocab_size": size}) for size in (None, 1)),
    ("ref_chosen", {"config": replace(PHI_WANTED, reference_mix=0.0), "ref_chosen": None}),
    ("reference_free", {"config": replace(PHI_WANTED, reference_free=True)}),
]


@pytest.mark.parametrize(("name", "change"), BAD_CALLS, ids=str)
def test_bad_call_names_the_argument(name: str, change: Fields) -> None:
    good = dict.fromkeys(SIDES, THREE) | {"config": PreferenceConfig(), "vocab_size": VOCAB}
    preference_loss(**good)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        preference_loss(**good | change)


MISSHAPEN = {
    "logps": ([[-1.0], [-2.0]],),
    "lengths": ([-1.0, -2.0], [5]),
    "entropy": ([-1.0], [5], [1.0, 1.0]),
}


@pytest.mark.parametrize(("name", "args"), MISSHAPEN.items())
def test_statistics_that_disagree_in_shape_are_refused(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=name):
        preference_loss(stats(*args), stats(*args), PreferenceConfig(reference_free=True))


@pytest.mark.parametrize(
    ("mentions", "fields"),
    [
        ("ipo dynamic_scaling", LEDPO | {"pref_loss_type": "ipo"}),
        ("dynamic_scaling add_beta_head", {"beta_mode": "dynamic_scaling"}),
        ("disco add_disco_head", {"pref_loss_type": "disco"}),
        ("pref_loss_type sigmoidal truncated_square", {"pref_loss_type": "sigmoidal"}),
        ("margin_units nats logratio", {"margin_units": "nats"}),
        ("sft_reduction median token", {"sft_reduction": "median"}),
        ("contextual_scaling rainbow mallows", {"contextual_scaling": "rainbow"}),
        ("reference_mix 1.5", {"reference_mix": 1.5}),
        ("beta -0.1", {"beta": -0.1}),
    ],
)
def test_objectives_that_make_no_sense_are_refused(mentions: str, fields: Fields) -> None:
    with pytest.raises(ValueError) as error:
        PreferenceConfig(**fields)
    assert all(word in str(error.value) for word in mentions.split())
