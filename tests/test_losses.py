"""The objectives against MATH.md: a numpy oracle, closed forms, identities, edges and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preference_oracle import (
    DIVERGENCES,
    LINK_SLOPES,
    LINKS,
    RESPONSE_LOSSES,
    SORTED_LOSSES,
    Array,
    Evaluation,
    Objective,
    Responses,
    discopop,
    evaluate,
    log_odds,
    mills,
    relative_entropy,
    sigmoid,
    smoothed,
    softplus,
)

from fastpo import ExtendedSequenceStats, LossOutput, PreferenceConfig, SequenceStats, preference_loss
from fastpo.links import LINKS as IMPLEMENTED
from fastpo.links import log_ndtr
from fastpo.methods import METHODS
from fastpo.types import StepTotals

VOCAB = 1000
UNIFORM = math.log(VOCAB)
LN = {"length_normalization": True}
MALLOWS = {"contextual_scaling": "mallows", "contextual_scaling_coef": 0.29}
LEDPO = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
HEAD = {"add_disco_head": True}  # `disco` needs it; the others do not mind
HINGE = {name: {"hinge_delta": 1.3} for name in ("hinge", "truncated_square")}  # an error for the others
REFERENCES = [{}, {"reference_free": True}, *({"reference_mix": mix} for mix in (0.0, 0.25, 1.0))]
SIDES = ("chosen", "rejected", "ref_chosen", "ref_rejected")
LOSSES = (*LINKS, *RESPONSE_LOSSES, *SORTED_LOSSES, "orpo", "sft")
Fields = dict[str, Any]


def draw_sides(seed: int, pairs: int, empty: bool = False, near: float | None = None) -> dict[str, Responses]:
    """Random sides; with `empty`, pair 0 is empty on both sides and pair 1 on the chosen one.

    `near`: the reference's log-probs are within so many nats of the policy's.
    """
    rng, sides = np.random.default_rng(seed), {}
    for name in ("chosen", "rejected"):
        lengths = rng.integers(1, 20, pairs)
        if empty:
            lengths[: 2 if name == "chosen" else 1] = 0
        there, drawn = lengths > 0, []
        for prefix in ("", "ref_"):
            logps, entropy = -rng.uniform(1, 12, pairs), rng.uniform(0.05, 0.9, pairs) * UNIFORM
            part, concentration = rng.uniform(0.3, 0.9, pairs), -rng.uniform(0.1, 2, pairs)
            if prefix and near:
                logps, part = drawn[0] + rng.uniform(-near, near, pairs), drawn[1]
            drawn = [logps, part]
            sides[prefix + name] = Responses(
                logps * there, lengths, entropy * there, part * logps * there, concentration * lengths
            )
    return sides


def stats(
    logps: Any, lengths: Any = None, entropy: Any = None, dtype: Any = torch.float64, shared: Any = None,
    log_sum_sq: Any = None,
) -> ExtendedSequenceStats:  # fmt: skip
    """Stats from arrays or lists: five tokens a response, 1 nat a token unless told; log-probs are leaves."""
    logps = torch.tensor(logps, dtype=dtype, requires_grad=True)
    lengths = torch.full(logps.shape, 5) if lengths is None else torch.tensor(lengths)
    entropy = torch.ones(logps.shape, dtype=dtype) if entropy is None else torch.tensor(entropy, dtype=dtype)
    shared = None if shared is None else torch.tensor(shared, dtype=dtype, requires_grad=True)
    log_sum_sq = None if log_sum_sq is None else torch.tensor(log_sum_sq, dtype=dtype)
    return ExtendedSequenceStats(logps, lengths, entropy, log_sum_sq, shared)


def to_stats(sides: dict[str, Responses], dtype: Any = torch.float64) -> dict[str, ExtendedSequenceStats]:
    return {
        name: stats(side.logps, side.lengths, side.entropy, dtype, side.shared, side.log_sum_sq)
        for name, side in sides.items()
    }


def tensors(given: Fields) -> Fields:
    return {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}


def variances(seed: int, pairs: int) -> dict[str, Array]:
    """The Disco head's, for `disco` alone."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.05, 3, pairs) for name in ("chosen_variance", "rejected_variance")}


def run(sides: dict[str, Responses], fields: Fields, **kwargs: Any) -> LossOutput:
    """The implementation's answer; arrays among the arguments become tensors."""
    config = PreferenceConfig(**fields)
    return preference_loss(**to_stats(sides), config=config, vocab_size=VOCAB, **tensors(kwargs))


def oracle(sides: dict[str, Responses], fields: Fields, **kwargs: Any) -> Evaluation:
    return evaluate(**sides, objective=Objective(**fields), vocab_size=VOCAB, **kwargs)


def assert_matches(out: LossOutput, want: Evaluation, message: Any = "") -> None:
    margins = want.chosen_rewards - want.rejected_rewards
    got = [out.losses, out.loss, out.chosen_rewards, out.rejected_rewards, out.margins]
    expected = [want.losses, want.loss, want.chosen_rewards, want.rejected_rewards, margins]
    for value, target in zip(got, expected, strict=True):
        assert value.shape == np.shape(target)
        np.testing.assert_allclose(value.detach(), target, rtol=1e-10, atol=1e-12, err_msg=str(message))


def test_every_loss_is_tested() -> None:
    assert set(IMPLEMENTED) == set(LOSSES)


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
@pytest.mark.parametrize("link", LINKS)
def test_values_over_every_combination_of_options(link: str, reference: Fields) -> None:
    sides = draw_sides(seed=1, pairs=5, empty=True)
    beta, own_phi = np.array([0.05, 0.3, 1.0, 2.0, 0.7]), np.array([0.2, 1.0, 1.7, 0.0, 0.6])
    spread = variances(1, 5) if link == "disco" else {}
    # The caller's phi comes along with "mallows": it has to win.
    scalings = [({}, None), (MALLOWS, own_phi)] + [(MALLOWS, None)] * ("reference_free" not in reference)
    sft = [(0.0, "mean"), (0.4, "mean"), (0.4, "sum"), (0.4, "token")]
    for normalized, units, eps, (scaling, phi), (sft_weight, sft_reduction) in product(
        [False, True], ["reward", "logratio"], [0.02 if link == "exo_pair" else 0.0, 0.1], scalings, sft
    ):
        fields = HEAD | reference | scaling | {"pref_loss_type": link, "home_advantage": 0.3} | HINGE.get(link, {})
        fields |= {"length_normalization": normalized, "margin_units": units, "label_smoothing": eps}
        fields |= {"sft_weight": sft_weight, "sft_reduction": sft_reduction}
        given = {"beta": beta, "context_scale": phi} | spread
        assert_matches(run(sides, fields, **given), oracle(sides, fields, **given), fields)


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
@pytest.mark.parametrize("loss", [*RESPONSE_LOSSES, *SORTED_LOSSES])
def test_values_of_what_is_no_function_of_z(loss: str, reference: Fields) -> None:
    sides = draw_sides(seed=1, pairs=5, empty=True)
    beta, smoothings = (0.7, [0.0, 0.1]) if loss in SORTED_LOSSES else (np.array([0.05, 0.3, 1.0, 2.0, 0.7]), [0.0])
    for normalized, eps, ld_alpha, sft_weight in product([False, True], smoothings, [None, 0.0, 0.4], [0.0, 0.4]):
        fields = reference | {"pref_loss_type": loss, "length_normalization": normalized, "ld_alpha": ld_alpha}
        fields |= {"label_smoothing": eps, "sft_weight": sft_weight}
        assert_matches(run(sides, fields, beta=beta), oracle(sides, fields, beta=beta), fields)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("link", LINKS)
