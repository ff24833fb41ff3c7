"""The options of the ops, and the checks of what a caller hands over: errors name the argument and what arrived."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Impl = Literal["auto", "fused", "chunked", "reference"]
Mode = Literal["auto", "no_grad", "frozen", "lean", "stash"]
IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")
MODES = ("auto", "no_grad", "frozen", "lean", "stash")
EXTRAS = ("log_sum_sq_probs", "is_top1", "mean_logits")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LORA_ROWS, LORA_HEAD = "lora's projected", "lora's lora_B"


class Options(NamedTuple):
    """The keywords that every function here takes."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    impl: Impl = "auto"
    mode: Mode = "auto"
    memory_budget: int | None = None
    skip_mass: float = 0.0
    vocab_order: Tensor | None = None


class HeadOptions(TypedDict, total=False):
    """Keywords of the joint functions, as in `linear_logps`."""

    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    impl: Impl
    mode: Mode
    memory_budget: int | None


def check_extras(extras: Sequence[str]) -> None:
    if isinstance(extras, str) or any(name not in EXTRAS for name in extras):
        raise ValueError(f"extras must be a sequence of names from {', '.join(EXTRAS)}, got {extras!r}")


def check_options(options: Options) -> None:
    _, scale, softcap, temperature, impl, mode, budget, skip_mass, _ = options
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value!r}")
    if not math.isfinite(scale):
        raise ValueError(f"logit_scale must be finite, got {scale!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise ValueError(f"memory_budget must be a whole number of bytes >= 0, got {budget!r}")
    if mode == "stash" and budget is None:
        raise ValueError("mode='stash' needs memory_budget, the bytes that it may keep; got None")
    if not 0 <= skip_mass < 1:
        raise ValueError(f"skip_mass must lie in [0, 1), got {skip_mass!r}")
    if skip_mass > 0 and (mode in ("frozen", "stash") or budget is not None):
        raise ValueError(
            f"skip_mass recomputes what it does not skip: it goes with mode='lean' and no memory_budget, "
            f"got mode={mode!r}, memory_budget={budget!r}"
        )


def check_tensors(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    vocab_order: Tensor | None,
) -> None:
    named = {"hidden": hidden, "weight": weight, "labels": labels}
    optional = {"ref_hidden": ref_hidden, "bias": bias, "vocab_order": vocab_order}
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    named |= _lora_tensors(lora)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float64, float32, float16 or bfloat16, got {hidden.dtype}")
    for name in ("labels", "vocab_order"):
        if name in named and named[name].dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {named[name].dtype}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (..., D) with at least 2 dimensions, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    vocab_size = weight.shape[0]
    rank = 0 if lora is None else lora[0].shape[-1]
    expected = {
        "labels": hidden.shape[:-1],
        "ref_hidden": hidden.shape,
        "bias": (vocab_size,),
        "vocab_order": (vocab_size,),
        LORA_ROWS: (*hidden.shape[:-1], rank),
        LORA_HEAD: (vocab_size, rank),
    }
    for name, shape in expected.items():
        if name in named and named[name].shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(named[name].shape)}")
    autocast = torch.is_autocast_enabled(hidden.device.type)  # then all are cast to one dtype
    for name in ("ref_hidden", "weight", "bias", LORA_ROWS, LORA_HEAD):
        if name in named and named[name].dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {named[name].dtype}")


def _lora_tensors(lora: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    if lora is None:
        return {}
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        got = f"{len(lora)} of them" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"lora must be two tensors, (projected, lora_B), got {got}")
    projected, lora_b = lora
    if isinstance(projected, Tensor) and (projected.dim() == 0 or projected.shape[-1] == 0):
        raise ValueError(f"{LORA_ROWS} must have shape (..., r) with r > 0, got {tuple(projected.shape)}")
    return {LORA_ROWS: projected, LORA_HEAD: lora_b}


def sequence_ends(hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B+1,) int64 boundaries of the sequences in the flattened rows; the op checks their values."""
    if cu_seqlens is None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise ValueError(
                f"hidden must have shape (B, T, D) without cu_seqlens, got {tuple(getattr(hidden, 'shape', ()))}"
            )
        batch, length = hidden.shape[:2]
        return torch.arange(batch + 1, device=hidden.device) * length
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', cu_seqlens)}")
    if hidden.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape (B+1,) and hidden (N, D), got {tuple(cu_seqlens.shape)} and "
            f"{tuple(hidden.shape)}"
        )
    return cu_seqlens.to(device=hidden.device, dtype=torch.int64)
