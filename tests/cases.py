"""Drawn problems for the kernels, their evaluation by any implementation and mode, and the comparison with float64."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from tolerance import assert_grads_close, assert_stats_close
from torch import Tensor

from fastpo import TokenStats, joint_linear_logps, joint_linear_sequence_stats, linear_logps, linear_sequence_stats
from fastpo.kernels import chunked, configs, fused

GPU = torch.cuda.is_available()
TILED = ("chunked", "fused")
IMPLEMENTATIONS = ("reference", *TILED)
EVERYTHING = 1 << 40  # a memory_budget into which every row fits


def drawn(examples: int) -> settings:
    # No shrinking: in the interpreter it takes many minutes, and a case is short to print as it is.
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


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
    uses: str = "both"  # which statistics the loss reads: logps | entropy | both | kl | all
    dtype: torch.dtype = torch.float32
    distance: float = 0.3  # of the reference's hidden states from the policy's
    tma: bool = True  # in the interpreter: operands through descriptors, or through pointers
    persistent: bool = True

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

    def ref_hidden(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        noise = torch.randn(self.n, self.d, generator=rng, dtype=torch.float64)
        return (self.tensors()[0].double() + self.distance * noise).to(self.dtype)

    @property
    def max_logit(self) -> float:
        hidden, weight, bias, _ = self.tensors()
        logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        logits = self.logit_scale * logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / self.temperature).abs().max().item()


def cases(make: type[Case] = Case, **changes: Any) -> st.SearchStrategy[Any]:
    fields = {
        "seed": st.integers(0, 2**31),
        "n": st.integers(3, 34),
        "d": st.integers(1, 40),
        "v": st.integers(2, 140),
        "size": st.sampled_from([0.1, 1.0, 5.0]),
        "ignored": st.sampled_from([0.0, 0.4, 0.9]),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, None, 5.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.25, 1.7]),
        "temperature": st.sampled_from([1.0, 0.7, 2.0]),
        "contiguous": st.booleans(),
        "frozen": st.booleans(),
        "uses": st.sampled_from(["logps", "entropy", "both"]),
        "distance": st.sampled_from([0.0, 0.1, 1.0]),
        "tma": st.booleans(),
        "persistent": st.booleans(),
    }
    return st.builds(make, **{**fields, **changes})


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles and slices small enough that drawn shapes span several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "BLOCK", 32)
        patch.setattr(chunked, "MAX_ROWS", {"cpu": 16, "cuda": 16})
        patch.setattr(chunked, "MAX_COLS", 64)
        if not GPU:  # a GPU's tiles are wider than such a slice
            patch.setattr(fused, "SLICE_STEP", 32)
            patch.setattr(fused, "MAX_COLS", 64)
        yield


@contextlib.contextmanager
def launched_as(case: Case) -> Iterator[None]:
    """The interpreter's family with the case's way to read operands and to walk over tiles."""
    family = configs.FAMILIES["interpreter"]._replace(tma=case.tma, persistent=case.persistent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.FAMILIES, "interpreter", family)
        yield


def device_of(impl: str) -> str:
    return "cuda" if GPU and impl == "fused" else "cpu"


def place(impl: str, *tensors: Any) -> list[Any]:
    """Tensors where an implementation runs."""
    return [x.to(device_of(impl)) if isinstance(x, Tensor) else x for x in tensors]


class Inputs:
    """A case's tensors where an implementation runs, and the leaves of its gradient."""

    def __init__(self, case: Case, impl: str, dtype: torch.dtype) -> None:
        hidden, weight, bias, self.labels = place(impl, *case.tensors())
        # .to would lose the strides of a tensor whose dtype changes, and only of that.
        self.hidden, self.weight = (x if x.dtype == dtype else x.to(dtype) for x in (hidden, weight))
        self.bias = None if bias is None else bias.to(dtype)
        self.ref_hidden = case.ref_hidden().to(device_of(impl), dtype)
        self.leaves = [self.hidden]
        if not case.frozen:
            self.leaves += [x for x in (self.weight, self.bias) if x is not None]
        for leaf in self.leaves:
            leaf.requires_grad_()
        third = case.n // 3
        self.ends = torch.tensor([0, third, third, case.n], device=hidden.device)  # the second sequence is empty
        self.factor = torch.linspace(-1, 2, case.n, device=hidden.device, dtype=torch.promote_types(dtype, torch.float))


