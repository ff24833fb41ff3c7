"""The Beta and Disco heads against MATH.md: formulas, bounds, dtypes, saving; and what learning s(x) comes to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

from fastpo import LossOutput, PreferenceConfig, SequenceStats, preference_loss
from fastpo.config import BetaHeadConfig
from fastpo.heads import BetaHead, DiscoHead
from fastpo.regularizers import regularizer_loss

D = 6
K = math.log(4)
LEDPO = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
KINDS = ("linear", "mlp")
FEATURES = [names for count in (1, 2, 3) for names in combinations(("hidden", "perplexity", "entropy"), count)]
PROMPTS = {  # of five prompts
    "hidden": torch.randn(5, D, generator=torch.Generator().manual_seed(0)),
    "perplexity": torch.tensor([1.0, 3.0, 20.0, 400.0, 1e4]),
    "entropy": torch.tensor([0.0, 0.1, 0.4, 0.7, 1.0]),
}
Fields = dict[str, Any]


def beta_head(scale: float = 0.0, size: int = D, **fields: Any) -> BetaHead:
    """As built, or with a last layer drawn at a scale."""
    torch.manual_seed(1)
    head = BetaHead(size, BetaHeadConfig(**fields))
    if scale:
        for parameter in head.layers[-1].parameters():
            nn.init.normal_(parameter, std=scale)
    return head


def disco_head(scale: float = 1.0) -> DiscoHead:
    torch.manual_seed(1)
    head = DiscoHead(D)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=scale)
    return head


def numpy_u(head: BetaHead, features: Tensor) -> np.ndarray:
    x, *pairs = (array.detach().double().numpy() for array in (features, *head.parameters()))
    for weight, bias in zip(pairs[:-2:2], pairs[1:-2:2], strict=True):
        x = x @ weight.T + bias
        x = x / (1 + np.exp(-x))
    return (x @ pairs[-2].T + pairs[-1])[:, 0]


# --- the Beta head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s_max", [4.0, None])
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_s_is_exactly_1_at_the_start(kind: str, features: tuple[str, ...], s_max: float | None) -> None:
    head = beta_head(kind=kind, features=features, s_max=s_max)
    prompts = {name: PROMPTS[name] for name in features}  # the others need not be there
    assert head(**prompts).tolist() == [1.0] * 5 and head.log_s(**prompts).tolist() == [0.0] * 5


@pytest.mark.parametrize("s_max", [1.5, 4.0, 100.0, None])
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_s_is_the_stated_formula(kind: str, features: tuple[str, ...], s_max: float | None) -> None:
    head = beta_head(0.7, kind=kind, features=features, s_max=s_max, hidden_size=7)
    u = numpy_u(head, head.features(**PROMPTS))
    log_s = u if s_max is None else math.log(s_max) * np.tanh(u / math.log(s_max))
    np.testing.assert_allclose(head.log_s(**PROMPTS).detach(), log_s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head(**PROMPTS).detach(), np.exp(log_s), rtol=1e-5)


def test_features_are_standardised_hidden_states_log_perplexity_and_entropy() -> None:
    head = beta_head(features=("hidden", "perplexity", "entropy"))
    got = head.features(**PROMPTS).double()
    assert got.shape == (5, D + 2) and not got.requires_grad
    x = PROMPTS["hidden"].double()
    want = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(got[:, :D], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, D], PROMPTS["perplexity"].double().log(), rtol=1e-6, atol=1e-6)
    assert got[:, D + 1].tolist() == PROMPTS["entropy"].tolist()


@pytest.mark.parametrize("size", [1e4, 1e15])
@pytest.mark.parametrize("s_max", [1.01, 4.0, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_s_stays_within_its_bounds(kind: str, s_max: float, size: float) -> None:
    head = beta_head(1e3, kind=kind, s_max=s_max, features=("hidden", "perplexity", "entropy"))
    s = head(**{name: size * value for name, value in PROMPTS.items()})
    # tanh rounds to 1 there: closed bounds, to a rounding.
    assert (s <= s_max * (1 + 1e-6)).all() and (s >= (1 - 1e-6) / s_max).all()
    assert s.max() > 0.99 * s_max or s.min() < 1.01 / s_max
    s.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_parameters_and_never_the_features(kind: str) -> None:
    head = beta_head(0.7, kind=kind, features=("hidden", "perplexity", "entropy"))
    prompts = {name: value.clone().requires_grad_() for name, value in PROMPTS.items()}
    head(**prompts).sum().backward()
    assert all(value.grad is None for value in prompts.values())
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_moves_it_off_1(kind: str) -> None:
    head = beta_head(kind=kind)
    head(PROMPTS["hidden"]).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.layers[-1].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_beta_head_is_float32_for_any_input_and_under_autocast(kind: str, dtype: torch.dtype) -> None:
    head = beta_head(0.7, kind=kind, features=("hidden", "perplexity", "entropy"))
    prompts = {name: value.to(dtype) for name, value in PROMPTS.items()}
    want = head(**{name: value.float() for name, value in prompts.items()})
    assert want.dtype == torch.float32
    assert torch.equal(head(**prompts), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s, log_s = head(**prompts), head.log_s(**prompts)
    assert s.dtype == log_s.dtype == torch.float32 and torch.equal(s, want)


@pytest.mark.parametrize("kind", KINDS)
def test_built_under_another_default_dtype_it_is_float32(kind: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        heads = beta_head(kind=kind), DiscoHead(D)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.dtype == torch.float32 for head in heads for parameter in head.parameters())


@pytest.mark.parametrize(
    "head", [beta_head(0.7), beta_head(0.7, kind="mlp"), disco_head()], ids=["linear", "mlp", "disco"]
)
def test_a_head_inside_a_model_survives_its_cast(head: nn.Module) -> None:
    # bf16_full_eval, say, casts the whole model.
    model = nn.ModuleDict({"head": head}).to(torch.bfloat16)
    out = model["head"](PROMPTS["hidden"].bfloat16())
    assert all(value.dtype == torch.float32 for value in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("hidden", {"hidden": value}) for value in (None, torch.ones(5), torch.ones(5, D + 1), torch.ones(2, 5, D))),
        *(
            (name, {name: v})
            for name in ("perplexity", "entropy")
            for v in (None, 0.5, torch.ones(()), torch.ones(5, 1))
        ),
    ],
    ids=str,
)
def test_a_feature_that_is_missing_or_misshapen_is_named(name: str, change: Fields) -> None:
    head = beta_head(features=("hidden", "perplexity", "entropy"))
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        head(**PROMPTS | change)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("kind", {"kind": value}) for value in ("deep", None, 3)),
        *(("hidden_size", {"hidden_size": value}) for value in (0, -1, 2.5, None, True)),
        *(
            ("features", {"features": value})
            for value in ((), [], ("hidden", "hidden"), ["reward"], "hidden", None, [3])
        ),
        *(("s_max", {"s_max": value}) for value in (1.0, 0.5, -4.0, math.nan, math.inf, "4", True)),
        *(("lr_multiplier", {"lr_multiplier": value}) for value in (0.0, -0.1, math.nan, math.inf, None, "0.1")),
        *(("direction", {"direction": value}) for value in ("up", 1, None)),
    ],
    ids=str,
)
def test_a_bad_field_of_the_config_names_itself(name: str, fields: Fields) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        BetaHeadConfig(**fields)
    with pytest.raises((ValueError, TypeError), match=rf"beta_head_config.*\b{name}\b"):
        PreferenceConfig(**LEDPO, beta_head_config=fields)


def test_config_defaults_and_spellings() -> None:
    config = BetaHeadConfig()
    assert (config.kind, config.s_max, config.direction) == ("linear", 4.0, "familiar") and config.lr_multiplier < 1
    listed = PreferenceConfig(**LEDPO, beta_head_config={"features": ["hidden", "entropy"]})
    assert listed.beta_head == BetaHeadConfig(features=("hidden", "entropy"))
    assert PreferenceConfig().beta_head == config == BetaHead(D).config
    with pytest.raises((ValueError, TypeError), match=r"beta_head_config.*depth"):
        PreferenceConfig(**LEDPO, beta_head_config={"depth": 3})
    with pytest.raises(ValueError, match=r"beta_head_config.*add_beta_head"):
        PreferenceConfig(beta_head_config={})


# --- the Disco head -------------------------------------------------------------------------------------------------


def test_disco_head_is_a_mean_and_a_softplus_variance() -> None:
    head = disco_head()
    mean, variance = head(PROMPTS["hidden"])
    weight, bias = (parameter.detach().double().numpy() for parameter in head.parameters())
    out = PROMPTS["hidden"].double().numpy() @ weight.T + bias
    np.testing.assert_allclose(mean.detach(), out[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance.detach(), np.logaddexp(0, out[:, 1]) + 1e-3, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_its_variance_is_at_least_a_thousandth(scale: float) -> None:
    mean, variance = disco_head(scale)(1e3 * PROMPTS["hidden"])
    assert mean.shape == variance.shape == (5,) and variance.isfinite().all()
    assert variance.min().item() >= 1e-3 and variance.min().item() == pytest.approx(1e-3)


def test_gradient_reaches_the_trained_model_through_both() -> None:
    for index in range(2):
        hidden, head = PROMPTS["hidden"].clone().requires_grad_(), disco_head()
        head(hidden)[index].sum().backward()
        assert hidden.grad.abs().min() > 0
        assert all(parameter.grad[index].abs().sum() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_disco_head_is_float32_for_any_input_and_under_autocast(dtype: torch.dtype) -> None:
    head, hidden = disco_head(), PROMPTS["hidden"].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(hidden)
    for got, again, want in zip(inside, head(hidden), head(hidden.float()), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want) and torch.equal(again, want)


@pytest.mark.parametrize("shape", [(5,), (5, D + 1), (2, 5, D)], ids=str)
def test_disco_head_names_a_misshapen_hidden(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hidden"):
        disco_head()(torch.ones(shape))


# --- saving ---------------------------------------------------------------------------------------------------------

SAVED: dict[str, nn.Module] = {
    "linear": beta_head(0.7),
    "mlp": beta_head(0.7, kind="mlp", hidden_size=5, features=("hidden", "entropy"), direction="unfamiliar"),
    "unbounded": beta_head(0.7, s_max=None, features=("perplexity",), lr_multiplier=0.3),
    "untrained": beta_head(),
    "disco": disco_head(),
}


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want) and got.settings() == want.settings()
    if isinstance(want, BetaHead):
        assert got.config == want.config and got.input_size == want.input_size
    state = want.state_dict()
    assert got.state_dict().keys() == state.keys()
    assert all(
        torch.equal(value, state[key]) and value.dtype == torch.float32 for key, value in got.state_dict().items()
    )


@pytest.mark.parametrize("head", SAVED.values(), ids=SAVED)
def test_a_head_comes_back_as_it_was(head: Any, tmp_path: Path) -> None:
    for folder in (tmp_path / "new" / "folder", str(tmp_path / "text")):
        assert not type(head).is_saved(folder)
        head.save_pretrained(folder)
        assert type(head).is_saved(folder)
        assert_same(type(head).from_pretrained(folder), head)


def test_heads_share_a_folder_with_a_model(tmp_path: Path) -> None:
    others = {name: f"contents of {name}" for name in ("config.json", "model.safetensors", "adapter_config.json")}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    SAVED["linear"].save_pretrained(tmp_path)  # a later checkpoint overwrites it
    for name in ("mlp", "disco"):
        SAVED[name].save_pretrained(tmp_path)
    assert_same(BetaHead.from_pretrained(tmp_path), SAVED["mlp"])
    assert_same(DiscoHead.from_pretrained(tmp_path), SAVED["disco"])
    assert {name: (tmp_path / name).read_text() for name in others} == others
    kept = {f"{head}{end}" for head in ("beta_head", "disco_head") for end in (".safetensors", "_config.json")}
    assert {path.name for path in tmp_path.iterdir()} == kept | set(others)


def test_gathered_weights_are_saved_in_place_of_its_own(tmp_path: Path) -> None:
    head, gathered = beta_head(), SAVED["linear"].state_dict()
    head.save_pretrained(tmp_path, state_dict=gathered)
    assert_same(BetaHead.from_pretrained(tmp_path), SAVED["linear"])
    head.load_pretrained(tmp_path)
    assert_same(head, SAVED["linear"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, file: str, **_: Any) -> None:
        validate_repo_id(repo)  # refused before anything is sent
        raise AssertionError(f"asked the hub for {file} of {repo!r}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


LOCAL: list[str | Path] = [
    "",
    "missing",
    "./missing",
    "../missing",
    "/missing",
    "runs/",
    "runs/empty",
    "./runs/missing",
]
LOCAL += [Path(), Path("/missing/folder"), Path("missing"), Path("runs/empty"), Path("runs/missing")]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("folder", LOCAL, ids=repr)
@pytest.mark.parametrize("kind", [BetaHead, DiscoHead])
def test_a_local_path_never_reaches_for_the_hub(
    kind: Any, folder: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    # The other kind's head, so that the folder is no empty one.
    SAVED["disco" if kind is BetaHead else "linear"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=kind.name) as error:
        kind.from_pretrained(folder)
    assert repr(str(folder)) in str(error.value)
    assert not kind.is_saved(folder)


def test_a_head_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAVED["mlp"].save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(tmp_path / repo[6:] / file))
    assert_same(BetaHead.from_pretrained("owner/."), SAVED["mlp"])

    def offline(repo: str, file: str, **_: Any) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"owner/name.*beta_head"):
        BetaHead.from_pretrained("owner/name")


MISFITS: dict[str, Any] = {
    "no_weights": lambda folder: (folder / "beta_head.safetensors").unlink(),
    "no_config": lambda folder: (folder / "beta_head_config.json").unlink(),
    "weights_of_another_size": lambda folder: resave(folder, beta_head(size=D + 1)),
    "weights_of_another_kind": lambda folder: resave(folder, SAVED["mlp"]),
    "weights_cut_short": lambda folder: (folder / "beta_head.safetensors").write_bytes(b"12345"),
    "config_cut_short": lambda folder: (folder / "beta_head_config.json").write_text('{"input_size": 6, '),
    "config_without_the_size": lambda folder: rewrite(folder, "input_size", None),
    "config_of_another_program": lambda folder: rewrite(folder, "depth", 3),
    "config_out_of_range": lambda folder: rewrite(folder, "s_max", 0.5),
}  # fmt: skip


def resave(folder: Path, head: nn.Module) -> None:
    """The weights of another head under this one's config."""
    SAVED["linear"].save_pretrained(folder, state_dict=head.state_dict())


