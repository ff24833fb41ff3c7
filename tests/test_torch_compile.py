"""The op inside torch.compile, and on the path that a CUDA-graph capture takes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import EVERYTHING, GPU, TILED, Case, Inputs, evaluate, evaluate_joint, small_tiles
from torch import Tensor

from fastpo import (
    PreferenceConfig,
    SequenceStats,
    joint_linear_logps,
    joint_linear_sequence_stats,
    linear_logps,
    linear_sequence_stats,
    preference_loss,
)
from fastpo.kernels import autograd

N, V, D = 24, 150, 16
ENDS = torch.tensor([0, 5, 12, 12, 24])  # two pairs; one response is empty


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def halves(stats: SequenceStats) -> tuple[SequenceStats, SequenceStats]:
    return SequenceStats(*(x[:2] for x in stats)), SequenceStats(*(x[2:] for x in stats))


def step(**options: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_hidden: Tensor) -> Tensor:
        config = PreferenceConfig(beta=0.3, label_smoothing=0.1, length_normalization=True)
        stats = linear_sequence_stats(hidden, weight, labels, bias, cu_seqlens=ENDS.to(hidden.device), **options)
        chosen, rejected = halves(stats)
        out = preference_loss(chosen, rejected, config, ref_chosen=rejected, ref_rejected=chosen)
        return out.loss + 0.1 * stats.entropy.mean()

    return loss


def joint_step(**options: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_hidden: Tensor) -> Tensor:
        joint = joint_linear_sequence_stats(
            hidden, ref_hidden, weight, labels, bias, cu_seqlens=ENDS.to(hidden.device), kl=True, **options
        )
        config = PreferenceConfig(beta=0.3)
        ref_chosen, ref_rejected = halves(joint.reference)
        out = preference_loss(*halves(joint.policy), config, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        return out.loss + 0.05 * joint.kl.sum()

    return loss


def run(loss: Callable[..., Tensor], case: Case, impl: str, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    x = Inputs(case, impl, torch.float32)
    with torch.autocast(x.hidden.device.type, torch.bfloat16, enabled=autocast):
        value = loss(x.hidden, x.weight, x.labels, x.bias, x.ref_hidden)
    return value.detach(), list(torch.autograd.grad(value, x.leaves))


def assert_compiles(
    make: Callable[..., Any], case: Case, backend: str, impl: str, autocast: bool, **options: Any
) -> None:
    loss = make(impl=impl, **options)
    value, grads = run(loss, case, impl, autocast)
    again, compiled = run(torch.compile(loss, fullgraph=True, backend=backend), case, impl, autocast)
    assert all(g.abs().sum() > 0 for g in grads)
    torch.testing.assert_close(again, value, atol=1e-6, rtol=1e-5)
    for a, b in zip(compiled, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-2 if autocast else 1e-5)


OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "auto, trainable": (False, {}),
    "auto, frozen": (True, {}),
    "stash of all": (False, {"memory_budget": EVERYTHING}),
    "stash of some": (False, {"memory_budget": 10 * V * 5}),
    "skip": (False, {"skip_mass": 1e-2}),
}


@pytest.mark.parametrize("make", [step, joint_step])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_with_the_same_gradients(make: Callable[..., Any], name: str, ignored: float) -> None:
    """Whatever the mode saves has its shape before a label is seen."""
    frozen, options = OPTIONS[name]
    if make is joint_step and name == "skip":
        pytest.skip("there is no skipping in the joint op")
    case = Case(seed=31, n=N, d=D, v=V, ignored=ignored, frozen=frozen)
    assert_compiles(make, case, "aot_eager", "chunked", False, **options)


@pytest.mark.skipif(not GPU, reason="Triton's interpreter runs no compiled graph's code faster, and slowly")
@pytest.mark.parametrize("make", [step, joint_step])
@pytest.mark.parametrize("frozen", [False, True])
def test_fused_in_one_graph(make: Callable[..., Any], frozen: bool) -> None:
    assert_compiles(make, Case(seed=31, n=N, d=D, v=V, frozen=frozen), "inductor", "fused", False)


@pytest.mark.skipif(GPU, reason="test_fused_in_one_graph is this on a GPU")
@pytest.mark.parametrize("frozen", [False, True])
def test_fused_in_one_graph_in_the_interpreter(frozen: bool) -> None:
    """The op's fake shapes are fused's too."""
    assert_compiles(step, Case(seed=31, n=N, d=D, v=V, frozen=frozen), "aot_eager", "fused", False)


@pytest.mark.parametrize("make", [step, joint_step])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_under_bf16_autocast(make: Callable[..., Any], backend: str) -> None:
    assert_compiles(make, Case(seed=32, n=N, d=D, v=V), backend, "chunked", True)


def test_with_inductor() -> None:
    assert_compiles(step, Case(seed=33, n=N, d=D, v=V, ignored=0.4), "inductor", "chunked", False)


def test_another_length_is_another_shape_not_another_answer() -> None:
    """Dynamic shapes: after the second length the compiler makes the row count symbolic."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        stats = linear_logps(hidden, weight, labels)
        return (stats.logps + stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (7, 12, 20, 33):
        x = Inputs(Case(seed=n, n=n, d=D, v=V), "chunked", torch.float32)
        expected, got = (torch.autograd.grad(f(x.hidden, x.weight, x.labels), x.leaves) for f in (loss, compiled))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_without_a_gradient() -> None:
    x = Inputs(Case(seed=34, n=N, d=D, v=V), "chunked", torch.float32)
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(
            compiled(x.hidden, x.weight, x.labels), linear_logps(x.hidden, x.weight, x.labels), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_a_wrong_label_is_an_error_there_too() -> None:
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\).*got 7"):
        compiled(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 7, 1]))


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize(
    ("mode", "budget", "skip_mass"),
    [("no_grad", 0, 0.0), ("frozen", 0, 0.0), ("lean", 0, 0.0), ("stash", EVERYTHING, 0.0), ("lean", 0, 0.01)],
)
def test_opcheck(impl: str, mode: str, budget: int, skip_mass: float) -> None:
    """torch's own examination of the registered op: schema, fake shapes, autograd, AOT dispatch."""
    x = Inputs(Case(seed=35, n=12, d=8, v=70, ignored=0.0, frozen=mode == "frozen"), impl, torch.float32)
    kl = skip_mass == 0
    plan = autograd.Plan(1.0, None, 1.0, -100, impl, mode, budget, skip_mass, kl, True)
    hidden = x.hidden.detach() if mode == "no_grad" else x.hidden
    weight = x.weight.detach() if mode == "no_grad" else x.weight
    ref_hidden = x.ref_hidden if kl else None
    torch.library.opcheck(
        autograd._linear_statistics, (hidden, weight, None, None, None, ref_hidden, x.labels, x.ends, None, *plan),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


# --- the path of a CUDA-graph capture ---------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "no_grad": {"mode": "no_grad"},
    "frozen": {"mode": "frozen"},
    "lean": {"mode": "lean"},
    "stash": {"mode": "stash", "memory_budget": EVERYTHING},
    "skip": {"skip_mass": 1e-3},
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "capturing", lambda: True)


