"""`linear_logps` and `linear_sequence_stats` as their callers see them, by every implementation."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import GPU, Case, cases, check, drawn, evaluate, place, small_tiles
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_grads_close
from torch import Tensor

from fastpo import SequenceStats, linear_logps, linear_sequence_stats
from fastpo.kernels import fused


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


# What `mode="auto"` takes: frozen or lean. test_modes.py draws for each mode by name.
drawn_cases = cases(
    n=st.integers(3, 40), d=st.integers(1, 70), v=st.integers(2, 300), ignored=st.sampled_from([0.0, 0.4, 1.0])
)


@drawn(200)
@given(case=drawn_cases)
def test_chunked_against_float64(case: Case) -> None:
    check(case, "chunked")


@drawn(30)
@given(case=drawn_cases)
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


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("mode", ["no_grad", "frozen", "lean"])
def test_log_sum_sq_probs_against_float64(impl: str, mode: str) -> None:
    if impl == "reference" and mode != "no_grad":
        pytest.skip("knows no mode")
    case = Case(seed=7, n=24, d=9, v=130, bias=True, softcap=4.0, logit_scale=1.3, temperature=0.7, frozen=True)
    hidden, weight, bias, labels = case.tensors()
    logits = 4 * torch.tanh(1.3 * (hidden.double() @ weight.double().T + bias.double()) / 4) / 0.7
    want = torch.where(labels == -100, 0, torch.logsumexp(2 * torch.log_softmax(logits, -1), -1))
    hidden, weight, bias, labels = place(impl, hidden, weight, bias, labels)
    hidden.requires_grad_(mode != "no_grad")
    options = {**case.options, "impl": impl, "mode": mode, "extras": ("log_sum_sq_probs",)}
    tokens = linear_logps(hidden, weight, labels, bias, **options)
    padded = linear_sequence_stats(hidden.view(4, 6, 9), weight, labels.view(4, 6), bias, **options)
    assert not tokens.log_sum_sq_probs.requires_grad and tokens.logps.requires_grad is (mode != "no_grad")
    assert (tokens.log_sum_sq_probs == 0).tolist() == (labels == -100).tolist()
    torch.testing.assert_close(tokens.log_sum_sq_probs.double().cpu(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.log_sum_sq_probs.double().cpu(), want.view(4, 6).sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extras", [("is_top2",), "log_sum_sq_probs"])
def test_unknown_extras_are_refused(extras: Any) -> None:
    with pytest.raises(ValueError, match="extras"):
        linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2]), extras=extras)


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

    def test_padded_equals_packed(self, impl: str) -> None:
        lengths, width = [5, 0, 9, 1], 9
        hidden, weight = place(impl, torch.randn(4, width, 12), torch.randn(50, 12))
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
        hidden, weight = place(impl, torch.randn(6, 8), torch.randn(20, 8))
        labels = torch.tensor([3, -1, 5, -1, -1, 0], device=hidden.device)
        hidden[labels == -1] = torch.nan
        hidden.requires_grad_()
        stats = linear_logps(hidden, weight, labels, ignore_index=-1, impl=impl)
        assert (stats.logps[labels == -1] == 0).all() and (stats.entropy[labels == -1] == 0).all()
        (stats.logps.sum() + stats.entropy.sum()).backward()
        assert hidden.grad.isfinite().all() and (hidden.grad[labels == -1] == 0).all()

    @pytest.mark.parametrize("shape", [(0, 4), (5, 4), (2, 0, 4)])
    def test_nothing_labelled(self, impl: str, shape: tuple[int, ...]) -> None:
        hidden, weight = place(impl, torch.randn(shape, requires_grad=True), torch.randn(9, 4, requires_grad=True))
        labels = torch.full(shape[:-1], -100, device=hidden.device)
        stats = linear_logps(hidden, weight, labels, impl=impl)
        assert stats.logps.shape == labels.shape and (stats.logps == 0).all() and (stats.entropy == 0).all()
        grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight))
        assert all((g == 0).all() for g in grads)
        if len(shape) == 3:
            sequences = linear_sequence_stats(hidden, weight, labels, impl=impl)
            assert sequences.logps.tolist() == [0, 0] and sequences.lengths.tolist() == [0, 0]

    def test_minus_infinity_in_the_bias(self, impl: str) -> None:
        """Forbidden tokens: 0 log 0 = 0 in the entropy, and finite gradients."""
        hidden, weight = place(impl, torch.randn(5, 6, requires_grad=True), torch.randn(90, 6, requires_grad=True))
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
        hidden, weight, bias = place(impl, torch.randn(3, 6), torch.randn(90, 6), torch.zeros(90))
        bias[40] = -torch.inf
        labels = torch.tensor([40, 41, 40], device=hidden.device)
        stats = linear_sequence_stats(hidden, weight, labels, bias, cu_seqlens=torch.tensor([0, 1, 2, 3]), impl=impl)
        assert stats.logps.isinf().tolist() == [True, False, True] and stats.entropy.isfinite().all()

    @pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, in the interpreter
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_a_nan_stays_a_nan(self, impl: str, with_bias: bool) -> None:
        """Were it to become -inf, a rejected response would cost nothing and the run would go on."""
        hidden, weight, bias = place(impl, torch.randn(3, 6), torch.randn(90, 6), torch.zeros(90))
        hidden[1] = torch.nan
        stats = linear_logps(
            hidden, weight, torch.tensor([4, 5, 6], device=hidden.device), bias if with_bias else None, impl=impl
        )
        assert stats.logps.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, False]

    def test_certain_token_has_log_prob_zero_not_above(self, impl: str) -> None:
        hidden, weight = place(impl, torch.full((2, 1), 100.0), torch.linspace(-1, 1, 67)[:, None])
        stats = linear_logps(hidden, weight, torch.tensor([66, 66], device=hidden.device), impl=impl)
        assert (stats.logps <= 0).all() and (stats.logps > -0.1).all() and (stats.entropy >= 0).all()

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


def test_autocast_multiplies_in_its_dtype_and_keeps_fp32_statistics() -> None:
    case = Case(seed=7, n=12, d=16, v=90)
    hidden, weight, _, labels = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_sequence_stats(hidden[None], weight, labels[None])
    rounded = linear_sequence_stats(hidden.bfloat16()[None], weight.bfloat16(), labels[None])
    assert isinstance(stats, SequenceStats) and stats.logps.dtype == torch.float32
    assert torch.equal(stats.logps, rounded.logps)


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