def test_values_under_every_divergence(link: str, divergence: str, normalized: bool) -> None:
    sides, spread = draw_sides(2, 5, empty=True, near=3.0), variances(2, 5) if link == "disco" else {}
    coefs = [0.5, -1.0, 2.5] if divergence.startswith("alpha") else [0.5]
    for coef, ld_alpha in product(coefs, [None, 0.3]):
        fields = HEAD | {"pref_loss_type": link, "f_divergence_type": divergence, "f_alpha_divergence_coef": coef}
        fields |= {"length_normalization": normalized, "label_smoothing": 0.05, "ld_alpha": ld_alpha}
        assert_matches(run(sides, fields, **spread), oracle(sides, fields, **spread), fields)


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    """A loss or a sum of up to three, and options that every one of them reads."""
    names = draw(st.lists(st.sampled_from(LOSSES), min_size=1, max_size=3, unique=True))
    compared = [name for name in names if name != "sft"]
    of_z, torn = set(compared) <= set(LINKS), set(compared) & set(SORTED_LOSSES)
    fields: Fields = HEAD | {
        "pref_loss_type": names[0] if len(names) == 1 else {name: draw(st.sampled_from([0.3, 1.0])) for name in names},
        "sft_weight": draw(st.sampled_from([0.0, 0.2])),
        "sft_reduction": draw(st.sampled_from(["mean", "sum", "token"])),
        "use_weighting": not torn and draw(st.booleans()),
    }
    if compared:
        fields["beta"] = draw(st.floats(0.05, 3))
        fields["length_normalization"] = draw(st.booleans())
        fields["batch_beta_coef"] = draw(st.sampled_from([0.0, 0.05]))
        reference = draw(st.sampled_from(REFERENCES) | st.builds(dict, reference_mix=st.floats(0, 1)))
        fields |= {} if "orpo" in compared and "reference_mix" in reference else reference
        if "orpo" not in compared:
            fields["ld_alpha"] = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
        if of_z or set(compared) <= set(LINKS) | set(SORTED_LOSSES):
            fields["label_smoothing"] = draw(st.sampled_from([0.02 if "exo_pair" in compared else 0.0, 0.1]))
        assume("label_smoothing" in fields or "exo_pair" not in compared)
    if of_z and compared:
        fields["home_advantage"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
        fields["margin_units"] = draw(st.sampled_from(["reward", "logratio"]))
        fields |= {} if "reference_free" in fields else draw(st.sampled_from([{}, MALLOWS]))
        if not {"reference_free", "reference_mix"} & set(fields):
            fields["f_divergence_type"] = draw(st.sampled_from(list(DIVERGENCES)))
    if set(names) & set(HINGE):
        fields["hinge_delta"] = draw(st.sampled_from([1.0, 2.5]))
    if "discopop" in names:
        fields["discopop_tau"] = draw(st.sampled_from([0.05, 0.7]))
    return Objective(**fields)


def finite_differences(terms: Callable[[Array], Array], x: Array, steps: Array) -> Array:
    """Fourth-order gradient of terms(x).sum(), differenced term by term so large terms cost no digits; 0 at step 0."""
    gradient = np.zeros_like(x)
    for j, step in enumerate(steps):
        if step == 0:
            continue
        d = np.zeros_like(x)
        d[j] = step
        near, far = terms(x + d) - terms(x - d), terms(x + 2 * d) - terms(x - 2 * d)
        gradient[j] = np.sum(8 * near - far) / (12 * step)
    return gradient


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(objectives(), st.integers(2, 4), st.sampled_from(["config", "float", "tensor"]), st.integers(0, 10**6))
def test_drawn_objectives_in_value_and_gradient(o: Objective, pairs: int, beta_from: str, seed: int) -> None:
    near = 2.0 if o.f_divergence_type != "reverse_kl" else None
    torn, of_z = set(o.weights) & set(SORTED_LOSSES), set(o.weights) - {"sft"} <= set(LINKS)
    # Empty responses tie, and at a tie sorting has a kink; their odds are infinite.
    empty = seed % 4 == 0 and not torn and "orpo" not in o.weights
    sides, rng = draw_sides(seed, pairs, empty, near), np.random.default_rng(seed)
    beta_from = "float" if torn and beta_from == "tensor" else beta_from
    b = rng.uniform(0.05, 3, pairs) if beta_from == "tensor" else np.full(pairs, o.beta)
    variance = variances(seed, pairs)
    given: Fields = {"vocab_size": VOCAB}
    if seed % 3 == 0 and of_z and set(o.weights) != {"sft"}:
        given["context_scale"] = rng.uniform(0.1, 2, pairs)
    if seed % 3 < 2 and not torn:
        given["pair_weight"] = rng.uniform(0, 2, pairs)
    totals = (7.0, 31.0) if seed % 5 == 0 else None
    # A batch before this one is what a running mean knows.
    config, before, state = PreferenceConfig(**vars(o)), draw_sides(seed + 1, pairs), {}
    known = tensors(variance) if "disco" in o.weights else {}
    preference_loss(**to_stats(before), config=config, vocab_size=VOCAB, state=state, **known)
    running = {"running_gap": evaluate(**before, objective=o, **variance, vocab_size=VOCAB).gap}

    def at(x: Array, constants: Evaluation | None = None) -> Evaluation:
        w, r, shared_w, shared_r, beta, v_w, v_r = np.split(x, 7)
        moved = {"chosen": replace(sides["chosen"], logps=w, shared=shared_w)}
        moved["rejected"] = replace(sides["rejected"], logps=r, shared=shared_r)
        spread = {"chosen_variance": v_w, "rejected_variance": v_r}
        called = given | spread | running | {"totals": totals, "constants": constants, "beta": beta}
        return evaluate(**sides | moved, objective=o, **called)

    policy = [getattr(sides[side], field) for field in ("logps", "shared") for side in ("chosen", "rejected")]
    x = np.concatenate([*policy, b, *variance.values()])
    want = at(x)
    # Where finite differences hold: no overflow, and no kink of a hinge or a clamp within reach of a step.
    for name in set(o.weights) & set(LINKS):
        z = np.abs(at(x, want).z if len(o.weights) == 1 else oracle_z(name, o, sides, given, b, want))
        assume(z.max() < 150 and (name not in HINGE or np.abs(z - o.hinge_delta).min() > 0.05))
    assume(np.abs(want.b - 1e-3).min() > 1e-4)
    assume(not torn or np.abs(want.losses).max() < 1e3)  # a sorted term shares its row with another pair's

    leaves, spread = to_stats(sides), {k: torch.tensor(v, requires_grad=True) for k, v in variance.items()}
    beta = torch.tensor(b, requires_grad=True)
    passed = {"config": None, "float": o.beta, "tensor": beta}[beta_from]
    out = preference_loss(
        **leaves, config=config, beta=passed, state=state, totals=totals and StepTotals(*map(torch.tensor, totals)),
        **tensors(given), **(spread if "disco" in o.weights else {}),
    )  # fmt: skip
    assert_matches(out, want)

    of_policy = [getattr(leaves[side], field) for field in ("logps", "shared_logps") for side in SIDES[:2]]
    read = [*of_policy, beta, *spread.values()]
    gradients = torch.autograd.grad(out.loss, read, allow_unused=True)
    got = torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(read, gradients, strict=True)]).numpy()
    kept = np.repeat([True] * 4 + [beta_from == "tensor"] + [True] * 2, pairs)
    steps = 2e-4 * np.concatenate([np.ones(4 * pairs), b, *variance.values()]) * kept

    def terms(x: Array) -> Array:
        moved = at(x, want)
        return np.append(moved.losses / (totals[0] if totals else pairs), moved.token_sft)

    expected = finite_differences(terms, x, steps)
    np.testing.assert_allclose(got[kept], expected[kept], rtol=1e-6, atol=1e-9)


