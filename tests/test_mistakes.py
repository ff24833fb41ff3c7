"""One test for each mistake that other kernels made (KERNELS.md), named after it."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVERYTHING, IMPLEMENTATIONS, TILED, Case, Inputs, check, evaluate, place, small_tiles
from tolerance import assert_grads_close
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastpo import linear_logps
from fastpo.kernels import autograd, chunked, device, fused

KERNELS = Path(autograd.__file__).parent
# mode -> keywords; the head is trainable but in "frozen"
MODES: dict[str, dict[str, Any]] = {
    "frozen": {"mode": "frozen"},
    "lean": {"mode": "lean"},
    "stash": {"mode": "stash", "memory_budget": EVERYTHING},
    "skip": {"skip_mass": 1e-8},
}


def leaves_of(mode: str, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return [x.requires_grad_() for x in ((hidden,) if mode == "frozen" else (hidden, weight))]


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with small_tiles():
        yield


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 5000.0])
def test_a_running_maximum_that_starts_at_0(impl: str, softcap: float | None) -> None:
    """It would give 0 / 0 where every logit lies near -1000."""
    hidden, weight = place(impl, torch.full((3, 1), 1.0, requires_grad=True), -1000.0 - torch.arange(70.0)[:, None])
    labels = torch.tensor([0, 1, 69], device=hidden.device)
    stats = linear_logps(hidden, weight, labels, impl=impl, softcap=softcap)
    logits = weight[:, 0].cpu().double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(stats.logps.cpu().double(), logits.log_softmax(0)[labels.cpu()], atol=3e-4, rtol=1e-5)
    assert stats.entropy.isfinite().all() and (stats.entropy > 0).all()
    (grad,) = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), hidden)
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", MODES)
def test_labels_out_of_range_leaving_uninitialised_memory(
    impl: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, or, where no error can be raised (CUDA-graph capture), a NaN: never what the memory held."""
    x = Inputs(Case(seed=1, n=20, d=8, v=150, ignored=0.0, frozen=mode == "frozen"), impl, torch.float32)
    x.labels[3], x.labels[4] = 150, -1
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 150\).*got 150"):
        linear_logps(x.hidden, x.weight, x.labels, impl=impl, **MODES[mode])
    monkeypatch.setattr(autograd, "capturing", lambda: True)
    stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl, **MODES[mode])
    assert stats.logps.isnan().nonzero()[:, 0].tolist() == [3, 4]


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", MODES)
def test_tail_rows_counted_when_n_is_not_a_multiple_of_the_tile(impl: str, mode: str) -> None:
    """Every N around the tile's 16 rows: weight's gradient would show a row too many."""
    for n in (3, 15, 16, 17, 31, 33):
        check(Case(seed=n, n=n, d=8, v=70, ignored=0.0, frozen=mode == "frozen"), impl, **MODES[mode])


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", MODES)
def test_v_not_divisible_by_the_tile(impl: str, mode: str) -> None:
    """Every V around tiles of 32 and slices of 64: the mass of the columns past V would show in each row."""
    for v in (2, 31, 33, 63, 64, 65, 129):
        check(Case(seed=v, n=5, d=8, v=v, frozen=mode == "frozen", bias=mode != "frozen"), impl, **MODES[mode])