def evaluate(
    case: Case, impl: str, dtype: torch.dtype, *, backward: bool = True, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and gradients of one implementation, on float64 copies of the same rounded inputs if so asked."""
    x = Inputs(case, impl, dtype)
    options = {**case.options, "impl": impl, **options}
    with launched_as(case):
        tokens = linear_logps(x.hidden, x.weight, x.labels, x.bias, **options)
        sequences = linear_sequence_stats(x.hidden, x.weight, x.labels, x.bias, cu_seqlens=x.ends, **options)
        stats = [tokens.logps, tokens.entropy, sequences.entropy, sequences.logps]
        loss = _loss(case, x, tokens, *stats[2:])
        grads = torch.autograd.grad(loss, x.leaves) if backward else []
    return [s.detach().cpu() for s in stats], [g.cpu() for g in grads]


def _loss(case: Case, x: Inputs, tokens: TokenStats, seq_entropy: Tensor, seq_logps: Tensor) -> Tensor:
    loss = tokens.logps.new_zeros(())
    if case.uses in ("logps", "both", "all"):
        loss = loss + (tokens.logps * x.factor).sum() + (seq_logps * x.factor[:3].mean()).sum()
    if case.uses in ("entropy", "both", "all"):
        loss = loss + (tokens.entropy * x.factor.flip(0)).sum() + seq_entropy.sum()
    return loss


def evaluate_joint(
    case: Case, impl: str, dtype: torch.dtype, *, kl: bool, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """As `evaluate`, of policy and reference."""
    x = Inputs(case, impl, dtype)
    options = {**case.options, "impl": impl, "kl": kl, **options}
    with launched_as(case):
        tokens = joint_linear_logps(x.hidden, x.ref_hidden, x.weight, x.labels, x.bias, **options)
        sequences = joint_linear_sequence_stats(
            x.hidden, x.ref_hidden, x.weight, x.labels, x.bias, cu_seqlens=x.ends, **options
        )
        stats = [
            s for part in ("policy", "reference")
            for s in (*getattr(tokens, part), getattr(sequences, part).entropy, getattr(sequences, part).logps)
        ]  # fmt: skip
        loss = _loss(case, x, tokens.policy, *stats[2:4])
        if kl:
            assert tokens.kl is not None and sequences.kl is not None
            stats += [tokens.kl, sequences.kl]
        if kl and case.uses in ("kl", "all"):
            loss = loss + (tokens.kl * (1 + x.factor)).sum() + 0.5 * sequences.kl.sum()
        grads = torch.autograd.grad(loss, x.leaves)
    return [s.detach().cpu() for s in stats], [g.cpu() for g in grads]


def check(case: Case, impl: str, *, rtol: float = 1e-4, backward: bool = True, **options: Any) -> None:
    truth, true_grads = evaluate(case, "reference", torch.float64)
    eager, _ = evaluate(case, "reference", case.dtype)
    stats, grads = evaluate(case, impl, case.dtype, backward=backward, **options)
    _compare(case, stats, truth, eager)
    assert len(grads) == len(true_grads) * backward
    _compare_grads(case, grads, true_grads, rtol)


def check_joint(case: Case, impl: str, *, kl: bool, rtol: float = 1e-4, **options: Any) -> None:
    truth, true_grads = evaluate_joint(case, "reference", torch.float64, kl=kl)
    eager, _ = evaluate_joint(case, "reference", case.dtype, kl=kl)
    stats, grads = evaluate_joint(case, impl, case.dtype, kl=kl, **options)
    assert len(stats) == len(truth) == (10 if kl else 8)
    for part in (slice(4), slice(4, 8), slice(8, None)):
        _compare(case, stats[part], truth[part], eager[part])
    assert len(grads) == len(true_grads)
    _compare_grads(case, grads, true_grads, rtol)


def _compare(case: Case, stats: list[Tensor], truth: list[Tensor], eager: list[Tensor]) -> None:
    """Of statistics as `evaluate` lists them; the last of a list are sums over sequences."""
    largest = case.max_logit
    for position, (value, true, other) in enumerate(zip(stats, truth, eager, strict=True)):
        assert value.dtype == torch.float32
        per = case.n if position == len(stats) - 1 else 1
        assert_stats_close(f"statistic {position}", value / per, true / per, other / per, largest)


def _compare_grads(case: Case, grads: list[Tensor], truth: list[Tensor], rtol: float) -> None:
    gain = case.logit_scale / case.temperature
    for name, grad, true in zip(("hidden", "weight", "bias"), grads, truth, strict=False):
        assert grad.dtype == case.dtype
        assert_grads_close(f"gradient in {name}", grad, true, scale=1e-2 * gain * max(1.0, case.size), rtol=rtol)