def oracle_z(
    name: str, o: Objective, sides: dict[str, Responses], given: Fields, b: Array, constants: Evaluation
) -> Array:
    """z of one loss of a sum: per token or not, and by the beta that the whole sum met."""
    alone = replace(o, pref_loss_type=name, batch_beta_coef=0.0)
    return evaluate(**sides, objective=alone, **given | {"beta": constants.b}, **variances(0, len(b))).z


# Each method's loss of a pair, from sums w, r and their reference's, log-ratios c - d = ratio, the same per token
# (mean_...), policy and reference part of the latter, phi, s, and what WPO, LD-DPO, beta-DPO and Disco add
PAPERS: dict[str, Callable[[SimpleNamespace], Array]] = {
    "dpo": lambda d: softplus(-0.1 * d.ratio),
    "ln_dpo": lambda d: softplus(-2 * d.mean_ratio),
    "ipo": lambda d: (d.mean_ratio - 1 / (2 * 0.1)) ** 2,
    "slic": lambda d: np.maximum(0, 1 - 0.1 * d.ratio),
    "rso": lambda d: np.maximum(0, 1 - 0.1 * d.ratio),
    "simpo": lambda d: softplus(-(2 * d.mean_pi - 1)),
    "cpo": lambda d: softplus(-0.1 * (d.w - d.r)) - d.w.sum() / d.n_w.sum(),
    "orpo": lambda d: -d.w / d.n_w + 0.1 * softplus(log_odds(d.r / d.n_r) - log_odds(d.w / d.n_w)),
    "robust_dpo": lambda d: (0.9 * softplus(-0.1 * d.ratio) - 0.1 * softplus(0.1 * d.ratio)) / 0.8,
    "cdpo": lambda d: 0.9 * softplus(-0.1 * d.ratio) + 0.1 * softplus(0.1 * d.ratio),
    "exo": lambda d: relative_entropy(0.1 * d.ratio, 1e-3),
    "nca": lambda d: softplus(-0.1 * d.c) + (softplus(0.1 * d.c) + softplus(0.1 * d.d)) / 2,
    "bco": lambda d: softplus(-0.1 * d.c) + softplus(0.1 * d.d),
    "sppo": lambda d: (d.c - 5) ** 2 + (d.d + 5) ** 2,
    "aot": lambda d: softplus(-0.1 * (np.sort(d.w - d.r) - np.sort(d.ref_w - d.ref_r))),
    "apo_zero": lambda d: 1 - sigmoid(0.1 * d.c) + sigmoid(0.1 * d.d),
    "apo_down": lambda d: sigmoid(0.1 * d.c) + 1 - sigmoid(0.1 * d.ratio),
    "discopop": lambda d: discopop(0.1 * d.ratio, 0.05),
    "wpo": lambda d: np.exp(d.on_policy_w / d.n_w + d.on_policy_r / d.n_r) * softplus(-0.1 * d.ratio),
    "ld_dpo": lambda d: softplus(-0.1 * (d.ratio + d.shared_ratio) / 2),
    "f_dpo": lambda d: softplus(-0.1 * (softplus(-d.d) - softplus(-d.c))),
    "beta_dpo": lambda d: softplus(-0.1 * (1 + 0.6 * 0.9 * 0.1 * (d.ratio.mean() - d.ratio_before.mean())) * d.ratio),
    "mallows_dpo": lambda d: softplus(-d.phi * 0.1 * d.ratio),
    "rainbowpo": lambda d: softplus(-d.phi * 10 * (d.mean_pi - 0.25 * d.mean_ref - 0.75 * 0.1)),
    "ledpo": lambda d: softplus(-0.1 * d.s * d.ratio),
    "disco_dpo": lambda d: -np.log([(1 + math.erf(x / math.sqrt(2))) / 2 for x in 0.1 * d.ratio / np.sqrt(d.variance)]),
    "ledpo_rainbowpo": lambda d: softplus(-10 * d.s * (d.mean_pi - 0.25 * d.mean_ref - 0.75 * 0.1)),
}


def log_ratio(sides: dict[str, Responses], field: str = "logps") -> Array:
    w, r, ref_w, ref_r = (getattr(sides[name], field) for name in SIDES)
    return (w - ref_w) - (r - ref_r)


@pytest.mark.parametrize("name", METHODS)
def test_preset_is_its_papers_loss(name: str) -> None:
    sides, before = draw_sides(seed=2, pairs=7), draw_sides(seed=3, pairs=7)
    d = SimpleNamespace(ratio=log_ratio(sides), shared_ratio=log_ratio(sides, "shared"), ratio_before=log_ratio(before))
    d.w, d.r, d.ref_w, d.ref_r = (sides[name].logps for name in SIDES)
    d.c, d.d, d.n_w, d.n_r = d.w - d.ref_w, d.r - d.ref_r, sides["chosen"].lengths, sides["rejected"].lengths
    d.mean_ratio, d.mean_pi, d.mean_ref = (
        x / d.n_w - y / d.n_r for x, y in ((d.c, d.d), (d.w, d.r), (d.ref_w, d.ref_r))
    )
    d.phi = -0.29 * np.log((sides["ref_chosen"].entropy + sides["ref_rejected"].entropy) / (2 * UNIFORM))
    d.on_policy_w, d.on_policy_r = (sides[side].logps - sides[side].log_sum_sq for side in SIDES[:2])
    d.s, heads = np.linspace(0.3, 3, 7), variances(2, 7)
    d.variance = heads["chosen_variance"] + heads["rejected_variance"]

    config, state = PreferenceConfig.preset(name), {}
    given: Fields = {"vocab_size": VOCAB, "state": state} | (tensors(heads) if name == "disco_dpo" else {})
    given |= {"beta": torch.tensor(config.beta * d.s)} if name.startswith("ledpo") else {}
    preference_loss(**to_stats(before), config=config, **given)
    out, want = preference_loss(**to_stats(sides), config=config, **given), PAPERS[name](d)
    assert out.loss.item() == pytest.approx(want.mean(), rel=1e-10)
    if name != "cpo":  # its SFT term is one number of the batch
        np.testing.assert_allclose(out.losses.detach(), want, rtol=1e-10)


