"""An LM head whose rows are split over a process group: each process projects onto its own, collectives do the rest.

The functions of `fastpo.ops` do this by themselves for a weight that is a DTensor with placement Shard(0); those here
take the local rows of any split that DTensor knows, and a process group.

Which process has which rows of `hidden` decides what a gradient means:

- Each has rows of its own, as in data parallelism: the head's gradient is the sum over all processes' losses, complete
  on the process that holds the head's rows. Who wants the mean, as DistributedDataParallel and FSDP2 make it, divides
  by the number of processes (`PreferenceTrainer` does). The rows are gathered: each process holds all of them.
- All have the same rows, as in tensor parallelism: every process computes the same loss, the head's gradient is that of
  this one loss, and that of hidden is complete on every process.

Either way every process of the group must make the same calls in the same order, forward and backward.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.ops import HeadOptions, linear_logps, linear_sequence_stats
from fastpo.types import SequenceStats, TokenStats


class VocabParallelOptions(HeadOptions, total=False):
    """Keywords of the functions here, as in `linear_logps`; skip_mass bounds what all processes leave out together."""

    skip_mass: float
    extras: Sequence[str]


def vocab_parallel_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    same_rows: bool = False,
    **options: Unpack[VocabParallelOptions],
) -> TokenStats:
    """`linear_logps` under a head of which each of P processes holds a part. A collective call.

    Args:
        hidden: (..., D) of this process; the leading shape may differ between processes.
        weight: (V_p, D) this process's rows of the (V, D) head, split in order as torch.chunk does: ceil(V / P) rows
            each, of which the last processes may have fewer, or none.
        labels: (...) int64 in [0, V), the token's number in the whole vocabulary.
        bias: (V_p,) of this process's rows, or None.
        group: the processes; default: all.
        same_rows: whether hidden and labels are the same on all processes.
        **options: as in `linear_logps`, of which impl="reference" is not to be had.

    Returns:
        as `linear_logps`, for this process's rows; see above for the gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`; weight is not what torch.chunk gives this process.
    """
    return linear_logps(*_sharded(hidden, weight, labels, bias, group, same_rows), **options)


def vocab_parallel_sequence_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    same_rows: bool = False,
    **options: Unpack[VocabParallelOptions],
) -> SequenceStats:
    """`linear_sequence_stats` under a head of which each of P processes holds a part. A collective call.

    Args:
        hidden, labels, cu_seqlens: as in `linear_sequence_stats`, of this process.
        weight, bias, group, same_rows, **options: as in `vocab_parallel_logps`.

    Returns:
        as `linear_sequence_stats`, for this process's sequences.

    Raises:
        TypeError, ValueError, RuntimeError: as `vocab_parallel_logps`.
    """
    inputs = _sharded(hidden, weight, labels, bias, group, same_rows)
    return linear_sequence_stats(*inputs, cu_seqlens=cu_seqlens, **options)


def mean_gradient(parameter: Tensor) -> Tensor:
    """The parameter, with the gradient that FSDP2 gives its own: the mean over the processes' losses.

    For a DTensor that FSDP2 shards and that is used as it is, outside of the forward for which FSDP2 would gather it;
    with placement Shard(0) on one dimension of the mesh, and replicated on others. Any other tensor is returned as is.
    """
    if not hasattr(parameter, "device_mesh") or not parameter.requires_grad:
        return parameter
    return _MeanGradient.apply(parameter)


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Any:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """grad: over the processes among which rows are split, already their sum."""
        mesh, local = grad.device_mesh, grad.to_local().clone()
        for dim, placement in enumerate(grad.placements):
            if placement.is_replicate():
                dist.all_reduce(local, group=mesh.get_group(dim))
        local /= mesh.size()
        return type(grad).from_local(
            local, mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )


def _sharded(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    same_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments of `fastpo.ops`: a head as a DTensor, and rows that all have as a replicated one."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not dist.is_initialized():
        raise RuntimeError("vocab_parallel functions need torch.distributed.init_process_group() to have been called")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight must have shape (V_p, D), got {tuple(getattr(weight, 'shape', ()))}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    group = dist.group.WORLD if group is None else group
    assert group is not None
    mesh = DeviceMesh.from_group(group, weight.device.type)
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=weight.device)
    sizes[group.rank()] = weight.shape[0]
    dist.all_reduce(sizes, group=group)
    found = sizes.tolist()
    chunk = -(-sum(found) // len(found))
    if found != [min(chunk, max(sum(found) - process * chunk, 0)) for process in range(len(found))]:
        raise ValueError(f"weight must be split as torch.chunk splits (V, D), got {found} rows on the processes")

    def whole(part: Tensor) -> DTensor:
        shape = torch.Size((sum(found), *part.shape[1:]))
        stride = (part.shape[1], 1) if part.dim() == 2 else (1,)
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    rows = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False) if same_rows else hidden
    return rows, whole(weight), labels, None if bias is None else whole(bias)
