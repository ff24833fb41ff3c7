"""Each way to a gradient, chunked and fused, against float64; what it keeps, what it skips, what it refuses."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    EVERYTHING,
    GPU,
    IMPLEMENTATIONS,
    TILED,
    Case,
    Inputs,
    cases,
    check,
    drawn,
    evaluate,
    place,
    small_tiles,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_grads_close
from torch import Tensor

from fastpo import linear_logps, linear_sequence_stats
from fastpo.kernels import backward_kernels, chunked, configs, fused


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


def engine(impl: str) -> Any:
    return chunked if impl == "chunked" else fused


def stash_row(case: Case, impl: str) -> int:
    """Bytes that a stash takes for a row: V exponentials, and an fp32 peak for each step of columns."""
    hidden = case.tensors()[0]
    return case.v * hidden.element_size() + 4 * math.ceil(case.v / engine(impl).stash_step(hidden))


class Spy:
    """Passes calls on to an engine's forward and notes its keywords and its answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
        self.keywords: dict[str, Any] = {}
        self.answer: Any = None
        forward = engine(impl).forward

        def spying(*args: Any, **kwargs: Any) -> Any:
            self.keywords = kwargs
            self.answer = forward(*args, **kwargs)
            return self.answer

        monkeypatch.setattr(engine(impl), "forward", spying)