def test_preset_overrides_win_and_heads_are_named_by_it() -> None:
    simpo = PreferenceConfig(beta=2.5, **LN, reference_free=True, home_advantage=1.0)
    assert PreferenceConfig.preset("simpo", beta=2.5) == simpo
    assert PreferenceConfig.preset("ledpo") == PreferenceConfig(**LEDPO)
    assert PreferenceConfig.preset("disco_dpo") == PreferenceConfig(**HEAD, pref_loss_type="disco")
    with pytest.raises(ValueError, match="sipmo"):
        PreferenceConfig.preset("sipmo")


MARGIN = LN | {"beta": 2.0, "home_advantage": 0.7, "margin_units": "logratio"}
REWARD_MARGIN = LN | {"beta": 2.0, "home_advantage": 1.4}
IPO = {"pref_loss_type": "ipo", "beta": 1.0}
IDENTITIES: dict[str, tuple[Fields, Fields]] = {
    "alpha_1_is_ln_dpo_without_margin": (MARGIN | {"reference_mix": 1.0}, LN | {"beta": 2.0}),
    "alpha_0_is_simpo": (MARGIN | {"reference_mix": 0.0}, REWARD_MARGIN | {"reference_free": True}),
    "reward_margin_is_beta_times_the_log_ratio_one": (MARGIN, REWARD_MARGIN),
    "ipo_scaled_is_ipo_at_beta_1": (IPO, IPO | {"pref_loss_type": "ipo_scaled"}),
    "sigmoid_norm_is_sigmoid_per_token": ({"pref_loss_type": "sigmoid_norm"}, LN),
    "ipo_norm_is_ipo_per_token": ({"pref_loss_type": "ipo_norm"}, LN | {"pref_loss_type": "ipo"}),
    "robust_without_noise_is_sigmoid": ({"pref_loss_type": "robust"}, {}),
    "ld_alpha_1_is_no_ld": ({"ld_alpha": 1.0}, {}),
    "alpha_1_is_reverse_kl": ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": 1.0}, {}),
    "alpha_0_is_forward_kl": (
        {"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0.0},
        {"f_divergence_type": "forward_kl"},
    ),
    "js_is_js_divergence": ({"f_divergence_type": "js"}, {"f_divergence_type": "js_divergence"}),
    "a_dict_of_one": ({"pref_loss_type": {"hinge": 1.0}}, {"pref_loss_type": "hinge"}),
    "beta_dpo_without_a_past": ({"batch_beta_coef": 0.6}, {}),
}


@pytest.mark.parametrize(("left", "right"), IDENTITIES.values(), ids=IDENTITIES)
def test_identity(left: Fields, right: Fields) -> None:
    sides = draw_sides(3, 6, empty=True)
    got, want = run(sides, left), run(sides, right)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-12, atol=1e-12)
    # Mixing and its margin change the rewards by nothing, a free reference does.
    if left.get("reference_free") == right.get("reference_free") and left.get("beta") == right.get("beta"):
        torch.testing.assert_close(got.margins, want.margins, rtol=1e-12, atol=1e-12)


def test_a_sum_is_the_sum_of_its_losses_by_weight() -> None:
    sides, weights = draw_sides(3, 6), {"sigmoid": 0.5, "sigmoid_norm": 3.0, "nca_pair": 0.25, "aot": 2.0, "sft": 0.7}
    alone = {name: run(sides, {"pref_loss_type": name}) for name in weights}
    out = run(sides, {"pref_loss_type": weights})
    for field in ("loss", "losses"):
        want = sum(weight * getattr(alone[name], field) for name, weight in weights.items())
        torch.testing.assert_close(getattr(out, field), want, rtol=1e-12, atol=0)
    assert torch.equal(out.margins, alone["sigmoid"].margins)


def test_an_sft_term_leaves_rewards_and_batch_beta_in_their_units() -> None:
    sides, state = draw_sides(3, 6), [{}, {}]
    common = {"batch_beta_coef": 0.5, "beta": 0.7}
    for pair in (draw_sides(4, 6), sides):
        alone = run(pair, common | {"pref_loss_type": "sigmoid_norm"}, state=state[0])
        summed = run(pair, common | {"pref_loss_type": {"sigmoid_norm": 1.0, "sft": 0.5}}, state=state[1])
    assert torch.equal(alone.losses, summed.losses)
    assert torch.equal(alone.margins, summed.margins)


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


@pytest.mark.parametrize("eps", [0.05, 0.0])
@pytest.mark.parametrize("units", ["reward", "logratio"])
@pytest.mark.parametrize("link", LINKS)
def test_gradient_in_s_is_the_stated_formula(link: str, units: str, eps: float) -> None:
    sides, s = draw_sides(4, 6), np.array([0.25, 0.5, 1.0, 1.5, 3.0, 4.0])
    spread = variances(4, 6) if link == "disco" else {}
    root = np.sqrt(sum(spread.values())) if spread else 1.0
    fields = HEAD | MALLOWS | {"pref_loss_type": link, "home_advantage": 0.3, "margin_units": units}
    fields |= {"label_smoothing": eps or 0.01 * (link == "exo_pair")}
    want = oracle(sides, fields, beta=0.2 * s, **spread)
    leaf = torch.tensor(s, requires_grad=True)
    run(sides, fields, beta=0.2 * leaf, **spread).losses.sum().backward()
    lever = want.h if units == "reward" else want.h - 0.3
    slope = smoothed(LINK_SLOPES, link, want.z / root, 0.2 * s, Objective(**fields), mirror=-1.0)
    slope = slope * want.phi * 0.2 * lever / root
    expected = slope - 2 * want.losses / s if link in ("ipo", "ipo_norm") else slope
    np.testing.assert_allclose(leaf.grad, expected, rtol=1e-10, atol=1e-12)


def s_gradient_where_policy_is_reference(**fields: Any) -> torch.Tensor:
    sides = draw_sides(5, 4)
    sides |= {"ref_chosen": sides["chosen"], "ref_rejected": sides["rejected"]}
    beta = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    run(
        sides, HEAD | fields, beta=beta, **variances(5, 4) if fields["pref_loss_type"] == "disco" else {}
    ).loss.backward()
    return beta.grad


@pytest.mark.parametrize("link", [link for link in LINKS if link not in ("ipo", "ipo_norm")])
@pytest.mark.parametrize("units", ["reward", "logratio"])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_s_gets_no_gradient_where_policy_is_reference(link: str, units: str, margin: float) -> None:
    fields = {"pref_loss_type": link, "home_advantage": margin, "margin_units": units}
    grad = s_gradient_where_policy_is_reference(**fields, label_smoothing=0.01 if link == "exo_pair" else 0.0)
    assert bool((grad == 0).all()) is (margin == 0 or units == "reward")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_s_gets_no_gradient_at_the_reference_under_any_divergence(divergence: str) -> None:
    grad = s_gradient_where_policy_is_reference(pref_loss_type="sigmoid", f_divergence_type=divergence)
    assert (grad == 0).all()