def rewrite(folder: Path, key: str, value: Any) -> None:
    """One entry of the saved config changed, or None: left out."""
    path = folder / "beta_head_config.json"
    fields = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("spoil", MISFITS.values(), ids=MISFITS)
def test_a_folder_that_does_not_fit_together_is_a_clear_error(spoil: Any, tmp_path: Path) -> None:
    SAVED["linear"].save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match="beta_head"):
        BetaHead.from_pretrained(tmp_path)


# --- learning s -----------------------------------------------------------------------------------------------------


def loss_at(h: Tensor, config: PreferenceConfig, beta: Tensor | None = None) -> LossOutput:
    """Loss of pairs with log-ratio difference h."""

    def stats(logps: Tensor) -> SequenceStats:
        return SequenceStats(logps, torch.ones(len(h), dtype=torch.long), torch.zeros_like(h))

    zero = stats(torch.zeros_like(h))
    return preference_loss(stats(h), zero, config, ref_chosen=zero, ref_rejected=zero, beta=beta)


def unbounded(regularizers: dict[str, float]) -> PreferenceConfig:
    return PreferenceConfig(**LEDPO, beta_head_config={"s_max": None}, regularizers=regularizers)


@pytest.mark.parametrize("kind", KINDS)
def test_without_bound_and_regulariser_s_runs_away(kind: str) -> None:
    config = unbounded({})
    h = torch.tensor([0.3, 1.0, 3.0, 10.0, -0.3, -1.0, -3.0, -10.0])
    head, prompts = beta_head(kind=kind, size=8, s_max=None), torch.eye(8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        loss_at(h, config, config.beta * head(prompts)).loss.backward()
        optimizer.step()
    s = head(prompts)
    # One direction a sign, whatever its size: h > 0 up, h < 0 down.
    assert (s[:4] > 100).all() and (s[4:] < 0.01).all()


# l^2/10 against softplus(-z): 0.2 l = z sigma(-z), at most 0.2785, reached at z = 1.2785, so that s <= e^1.3923.
WORST = 1.278465
LARGEST = 4.0240


@pytest.mark.parametrize("start", [0.0, 3.0])
def test_pointwise_bounds_a_free_s(start: float) -> None:
    config, h = unbounded({"pointwise": 0.1}), np.concatenate([[0.0, 10 * WORST / LARGEST], np.logspace(-3, 4, 40)])
    log_s = torch.full((42,), start, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        total = loss_at(torch.tensor(h), config, config.beta * log_s.exp()).loss + regularizer_loss(log_s, config)[0]
        (gradient,) = torch.autograd.grad(42 * total, log_s)  # a sum over prompts: every one for itself
        log_s.data -= gradient
    assert gradient.abs().max() < 1e-9  # converged
    s = log_s.detach().exp()
    assert s.max().item() == pytest.approx(LARGEST, abs=1e-3) and s.argmax() == 1
    assert (s >= 1 - 1e-9).all()


def test_pointwise_leaves_s_without_a_lower_bound() -> None:
    config, log_s = unbounded({"pointwise": 0.1}), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_s], lr=0.05)
    for _ in range(800):
        loss = loss_at(torch.tensor([-1e4], dtype=torch.float64), config, config.beta * log_s.exp()).loss
        optimizer.zero_grad()
        (loss + regularizer_loss(log_s, config)[0]).backward()
        optimizer.step()
    assert log_s.exp() < 0.01