@pytest.mark.parametrize("impl", TILED)
class TestCapture:
    @pytest.mark.parametrize("mode", MODES)
    def test_the_same_answer(self, impl: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(seed=41, n=N, d=D, v=V, frozen=mode == "frozen", ignored=0.4, bias=mode != "frozen", softcap=9.0)
        options = {"backward": mode != "no_grad", **MODES[mode]}
        expected = evaluate(case, impl, torch.float32, **options)
        monkeypatch.setattr(autograd, "capturing", lambda: True)
        got = evaluate(case, impl, torch.float32, **options)
        for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
            # skip: fused's rows are grouped otherwise when none is left out
            tolerance = 2e-2 if mode == "skip" and impl == "fused" else 1e-5
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize("mode", ["frozen", "lean"])
    def test_the_same_joint_answer(self, impl: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(seed=42, n=N, d=D, v=V, frozen=mode == "frozen", ignored=0.4, uses="all")
        expected = evaluate_joint(case, impl, torch.float32, kl=True, mode=mode)
        monkeypatch.setattr(autograd, "capturing", lambda: True)
        got = evaluate_joint(case, impl, torch.float32, kl=True, mode=mode)
        for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_ignored_rows_are_exactly_zero_whatever_they_hold(self, captured: None, impl: str, mode: str) -> None:
        case = Case(seed=43, n=N, d=D, v=V, frozen=mode in ("frozen", "no_grad"), ignored=0.4)
        x = Inputs(case, impl, torch.float32)
        ignored = x.labels == -100
        with torch.no_grad():
            x.hidden[ignored] = torch.nan
        tokens = linear_logps(x.hidden, x.weight, x.labels, impl=impl, **MODES[mode])
        sequences = linear_sequence_stats(x.hidden, x.weight, x.labels, cu_seqlens=x.ends, impl=impl, **MODES[mode])
        for value in tokens:
            assert (value[ignored] == 0).all() and (value[~ignored] != 0).all() and value.isfinite().all()
        first = int(x.ends[1])
        torch.testing.assert_close(sequences.logps[0], tokens.logps[:first].sum())
        assert sequences.logps[1] == 0 and sequences.entropy.isfinite().all()
        assert sequences.lengths.tolist() == [(~ignored[:first]).sum(), 0, (~ignored[first:]).sum()]
        if mode == "no_grad":
            return
        loss = (tokens.logps + tokens.entropy).sum() + sequences.logps.sum()
        grads = torch.autograd.grad(loss, x.leaves)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][ignored] == 0).all() and (grads[0][~ignored].abs().sum(1) > 0).all()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("label", [V, V + 10**6, -1])
    def test_a_wrong_label_is_nan_in_its_row_and_its_sequence_alone(
        self, captured: None, impl: str, mode: str, label: int
    ) -> None:
        x = Inputs(Case(seed=44, n=N, d=D, v=V, frozen=mode != "lean", ignored=0.2), impl, torch.float32)
        x.labels[2] = label
        tokens = linear_logps(x.hidden, x.weight, x.labels, impl=impl, **MODES[mode])
        assert tokens.logps.isnan().nonzero().tolist() == [[2]]
        assert tokens.entropy.isfinite().all()
        sequences = linear_sequence_stats(x.hidden, x.weight, x.labels, cu_seqlens=x.ends, impl=impl, **MODES[mode])
        assert sequences.logps.isnan().tolist() == [True, False, False]
        if mode != "no_grad":
            (grad,) = torch.autograd.grad(tokens.logps[3:].sum(), x.hidden)
            assert grad.isfinite().all()

    def test_a_wrong_label_in_an_ordered_vocabulary(self, captured: None, impl: str) -> None:
        x = Inputs(Case(seed=48, n=N, d=D, v=V, ignored=0.2), impl, torch.float32)
        x.labels[2], x.labels[3] = V, -100
        order = torch.randperm(V, device=x.labels.device)
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl, skip_mass=1e-3, vocab_order=order)
        assert stats.logps.isnan().nonzero().tolist() == [[2]]
        assert stats.logps[3] == stats.entropy[3] == 0

    def test_a_wrong_label_in_a_joint_call(self, captured: None, impl: str) -> None:
        x = Inputs(Case(seed=45, n=N, d=D, v=V, ignored=0.2), impl, torch.float32)
        x.labels[2] = V
        joint = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, impl=impl, kl=True)
        for stats in (joint.policy, joint.reference):
            assert stats.logps.isnan().nonzero().tolist() == [[2]]
        assert joint.kl.isfinite().all()

    def test_no_row_is_left_out(self, captured: None, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which rows count would have to be read from the device."""
        x = Inputs(Case(seed=46, n=N, d=D, v=V, ignored=0.5), impl, torch.float32)
        monkeypatch.setattr(Tensor, "nonzero", lambda *_: pytest.fail("the rows were compacted"))
        monkeypatch.setattr(autograd, "check_values", lambda *_: pytest.fail("values were read"))
        monkeypatch.setattr(Tensor, "item", lambda *_: pytest.fail("a value was read"))
        monkeypatch.setattr(Tensor, "__bool__", lambda *_: pytest.fail("a value was read"))
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl)
        if impl == "chunked":  # the interpreter reads values by its nature
            torch.autograd.grad(stats.logps.sum(), x.leaves)

    def test_nothing_labelled(self, captured: None, impl: str) -> None:
        x = Inputs(Case(seed=47, n=N, d=D, v=V, ignored=1.0), impl, torch.float32)
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl)
        grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x.leaves)
        assert all((s == 0).all() for s in (*stats, *grads))


def test_where_there_is_no_gpu_nothing_is_captured() -> None:
    assert not autograd.capturing()
