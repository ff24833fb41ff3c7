import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_grads_close, assert_stats_close
from torch import Tensor

from fastpo import SequenceStats, linear_logps, linear_sequence_stats
from fastpo.kernels import chunked, configs, fused

GPU = torch.cuda.is_available()


@dataclass
class Case:
    """One drawn problem; tensors are made from `seed`, so that a failing example is short to print."""

    seed: int
    n: int
    d: int
    v: int
    size: float = 1.0  # standard deviation of the raw logits
    ignored: float = 0.3
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    contiguous: bool = True
    frozen: bool = False
    uses: str = "both"  # which statistics the loss reads: logps | entropy | both
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "temperature": self.temperature}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        hidden, weight = draw(self.n, self.d), draw(self.v, self.d) * self.size / math.sqrt(self.d)
        bias = draw(self.v) if self.bias else None
        labels = torch.randint(0, self.v, (self.n,), generator=rng)
        labels[torch.rand(self.n, generator=rng) < self.ignored] = -100
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        if not self.contiguous:
            hidden = torch.stack((hidden, hidden), dim=1)[:, 0]
            weight = weight.t().contiguous().t()
        return hidden, weight, None if bias is None else bias.to(self.dtype), labels


def evaluate(case: Case, impl: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and gradients of one implementation, on float64 copies of the same rounded inputs if so asked."""
    device = "cuda" if GPU and impl == "fused" else "cpu"
    hidden, weight, bias, labels = case.tensors()
    hidden, weight = (x.to(device, dtype) if x.dtype != dtype else x.to(device) for x in (hidden, weight))
    bias = None if bias is None else bias.to(device, dtype)
    leaves = [hidden.requires_grad_()]
    if not case.frozen:
        leaves += [x.requires_grad_() for x in (weight, bias) if x is not None]
    third = case.n // 3
    ends = torch.tensor([0, third, third, case.n], device=device)  # the second sequence is empty
    labels = labels.to(device)
    tokens = linear_logps(hidden, weight, labels, bias, impl=impl, **case.options)
    sequences = linear_sequence_stats(hidden, weight, labels, bias, cu_seqlens=ends, impl=impl, **case.options)
    factor = torch.linspace(-1, 2, case.n, device=device, dtype=tokens.logps.dtype)
    loss = tokens.logps.new_zeros(())
    if case.uses != "entropy":
        loss = loss + (tokens.logps * factor).sum() + (sequences.logps * factor[:3].mean()).sum()
    if case.uses != "logps":
        loss = loss + (tokens.entropy * factor.flip(0)).sum() + sequences.entropy.sum()
    grads = torch.autograd.grad(loss, leaves)
    stats = [tokens.logps, tokens.entropy, sequences.entropy, sequences.logps]
    return [x.detach().cpu() for x in stats], [g.cpu() for g in grads]


def max_logit(case: Case) -> float:
    hidden, weight, bias, _ = case.tensors()
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = case.logit_scale * logits
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return (logits / case.temperature).abs().max().item()


def check(case: Case, impl: str) -> None:
    truth, true_grads = evaluate(case, "reference", torch.float64)
    eager, _ = evaluate(case, "reference", case.dtype)
    stats, grads = evaluate(case, impl, case.dtype)
    largest = max_logit(case)
    for name, value, true, other in zip(("logps", "entropy", "mean entropy"), stats, truth, eager, strict=False):
        assert value.dtype == torch.float32
        assert_stats_close(name, value, true, other, largest)
    assert_stats_close("sums", stats[3] / case.n, truth[3] / case.n, eager[3] / case.n, largest)
    gain = case.logit_scale / case.temperature
    for name, grad, true in zip(("hidden", "weight", "bias"), grads, true_grads, strict=False):
        assert_grads_close(f"gradient in {name}", grad, true, scale=1e-2 * gain)


cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    n=st.integers(3, 40),
    d=st.integers(1, 70),
    v=st.integers(2, 300),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, None, 5.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.25, 1.7]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    contiguous=st.booleans(),
    frozen=st.booleans(),
    uses=st.sampled_from(["logps", "entropy", "both"]),
)


@pytest.fixture(scope="module")
def small_tiles() -> Any:
    """Tiles of chunked small enough that drawn shapes span several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(chunked, "MAX_ROWS", {"cpu": 16, "cuda": 16})
    patch.setattr(chunked, "MAX_COLS", 64)
    yield
    patch.undo()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_chunked_against_float64(small_tiles: None, case: Case) -> None:
    check(case, "chunked")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_fused_against_float64(case: Case) -> None:
    check(case, "fused")


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_as_exact_as_their_rounding(impl: str, dtype: torch.dtype) -> None:
    """Statistics are fp32-exact on the rounded inputs; gradients are rounded once, to the inputs' dtype."""
    case = Case(seed=1, n=37, d=48, v=257, bias=True, dtype=dtype)
    truth, true_grads = evaluate(case, "reference", torch.float64)
    stats, grads = evaluate(case, impl, dtype)
    for value, true in zip(stats, truth, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), true, atol=2e-5, rtol=1e-5)
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert_grads_close("gradient", grad, true, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_float64_stays_float64() -> None:
    case = Case(seed=2, n=20, d=9, v=300, bias=True, softcap=4.0, temperature=0.7, dtype=torch.float64)
    truth, true_grads = evaluate(case, "reference", torch.float64)
    stats, grads = evaluate(case, "chunked", torch.float64)
    for value, true in zip(stats + grads, truth + true_grads, strict=True):
        torch.testing.assert_close(value, true, atol=1e-12, rtol=1e-12)


def test_reference_against_numpy() -> None:
    """The oracle itself, against the formula written out."""
    hidden, weight, bias, labels = Case(seed=3, n=5, d=4, v=7, bias=True, ignored=0, dtype=torch.float64).tensors()
    x = 1.3 * (hidden.numpy() @ weight.numpy().T + bias.numpy())
    logits = 2.0 * np.tanh(x / 2.0) / 0.7
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    stats = linear_logps(hidden, weight, labels, bias, logit_scale=1.3, softcap=2.0, temperature=0.7, impl="reference")
    np.testing.assert_allclose(stats.logps, np.log(probs[np.arange(5), labels]), rtol=1e-12)
    np.testing.assert_allclose(stats.entropy, -(probs * np.log(probs)).sum(1), rtol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_reference(softcap: float | None) -> None:
    hidden, weight, bias, labels = Case(seed=4, n=4, d=3, v=5, bias=True, dtype=torch.float64).tensors()
    labels[1] = -100

    def stats(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        tokens = linear_logps(h, w, labels, b, softcap=softcap, temperature=0.8, impl="reference")
        sequences = linear_sequence_stats(h[None], w, labels[None], b, softcap=softcap, impl="reference")
        return tokens.logps, tokens.entropy, sequences.logps, sequences.entropy

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(stats, leaves)


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
class TestEveryImplementation:
    """What holds for all three behind the one signature."""

    def place(self, impl: str, *tensors: Tensor) -> list[Tensor]:
        return [x.cuda() if GPU and impl == "fused" else x for x in tensors]

    def test_padded_equals_packed(self, impl: str) -> None:
        lengths, width = [5, 0, 9, 1], 9
        hidden, weight = self.place(impl, torch.randn(4, width, 12), torch.randn(50, 12))
        labels = torch.randint(0, 50, (4, width), device=hidden.device)
        mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        labels[~mask] = -100
        padded = linear_sequence_stats(hidden, weight, labels, impl=impl)
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        packed = linear_sequence_stats(hidden[mask], weight, labels[mask], cu_seqlens=ends, impl=impl)
        assert padded.lengths.tolist() == lengths and padded.lengths.dtype == torch.int64
        for a, b in zip(padded, packed, strict=True):
            torch.testing.assert_close(a, b)
        tokens = linear_logps(hidden, weight, labels, impl=impl)
        torch.testing.assert_close(padded.logps, tokens.logps.sum(1))
        torch.testing.assert_close(padded.entropy, tokens.entropy.sum(1) / padded.lengths.clamp(min=1))
        assert padded.logps[1] == 0 and padded.entropy[1] == 0

    def test_ignored_rows_are_exactly_zero_and_never_read(self, impl: str) -> None:
        hidden, weight = self.place(impl, torch.randn(6, 8), torch.randn(20, 8))
        labels = torch.tensor([3, -1, 5, -1, -1, 0], device=hidden.device)
        hidden[labels == -1] = torch.nan
        hidden.requires_grad_()
        stats = linear_logps(hidden, weight, labels, ignore_index=-1, impl=impl)
        assert (stats.logps[labels == -1] == 0).all() and (stats.entropy[labels == -1] == 0).all()
        (stats.logps.sum() + stats.entropy.sum()).backward()
        assert hidden.grad.isfinite().all() and (hidden.grad[labels == -1] == 0).all()

    @pytest.mark.parametrize("shape", [(0, 4), (5, 4), (2, 0, 4)])
    def test_nothing_labelled(self, impl: str, shape: tuple[int, ...]) -> None:
        hidden, weight = self.place(impl, torch.randn(shape, requires_grad=True), torch.randn(9, 4, requires_grad=True))
        labels = torch.full(shape[:-1], -100, device=hidden.device)
        stats = linear_logps(hidden, weight, labels, impl=impl)
        assert stats.logps.shape == labels.shape and (stats.logps == 0).all() and (stats.entropy == 0).all()
        grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight))
        assert all((g == 0).all() for g in grads)
        if len(shape) == 3:
            sequences = linear_sequence_stats(hidden, weight, labels, impl=impl)
            assert sequences.logps.tolist() == [0, 0] and sequences.lengths.tolist() == [0, 0]

    def test_very_negative_logits(self, impl: str) -> None:
        """A running maximum that starts at 0 would give NaN here."""
        hidden, weight = self.place(impl, torch.full((3, 1), 1.0), -1000.0 - torch.arange(70.0)[:, None])
        stats = linear_logps(hidden, weight, torch.tensor([0, 1, 69], device=hidden.device), impl=impl)
        expected = -math.log(sum(math.exp(-i) for i in range(70)))
        torch.testing.assert_close(stats.logps.cpu(), expected - torch.tensor([0.0, 1.0, 69.0]))

    def test_minus_infinity_in_the_bias(self, impl: str) -> None:
        """Forbidden tokens: 0 log 0 = 0 in the entropy, and finite gradients."""
        hidden, weight = self.place(impl, torch.randn(5, 6, requires_grad=True), torch.randn(90, 6, requires_grad=True))
        bias = torch.zeros(90, device=hidden.device)
        bias[:70] = -torch.inf
        labels = torch.tensor([70, 75, 80, 85, 89], device=hidden.device)
        stats = linear_logps(hidden, weight, labels, bias, impl=impl)
        allowed = linear_logps(hidden, weight[70:], labels - 70, impl="reference")
        for a, b in zip(stats, allowed, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(s.logps.sum() + s.entropy.sum(), (hidden, weight)) for s in (stats, allowed)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_a_forbidden_label_has_log_prob_minus_infinity(self, impl: str) -> None:
        hidden, weight, bias = self.place(impl, torch.randn(3, 6), torch.randn(90, 6), torch.zeros(90))
        bias[40] = -torch.inf
        labels = torch.tensor([40, 41, 40], device=hidden.device)
        stats = linear_sequence_stats(hidden, weight, labels, bias, cu_seqlens=torch.tensor([0, 1, 2, 3]), impl=impl)
        assert stats.logps.isinf().tolist() == [True, False, True] and stats.entropy.isfinite().all()

    @pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, in the interpreter
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_a_nan_stays_a_nan(self, impl: str, with_bias: bool) -> None:
        """Were it to become -inf, a rejected response would cost nothing and the run would go on."""
        hidden, weight, bias = self.place(impl, torch.randn(3, 6), torch.randn(90, 6), torch.zeros(90))
        hidden[1] = torch.nan
        stats = linear_logps(
            hidden, weight, torch.tensor([4, 5, 6], device=hidden.device), bias if with_bias else None, impl=impl
        )
        assert stats.logps.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, False]

    def test_certain_token_has_log_prob_zero_not_above(self, impl: str) -> None:
        hidden, weight = self.place(impl, torch.full((2, 1), 100.0), torch.linspace(-1, 1, 67)[:, None])
        stats = linear_logps(hidden, weight, torch.tensor([66, 66], device=hidden.device), impl=impl)
        assert (stats.logps <= 0).all() and (stats.logps > -0.1).all() and (stats.entropy >= 0).all()

    def test_bit_identical_from_run_to_run(self, impl: str) -> None:
        case = Case(seed=5, n=33, d=24, v=130, bias=True, softcap=5.0)
        first, second = evaluate(case, impl, torch.float32), evaluate(case, impl, torch.float32)
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)

    def test_entropy_alone_or_log_probs_alone(self, impl: str) -> None:
        for uses in ("logps", "entropy"):
            for frozen in (True, False):
                check(Case(seed=6, n=9, d=5, v=70, uses=uses, frozen=frozen), impl)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.tensor([0, 7, 1])}, r"labels must lie in \[0, 7\).*got 7"),
            ({"labels": torch.tensor([0, -1, 1])}, r"labels must lie in \[0, 7\).*got -1"),
            ({"labels": torch.tensor([0, 1])}, r"labels must have shape \(3,\), got \(2,\)"),
            ({"labels": torch.tensor([0.0, 1, 2])}, "labels must be int64"),
            ({"weight": torch.randn(7, 5)}, r"weight must have shape \(V, 4\), got \(7, 5\)"),
            ({"weight": torch.randn(7, 4).double()}, "weight must have hidden's dtype torch.float32"),
            ({"weight": None}, "weight must be a tensor, got NoneType"),
            ({"hidden": torch.randint(0, 3, (3, 4))}, "hidden must be float64, float32"),
            ({"hidden": torch.randn(4)}, r"hidden must have shape \(..., D\)"),
            ({"bias": torch.randn(6)}, r"bias must have shape \(7,\), got \(6,\)"),
            ({"softcap": 0.0}, "softcap must be > 0"),
            ({"temperature": -1.0}, "temperature must be > 0"),
            ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ],
    )
    def test_bad_input(self, impl: str, change: dict[str, Any], message: str) -> None:
        arguments = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4), "labels": torch.tensor([0, 6, -100])}
        with pytest.raises((ValueError, TypeError), match=message):
            linear_logps(**{**arguments, **change}, impl=impl)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 2, 5]), "end at N = 6"),
        (torch.tensor([1, 6]), "start at 0"),
        (torch.tensor([0, 4, 3, 6]), "not decrease"),
        (torch.tensor([0.0, 6.0]), "int32 or int64"),
        (torch.tensor([0]), r"shape \(B\+1,\)"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        linear_sequence_stats(torch.randn(6, 3), torch.randn(5, 3), torch.zeros(6).long(), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="without cu_seqlens"):
        linear_sequence_stats(torch.randn(6, 3), torch.randn(5, 3), torch.zeros(6).long())


def test_an_implementation_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 1]))
    with pytest.raises(ValueError, match="impl must be one of auto, fused, chunked, reference, got 'triton'"):
        linear_logps(*arguments, impl="triton")
    monkeypatch.setattr(fused, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="impl='fused' needs a GPU"):
        linear_logps(*arguments, impl="fused")
    with pytest.raises(RuntimeError, match="does not take float64"):
        linear_logps(arguments[0].double(), arguments[1].double(), arguments[2], impl="fused")


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_second_derivative_is_an_error(impl: str) -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    stats = linear_logps(hidden, torch.randn(7, 4), torch.tensor([0, 6, 1]), impl=impl)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(stats.logps.sum(), hidden, create_graph=True)