@pytest.mark.parametrize("loss", RESPONSE_LOSSES)
def test_of_the_response_losses_only_sppo_moves_s_at_the_reference(loss: str) -> None:
    grad = s_gradient_where_policy_is_reference(pref_loss_type=loss)
    # d/db of 2 (1/(2b))^2 = -1/b^3 of each of the four pairs' mean
    assert grad.tolist() == pytest.approx([-250.0 if loss == "sppo_hard" else 0.0] * 4)


def loss_at(z: Any, dtype: Any = torch.float64, **fields: Any) -> tuple[LossOutput, Array, Array]:
    """Loss of reference-free pairs with h = z and no log-prob above 0; its gradients in both log-probs."""
    chosen, rejected = stats(np.minimum(z, 0), dtype=dtype), stats(-np.maximum(z, 0), dtype=dtype)
    out = preference_loss(chosen, rejected, PreferenceConfig(reference_free=True, **fields))
    out.losses.sum().backward()
    return out, chosen.logps.grad.numpy(), rejected.logps.grad.numpy()


def test_sigmoid_with_infinite_log_probs() -> None:
    out, chosen_grad, rejected_grad = loss_at([-math.inf, math.inf], beta=0.1)
    assert out.losses.tolist() == [math.inf, 0.0]
    assert chosen_grad.tolist() == [-0.1, 0.0] and rejected_grad.tolist() == [0.1, 0.0]


@pytest.mark.parametrize("link", ["sigmoid", "hinge", "truncated_square", "exponential", "savage", "cauchy", "robust"])
def test_without_smoothing_the_mirrored_link_is_not_formed(link: str) -> None:
    assert loss_at([math.inf], pref_loss_type=link)[0].losses.item() == 0.0


def test_a_loss_of_weight_0_is_not_formed() -> None:
    # e^(1e4) is infinite, and 0 times infinity no number.
    out, chosen_grad, _ = loss_at([-1e4], beta=1.0, pref_loss_type={"sigmoid": 1.0, "exponential": 0.0})
    assert out.losses.tolist() == [1e4] and chosen_grad.tolist() == [-1.0]


def test_ld_dpo_at_its_ends_forms_one_sum_only() -> None:
    nan, ends = [math.nan], {0.0: {"logps": [-1.0], "shared": [-2.0]}, 1.0: {"logps": [-2.0], "shared": [-1.0]}}
    for ld_alpha, sums in ends.items():
        unread = {"shared": nan} if ld_alpha == 1 else {"logps": nan}
        chosen, rejected = stats(**sums | unread), stats([-5.0], shared=[-5.0])
        out = preference_loss(chosen, rejected, PreferenceConfig(reference_free=True, ld_alpha=ld_alpha))
        assert out.losses.item() == pytest.approx(softplus(-0.1 * (-2.0 + 5.0)))
        assert out.chosen_rewards.item() == pytest.approx(0.1 * -2.0)


def test_ld_dpo_keeps_an_infinite_log_prob_infinite() -> None:
    chosen, rejected = stats([-math.inf], shared=[-math.inf]), stats([-1.0], shared=[-1.0])
    out = preference_loss(chosen, rejected, PreferenceConfig(reference_free=True, ld_alpha=0.5))
    assert out.losses.tolist() == [math.inf]


