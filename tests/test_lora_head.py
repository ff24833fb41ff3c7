"""An adapter of the LM head: as exact as the merged weight in float64, and without a merged copy of the head."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EVERYTHING, IMPLEMENTATIONS, TILED, Case, cases, drawn, launched_as, place, small_tiles
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_grads_close
from torch import Tensor

from fastpo import joint_linear_logps, linear_logps, linear_sequence_stats
from fastpo.kernels import autograd, chunked, fused, tiles

ROOT = Path(__file__).resolve().parents[1]
SCALING = 1.5


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


@dataclass
class Adapted(Case):
    """A problem with an adapter of rank `rank`; `trains` names what wants a gradient."""

    rank: int = 4
    trains: tuple[str, ...] = ("hidden", "lora_A", "lora_B")
    strided: bool = False  # lora_B as a transposed tensor

    def inputs(self, dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
        """Leaves on the implementation's device, rounded to the case's dtype before anything else."""
        hidden, weight, bias, labels = self.tensors()
        rng = torch.Generator().manual_seed(self.seed + 2)
        lora_a = torch.randn(self.rank, self.d, generator=rng, dtype=torch.float64) / self.d**0.5
        lora_b = self.size * torch.randn(self.v, self.rank, generator=rng, dtype=torch.float64) / self.rank**0.5
        given = {"hidden": hidden, "weight": weight, "bias": bias, "lora_A": lora_a, "lora_B": lora_b}
        made = {name: x.to(self.dtype).to(dtype) for name, x in given.items() if x is not None}
        if self.strided:
            made["lora_B"] = made["lora_B"].t().contiguous().t()
        made = dict(zip(made, place(impl, *made.values()), strict=True))
        for name, x in made.items():
            x.requires_grad_(name in self.trains)
        return made | {"labels": place(impl, labels)[0]}


def adapted(**changes: Any) -> st.SearchStrategy[Adapted]:
    fields = {"rank": st.sampled_from([1, 3, 8, 16]), "strided": st.booleans()}
    return cases(make=Adapted, **{**fields, **changes})


FROZEN_HEAD = st.just(("hidden", "lora_A"))
TRAINABLE = st.sampled_from(
    [
        ("hidden", "lora_A", "lora_B"),
        ("hidden", "lora_A", "lora_B", "weight", "bias"),
        ("lora_A", "lora_B"),
        ("hidden", "weight"),
        ("lora_B",),
    ]
)


def through(case: Adapted, impl: str, x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Token and sequence statistics of an implementation, which takes the adapter as it is."""
    lora = (SCALING * x["hidden"] @ x["lora_A"].T, x["lora_B"])
    options = {**case.options, "impl": impl, "lora": lora, **options}
    arguments = (x["hidden"], x["weight"], x["labels"], x.get("bias"))
    tokens = linear_logps(*arguments, **options)
    sequences = linear_sequence_stats(*arguments, cu_seqlens=ends(case, x), **options)
    return [tokens.logps, tokens.entropy, sequences.logps, sequences.entropy]


def merged(case: Adapted, x: dict[str, Tensor]) -> list[Tensor]:
    """The same in eager float64, of one weight."""
    weight = x["weight"] + SCALING * x["lora_B"] @ x["lora_A"]
    arguments = (x["hidden"], weight, x["labels"], x.get("bias"))
    options = {**case.options, "impl": "reference"}
    tokens = linear_logps(*arguments, **options)
    sequences = linear_sequence_stats(*arguments, cu_seqlens=ends(case, x), **options)
    return [tokens.logps, tokens.entropy, sequences.logps, sequences.entropy]


def ends(case: Adapted, x: dict[str, Tensor]) -> Tensor:
    third = case.n // 3
    return torch.tensor([0, third, third, case.n], device=x["labels"].device)  # the second sequence is empty