def forbid_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever forms logits fails."""

    class Forbidden:
        def __getitem__(self, grid: Any) -> Any:
            pytest.fail("the backward projected")

    monkeypatch.setattr(backward_kernels, "backward_kernel", Forbidden())
    monkeypatch.setattr(chunked, "_logits", lambda *_: pytest.fail("the backward projected"))


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", TILED)
class TestAgainstFloat64:
    @drawn(30)
    @given(case=cases(frozen=st.just(True)))
    def test_frozen(self, impl: str, case: Case) -> None:
        check(case, impl, mode="frozen")

    @drawn(30)
    @given(case=cases())
    def test_lean(self, impl: str, case: Case) -> None:
        check(case, impl, mode="lean")

    @drawn(30)
    @given(case=cases())
    def test_no_grad(self, impl: str, case: Case) -> None:
        check(case, impl, mode="no_grad", backward=False)

    @drawn(45)
    @given(case=cases(), share=st.sampled_from([0.0, 0.4, 1.0]))
    def test_stash_of_no_some_or_all_rows(self, impl: str, case: Case, share: float) -> None:
        check(case, impl, mode="stash", memory_budget=int(share * case.n * stash_row(case, impl)))

    def test_stash_under_a_head_in_column_order(self, impl: str) -> None:
        """Such a head is read by slices: each has its own columns of the stash."""
        check(
            Case(seed=20, n=20, d=8, v=150, contiguous=False, frozen=True, uses="logps"),
            impl, mode="stash", memory_budget=EVERYTHING,
        )  # fmt: skip

    @drawn(30)
    @given(case=cases(ignored=st.just(0.0)), tau=st.sampled_from([1e-9, 1e-7]), ordered=st.booleans())
    def test_skipping_next_to_nothing(self, impl: str, case: Case, tau: float, ordered: bool) -> None:
        """A tau below fp32's rounding: blocks are left out, and nobody can tell."""
        order = torch.randperm(case.v, generator=torch.Generator().manual_seed(case.seed)) if ordered else None
        order = None if order is None else place(impl, order)[0]
        check(case, impl, skip_mass=tau, vocab_order=order, mode="auto" if ordered else "lean")


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", ["frozen", "lean", "stash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_16_bit_inputs(impl: str, mode: str, dtype: torch.dtype, softcap: float | None) -> None:
    """fp32 statistics of the rounded inputs; gradients within a few roundings of the dtype, stashed or not."""
    case = Case(
        seed=11, n=37, d=48, v=257, bias=mode != "frozen", softcap=softcap, frozen=mode == "frozen", dtype=dtype
    )
    budget = EVERYTHING if mode == "stash" else None
    truth, true_grads = evaluate(case, "reference", torch.float64)
    stats, grads = evaluate(case, impl, dtype, mode=mode, memory_budget=budget)
    for value, true in zip(stats, truth, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), true, atol=3e-5, rtol=1e-5)
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert_grads_close("gradient", grad, true, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.skipif(GPU, reason="a GPU runs its own tiles")
@pytest.mark.parametrize("mode", ["frozen", "lean", "stash", "skip"])
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_fused_with_the_tiles_that_a_gpu_would_run(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged in rows, columns and D. The heavy square tile reads through pointers, every wide one as its family does.

    fp32 is not multiplied in these tiles on a GPU, so they stand where the interpreter looks for fp32's.
    """
    monkeypatch.setattr(fused, "SLICE_STEP", 256)
    monkeypatch.setattr(fused, "MAX_COLS", 256)
    real = configs.FAMILIES[family]
    heavy = real._replace(single=real.square, single_small=real.square, tma=False)
    light = [real._replace(single=wide, single_small=wide) for wide in real.wide]
    option = {"skip_mass": 1e-8} if mode == "skip" else {"mode": mode}
    budget = 100 * 270 * 4 if mode == "stash" else None
    for tiles in (heavy, *light) if mode == "frozen" else (heavy, light[0]):
        monkeypatch.setitem(configs.FAMILIES, "interpreter", tiles)
        softcap = 10.0 if tiles is heavy else None
        case = Case(seed=10, n=135, d=72, v=270, bias=tiles is heavy, frozen=mode == "frozen")
        x, exact = Inputs(case, "fused", torch.float32), Inputs(case, "reference", torch.float64)
        stats = linear_logps(
            x.hidden, x.weight, x.labels, x.bias, softcap=softcap, impl="fused", memory_budget=budget, **option
        )
        truth = linear_logps(exact.hidden, exact.weight, exact.labels, exact.bias, softcap=softcap, impl="reference")
        for value, true in zip(stats, truth, strict=True):
            torch.testing.assert_close(value.double(), true, atol=1e-5, rtol=1e-5)
        grads, true_grads = (
            torch.autograd.grad((s.logps * y.factor).sum() + s.entropy.sum(), y.leaves)
            for s, y in ((stats, x), (truth, exact))
        )
        for grad, true in zip(grads, true_grads, strict=True):
            assert_grads_close("gradient", grad, true)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("option", [{}, {"mode": "stash", "memory_budget": EVERYTHING}, {"skip_mass": 1e-9}])
def test_more_column_tiles_than_the_reduction_takes_at_once(impl: str, option: dict) -> None:
    check(Case(seed=19, n=20, d=4, v=32 * configs.REDUCE["BLOCK_T"] * 2 + 40, size=4.0, ignored=0.0), impl, **option)


# --- what a mode keeps, and what its backward leaves undone -----------------------------------------------------------


@pytest.mark.parametrize("impl", TILED)
class TestWhatIsKept:
    @pytest.mark.parametrize("rows", [0, 1, 7, 20, 1000])
    def test_a_stash_stays_within_its_budget(self, impl: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(seed=12, n=20, d=8, v=150, ignored=0.0)
        spy, budget = Spy(monkeypatch, impl), rows * stash_row(case, impl) + stash_row(case, impl) - 1
        check(case, impl, mode="stash", memory_budget=budget)
        assert spy.keywords["stash_rows"] == min(rows, 20)
        if rows:
            kept = sum(x.numel() * x.element_size() for x in spy.answer.stash)
            assert 0 < kept <= budget
        else:
            assert spy.answer.stash is None

    def test_a_whole_stash_is_not_projected_again(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(seed=13, n=20, d=8, v=150)
        x = Inputs(case, impl, torch.float32)
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl, mode="stash", memory_budget=EVERYTHING)
        forbid_projections(monkeypatch)
        grads = torch.autograd.grad((stats.logps + stats.entropy).sum(), x.leaves)
        assert all(g.abs().sum() > 0 for g in grads)

    def test_frozen_is_not_projected_again(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the head frozen the gradient of the log-probs is a row scale."""
        x = Inputs(Case(seed=8, n=9, d=5, v=70, frozen=True), impl, torch.float32)
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl)
        forbid_projections(monkeypatch)
        (grad,) = torch.autograd.grad(stats.logps.sum(), x.leaves)
        assert grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("frozen", "options", "expected"),
        [
            (False, {}, {"unit": False, "stash_rows": 0, "block_mass": False}),
            (False, {"memory_budget": EVERYTHING}, {"unit": False, "stash_rows": 9, "block_mass": False}),
            (False, {"skip_mass": 0.1}, {"unit": False, "stash_rows": 0, "block_mass": True}),
            (True, {}, {"unit": True, "stash_rows": 0, "block_mass": False}),
            (True, {"memory_budget": EVERYTHING}, {"unit": True, "stash_rows": 0, "block_mass": False}),
            (True, {"mode": "stash", "memory_budget": EVERYTHING}, {"unit": False, "stash_rows": 9}),
            (True, {"skip_mass": 0.1}, {"unit": False, "stash_rows": 0, "block_mass": True}),
            (False, {"mode": "no_grad", "memory_budget": EVERYTHING}, {"unit": False, "stash_rows": 0}),
        ],
    )
    def test_what_auto_chooses(
        self, impl: str, frozen: bool, options: dict, expected: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = Inputs(Case(seed=14, n=9, d=5, v=70, ignored=0.0, frozen=frozen), impl, torch.float32)
        spy = Spy(monkeypatch, impl)
        linear_logps(x.hidden, x.weight, x.labels, impl=impl, **options)
        assert {name: spy.keywords[name] for name in expected} == expected
        with torch.no_grad():
            linear_logps(x.hidden, x.weight, x.labels, impl=impl, **({} if "mode" in options else options))
        assert not spy.keywords["unit"] and not spy.keywords["stash_rows"] and not spy.keywords["block_mass"]

    def test_no_grad_is_detached(self, impl: str) -> None:
        x = Inputs(Case(seed=15, n=9, d=5, v=70), impl, torch.float32)
        stats = linear_sequence_stats(x.hidden[None], x.weight, x.labels[None], impl=impl, mode="no_grad")
        assert not stats.logps.requires_grad and not stats.entropy.requires_grad

    @pytest.mark.parametrize("mode", ["frozen", "lean", "stash", "skip"])
    def test_a_second_backward_through_the_same_graph_is_the_same(self, impl: str, mode: str) -> None:
        case = Case(seed=16, n=20, d=8, v=150, frozen=mode == "frozen", bias=mode != "frozen", softcap=8.0)
        x = Inputs(case, impl, torch.float32)
        option = {"skip_mass": 0.01} if mode == "skip" else {"mode": mode}
        budget = 11 * stash_row(case, impl) if mode == "stash" else None
        stats = linear_logps(
            x.hidden, x.weight, x.labels, x.bias, softcap=8.0, impl=impl, memory_budget=budget, **option
        )
        loss = (stats.logps * x.factor + stats.entropy).sum()
        first = [g.clone() for g in torch.autograd.grad(loss, x.leaves, retain_graph=True)]
        second = torch.autograd.grad(loss, x.leaves, retain_graph=True)
        alone = torch.autograd.grad(stats.logps.sum(), x.leaves, retain_graph=True)
        again = torch.autograd.grad(loss, x.leaves)
        for a, b, c in zip(first, second, again, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        assert not torch.equal(alone[0], first[0])

    @pytest.mark.parametrize("mode", ["frozen", "lean", "stash", "skip"])
    def test_a_second_derivative_is_an_error(self, impl: str, mode: str) -> None:
        x = Inputs(Case(seed=17, n=9, d=5, v=70, frozen=mode == "frozen"), impl, torch.float32)
        option = {"skip_mass": 0.01} if mode == "skip" else {"mode": mode}
        budget = EVERYTHING if mode == "stash" else None
        stats = linear_sequence_stats(
            x.hidden[None], x.weight, x.labels[None], impl=impl, memory_budget=budget, **option
        )
        for value in (stats.logps, stats.entropy):
            with pytest.raises(RuntimeError, match="linear_logps is differentiable once; for create_graph=True use"):
                torch.autograd.grad(value.sum(), x.leaves, create_graph=True, retain_graph=True)

    @pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
    @pytest.mark.parametrize("option", [{}, {"memory_budget": EVERYTHING}, {"skip_mass": 1e-8}])
    def test_only_what_is_needed_gets_a_gradient(self, impl: str, needs: tuple[str, ...], option: dict) -> None:
        case = Case(seed=18, n=20, d=8, v=150, bias=True)

        def gradients(impl: str, option: dict) -> list[Tensor]:
            x = Inputs(case, impl, torch.float32)
            for leaf in x.leaves:
                leaf.requires_grad_(False)
            leaves = [getattr(x, name).requires_grad_() for name in needs]
            stats = linear_logps(x.hidden, x.weight, x.labels, x.bias, impl=impl, **option)
            return [g.cpu() for g in torch.autograd.grad((stats.logps * x.factor + stats.entropy).sum(), leaves)]

        for got, expected in zip(gradients(impl, option), gradients("reference", {}), strict=True):
            assert_grads_close("gradient", got, expected)


# --- what is refused --------------------------------------------------------------------------------------------------

PERMUTED = "vocab_order must be a permutation of 0 .. 6"
TOGETHER = "skip_mass .*mode='lean' and no memory_budget, got "
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "fast"}, ValueError, "mode must be one of auto, no_grad, frozen, lean, stash, got 'fast'"),
    ({"mode": "frozen"}, ValueError, "mode='frozen' gives no gradient to weight, bias and lora_B"),
    ({"mode": "stash"}, ValueError, "mode='stash' needs memory_budget.*got None"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be a whole number of bytes >= 0, got -1"),
    ({"memory_budget": True}, ValueError, "memory_budget must be .* got True"),
    ({"memory_budget": 1e9}, ValueError, "memory_budget must be .* got 1000000000.0"),
    ({"skip_mass": 1.0}, ValueError, r"skip_mass must lie in \[0, 1\), got 1.0"),
    ({"skip_mass": -0.1}, ValueError, r"skip_mass must lie in \[0, 1\), got -0.1"),
    ({"skip_mass": math.nan}, ValueError, r"skip_mass must lie in \[0, 1\), got nan"),
    ({"skip_mass": 0.1, "mode": "stash", "memory_budget": 9}, ValueError, TOGETHER + "mode='stash', memory_budget=9"),
    ({"skip_mass": 0.1, "mode": "frozen"}, ValueError, TOGETHER + "mode='frozen'"),
    ({"skip_mass": 0.1, "memory_budget": 9}, ValueError, TOGETHER + "mode='auto', memory_budget=9"),
    ({"skip_mass": 0.1, "vocab_order": torch.arange(6)}, ValueError, r"vocab_order must have shape \(7,\), got \(6,\)"),
    ({"skip_mass": 0.1, "vocab_order": torch.arange(7).int()}, TypeError, "vocab_order must be int64, got torch.int32"),
    ({"skip_mass": 0.1, "vocab_order": list(range(7))}, TypeError, "vocab_order must be a tensor, got list"),
    ({"skip_mass": 0.1, "vocab_order": torch.zeros(7).long()}, ValueError, PERMUTED),
    ({"skip_mass": 0.1, "vocab_order": torch.arange(7) + 1}, ValueError, PERMUTED),
    ({"skip_mass": 0.1, "vocab_order": torch.arange(7) - 1}, ValueError, PERMUTED),
]


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("function", [linear_logps, linear_sequence_stats])
@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals_name_the_argument_and_what_arrived(
    impl: str, function: Any, options: dict, error: type[Exception], message: str
) -> None:
    hidden, weight, labels = place(impl, torch.randn(1, 3, 4), torch.randn(7, 4), torch.tensor([[0, 6, -100]]))
    options = {name: place(impl, value)[0] for name, value in options.items()}
    with pytest.raises(error, match=message):
        function(hidden.requires_grad_(), weight.requires_grad_(), labels, impl=impl, **options)