def test_ld_dpo_leaves_the_sft_term_alone() -> None:
    sides = draw_sides(6, 4)
    for reduction in ("mean", "sum", "token"):
        sft = {"sft_weight": 0.7, "sft_reduction": reduction}
        terms = [run(sides, fields | sft).loss - run(sides, fields).loss for fields in ({}, {"ld_alpha": 0.2})]
        torch.testing.assert_close(*terms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_without_sft_weight_the_sft_term_is_not_formed(reduction: str) -> None:
    assert loss_at([-math.inf], sft_reduction=reduction)[0].loss.item() == math.inf


UNREAD = [{"reference_free": True}, {"reference_mix": 0.0}, {"pref_loss_type": "orpo"}]


@pytest.mark.parametrize("fields", UNREAD, ids=str)
def test_unused_references_are_never_read(fields: Fields) -> None:
    sides, nan = draw_sides(6, 4), np.full(4, math.nan)
    poison = {name: replace(sides[name], logps=nan, entropy=nan) for name in ("ref_chosen", "ref_rejected")}
    tensors = to_stats(sides | poison)
    out = preference_loss(**tensors, config=PreferenceConfig(**fields))
    out.loss.backward()
    assert torch.equal(out.losses, run(sides, fields).losses)
    assert tensors["chosen"].logps.grad.isfinite().all() and tensors["rejected"].logps.grad.isfinite().all()
    if "reference_mix" not in fields:
        assert out.margins.isfinite().all() and all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("sft_reduction", ["mean", "sum", "token"])
def test_a_pair_of_empty_responses_is_finite(sft_reduction: str) -> None:
    empty = stats([0.0], [0], [0.0])
    config = PreferenceConfig.preset("ln_dpo", sft_weight=1.0, sft_reduction=sft_reduction)
    out = preference_loss(empty, empty, config, ref_chosen=empty, ref_rejected=empty)
    assert out.loss.item() == pytest.approx(math.log(2)) and out.margins.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_empty_responses_and_ties_are_finite_in_every_method(name: str, dtype: torch.dtype) -> None:
    config = PreferenceConfig.preset(name)
    # Both empty; chosen empty; rejected empty; a tie of two that are not.
    logps, lengths = [[0.0, 0.0, -4.0, -3.0], [0.0, -4.0, 0.0, -3.0]], [[0, 0, 5, 5], [0, 5, 0, 5]]
    pair = [
        stats(x, n, np.sign(n).tolist(), dtype, shared=np.multiply(x, 0.5), log_sum_sq=np.multiply(x, 0.3))
        for x, n in zip(logps, lengths, strict=True)
    ]
    given = {"ref_chosen": pair[0], "ref_rejected": pair[1], "vocab_size": VOCAB}
    floor = torch.full((4,), 1e-6, dtype=dtype, requires_grad=True)
    given |= {"chosen_variance": floor, "rejected_variance": floor} if name == "disco_dpo" else {}
    out = preference_loss(*pair, config, **given)
    out.loss.backward()
    assert out.losses.isfinite().all() and all(value.isfinite() for value in out.metrics.values())
    assert all(side.logps.grad.isfinite().all() for side in pair)
    assert floor.grad is None or floor.grad.isfinite().all()
    assert out.margins[0] == out.margins[3] == 0


def test_orpo_of_an_empty_response_is_that_of_a_nearly_certain_one() -> None:
    eps, means = torch.finfo(torch.float64).eps, (np.array([-0.5]), np.array([0.0]))
    for chosen, rejected in (means, means[::-1]):
        want = -chosen + 0.1 * softplus(log_odds(np.minimum(rejected, -eps)) - log_odds(np.minimum(chosen, -eps)))
        sides = [stats(mean * 4, [4 if mean else 0]) for mean in (chosen, rejected)]
        out = preference_loss(*sides, PreferenceConfig.preset("orpo"))
        assert out.losses.item() == pytest.approx(want.item(), rel=1e-10)


def test_an_empty_batch_of_tokens_has_no_sft_term() -> None:
    empty = stats([0.0], [0], [0.0])
    assert preference_loss(empty, empty, PreferenceConfig(pref_loss_type="sft")).loss.item() == 0.0


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
@pytest.mark.parametrize("name", METHODS)
def test_float32_stays_float32(name: str, beta: float | torch.Tensor | None) -> None:
    if name == "aot" and isinstance(beta, torch.Tensor):
        beta = beta[0]
    sides, config = draw_sides(8, 3), PreferenceConfig.preset(name, sft_weight=0.1)
    given = {"beta": beta, "vocab_size": VOCAB} | (tensors(variances(8, 3)) if name == "disco_dpo" else {})
    given |= {} if name == "aot" else {"pair_weight": torch.tensor([1.0, 0.3, 2.0])}
    single, double = (
        preference_loss(**to_stats(sides, dtype), config=config, **given) for dtype in (torch.float32, torch.float64)
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
    spread = {"std": b.std(), "min": 0.1, "max": 2.0}
    assert {name: metrics[f"beta/{name}"].item() for name in spread} == pytest.approx(spread)
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


@pytest.mark.parametrize("reference", REFERENCES, ids=str)
@pytest.mark.parametrize("normalized", [False, True])
def test_batch_beta_is_a_constant_to_the_policy(reference: Fields, normalized: bool) -> None:
    fields = reference | {"length_normalization": normalized, "batch_beta_coef": 2.0, "beta": 0.3}
    state: Fields = {}
    run(draw_sides(4, 6), fields, state=state)
    sides = to_stats(draw_sides(3, 6))
    moved = preference_loss(**sides, config=PreferenceConfig(**fields), state=state)
    b = moved.metrics["beta/mean"]
    assert abs(b - 0.3) > 0.01
    fixed = preference_loss(**sides, config=PreferenceConfig(**fields | {"batch_beta_coef": 0.0}), beta=b)
    assert torch.equal(moved.losses, fixed.losses)
    leaves = [sides[side].logps for side in SIDES[:2]]
    gradients = (torch.cat(torch.autograd.grad(out.loss, leaves)) for out in (moved, fixed))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert not any(value.requires_grad for value in state.values())


def test_batch_beta_follows_the_running_gap() -> None:
    """The first batch starts the mean; each later one enters it by a tenth before it is compared with it."""
    fields, state, mean = {"batch_beta_coef": 0.6, "beta": 0.5}, {}, None
    for seed in range(4):
        sides = draw_sides(seed, 5)
        gap = 0.5 * log_ratio(sides).mean()
        mean = gap if mean is None else 0.9 * mean + 0.1 * gap
        out = run(sides, fields, state=state)
        b = max(0.5 * (1 + 0.6 * (gap - mean)), 1e-3)
        assert out.metrics["beta/mean"].item() == pytest.approx(b, rel=1e-12)
        np.testing.assert_allclose(out.losses.detach(), softplus(-b * log_ratio(sides)), rtol=1e-10)
        assert (seed == 0) == (b == 0.5)
    assert torch.equal(run(sides, fields).losses, run(sides, {"beta": 0.5}).losses)


def test_batch_beta_has_a_floor_that_keeps_the_pairs_order() -> None:
    fields, state, s = {"batch_beta_coef": 1.0}, {}, np.array([0.2, 1.0])
    high, low = stats([0.0, 0.0]), stats([-200.0, -200.0])
    reference = {"ref_chosen": stats([0.0, 0.0]), "ref_rejected": stats([0.0, 0.0])}
    preference_loss(high, low, PreferenceConfig(**fields), **reference, state=state)
    out = preference_loss(low, high, PreferenceConfig(**fields), **reference, state=state, beta=torch.tensor(s))
    np.testing.assert_allclose(out.losses.detach(), softplus(1e-3 * 200 * np.ones(2)), rtol=1e-12)


def test_wpo_weights_are_constants_of_the_policy() -> None:
    sides = to_stats(draw_sides(3, 4))
    plain, weighted = (
        preference_loss(**sides, config=PreferenceConfig(use_weighting=weighted, sft_weight=0.3))
        for weighted in (False, True)
    )
    weights = (weighted.losses / plain.losses).detach()
    assert weighted.metrics["pair_weight/mean"].item() == pytest.approx(weights.mean().item())
    leaves = [sides[side].logps for side in SIDES[:2]]
    one, other = (torch.autograd.grad(out.losses.sum(), leaves) for out in (plain, weighted))
    for before, after in zip(one, other, strict=True):
        torch.testing.assert_close(after, weights * before, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "extra", [{}, {"sft_weight": 0.4, "sft_reduction": "token"}, {"pref_loss_type": "sft"}], ids=str
)
def test_a_pair_of_weight_2_counts_as_two(extra: Fields) -> None:
    sides = draw_sides(7, 3)
    twice = {name: Responses(*(x[[0, 1, 1, 2]] for x in vars(side).values())) for name, side in sides.items()}
    tokens = float(twice["chosen"].lengths.sum())
    totals = StepTotals(torch.tensor(4.0), torch.tensor(tokens))
    weighted = run(sides, extra, pair_weight=np.array([1.0, 2.0, 1.0]), totals=totals)
    assert weighted.loss.item() == pytest.approx(run(twice, extra).loss.item(), rel=1e-12)


def test_pair_weights_are_not_normalised_and_get_no_gradient() -> None:
    sides, weight = draw_sides(7, 3), torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    out, plain = run(sides, {"sft_weight": 0.2}, pair_weight=weight), run(sides, {"sft_weight": 0.2})
    assert torch.equal(out.losses, weight * plain.losses) and out.loss.item() == out.losses.mean().item()
    assert torch.equal(out.margins, plain.margins)
    out.loss.backward()
    assert weight.grad is None


@pytest.mark.parametrize("name", ["dpo", "cpo", "orpo", "rainbowpo", "disco_dpo"])
def test_micro_batches_of_any_size_add_up_to_the_batch(name: str) -> None:
    sides, fields, spread = draw_sides(8, 7), dict(METHODS[name].settings), variances(8, 7) if "disco" in name else {}
    rows, tokens = torch.tensor(7.0), torch.tensor(float(sides["chosen"].lengths.sum()))
    parts = []
    for rows_of in (slice(0, 2), slice(2, 3), slice(3, 7)):
        cut = {side: Responses(*(x[rows_of] for x in vars(own).values())) for side, own in sides.items()}
        some = {name: x[rows_of] for name, x in spread.items()}
        parts.append(run(cut, fields, totals=StepTotals(rows, tokens), **some).loss)
    assert sum(parts).item() == pytest.approx(run(sides, fields, **spread).loss.item(), rel=1e-12)


def test_a_variance_below_the_floor_counts_as_the_floor() -> None:
    sides, fields = draw_sides(9, 2), HEAD | {"pref_loss_type": "disco", "variance_floor": 0.5}
    small = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
    out = run(sides, fields, chosen_variance=small, rejected_variance=small)
    want = oracle(sides, fields, chosen_variance=np.array([0.25, 0.4]), rejected_variance=np.array([0.25, 0.4]))
    assert_matches(out, want)
    out.loss.backward()
    assert small.grad[0] == 0 and small.grad[1] != 0
    assert out.metrics["variance/min"] == 0.5


# An option -> what it needs beside it to act, and legal values other than the default.
WALKED: dict[str, tuple[Fields, tuple[Any, ...]]] = {
    "beta": ({}, (0.37,)),
    "length_normalization": ({}, (True,)),
    "home_advantage": ({}, (0.3, -0.3)),
    "margin_units": ({"home_advantage": 0.3}, ("logratio",)),
    "reference_mix": ({}, (0.0, 0.5)),
    "reference_free": ({}, (True,)),
    "contextual_scaling": ({}, ("mallows",)),
    "contextual_scaling_coef": ({"contextual_scaling": "mallows"}, (0.29,)),
    "sft_weight": ({}, (0.4,)),
    "sft_reduction": ({"sft_weight": 0.4}, ("sum", "token")),
    "label_smoothing": ({}, (0.2,)),
    "f_divergence_type": ({}, ("forward_kl", "js_divergence", "js", "alpha_divergence", "alpha")),
    "f_alpha_divergence_coef": ({"f_divergence_type": "alpha"}, (0.7,)),
    "ld_alpha": ({}, (0.0, 0.4)),
    "use_weighting": ({}, (True,)),
    "batch_beta_coef": ({}, (0.5,)),
    "discopop_tau": ({}, (0.5,)),
    "hinge_delta": ({}, (1.7,)),
    "variance_floor": ({}, (2.5,)),
}
# Heads and what the trainer applies: no number of `preference_loss`.
NOT_WALKED = {
    "pref_loss_type", "beta_mode", "add_beta_head", "beta_head_config", "add_disco_head", "disco_prior_weight",
    "regularizers", "beta_schedule",
}  # fmt: skip
# What these losses are in any case.
SAID_TWICE = {("orpo", "reference_free"), ("orpo", "length_normalization")}
SAID_TWICE |= {("sigmoid_norm", "length_normalization"), ("ipo_norm", "length_normalization")}
SAID_TWICE |= {("sft", "beta")}  # sft's rewards are measured in it, its loss is not
# An argument of the call -> values other than None
ARGUMENTS: dict[str, Any] = {
    "context_scale": np.array([0.5, 1.0, 2.0, 0.7]),
    "pair_weight": np.array([0.5, 1.0, 2.0, 0.7]),
    "beta": np.array([0.05, 0.2, 0.3, 0.4]),
}


def number(fields: Fields, **given: Any) -> float:
    """The loss of a second batch, by everything the options could read."""
    config, state = PreferenceConfig(**fields), {}
    given = tensors(given | (variances(6, 4) if "disco" in config.loss_weights else {}))
    for seed in (5, 6):
        sides = to_stats(draw_sides(seed, 4, near=3.0))
        out = preference_loss(**sides, config=config, vocab_size=VOCAB, state=state, **given)
    return out.loss.item()


def needed(loss: str) -> Fields:
    return HEAD | {"pref_loss_type": loss} | ({"label_smoothing": 0.1} if loss == "exo_pair" else {})


def refusal(option: str, losses: tuple[str, ...], fields: Fields, **given: Any) -> float | None:
    """The loss, or None where it is refused by an error that names the option and one of the losses."""
    try:
        return number(fields, **given)
    except ValueError as error:
        assert option in str(error) and any(name in str(error) for name in losses), error
        return None


def test_every_option_is_walked() -> None:
    assert {field.name for field in dataclass_fields(PreferenceConfig)} == set(WALKED) | NOT_WALKED


@pytest.mark.parametrize("option", WALKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_changes_the_loss_or_is_refused(loss: str, option: str) -> None:
    """An option whose effect another one scales meets it above its default."""
    if (loss, option) in SAID_TWICE:
        pytest.skip("holds of this loss in any case")
    companion, values = WALKED[option]
    base = needed(loss) | companion
    before = refusal(next(iter(companion), ""), (loss,), base)
    for value in values:
        after = refusal(option if before is not None else "", (loss,), base | {option: value})
        assert after is None or (before is not None and abs(after - before) > 1e-9), (value, before, after)


@pytest.mark.parametrize("option", WALKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_of_a_sum_changes_it_or_is_refused(loss: str, option: str) -> None:
    companion, values = WALKED[option]
    base = needed(loss) | companion | {"pref_loss_type": {"square": 0.5, loss: 1.0}}
    try:
        before = number(base)
    except ValueError:
        return  # the companion was refused, which the test above reads
    for value in values:
        after = refusal(option, (loss, "square"), base | {option: value})
        assert after is None or abs(after - before) > 1e-9, (value, before, after)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_argument_changes_the_loss_or_is_refused(loss: str, argument: str) -> None:
    if (loss, argument) in SAID_TWICE:
        pytest.skip("the loss does not read it")
    after = refusal(argument, (loss,), needed(loss), **{argument: ARGUMENTS[argument]})
    assert after is None or abs(after - number(needed(loss))) > 1e-9
    refused = {"context_scale": (*RESPONSE_LOSSES, *SORTED_LOSSES, "orpo", "sft")}
    assert (after is None) is (loss in refused.get(argument, SORTED_LOSSES))


# Options that the formula gives these losses: refusing everything would pass the walk.
OF_Z = {"home_advantage", "margin_units", "contextual_scaling", "contextual_scaling_coef", "f_divergence_type"}
OF_Z |= {"label_smoothing", "f_alpha_divergence_coef"}
OF_RESPONSES = {"length_normalization", "reference_mix", "reference_free", "ld_alpha", "batch_beta_coef", "beta"}
OF_ALL = {"sft_weight", "sft_reduction", "use_weighting"}
READ: dict[str, set[str]] = {
    **dict.fromkeys(LINKS, OF_Z | OF_RESPONSES | OF_ALL),
    **dict.fromkeys(RESPONSE_LOSSES, OF_RESPONSES | OF_ALL),
    **dict.fromkeys(SORTED_LOSSES, OF_RESPONSES | OF_ALL - {"use_weighting"} | {"label_smoothing"}),
    "orpo": {"beta", "batch_beta_coef", "length_normalization", "reference_free"} | OF_ALL,
    "sft": OF_ALL,
}
for own, names in {"hinge_delta": HINGE, "discopop_tau": ["discopop"], "variance_floor": ["disco"]}.items():
    READ |= {name: READ[name] | {own} for name in names}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_is_refused_exactly_where_the_formula_lacks_it(loss: str) -> None:
    for option, (companion, values) in WALKED.items():
        if (loss, option) == ("sft", "beta"):
            continue  # the test above has it
        accepted = []
        for value in values:
            try:
                PreferenceConfig(**needed(loss) | companion | {option: value})
            except ValueError:
                continue
            accepted.append(value)
        assert accepted == (list(values) if option in READ[loss] else []), option


THREE, ONE = stats([-1.0, -2.0, -3.0]), stats([-1.0])
PHI_WANTED = PreferenceConfig(**MALLOWS)
DISCO = PreferenceConfig(**HEAD, pref_loss_type="disco")
WPO, LD = PreferenceConfig(use_weighting=True), PreferenceConfig(ld_alpha=0.5)
FULL = stats([-1.0, -2.0, -3.0], shared=[-1.0] * 3, log_sum_sq=[-1.0] * 3)
V = {"chosen_variance": torch.ones(3), "rejected_variance": torch.ones(3)}
BAD_CALLS: list[tuple[str, Fields]] = [
    *((side, {side: torch.zeros(3)}) for side in SIDES),
    *((side, {side: ONE}) for side in SIDES[1:]),
    *((side, {side: None}) for side in SIDES),
    ("config", {"config": "dpo"}),
    *(("beta", {"beta": beta}) for beta in (0.0, -0.1, math.nan, "0.1")),
    *(("beta", {"beta": torch.ones(shape)}) for shape in ((1,), (3, 1))),
    *((name, {name: torch.ones(shape)}) for name in ("context_scale", "pair_weight") for shape in ((1,), (3, 1))),
    *((name, {name: 1.0}) for name in ("context_scale", "pair_weight")),
    *(("vocab_size", {"config": PHI_WANTED, "vocab_size": size}) for size in (None, 1)),
    ("ref_chosen", {"config": replace(PHI_WANTED, reference_mix=0.0), "ref_chosen": None}),
    ("reference_free", {"config": replace(PHI_WANTED, reference_free=True)}),
    *((name, {"config": DISCO} | V | {name: bad}) for name in V for bad in (None, 1.0, torch.ones(1))),
    *((name, {name: torch.ones(3)}) for name in V),  # the loss is no disco
    *((side, {"config": WPO} | dict.fromkeys(SIDES, FULL) | {side: THREE}) for side in SIDES[:2]),
    *((side, {"config": LD} | dict.fromkeys(SIDES, FULL) | {side: THREE}) for side in SIDES),
    ("use_weighting", {"config": WPO}),
    ("ld_alpha", {"config": LD}),
    ("chosen", {"chosen": FULL._replace(shared_logps=torch.ones(1))}),
    ("rejected", {"rejected": FULL._replace(log_sum_sq_probs=torch.ones(1))}),
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
        *(
            (f"{loss} dynamic_scaling", LEDPO | {"pref_loss_type": loss_type})
            for loss in ("ipo", "ipo_norm", "sppo_hard", "orpo", "aot", "aot_unpaired", "sft")
            for loss_type in (loss, {loss: 0.5} | ({} if loss == "sft" else {"sigmoid": 1.0}))
        ),
        ("dynamic_scaling add_beta_head", {"beta_mode": "dynamic_scaling"}),
        ("disco add_disco_head", {"pref_loss_type": "disco"}),
        ("disco add_disco_head", {"pref_loss_type": {"sigmoid": 1.0, "disco": 0.5}}),
        ("exo_pair label_smoothing", {"pref_loss_type": "exo_pair"}),
        ("robust label_smoothing", {"pref_loss_type": "robust", "label_smoothing": 0.5}),
        ("aot use_weighting", {"pref_loss_type": "aot", "use_weighting": True}),
        ("f_divergence_type reference_free", {"f_divergence_type": "js", "reference_free": True}),
        ("f_divergence_type reference_mix", {"f_divergence_type": "js", "reference_mix": 0.5}),
        ("f_divergence_type hellinger forward_kl", {"f_divergence_type": "hellinger"}),
        ("f_alpha_divergence_coef js", {"f_divergence_type": "js", "f_alpha_divergence_coef": 0.7}),
        ("reference_mix reference_free", {"reference_free": True, "reference_mix": 0.5}),
        ("pref_loss_type sigmoidal truncated_square", {"pref_loss_type": "sigmoidal"}),
        ("pref_loss_type sigmoidal truncated_square", {"pref_loss_type": {"sigmoidal": 1.0}}),
        ("pref_loss_type", {"pref_loss_type": {}}),
        ("pref_loss_type sigmoid", {"pref_loss_type": {"sigmoid": 0.0}}),
        *(("pref_loss_type sft", {"pref_loss_type": {"sft": weight}}) for weight in (-1.0, math.inf, math.nan, "1")),
        ("margin_units nats logratio", {"margin_units": "nats"}),
        ("sft_reduction median token", {"sft_reduction": "median"}),
        ("contextual_scaling rainbow mallows", {"contextual_scaling": "rainbow"}),
        *((f"{name} 1.5", {name: 1.5}) for name in ("reference_mix", "ld_alpha", "label_smoothing")),
        *((f"{name} -0.1", {name: -0.1}) for name in ("beta", "sft_weight", "batch_beta_coef", "ld_alpha")),
        *((f"{name} 0.0", {name: 0.0}) for name in ("hinge_delta", "discopop_tau", "variance_floor")),
    ],
)
def test_objectives_that_make_no_sense_are_refused(mentions: str, fields: Fields) -> None:
    with pytest.raises(ValueError) as error:
        PreferenceConfig(**fields)
    assert all(word in str(error.value) for word in mentions.split())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in (*SORTED_LOSSES, "sft")])
def test_an_impossible_response_leaves_beta_and_variance_numbers(loss: str) -> None:
    """Where the loss is finite; its limit does not move with beta and variance."""
    beta, spread = (torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.5))
    known = {"chosen_variance": spread, "rejected_variance": spread} if loss == "disco" else {}
    leaves = (beta, spread) if loss == "disco" else (beta,)
    config = PreferenceConfig(**needed(loss), **({} if loss == "orpo" else {"reference_free": True}))
    for w, r in ((-3.0, -math.inf), (-math.inf, -3.0)):
        sides = stats([w, -2.0]), stats([r, -3.0])
        left_out = preference_loss(*sides, config, beta=beta, pair_weight=torch.tensor([0.0, 1.0]), **known)
        assert left_out.loss.isfinite()
        losses = [left_out.loss]
        losses += [loss for loss in (preference_loss(*sides, config, beta=beta, **known).loss,) if loss.isfinite()]
        for value in losses:
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, leaves))


