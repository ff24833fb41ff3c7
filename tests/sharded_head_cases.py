"""Problems for an LM head that is split over processes; what each process makes of them, and what is true."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cases import EVERYTHING, Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastpo import (
    joint_linear_logps,
    joint_linear_sequence_stats,
    linear_logps,
    vocab_parallel_logps,
    vocab_parallel_sequence_stats,
)
from fastpo.op_checks import EXTRAS
from fastpo.vocab_parallel import mean_gradient


@dataclass(frozen=True)
class Sharded:
    """A problem, and how it is given and computed."""

    case: Case
    same_rows: bool = False
    mode: str = "auto"
    impl: str = "chunked"
    sequences: bool = False
    kl: bool = False  # jointly with a reference
    far: float = 0.0  # what each slice of the head has its logits above the one before


SMALL = {"seed": 3, "n": 21, "d": 7, "v": 45}
BENT: dict[str, Any] = {"bias": True, "softcap": 5.0, "logit_scale": 1.7, "temperature": 0.7}
PROBLEMS: dict[str, Sharded] = {
    "own rows": Sharded(Case(**SMALL)),
    "own rows, frozen, softcap": Sharded(Case(**SMALL, **BENT, frozen=True)),
    "own rows, entropy's gradient, frozen": Sharded(Case(**SMALL, bias=True, frozen=True, uses="entropy")),
    "own rows, stash": Sharded(Case(**SMALL, **BENT), mode="stash"),
    "own rows, sequences": Sharded(Case(**SMALL, bias=True), sequences=True),
    "own rows, float64": Sharded(Case(**SMALL, **BENT, dtype=torch.float64)),
    "own rows, kl": Sharded(Case(**SMALL, **BENT, uses="all"), kl=True),
    "own rows, kl, sequences": Sharded(Case(**SMALL, uses="all"), kl=True, sequences=True),
    "own rows, most have none": Sharded(Case(**{**SMALL, "n": 3}, ignored=0.0)),
    "fewer columns than processes": Sharded(Case(**{**SMALL, "v": 3}, bias=True)),
    "fewer columns than processes, frozen": Sharded(Case(**{**SMALL, "v": 3}, frozen=True)),
    "same rows": Sharded(Case(**SMALL, **BENT), same_rows=True),
    "same rows, frozen": Sharded(Case(**SMALL, frozen=True), same_rows=True),
    "same rows, kl": Sharded(Case(**SMALL, uses="all"), same_rows=True, kl=True),
    "improbable labels": Sharded(Case(**SMALL, size=30.0)),
    "improbable labels, frozen": Sharded(Case(**SMALL, size=30.0, frozen=True)),
    "slices far apart": Sharded(Case(**SMALL, bias=True), far=60.0),
    "slices far apart, frozen": Sharded(Case(**SMALL, bias=True, frozen=True), far=60.0),
    "fused": Sharded(Case(**SMALL, **BENT), impl="fused"),
    "fused, frozen": Sharded(Case(**SMALL, **BENT, frozen=True), impl="fused", same_rows=True),
}


def tensors(problem: Sharded) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """hidden, weight, bias, labels of all rows, and the upstream gradients (3, N) of logps, entropy and kl."""
    case = problem.case
    hidden, weight, bias, labels = case.tensors()
    if bias is not None:
        bias = bias + problem.far * (torch.arange(case.v) * 4 // case.v)
    if case.size == 1 and not problem.far:  # a certain label has next to no gradient to compare
        best = hidden @ weight.T + (0 if bias is None else bias)
        labels = torch.where((labels != -100) & (torch.arange(case.n) % 2 == 0), best.argmax(1), labels)
    upstream = torch.randn(3, case.n, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(case.dtype)
    wanted = {"both": (1, 1, 0), "entropy": (0, 1, 0), "logps": (1, 0, 0), "all": (1, 1, 1)}[case.uses]
    return hidden, weight, bias, labels, upstream * torch.tensor(wanted)[:, None]


def own_rows(problem: Sharded, process: int, processes: int) -> slice:
    """The later a process, the more rows it has."""
    if problem.same_rows:
        return slice(None)
    first, last = (problem.case.n * i**2 // processes**2 for i in (process, process + 1))
    return slice(first, last)


def evaluate(problem: Sharded) -> dict[str, Tensor]:
    """This process's statistics and gradients, and the head's gradients put together from all slices."""
    process, processes, case = dist.get_rank(), dist.get_world_size(), problem.case
    rows, mesh = own_rows(problem, process, processes), init_device_mesh("cpu", (processes,))
    hidden, weight, bias, labels, upstream = tensors(problem)
    own = hidden[rows].clone().requires_grad_()
    head = {
        name: distribute_tensor(x, mesh, [Shard(0)]).requires_grad_(not case.frozen)
        for name, x in (("weight", weight), ("bias", bias))
        if x is not None
    }
    options: dict[str, Any] = {**case.options, "impl": problem.impl, "mode": problem.mode}
    if problem.mode == "stash":
        options["memory_budget"] = EVERYTHING
    if problem.sequences:  # of one token each, so that their statistics are the tokens'
        options["cu_seqlens"] = torch.arange(own.shape[0] + 1)
    if problem.kl:
        joint: Any = joint_linear_sequence_stats if problem.sequences else joint_linear_logps
        given = own, case.ref_hidden()[rows]
        if problem.same_rows:
            given = tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in given)
        policy, reference, kl = joint(*given, labels=labels[rows], kl=True, **head, **options)
        stats = {"logps": policy.logps, "entropy": policy.entropy, "kl": kl}
        constants = {"ref_logps": reference.logps, "ref_entropy": reference.entropy}
    else:
        call: Any = vocab_parallel_sequence_stats if problem.sequences else vocab_parallel_logps
        parts = {name: x.to_local() for name, x in head.items()}
        found = call(own, labels=labels[rows], same_rows=problem.same_rows, extras=EXTRAS, **parts, **options)
        stats = {"logps": found.logps, "entropy": found.entropy}
        constants = {name: getattr(found, name) for name in ("log_sum_sq_probs", "mean_logits")}
        constants["top1"] = (found.top1 if problem.sequences else found.is_top1).to(constants["mean_logits"])
    used = [(x * g[rows]).sum() for x, g in zip(stats.values(), upstream, strict=False) if g.any()]
    torch.stack(used).sum().backward()
    gradients = {f"d_{name}": x.grad.full_tensor() for name, x in head.items() if x.grad is not None}
    return {name: x.detach() for name, x in (stats | constants | gradients).items()} | {"d_hidden": own.grad}


def truth(problem: Sharded, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same of all rows, eagerly and on one process."""
    hidden, weight, bias, labels, upstream = tensors(problem)
    leaves = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    options: dict[str, Any] = {**problem.case.options, "impl": "reference"}
    if problem.kl:
        policy, reference, kl = joint_linear_logps(
            ref_hidden=problem.case.ref_hidden().to(dtype), labels=labels, kl=True, **leaves, **options
        )
        stats = {"logps": policy.logps, "entropy": policy.entropy, "kl": kl}
        constants = {"ref_logps": reference.logps, "ref_entropy": reference.entropy}
    else:
        found: Any = linear_logps(labels=labels, extras=EXTRAS, **leaves, **options)
        stats = {"logps": found.logps, "entropy": found.entropy}
        constants = {name: getattr(found, name) for name in ("log_sum_sq_probs", "mean_logits")}
        constants["top1"] = found.is_top1.to(constants["mean_logits"])
    torch.stack([(x * g).sum() for x, g in zip(stats.values(), upstream.to(dtype), strict=False)]).sum().backward()
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if name == "hidden" or not problem.case.frozen}
    return {name: x.detach() for name, x in (stats | constants | gradients).items()}


def mean_over_processes() -> dict[str, Tensor]:
    """d weight of a head on a mesh that is split one way and replicated the other, as FSDP2 makes it."""
    problem, processes = PROBLEMS["own rows"], dist.get_world_size()
    hidden, weight, _, labels, upstream = tensors(problem)
    rows = own_rows(problem, dist.get_rank(), processes)
    head = distribute_tensor(weight, init_device_mesh("cpu", (processes // 2, 2)), [Replicate(), Shard(0)])
    head.requires_grad_()
    stats = linear_logps(hidden[rows], mean_gradient(head), labels[rows])
    (stats.logps * upstream[0, rows] + stats.entropy * upstream[1, rows]).sum().backward()
    return {"d_weight": head.grad.full_tensor()}


def evaluate_all() -> dict[str, Any]:
    return {name: evaluate(problem) for name, problem in PROBLEMS.items()} | {"mean": mean_over_processes()}