def test_pointwise_bounds_a_head_without_bound() -> None:
    config = unbounded({"pointwise": 0.1})
    h = torch.tensor([0.0, 0.1, 1.0, 10 * WORST / LARGEST, 10.0, 100.0, 1e3, 1e4])
    head, prompts = beta_head(size=8, s_max=None), torch.eye(8)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_s = head.log_s(prompts)
        loss = loss_at(h, config, config.beta * log_s.exp()).loss + regularizer_loss(log_s, config)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    s = head(prompts)
    assert 4.0 < s.max() <= 4.03 and s.argmax() == 3


class LogS(nn.Module):
    """`functional_call` calls forward."""

    def __init__(self, head: BetaHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head.log_s(hidden)


def furthest_log_s(regularizers: dict[str, float] | None, lr: float, seeds: int = 20, steps: int = 500) -> Tensor:
    """(seeds,) largest |log s| on the way, of a simulated preference problem.

    64 prompts of 8 kinds, whose labels flip with probability 0 to 0.45, with hidden states and entropies by kind. A
    linear policy of shared features learns beside the default head, each by Adam at its own learning rate.
    """
    kinds, each, width = 8, 8, 16
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(seeds, kinds, 1, width, generator=rng) + 0.3 * torch.randn(
        seeds, kinds, each, width, generator=rng
    )
    hidden, unreliable = hidden.flatten(1, 2), torch.linspace(0, 1, kinds).repeat_interleave(each)
    entropy = (0.1 + 0.8 * unreliable).expand(seeds, -1)
    features, truth = torch.randn(seeds, 64, width, generator=rng), torch.randn(seeds, width, 1, generator=rng)
    flipped = torch.rand(seeds, 64, 1, generator=rng) < 0.45 * unreliable[:, None]
    features = features * torch.sign(features @ truth) * torch.where(flipped, -1, 1)  # chosen minus rejected

    config = PreferenceConfig(**LEDPO, regularizers=regularizers)
    module = LogS(BetaHead(width, config.beta_head))
    # Every seed has its own head, policy and batch; the seeds share the arithmetic.
    heads = {name: value.detach().expand(seeds, *value.shape).clone() for name, value in module.named_parameters()}
    policy = torch.zeros(seeds, width, 1, requires_grad=True)
    optimizer = torch.optim.Adam([
        {"params": [policy], "lr": lr},
        {"params": [value.requires_grad_() for value in heads.values()], "lr": lr * config.beta_head.lr_multiplier},
    ])  # fmt: skip

    def penalty(log_s: Tensor, entropy: Tensor, hidden: Tensor, state: Fields) -> tuple[Tensor, Fields]:
        return regularizer_loss(log_s, config, prompt_entropy=entropy, features=hidden, state=state)[0], state

    every_log_s = torch.func.vmap(lambda head, hidden: torch.func.functional_call(module, head, (hidden,)))
    every_penalty = torch.func.vmap(penalty)
    state: Fields = {}
    furthest = torch.zeros(seeds)
    for _ in range(steps):
        log_s = every_log_s(heads, hidden)
        furthest = torch.maximum(furthest, log_s.detach().abs().amax(1))
        out = loss_at((features @ policy).flatten(), config, config.beta * log_s.exp().flatten())
        penalties, state = every_penalty(log_s, entropy, hidden, state) if regularizers != {} else (torch.zeros(1), {})
        optimizer.zero_grad()
        (out.losses.view(seeds, 64).mean(1).sum() + penalties.sum()).backward()
        optimizer.step()
    return furthest


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap, of smooth
def test_the_default_head_never_saturates_and_without_regularisers_it_does() -> None:
    assert 0.2 * K < furthest_log_s(None, lr=1e-2).max() < 0.95 * K
    assert furthest_log_s({}, lr=1e-2).median() > 0.95 * K


@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_fixed_beta_bit_for_bit(kind: str, features: tuple[str, ...]) -> None:
    config = PreferenceConfig(**LEDPO, beta=0.07, beta_head_config={"kind": kind, "features": features})
    head = BetaHead(D, config.beta_head)
    h = torch.tensor([0.0, 3.1, -2.7, 1e3, -1e3])
    got = loss_at(h, config, config.beta * head(**PROMPTS))
    # preference_loss does not add the regularisers.
    for want in (loss_at(h, PreferenceConfig(beta=0.07)), loss_at(h, config)):
        assert torch.equal(got.loss, want.loss) and torch.equal(got.losses, want.losses)
        assert torch.equal(got.chosen_rewards, want.chosen_rewards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo_scaled"])
@pytest.mark.parametrize(
    ("zero", "fields"),
    [
        (True, {}),
        (True, {"length_normalization": True}),
        (True, {"home_advantage": 0.3}),
        (True, {"home_advantage": 0.3, "margin_units": "logratio", "reference_mix": 1.0}),  # m is 0 there
        (False, {"home_advantage": 0.3, "margin_units": "logratio"}),
        (False, {"reference_mix": 0.25}),
        (False, {"reference_free": True}),
    ],
    ids=str,
)
def test_where_policy_is_reference_the_head_gets_gradient_only_as_stated(
    zero: bool, fields: Fields, link: str, kind: str
) -> None:
    config = PreferenceConfig(**LEDPO, pref_loss_type=link, **fields)
    head, logps = (
        beta_head(0.7, kind=kind),
        torch.tensor([[-1.0, -4.0, -3.0, 0.0, -2.0], [-2.0, -2.0, -1.5, 0.0, -5.0]]),
    )
    lengths, entropy = torch.tensor([1, 7, 3, 0, 12]), torch.ones(5)
    chosen, rejected = (SequenceStats(row, lengths, entropy) for row in logps)
    beta = config.beta * head(PROMPTS["hidden"])
    preference_loss(chosen, rejected, config, ref_chosen=chosen, ref_rejected=rejected, beta=beta).loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in head.parameters()])
    assert bool((gradients == 0).all()) is zero
    if not zero:
        assert (gradients[-1:] != 0).all() and gradients.isfinite().all()


def test_h_above_0_pushes_s_up_and_below_0_down() -> None:
    log_s = torch.zeros(3, requires_grad=True)
    h, config = torch.tensor([2.0, 0.0, -2.0]), PreferenceConfig(**LEDPO)
    loss_at(h, config, config.beta * log_s.exp()).losses.sum().backward()
    # f'(z) beta h of sigmoid
    z = 0.1 * h.double()
    torch.testing.assert_close(log_s.grad.double(), -torch.sigmoid(-z) * z, rtol=1e-6, atol=0)
    assert replace(config, beta_head_config={"s_max": None}).beta_head.s_max is None