def test_disco_under_functional_transforms() -> None:
    """torch.func's gradient is autograd's."""
    z = torch.tensor([-1e4, -30.0, 0.5, 8.0], dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    log_ndtr(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: log_ndtr(x).sum())(z), leaf.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("x", [-1e4, -40.0, -1.0, 0.0, 3.0, 15.0, 50.0])
def test_second_derivative_of_log_ndtr_is_that_of_its_slope(x: float) -> None:
    """(log Phi)'' = -r (x + r), here from the slopes next to x; far above 0 it is 0 and not 0 * inf."""
    at = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_ndtr(at).sum(), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), at)
    step = 1e-4 * max(1.0, abs(x))
    near = mills(np.array([x - step, x + step]))
    assert curvature.item() == pytest.approx((near[1] - near[0]) / (2 * step), rel=1e-5, abs=1e-12)


def test_statistics_of_an_odd_number_of_rows_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="even number of rows"):
        stats([-1.0, -2.0, -3.0]).split()
    with pytest.raises(ValueError, match="even number of rows"):
        SequenceStats(torch.zeros(3), torch.ones(3), torch.zeros(3)).split()


def test_a_learnable_beta_of_a_sorted_batch_survives_an_impossible_response() -> None:
    beta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sides = stats([-3.0, -4.0, -5.0]), stats([-2.0, -math.inf, -6.0])
    config = PreferenceConfig(pref_loss_type="aot_unpaired", reference_free=True)
    preference_loss(*sides, config, beta=beta).losses[1].backward()
    assert beta.grad.isfinite()
