"""Certified skipping: the error stays under the stated bound, and what is left out is not touched."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import TILED, Case, Inputs, cases, drawn, place, small_tiles
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpo import TokenStats, linear_logps, linear_sequence_stats
from fastpo.kernels import autograd, chunked, fused
from fastpo.kernels.skipping import kept_blocks

TAUS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
N, V, D = 48, 400, 32


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


class Spy:
    """Notes which blocks a forward keeps, and the size of a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keep = torch.empty(0)
        self.block = self.rows_per_group = 0

        def spying(mass: Tensor, labels: Tensor, tau: float, block: int, rows_per_group: int = 1) -> Tensor:
            self.keep = kept_blocks(mass, labels, tau, block, rows_per_group)
            self.block, self.rows_per_group = block, rows_per_group
            return self.keep

        monkeypatch.setattr(autograd, "kept_blocks", spying)

    def columns(self, n: int, v: int) -> Tensor:
        """(n, v) bool: the logits that are computed, in the order of the plane's columns."""
        keep = self.keep.t().repeat_interleave(self.rows_per_group, 0).repeat_interleave(self.block, 1)
        return keep[:n, :v].cpu()


def planted(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and labels of a known softmax; tokens and labels grow rarer with their number, as words do."""
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64)
    labels = (V * torch.rand(N, generator=rng) ** 5).long()
    towards = weight[labels] / weight[labels].norm(dim=1, keepdim=True)
    sharpness = {"peaked": torch.full((N,), 2.5), "flat": torch.full((N,), 0.01), "mixed": torch.linspace(0.01, 4, N)}
    hidden = towards * sharpness[kind][:, None]
    weight[:, 0], hidden[:, 0] = torch.linspace(6, -6, V), 0.5 * sharpness[kind]
    return hidden.to(dtype), weight.to(dtype), labels


def gradients(
    impl: str, tensors: tuple[Tensor, ...], *, g: Tensor, g_h: Tensor | None = None, **options: Any
) -> tuple[TokenStats, list[Tensor]]:
    hidden, weight, labels = place(impl, *tensors)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    stats = linear_logps(*leaves, labels, impl=impl, **options)
    loss = (stats.logps * g.to(stats.logps)).sum()
    if g_h is not None:
        loss = loss + (stats.entropy * g_h.to(stats.logps)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return TokenStats(*(s.detach().cpu() for s in stats)), [x.cpu().double() for x in grads]


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("kind", ["peaked", "flat", "mixed"])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_error_stays_under_the_stated_bound(
    impl: str, kind: str, entropy: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    # chunked in float64, where no rounding hides an error; fused has only fp32
    spy, tensors = Spy(monkeypatch), planted(kind, torch.float64 if impl == "chunked" else torch.float32)
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in tensors)
    g, g_h = torch.linspace(-2, 3, N).double(), torch.linspace(1, -1, N).double() if entropy else None
    gain = 1.5 / 0.8
    options = {"logit_scale": 1.5, "temperature": 0.8}
    exact_stats, exact = gradients("reference", (hidden, weight, labels), g=g, g_h=g_h, **options)
    logits = gain * hidden @ weight.T
    probs, widest, lengths = logits.softmax(1), weight.norm(dim=1).max(), hidden.norm(dim=1)
    noise = 4 * torch.finfo(tensors[0].dtype).eps * logits.abs().max()
    kept, errors = [], []
    for tau in TAUS:
        stats, grads = gradients(impl, tensors, g=g, g_h=g_h, skip_mass=tau, **options)
        for value, true in zip(stats, exact_stats, strict=True):
            torch.testing.assert_close(value.double(), true, atol=1e-5, rtol=1e-5)
        size = g.abs()
        if g_h is not None:
            size = size + g_h.abs() * (torch.log(torch.tensor(V / tau)) + exact_stats.entropy)
        error = (grads[0] - exact[0]).norm(dim=1)
        assert (error <= gain * size * (tau + noise) * widest).all(), tau
        assert (grads[1] - exact[1]).norm(dim=1).sum() <= gain * (tau + 2 * noise) * (size * lengths).sum(), tau

        computed = spy.columns(N, V)
        assert ((probs * ~computed).sum(1) <= tau).all(), "a row lost more than tau"
        assert computed[torch.arange(N), labels].all(), "a label's block was left out"
        kept.append(spy.keep.float().mean().item())
        errors.append(error.max().item())
    assert kept == sorted(kept), "a smaller tau must keep more"
    if kind == "peaked":
        assert kept[0] < 0.5 and errors[0] > 1e-5, "nothing was left out: the test shows nothing"
    if kind == "flat":
        assert kept[-1] == 1.0
    for tau, share, largest in zip(TAUS, kept, errors, strict=True):
        record_property(f"tau={tau:g}", f"kept {share:.3f}, largest error {largest:.1e}")
        print(f"{impl} {kind}{' entropy' * entropy} tau={tau:g}: kept {share:.3f}, error {largest:.1e}")


@pytest.mark.parametrize("impl", TILED)
@drawn(30)
@given(
    case=cases(ignored=st.sampled_from([0.0, 0.4]), size=st.sampled_from([0.1, 4.0, 20.0]), frozen=st.just(False)),
    tau=st.sampled_from(TAUS), ordered=st.booleans(),
)  # fmt: skip
def test_the_bound_for_drawn_problems(impl: str, case: Case, tau: float, ordered: bool) -> None:
    """Bias, softcap, scale, ragged shapes, ignored rows, and blocks of a permuted vocabulary."""
    order = torch.randperm(case.v, generator=torch.Generator().manual_seed(case.seed)) if ordered else None

    def run(impl: str, dtype: torch.dtype, **options: Any) -> tuple[Inputs, list[Tensor]]:
        x = Inputs(case, impl, dtype)
        stats = linear_logps(x.hidden, x.weight, x.labels, x.bias, impl=impl, **case.options, **options)
        return x, [g.cpu().double() for g in torch.autograd.grad((stats.logps * x.factor).sum(), x.leaves)]

    x, exact = run("reference", torch.float64)
    _, lean = run(impl, torch.float32, mode="lean")
    _, skipped = run(impl, torch.float32, skip_mass=tau, vocab_order=None if order is None else place(impl, order)[0])
    gain, g = case.logit_scale / case.temperature, x.factor.abs() * (x.labels != -100)
    noise = [(a - b).norm().item() * 2 + 1e-6 for a, b in zip(lean, exact, strict=True)]
    errors = [a - b for a, b in zip(skipped, exact, strict=True)]
    widest = x.weight.detach().norm(dim=1).max()
    assert (errors[0].norm(dim=1) <= gain * g * tau * widest + noise[0]).all()
    lengths = x.hidden.detach().norm(dim=1)
    assert errors[1].norm(dim=1).sum() <= gain * tau * (g * lengths).sum() + noise[1] * case.v**0.5
    if case.bias:
        assert errors[2].abs().sum() <= gain * tau * g.sum() + noise[2] * case.v**0.5


@pytest.mark.parametrize("impl", TILED)
def test_the_bound_grows_with_the_upstream_gradient_and_no_further(impl: str) -> None:
    """Rows of very different weight in the loss: the filter knows nothing of them, the bound is each row's own."""
    tensors, tau = planted("mixed"), 1e-2
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in tensors)
    g = torch.logspace(-6, 6, N).double()
    _, exact = gradients("reference", (hidden, weight, labels), g=g)
    _, grads = gradients(impl, tensors, g=g, skip_mass=tau)
    relative = (grads[0] - exact[0]).norm(dim=1) / (g * weight.norm(dim=1).max())
    assert (relative <= tau + 1e-5).all()
    assert relative.max() > 1e-4, "nothing was left out: the test shows nothing"


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(impl: str, dtype: torch.dtype) -> None:
    tensors, tau, g = planted("peaked", dtype), 1e-2, torch.ones(N).double()
    exact_tensors = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    _, exact = gradients("reference", exact_tensors, g=g)
    _, grads = gradients(impl, tensors, g=g, skip_mass=tau)
    rounding = 2 * torch.finfo(dtype).eps
    bound = tau * exact_tensors[1].norm(dim=1).max()
    assert ((grads[0] - exact[0]).norm(dim=1) <= bound + rounding * exact[0].norm(dim=1).max()).all()


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("ordered", [False, True])
def test_tau_of_zero_is_the_exact_path_bit_for_bit(impl: str, ordered: bool) -> None:
    tensors, g = planted("peaked"), torch.linspace(-2, 3, N)
    order = torch.arange(V).flip(0) if ordered else None
    exact_stats, exact = gradients(impl, tensors, g=g, g_h=g, mode="lean")
    stats, grads = gradients(impl, tensors, g=g, g_h=g, mode="lean", skip_mass=0.0, vocab_order=order)
    auto_stats, auto = gradients(impl, tensors, g=g, g_h=g, skip_mass=0)
    for a, b, c in zip((*exact_stats, *exact), (*stats, *grads), (*auto_stats, *auto), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("impl", TILED)
def test_an_order_by_frequency_leaves_out_more(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same problem with its tokens numbered by chance: sorted again, as much is left out as before."""
    spy = Spy(monkeypatch)
    hidden, weight, labels = planted("peaked")
    shuffle = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    shuffled = (hidden, torch.empty_like(weight).index_copy(0, shuffle, weight), shuffle[labels])
    kept, g = {}, torch.ones(N)
    results = {}
    for name, tensors, order in (
        ("sorted", (hidden, weight, labels), None), ("chance", shuffled, None), ("ordered", shuffled, shuffle)
    ):  # fmt: skip
        options = {} if order is None else {"vocab_order": place(impl, order)[0]}
        results[name] = gradients(impl, tensors, g=g, skip_mass=1e-2, **options)
        kept[name] = spy.keep.float().mean().item()
    assert kept["ordered"] == kept["sorted"] < kept["chance"] - 0.05
    for a, b in zip(results["sorted"][0], results["ordered"][0], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(results["sorted"][1][0], results["ordered"][1][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results["sorted"][1][1], results["ordered"][1][1][shuffle], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_left_out_is_not_touched(impl: str, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the head's rows that no row keeps, between forward and backward: nothing of it arrives."""
    spy = Spy(monkeypatch)
    hidden, weight, labels = place(impl, *planted("peaked"))
    order = torch.randperm(V, generator=torch.Generator().manual_seed(4)) if ordered else torch.arange(V)
    weight = torch.empty_like(weight).index_copy(0, place(impl, order)[0], weight)
    labels, bias = place(impl, order)[0][labels], torch.zeros_like(weight[:, 0])
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    vocab_order = place(impl, order)[0] if ordered else None
    stats = linear_sequence_stats(
        hidden[None], weight, labels[None], bias, impl=impl, skip_mass=1e-2, vocab_order=vocab_order
    )
    unread = order[~spy.columns(N, V).any(0)]
    assert len(unread) > V / 10
    poisoned = weight.data.clone()
    weight.data[unread] = torch.nan  # .data: autograd's count of in-place changes does not see it
    grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaves, retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][unread] == 0).all() and (grads[2][unread] == 0).all()
    weight.data.copy_(poisoned)
    for a, b in zip(grads, torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", TILED)
def test_a_skipped_row_does_not_reach_a_kept_block(impl: str) -> None:
    """Rows that leave a block out, beside rows that keep it: only these make its weight's gradient."""
    hidden, weight = torch.zeros(32, 8), torch.zeros(128, 8)
    weight[:64, 0], weight[64:, 1] = 1.0, 1.0
    hidden[:16, 0], hidden[16:, 1] = 60.0, 60.0
    labels = torch.cat((torch.zeros(16), torch.full((16,), 70))).long()
    _, (d_hidden, d_weight) = gradients(impl, (hidden, weight, labels), g=torch.ones(32), skip_mass=1e-3)
    _, exact = gradients("reference", (hidden.double(), weight.double(), labels), g=torch.ones(32))
    assert (d_weight[:64, 1] == 0).all() and (d_weight[64:, 0] == 0).all()
    torch.testing.assert_close(d_weight, exact[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d_hidden, exact[0], atol=1e-4, rtol=1e-4)


@drawn(200)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 40), blocks=st.integers(1, 12), group=st.sampled_from([1, 4, 16]),
    tau=st.sampled_from([0.5, 1e-2, 1e-4]), sharpness=st.sampled_from([0.0, 3.0, 20.0]),
)  # fmt: skip
def test_kept_blocks(seed: int, n: int, blocks: int, group: int, tau: float, sharpness: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    mass = (sharpness * torch.randn(blocks, n, generator=rng)).softmax(0)
    labels = torch.randint(-1, blocks * 10 + 1, (n,), generator=rng)
    keep = kept_blocks(mass, labels, tau, 10, group)
    assert keep.shape == (blocks, -(-n // group)) and keep.dtype == torch.bool
    mine = keep.repeat_interleave(group, 1)[:, :n]
    assert ((mass.double() * ~mine).sum(0) <= tau).all()
    inside = (labels >= 0) & (labels < blocks * 10)
    assert mine[labels[inside] // 10, inside.nonzero()[:, 0]].all()
    if group == 1:  # as much as can be: one block more would be too much
        keep = kept_blocks(mass, torch.full((n,), -1), tau, 10)
        smallest = torch.where(keep, mass.double(), torch.inf).amin(0)
        assert ((mass.double() * ~keep).sum(0) + smallest > tau * 0.999).all()


def test_a_mass_of_nan_is_kept() -> None:
    mass = torch.tensor([[1e-9, torch.nan], [1.0, torch.nan], [1e-9, 1.0]])
    keep = kept_blocks(mass, torch.tensor([15, 15]), 1e-3, 10)
    assert keep.tolist() == [[False, True], [True, True], [False, True]]


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_masses_are_sorted_a_part_at_a_time(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mass = torch.randn(9, 37).mul(4).softmax(0)
    labels = torch.randint(0, 90, (37,))
    whole = [kept_blocks(mass, labels, 1e-2, 10, group) for group in (1, 4)]
    monkeypatch.setattr("fastpo.kernels.skipping.SORTED_AT_ONCE", rows_at_once)
    for expected, group in zip(whole, (1, 4), strict=True):
        assert torch.equal(kept_blocks(mass, labels, 1e-2, 10, group), expected)


def test_blocks_of_the_two_implementations() -> None:
    """What the tests above rest on: several rows share a choice in fused, none in chunked."""
    hidden = torch.randn(2, 4)
    assert chunked.block_shape(hidden) == (1, 32) and fused.block_shape(hidden) == (16, 32)