def test_autocast_multiplies_in_its_dtype_and_keeps_fp32_statistics() -> None:
    case = Case(seed=7, n=12, d=16, v=90)
    hidden, weight, _, labels = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_sequence_stats(hidden[None], weight, labels[None])
    rounded = linear_sequence_stats(hidden.bfloat16()[None], weight.bfloat16(), labels[None])
    assert isinstance(stats, SequenceStats) and stats.logps.dtype == torch.float32
    assert torch.equal(stats.logps, rounded.logps)


def test_frozen_head_saves_no_logits_and_recomputes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head frozen the backward is a row scale: it must not walk the tiles again."""
    hidden, weight, _, labels = dataclasses.replace(Case(seed=8, n=9, d=5, v=70, frozen=True)).tensors()
    stats = linear_logps(hidden.requires_grad_(), weight, labels, impl="chunked")
    monkeypatch.setattr(chunked, "_tiles", lambda *_: pytest.fail("the backward recomputed logits"))
    stats.logps.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_sums_of_thousands_of_tokens_keep_the_tokens_exactness(impl: str) -> None:
    """A running fp32 sum of 4,000 log-probs is off by milli-nats."""
    case = Case(seed=9, n=4000, d=8, v=40, ignored=0.0, frozen=True)
    hidden, weight, _, labels = (x.cuda() if GPU and impl == "fused" and x is not None else x for x in case.tensors())
    with torch.no_grad():
        stats = linear_sequence_stats(hidden[None], weight, labels[None], impl=impl)
        truth = linear_sequence_stats(hidden[None].double(), weight.double(), labels[None], impl="reference")
    size = truth.logps.abs().item()
    assert abs(stats.logps.item() - truth.logps.item()) <= 2 * torch.finfo(torch.float32).eps * size


@pytest.mark.skipif(GPU, reason="a GPU runs its own tiles")
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_fused_with_the_tiles_that_a_gpu_would_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = configs.FAMILIES[family]
    monkeypatch.setitem(configs.FAMILIES, "interpreter", tiles._replace(single=tiles.square, single_small=tiles.dual))
    check(Case(seed=10, n=150, d=100, v=301, bias=True, softcap=10.0), "fused")