def test_a_frozen_head_with_a_trainable_bias_is_not_frozen() -> None:
    hidden, weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), torch.zeros(7, requires_grad=True)
    labels = torch.tensor([0, 6, 1])
    with pytest.raises(ValueError, match="mode='frozen' gives no gradient to weight, bias and lora_B"):
        linear_logps(hidden, weight, labels, bias, mode="frozen")
    with torch.no_grad():  # there nothing is lost
        linear_logps(hidden, weight, labels, bias, mode="frozen")


@pytest.mark.parametrize(
    "options", [{"mode": "lean"}, {"mode": "frozen"}, {"mode": "stash", "memory_budget": 9}, {"skip_mass": 0.1}]
)
def test_the_reference_knows_no_mode(options: dict) -> None:
    with pytest.raises(ValueError, match="impl='reference' knows no mode and no skip_mass, got mode='"):
        linear_logps(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 1]), impl="reference", **options)


def test_vocab_order_is_not_read_without_skipping() -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 1])
    for impl in IMPLEMENTATIONS:
        place_on = place(impl, hidden, weight, labels, torch.zeros(7).long())
        plain = linear_logps(*place_on[:3], impl=impl)
        with_order = linear_logps(*place_on[:3], impl=impl, vocab_order=place_on[3])
        assert torch.equal(plain.logps, with_order.logps)