@pytest.fixture
def far_apart(tmp_path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden (20, 8) and weight (40, 8) whose rows are 2^27 elements apart, in a file that is nearly all hole."""
    stride, rows = 1 << 27, 60
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(rows * stride * 4)
    memory = torch.from_file(str(path), shared=True, size=rows * stride)
    whole = memory.as_strided((rows, 8), (stride, 1))
    rng = torch.Generator().manual_seed(0)
    whole.copy_(torch.randn(rows, 8, generator=rng))
    assert (20 - 1) * stride > 2**31
    yield whole[:20], whole[20:]
    del whole, memory
    path.unlink()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would need the memory")
@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tma", [True, False])
def test_int32_overflow_of_row_times_stride_on_a_100b_class_head(
    impl: str, mode: str, tma: bool, far_apart: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stride fits in int32, row times stride does not."""
    if impl == "chunked" and not tma:
        pytest.skip("chunked has no pointers")
    family = fused.FAMILIES["interpreter"]._replace(tma=tma)
    monkeypatch.setitem(fused.FAMILIES, "interpreter", family)
    labels = torch.arange(20) * 2
    far = [x.detach() for x in far_apart]
    near = [x.clone(memory_format=torch.contiguous_format) for x in far]

    def run(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        leaves = leaves_of(mode, hidden, weight)
        stats = linear_logps(hidden, weight, labels, impl=impl, **MODES[mode])
        loss = (stats.logps * torch.linspace(-1, 1, 20)).sum() + stats.entropy.sum() * (mode != "frozen")
        return [*stats, *torch.autograd.grad(loss, leaves)]

    for a, b in zip(run(*far), run(*near), strict=True):
        torch.testing.assert_close(a, b)


def test_int32_overflow_nowhere_in_the_source() -> None:
    """What the kernels write is too large to test: there too, a row times its stride must be a product of int64."""
    for name in ("device", "forward_kernels", "backward_kernels"):
        for function in (KERNELS / f"{name}.py").read_text().split("@triton.jit"):
            if "tl.load(tiles" in function:  # its rows and columns come from an int64 list
                continue
            products = re.findall(r"[\w.()]+(?:\[[^]]*\])? \* (?:stride_(?!keep)\w+|N \+)", function)
            assert all("int64" in product or product.startswith(("at *", "tile *", "row *")) for product in products)
            for short in ("at", "tile", "row"):
                definitions = re.findall(rf"^    {short} = (.*)", function, re.MULTILINE)
                if any(product.startswith(short + " *") for product in products):
                    assert any("int64" in definition for definition in definitions), short


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sum_of", ["dw", "dh"])
def test_dw_or_dh_summed_in_bf16(impl: str, mode: str, sum_of: str) -> None:
    """Thousands of rows (dW), dozens of slices (dh), each too small to change a bf16 sum that has grown."""
    n, v, d = (1500, 40, 8) if sum_of == "dw" else (20, 1500, 8)
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=rng), torch.randn(v, d, generator=rng)
    hidden, weight = (1 + 0.1 * hidden, 0.02 * weight) if sum_of == "dw" else (0.01 * hidden, weight)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    labels = torch.randint(0, 2, (n,), generator=rng)

    def gradients(impl: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        h, w, y = place(impl, hidden.to(dtype), weight.to(dtype), labels)
        leaves = leaves_of(mode, h, w)
        stats = linear_logps(h, w, y, impl=impl, **options)
        return [g.cpu() for g in torch.autograd.grad(stats.logps.sum(), leaves)]

    truth = gradients("reference", torch.float64)
    for grad, true in zip(gradients(impl, torch.bfloat16, **MODES[mode]), truth, strict=True):
        assert grad.dtype == torch.bfloat16
        assert_grads_close("gradient", grad, true, rtol=6e-3)  # the interpreter cuts off, not rounds


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("largest", [1.0, 1e6])
def test_filter_applied_before_the_upstream_gradient(impl: str, largest: float) -> None:
    """A block is left out for its share of the softmax, so that the error is a share of the gradient, however large.

    A filter on |gradient| would leave out all of a row with a small upstream gradient, or nothing of one with a large.
    """
    tau, case = 1e-3, Case(seed=2, n=24, d=16, v=200, size=30.0, ignored=0.0, frozen=True)
    upstream = torch.logspace(-9, math.log10(largest), case.n)

    def gradient(impl: str, dtype: torch.dtype, **options: Any) -> Tensor:
        x = Inputs(case, impl, dtype)
        stats = linear_logps(x.hidden, x.weight, x.labels, impl=impl, **options)
        return torch.autograd.grad(stats.logps, x.hidden, upstream.to(x.hidden))[0].cpu().double()

    exact, skipped = gradient("reference", torch.float64), gradient(impl, torch.float32, skip_mass=tau)
    bound = upstream.double() * tau * case.tensors()[1].double().norm(dim=1).max()
    rounding = 1e-5 * exact.norm(dim=1)
    error = (skipped - exact).norm(dim=1)
    assert (error <= bound + rounding).all()
    assert (error > rounding).any(), "nothing was left out: the test shows nothing"


def test_spin_locks_that_hang() -> None:
    """There are none, nor atomics: each number is written by one program, once."""
    for path in KERNELS.glob("*.py"):
        assert not re.search(r"tl\.atomic|atomic_(add|cas|xchg)|^\s*while\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_bit_identical_from_run_to_run(impl: str, mode: str) -> None:
    """As sums in an order of chance would not be."""
    case = Case(seed=5, n=33, d=24, v=130, bias=True, softcap=5.0, frozen=mode == "frozen")
    options = {} if impl == "reference" else MODES[mode]
    first, second = (evaluate(case, impl, torch.float32, **options) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["frozen", "lean", "skip"])  # stash: test_modes.py
def test_non_contiguous_hidden(impl: str, mode: str) -> None:
    """Every other token, a transpose, one row repeated: the strides are read, and the gradient is that of a copy."""
    hidden, weight, labels = place(impl, torch.randn(4, 20, 8), torch.randn(70, 8), torch.randint(0, 70, (4, 10)))
    option = {} if impl == "reference" else MODES[mode]

    def run(view: Tensor, head: Tensor) -> list[Tensor]:
        leaves = leaves_of(mode, view, head)
        stats = linear_logps(view, head, labels, impl=impl, **option)
        return [*stats, *torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), leaves)]

    backwards = weight.flip(0).as_strided((70, 8), (1, 70)) if impl == "chunked" else weight.t().contiguous().t()
    for view in (
        hidden[:, ::2],
        hidden.transpose(0, 1)[:10].transpose(0, 1),
        hidden.transpose(1, 2).contiguous().transpose(1, 2)[:, :10],
        hidden[:1, :1].expand(4, 10, 8),
    ):
        for head in (weight, backwards, weight.repeat(1, 2)[:, :8], weight.repeat(2, 1)[::2]):
            got = run(view.detach(), head.detach())
            copies = (x.detach().clone(memory_format=torch.contiguous_format) for x in (view, head))
            for a, b in zip(got, run(*copies), strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("mode", ["lean", "stash", "skip"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_in_the_gradient_wrong(impl: str, mode: str, softcap: float | None) -> None:
    """The bias moves the softmax that all three gradients are made of, scaled and capped as the logits are."""
    for uses in ("logps", "entropy"):
        case = Case(seed=3, n=20, d=8, v=150, bias=True, softcap=softcap, logit_scale=1.7, temperature=0.7, uses=uses)
        check(case, impl, **MODES[mode])


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_a_sharded_head_read_as_a_shard(tmp_path: Path, placement: Any) -> None:
    """Under FSDP2 the head may be a DTensor; test_distributed has more than one process."""
    from tiny import tiny_model

    from fastpo.backbone import install_stats_forward, sequence_stats

    ids = torch.randint(5, 300, (2, 9))
    mask = torch.ones_like(ids)
    model = tiny_model().requires_grad_(False)
    install_stats_forward(model)
    expected = sequence_stats(model, ids, mask, mask)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shards = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [placement])
        model.lm_head.weight = torch.nn.Parameter(shards, requires_grad=False)
        found = sequence_stats(model, ids, mask, mask)
    finally:
        torch.distributed.destroy_process_group()
    for value, truth in zip(found, expected, strict=True):
        assert type(value) is Tensor
        torch.testing.assert_close(value, truth)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tanh")
def test_a_tanh_that_cancels_near_zero() -> None:
    """1 - e^-2x loses all digits there; libdevice's is not to be had in the interpreter."""
    x = np.concatenate([np.logspace(-8, 1.5, 400), [0.2499, 0.2501, 0.0]])
    hidden = torch.tensor(np.concatenate([x, -x]), dtype=torch.float32)[:, None]
    weight, labels = torch.tensor([[1.0], [0.0]]), torch.zeros(len(hidden)).long()
    logps = linear_logps(hidden, weight, labels, softcap=1.0, impl="fused").logps
    truth = linear_logps(hidden.double(), weight.double(), labels, softcap=1.0, impl="reference").logps
    torch.testing.assert_close(logps.double(), truth, atol=2e-7, rtol=1e-6)
    assert device.LOWEST.value == chunked.LOWEST  # one stand-in for -inf