def gradients(case: Adapted, stats: list[Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in case.trains if name in x]
    loss = stats[0].new_zeros(())
    factor = torch.linspace(-1, 2, case.n, device=loss.device, dtype=loss.dtype)
    if case.uses in ("logps", "both"):
        loss = loss + (stats[0] * factor).sum() + 0.3 * stats[2].sum()
    if case.uses in ("entropy", "both"):
        loss = loss + (stats[1] * factor.flip(0)).sum() + stats[3].sum()
    return dict(zip(names, torch.autograd.grad(loss, [x[name] for name in names]), strict=True))


def check(case: Adapted, impl: str, *, backward: bool = True, rtol: float = 1e-4, **options: Any) -> None:
    exact, x = case.inputs(torch.float64, "reference"), case.inputs(case.dtype, impl)
    truth = merged(case, exact)
    with launched_as(case):
        stats = through(case, impl, x, **options)
        found = gradients(case, stats, x) if backward else {}
    largest = max(1.0, max_logit(case, exact))
    for name, value, true in zip(("logps", "entropy", "summed logps", "mean entropy"), stats, truth, strict=True):
        assert value.dtype == torch.float32
        error = (value.cpu().double() - true).abs().max().item()
        bound = 1e-5 * max(1.0, largest / 20) * (case.n if name == "summed logps" else 1)
        assert error <= bound, f"{name}: error {error:.1e} exceeds {bound:.1e}"
    if not backward:
        assert not any(value.requires_grad for value in stats)
        return
    gain = case.logit_scale / case.temperature
    for name, true in gradients(case, truth, exact).items():
        assert_grads_close(f"gradient in {name}", found[name].cpu(), true, 1e-2 * gain * max(1.0, case.size), rtol)


def max_logit(case: Adapted, x: dict[str, Tensor]) -> float:
    raw = x["hidden"] @ (x["weight"] + SCALING * x["lora_B"] @ x["lora_A"]).T
    return (case.logit_scale * raw / case.temperature).abs().max().item()


# --- against the merged weight in float64 ---------------------------------------------------------------------------


@drawn(20)
@given(case=adapted(trains=TRAINABLE))
def test_reference(case: Adapted) -> None:
    check(case, "reference")


@pytest.mark.parametrize("impl", TILED)
class TestAgainstTheMergedWeight:
    @drawn(20)
    @given(case=adapted(trains=TRAINABLE))
    def test_auto(self, impl: str, case: Adapted) -> None:
        check(case, impl)

    @drawn(12)
    @given(case=adapted(trains=FROZEN_HEAD), mode=st.sampled_from(["auto", "frozen", "lean"]))
    def test_a_frozen_head_and_a_frozen_lora_b(self, impl: str, case: Adapted, mode: str) -> None:
        check(case, impl, mode=mode)

    @drawn(6)
    @given(case=adapted(trains=st.just(("lora_A",))), mode=st.sampled_from(["frozen", "lean"]))
    def test_projected_alone(self, impl: str, case: Adapted, mode: str) -> None:
        check(case, impl, mode=mode)

    @drawn(6)
    @given(case=adapted(trains=TRAINABLE))
    def test_no_grad(self, impl: str, case: Adapted) -> None:
        check(case, impl, mode="no_grad", backward=False)

    @drawn(12)
    @given(case=adapted(trains=TRAINABLE), share=st.sampled_from([0.4, 1.0]))
    def test_stash_of_some_or_all_rows(self, impl: str, case: Adapted, share: float) -> None:
        check(case, impl, memory_budget=int(share * case.n * case.v * 5))

    @drawn(12)
    @given(case=adapted(trains=TRAINABLE, ignored=st.just(0.0)), ordered=st.booleans())
    def test_skipping_next_to_nothing(self, impl: str, case: Adapted, ordered: bool) -> None:
        order = torch.randperm(case.v, generator=torch.Generator().manual_seed(case.seed)) if ordered else None
        check(case, impl, skip_mass=1e-8, vocab_order=None if order is None else place(impl, order)[0])

    def test_an_unaligned_row_of_more_than_one_step(self, impl: str) -> None:
        """Widths that no tile and no tensor descriptor divides."""
        for d, rank in ((33, 1), (16, 16), (31, 17)):
            check(Adapted(seed=3, n=21, d=d, v=133, rank=rank, bias=True), impl)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", [{}, {"memory_budget": EVERYTHING}, {"mode": "frozen"}], ids=str)
def test_16_bit_inputs_are_as_exact_as_their_rounding(impl: str, dtype: torch.dtype, option: dict) -> None:
    """Statistics are fp32-exact on the rounded inputs; gradients are no worse than eager code's in that dtype."""
    leaves = ["hidden", "projected"] + ["weight", "lora_B"] * (option.get("mode") != "frozen")
    rng = torch.Generator().manual_seed(5)
    shapes = {"hidden": (37, 48), "projected": (37, 8), "weight": (257, 48), "lora_B": (257, 8)}
    drawn_tensors = {
        name: (torch.randn(*shape, generator=rng) * (0.15 if shape[0] == 257 else 1)).to(dtype)
        for name, shape in shapes.items()
    }
    labels = torch.randint(0, 257, (37,), generator=rng)
    g = torch.linspace(-1, 2, 37)

    def run(impl: str, to: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        x = {name: place(impl, t.to(to))[0].requires_grad_(name in leaves) for name, t in drawn_tensors.items()}
        on_device, factor = place(impl, labels, g)
        stats = linear_logps(
            x["hidden"], x["weight"], on_device, lora=(x["projected"], x["lora_B"]), impl=impl, **options
        )
        loss = (stats.logps * factor).sum() + stats.entropy.sum()
        grads = torch.autograd.grad(loss, [x[name] for name in leaves])
        return [s.detach().cpu().double() for s in stats], [grad.cpu() for grad in grads]

    def eager() -> list[Tensor]:
        x = {name: t.detach().requires_grad_(name in leaves) for name, t in drawn_tensors.items()}
        logits = x["hidden"] @ x["weight"].T + x["projected"] @ x["lora_B"].T
        log_probs = logits.log_softmax(-1)
        loss = (log_probs.gather(1, labels[:, None])[:, 0] * g).sum() - (log_probs.exp() * log_probs).sum()
        return list(torch.autograd.grad(loss, [x[name] for name in leaves]))

    truth, true_grads = run("reference", torch.float64)
    stats, grads = run(impl, dtype, **option)
    for value, true in zip(stats, truth, strict=True):
        torch.testing.assert_close(value, true, atol=3e-5, rtol=1e-5)
    for name, grad, true, other in zip(leaves, grads, true_grads, eager(), strict=True):
        assert grad.dtype == dtype
        error, eager_error = ((y.double() - true).norm() / true.norm() for y in (grad, other))
        assert error <= max(eager_error, 2 * torch.finfo(dtype).eps), f"{name}: {error:.1e}, eager {eager_error:.1e}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_and_scaling_are_the_callers(impl: str) -> None:
    """The gradient reaches hidden through the head and through the adapter's dropped-out copy of it."""
    rng = torch.Generator().manual_seed(6)
    tensors = [torch.randn(*shape, generator=rng) for shape in ((2, 9, 12), (70, 12), (3, 12), (70, 3))]
    keep = (torch.rand(2, 9, 12, generator=rng) < 0.8) / 0.8
    labels = torch.randint(0, 70, (2, 9), generator=rng)
    labels[1, 5:] = -100

    hidden, weight, lora_a, lora_b = exact = [x.double().requires_grad_() for x in tensors]
    logits = hidden @ weight.T + SCALING * ((hidden * keep) @ lora_a.T) @ lora_b.T
    log_probs = logits.log_softmax(-1)
    truth = (log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)
    true_grads = torch.autograd.grad((truth * torch.tensor([1.0, -2.0])).sum(), exact)

    hidden, weight, lora_a, lora_b = leaves = [x.requires_grad_() for x in place(impl, *tensors)]
    mask, on_device = place(impl, keep, labels)
    projected = SCALING * (hidden * mask) @ lora_a.T
    stats = linear_sequence_stats(hidden, weight, on_device, lora=(projected, lora_b), impl=impl)
    torch.testing.assert_close(stats.logps.cpu().double(), truth, atol=1e-4, rtol=1e-6)
    grads = torch.autograd.grad((stats.logps * torch.tensor([1.0, -2.0]).to(stats.logps.device)).sum(), leaves)
    for grad, true in zip(grads, true_grads, strict=True):
        assert_grads_close("gradient", grad.cpu(), true)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_adapter_of_zeros_changes_nothing(impl: str) -> None:
    """As PEFT begins: lora_B is 0, and of the adapter only lora_B gets a gradient."""
    hidden, weight, projected = place(impl, torch.randn(9, 6), torch.randn(70, 6), torch.randn(9, 4))
    labels = torch.arange(9, device=hidden.device)
    leaves = hidden, projected, lora_b = [x.requires_grad_() for x in (hidden, projected, weight.new_zeros(70, 4))]
    plain = linear_logps(hidden, weight, labels, impl=impl)
    stats = linear_logps(hidden, weight, labels, lora=(projected, lora_b), impl=impl)
    torch.testing.assert_close(stats.logps, plain.logps)
    d_hidden, d_projected, d_lora_b = torch.autograd.grad(stats.logps.sum(), leaves)
    torch.testing.assert_close(d_hidden, torch.autograd.grad(plain.logps.sum(), hidden)[0])
    assert (d_projected == 0).all() and (d_lora_b != 0).any()
    assert d_hidden.is_contiguous() and d_projected.is_contiguous()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_log_sum_sq_probs(impl: str) -> None:
    case = Adapted(seed=7, n=12, d=9, v=130, bias=True, softcap=4.0, logit_scale=1.3, temperature=0.7)
    exact, x = case.inputs(torch.float64, "reference"), case.inputs(torch.float32, impl)
    weight = exact["weight"] + SCALING * exact["lora_B"] @ exact["lora_A"]
    logits = 4 * torch.tanh(1.3 * (exact["hidden"] @ weight.T + exact["bias"]) / 4) / 0.7
    want = torch.where(exact["labels"] == -100, 0, torch.logsumexp(2 * logits.log_softmax(-1), -1))
    stats = linear_logps(
        x["hidden"], x["weight"], x["labels"], x["bias"], lora=(SCALING * x["hidden"] @ x["lora_A"].T, x["lora_B"]),
        impl=impl, extras=("log_sum_sq_probs",), **case.options,
    )  # fmt: skip
    torch.testing.assert_close(stats.log_sum_sq_probs.cpu().double(), want, atol=1e-5, rtol=1e-5)


# --- rows that do not count -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("capturing", [False, True])
def test_ignored_rows_are_exactly_zero_and_never_read(
    impl: str, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "capturing", lambda: capturing)
    for trains in (("hidden", "projected"), ("hidden", "projected", "weight", "lora_B"), ("projected", "lora_B")):
        shapes = {"hidden": (6, 8), "projected": (6, 3), "weight": (70, 8), "lora_B": (70, 3)}
        x = {name: place(impl, torch.randn(*shape))[0] for name, shape in shapes.items()}
        labels = torch.tensor([3, -1, 5, -1, -1, 0], device=x["hidden"].device)
        x["hidden"][labels == -1], x["projected"][labels == -1] = torch.nan, torch.nan
        leaves = [x[name].requires_grad_() for name in trains]
        stats = linear_logps(
            x["hidden"], x["weight"], labels, lora=(x["projected"], x["lora_B"]), ignore_index=-1, impl=impl
        )
        assert (stats.logps[labels == -1] == 0).all() and (stats.entropy[labels == -1] == 0).all()
        grads = dict(zip(trains, torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaves), strict=True))
        assert all(grad.isfinite().all() for grad in grads.values())
        assert (grads["projected"][labels == -1] == 0).all() and (grads["projected"][labels != -1] != 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_labelled(impl: str, rows: int) -> None:
    leaves = place(impl, torch.randn(rows, 4), torch.randn(9, 4), torch.randn(rows, 2), torch.randn(9, 2))
    hidden, weight, projected, lora_b = (x.requires_grad_() for x in leaves)
    labels = torch.full((rows,), -100, device=hidden.device)
    stats = linear_logps(hidden, weight, labels, lora=(projected, lora_b), impl=impl)
    grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaves)
    assert all((s == 0).all() for s in (*stats, *grads)) and [g.shape for g in grads] == [x.shape for x in leaves]


# --- certified skipping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("tau", [1e-1, 1e-3])
def test_what_skipping_costs_stays_under_the_bound(impl: str, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden's error against weight's largest row, projected's against lora_B's, lora_B's against projected's."""
    kept = []
    backward = (chunked if impl == "chunked" else fused).backward

    def spying(*args: Any, **kwargs: Any) -> Any:
        kept.append(kwargs["keep"].float().mean().item())
        return backward(*args, **kwargs)

    monkeypatch.setattr(chunked if impl == "chunked" else fused, "backward", spying)
    rng = torch.Generator().manual_seed(8)
    n, v, d, r = 48, 400, 32, 5
    weight, lora_b, projected = (torch.randn(*s, generator=rng) for s in ((v, d), (v, r), (n, r)))
    labels = (v * torch.rand(n, generator=rng) ** 5).long()
    hidden = 2.5 * weight[labels] / weight[labels].norm(dim=1, keepdim=True)
    weight[:, 0], hidden[:, 0] = torch.linspace(6, -6, v), 1.25
    g = torch.linspace(-2, 3, n)

    def run(impl: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in place(impl, hidden, weight, projected, lora_b)]
        on_device, factor = place(impl, labels, g)
        stats = linear_logps(leaves[0], leaves[1], on_device, lora=(leaves[2], leaves[3]), impl=impl, **options)
        return [x.cpu().double() for x in torch.autograd.grad((stats.logps * factor).sum(), leaves)]

    exact, skipped = run("reference", torch.float64), run(impl, torch.float32, skip_mass=tau)
    assert kept[0] < 0.9, "nothing was left out: the test shows nothing"
    error, noise = [a - b for a, b in zip(skipped, exact, strict=True)], 1e-4
    for rows, head, width in ((0, weight, "hidden"), (2, lora_b, "projected")):
        bound = g.abs() * tau * head.norm(dim=1).max() + noise
        assert (error[rows].norm(dim=1) <= bound).all(), width
    for head, rows in ((1, hidden), (3, projected)):
        assert error[head].norm(dim=1).sum() <= tau * (g.abs() * rows.norm(dim=1)).sum() + v * noise
    assert error[2].norm(dim=1).max() > 1e-6


# --- what is computed, and what is not ------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize(
    ("trains", "options", "expected"),
    [
        (("hidden", "projected"), {}, {"unit": True, "stash_rows": 0}),
        (("projected",), {}, {"unit": True, "stash_rows": 0}),
        (("hidden", "projected", "lora_B"), {}, {"unit": False, "stash_rows": 0}),
        (("lora_B",), {}, {"unit": False, "stash_rows": 0}),
        (("hidden", "lora_B"), {"memory_budget": EVERYTHING}, {"unit": False, "stash_rows": 6}),
        (("hidden", "lora_B"), {"skip_mass": 0.1}, {"unit": False, "block_mass": True}),
        ((), {}, {"unit": False, "stash_rows": 0}),
    ],
)
def test_what_auto_chooses(
    impl: str, trains: tuple[str, ...], options: dict, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = (chunked if impl == "chunked" else fused), {}
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda *args, **kwargs: (seen.update(kwargs), forward(*args, **kwargs))[1])
    shapes = {"hidden": (6, 8), "projected": (6, 3), "weight": (70, 8), "lora_B": (70, 3)}
    x = {name: place(impl, torch.randn(*shape))[0].requires_grad_(name in trains) for name, shape in shapes.items()}
    labels = torch.arange(6, device=x["hidden"].device)
    linear_logps(x["hidden"], x["weight"], labels, lora=(x["projected"], x["lora_B"]), impl=impl, **options)
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize("impl", TILED)
def test_a_frozen_weight_is_multiplied_by_no_gradient(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backward's two wide products, d hidden is left with lora_B alone trained, and none without hidden."""
    engine, widths = (chunked if impl == "chunked" else fused), []
    mm_into = tiles.mm_into

    def counting(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        widths.append(b.shape[1])
        mm_into(out, a, b, accumulate=accumulate)

    shapes = {"hidden": (6, 40), "projected": (6, 3), "weight": (50, 40), "lora_B": (50, 3)}
    for trains, expected in ((("hidden", "projected", "lora_B"), 1), (("projected", "lora_B"), 0)):
        x = {name: place(impl, torch.randn(*s))[0].requires_grad_(name in trains) for name, s in shapes.items()}
        labels = torch.arange(6, device=x["hidden"].device)
        # A whole stash: the backward projects nothing, so that only the gradients' products are left.
        stats = linear_logps(
            x["hidden"], x["weight"], labels, lora=(x["projected"], x["lora_B"]), impl=impl, memory_budget=EVERYTHING
        )
        widths.clear()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "mm_into", counting)
            torch.autograd.grad(stats.logps.sum(), [x[name] for name in trains])
        assert sum(width >= 40 for width in widths) == expected and len(widths) == 2


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize(
    "options",
    [{"mode": "no_grad"}, {"mode": "frozen"}, {}, {"memory_budget": EVERYTHING}, {"skip_mass": 1e-3}],
    ids=str,
)
def test_only_slices_of_the_head_are_joined(impl: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, join = [], tiles.join

    def noting(left: Tensor, right: Tensor, width: int) -> Tensor:
        joined.append(left.shape[0])
        return join(left, right, width)

    monkeypatch.setattr(tiles, "join", noting)
    trains = ("hidden", "lora_A") if options.get("mode") else ("hidden", "lora_A", "lora_B", "weight")
    case = Adapted(seed=9, n=20, d=8, v=150, trains=trains)
    x = case.inputs(torch.float32, impl)
    stats = through(case, impl, x, **options)
    if options.get("mode") != "no_grad":
        gradients(case, stats, x)
    assert joined and max(joined) <= 64


MEMORY = """
import torch
from fastpo import linear_logps
from fastpo.memory import peak_bytes_of

n, v, d, r = 64, 131072, 512, 8
hidden, projected = torch.rand(n, d, requires_grad=True), torch.rand(n, r, requires_grad=True)
weight, lora_b = torch.full((v, d), 0.01), torch.zeros(v, r, requires_grad=True)
labels = torch.randint(0, v, (n,))

def step(rows, columns):
    stats = linear_logps(
        hidden[rows], weight[columns], labels[rows] % 512, lora=(projected[rows], lora_b[columns]), impl="chunked"
    )
    stats.logps.sum().backward()

step(slice(2), slice(512))
hidden.grad = projected.grad = lora_b.grad = None
print(peak_bytes_of(lambda: step(slice(None), slice(None)), torch.device("cpu")) / weight.nbytes)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux lets a process reset its peak resident memory"
)
def test_a_frozen_weight_has_no_gradient_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < 0.4


# --- inside torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize(
    ("trains", "options"),
    [
        (("hidden", "lora_A", "lora_B"), {}),
        (("hidden", "lora_A", "lora_B", "weight"), {"memory_budget": 10 * 150 * 5}),
        (("hidden", "lora_A"), {}),
        (("lora_A", "lora_B"), {"skip_mass": 1e-8}),
    ],
)
def test_one_graph_with_the_same_gradients(impl: str, trains: tuple[str, ...], options: dict) -> None:
    case = Adapted(seed=31, n=24, d=16, v=150, trains=trains)
    x = case.inputs(torch.float32, impl)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        lora = (SCALING * hidden @ lora_a.T, lora_b)
        stats = linear_logps(hidden, weight, labels, lora=lora, impl=impl, **options)
        return (stats.logps * 0.3 + stats.entropy).sum()

    torch.compiler.reset()
    leaves = [x[name] for name in trains]
    values = [
        f(x["hidden"], x["weight"], x["labels"], x["lora_A"], x["lora_B"])
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(values[1], values[0])
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize(
    ("mode", "budget", "skip_mass"),
    [("frozen", 0, 0.0), ("lean", 0, 0.0), ("stash", EVERYTHING, 0.0), ("lean", 0, 0.01)],
)
def test_opcheck(impl: str, mode: str, budget: int, skip_mass: float) -> None:
    """torch's own examination of the registered op: schema, fake shapes, autograd."""
    case = Adapted(seed=35, n=12, d=8, v=70, ignored=0.0, trains=("hidden",) if mode == "frozen" else ("lora_B",))
    x = case.inputs(torch.float32, impl)
    projected = (x["hidden"] @ x["lora_A"].T).detach().requires_grad_()
    plan = autograd.Plan(1.0, None, 1.0, -100, impl, mode, budget, skip_mass, False, True)
    torch.library.opcheck(
        autograd._linear_statistics,
        (x["hidden"], x["weight"], None, projected, x["lora_B"], None, x["labels"], ends(case, x), None, *plan),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_autocast_casts_the_adapter_too() -> None:
    case = Adapted(seed=7, n=12, d=16, v=90)
    x = case.inputs(torch.float32, "chunked")
    lora = (x["hidden"] @ x["lora_A"].T, x["lora_B"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_logps(x["hidden"].bfloat16(), x["weight"], x["labels"], lora=lora)
    rounded = [y.bfloat16() for y in (x["hidden"], x["weight"], *lora)]
    again = linear_logps(rounded[0], rounded[1], x["labels"], lora=(rounded[2], rounded[3]))
    assert stats.logps.dtype == torch.float32 and torch.equal(stats.logps, again.logps)


# --- what is refused ------------------------------------------------------------------------------------------------

PAIR = r"lora must be two tensors, \(projected, lora_B\), got "
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(3, 2), TypeError, PAIR + "Tensor"),
    ((torch.ones(3, 2),), TypeError, PAIR + "1 of them"),
    ((torch.ones(3, 2), None), TypeError, "lora's lora_B must be a tensor, got NoneType"),
    ((None, torch.ones(7, 2)), TypeError, "lora's projected must be a tensor, got NoneType"),
    ((torch.ones(2, 2), torch.ones(7, 2)), ValueError, r"lora's projected must have shape \(3, 2\), got \(2, 2\)"),
    ((torch.ones(3, 2), torch.ones(2, 7)), ValueError, r"lora's lora_B must have shape \(7, 2\), got \(2, 7\)"),
    ((torch.ones(3, 2), torch.ones(7, 3)), ValueError, r"lora's lora_B must have shape \(7, 2\), got \(7, 3\)"),
    ((torch.ones(3, 0), torch.ones(7, 0)), ValueError, r"lora's projected must have shape .* r > 0, got \(3, 0\)"),
    ((torch.ones(()), torch.ones(7, 1)), ValueError, r"lora's projected must have shape .* got \(\)"),
    (
        (torch.ones(3, 2).double(), torch.ones(7, 2)),
        TypeError,
        "lora's projected must have hidden's dtype torch.float32",
    ),
    ((torch.ones(3, 2), torch.ones(7, 2).half()), TypeError, "lora's lora_B must have .* got torch.float16"),
    ((torch.ones(3, 2, device="meta"), torch.ones(7, 2)), ValueError, "lora's projected must be on hidden's device"),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lora", "error", "message"), REFUSED)
def test_refusals_name_the_argument_and_what_arrived(
    impl: str, lora: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_logps(torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 6, -100]), lora=lora, impl=impl)


def test_frozen_gives_no_gradient_to_lora_b() -> None:
    lora = (torch.ones(3, 2), torch.ones(7, 2, requires_grad=True))
    with pytest.raises(ValueError, match="mode='frozen' gives no gradient to weight, bias and lora_B"):
        linear_logps(torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 6, 1]), lora=lora, mode="frozen")


def test_the_joint_functions_take_no_adapter() -> None:
    """Policy and reference would have to differ in it."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora'"):
        joint_linear_logps(torch.ones(3, 4), torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 6, 1]), lora=None)
