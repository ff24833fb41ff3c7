"""What a loss was given: checked, cast to one dtype, None where the formula leaves it out."""

import dataclasses
import math
from numbers import Integral

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.links import FORMED_BY, LINKS
from fastpo.scores import mallows_scale
from fastpo.types import AnySequenceStats

Reference = tuple[AnySequenceStats, AnySequenceStats]

# What a loss is a function of, where it reads no such (B,) tensor.
_UNREAD_BY = {
    "context_scale": {of for of, options in FORMED_BY.items() if "contextual_scaling" not in options},
    "pair_weight": {"sorted batch"},
}


def usable_reference(
    config: PreferenceConfig,
    ref_chosen: AnySequenceStats | None,
    ref_rejected: AnySequenceStats | None,
    batch: torch.Size,
    dtype: torch.dtype,
) -> Reference | None:
    """The reference pair where it may be read, None where the formula leaves it out."""
    if config.reference_free or (config.comparisons and not config.reads_log_ratios):
        return None
    # sft compares nothing, but where a reference is given rewards are measured against it.
    if ref_chosen is None and ref_rejected is None and (config.reference_weight == 0 or not config.comparisons):
        return None
    for name, stats in (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if stats is None:
            raise ValueError(f"{name} must be the reference's SequenceStats unless reference_free=True, got None")
        check_stats(name, stats, batch)
    assert ref_chosen is not None and ref_rejected is not None
    return _cast(ref_chosen, dtype), _cast(ref_rejected, dtype)


def _cast(stats: AnySequenceStats, dtype: torch.dtype) -> AnySequenceStats:
    return stats._replace(
        **{name: x.to(dtype) for name, x in stats._asdict().items() if x is not None and name != "lengths"}
    )


def beta_tensor(config: PreferenceConfig, beta: float | Tensor | None, like: Tensor) -> Tensor:
    """beta_eff as a tensor () or (B,)."""
    if beta is None:
        beta = config.beta
    if isinstance(beta, Tensor):
        if beta.shape not in ((), like.shape):
            raise ValueError(f"beta must have shape {tuple(like.shape)} or (), got {tuple(beta.shape)}")
        torn = [name for name in config.loss_weights if LINKS[name].of == "sorted batch"]
        if torn and beta.dim() == 1:
            raise ValueError(f"beta must be one number for pref_loss_type {torn[0]!r}, which sorts the pairs apart")
        return beta.to(like)
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta must be a number or a tensor, got {type(beta).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be > 0 and finite, got {beta!r}")
    return torch.full((), beta, dtype=like.dtype, device=like.device)


def summed_variance(
    config: PreferenceConfig, chosen: Tensor | None, rejected: Tensor | None, like: Tensor
) -> Tensor | None:
    """max(var_w + var_l, variance_floor) (B,) for `disco`, None for the others."""
    if "disco" not in config.loss_weights:
        if chosen is not None or rejected is not None:
            raise ValueError("chosen_variance and rejected_variance must be None unless pref_loss_type is 'disco'")
        return None
    for name, value in (("chosen_variance", chosen), ("rejected_variance", rejected)):
        if not isinstance(value, Tensor) or value.shape != like.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{name} must be a tensor of shape {tuple(like.shape)} for 'disco', got {got}")
    assert chosen is not None and rejected is not None
    return (chosen.to(like) + rejected.to(like)).clamp(min=config.variance_floor)


def context_scale_of(
    config: PreferenceConfig,
    own: Tensor | None,
    reference: Reference | None,
    like: Tensor,
    vocab_size: int | None,
) -> Tensor | None:
    """phi(x) (B,), the caller's own or Mallows', or None where nothing scales."""
    if own is not None:
        return own.detach().to(like)
    if config.contextual_scaling == "none":
        return None
    if reference is None:
        raise ValueError(
            "contextual_scaling='mallows' needs the reference's entropy: pass ref_chosen and ref_rejected (with "
            "reference_free=False), or a context_scale of your own"
        )
    if not isinstance(vocab_size, Integral) or vocab_size < 2:
        raise ValueError(
            f"contextual_scaling='mallows' needs vocab_size, the LM head's number of rows (>= 2), got {vocab_size!r}"
        )
    return mallows_scale(*reference, config.contextual_scaling_coef, int(vocab_size)).to(like)


def check_stats(name: str, stats: AnySequenceStats, batch: torch.Size | None) -> None:
    if not isinstance(stats, AnySequenceStats):
        raise TypeError(f"{name} must be SequenceStats, got {type(stats).__name__}")
    given = {field: tensor for field, tensor in stats._asdict().items() if tensor is not None}
    given |= {field: getattr(stats, field) for field in ("logps", "lengths", "entropy")}
    for field, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{field} must be a tensor, got {type(tensor).__name__}")
    shape = stats.logps.shape if batch is None else batch
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{name}.logps must have shape (B,) with B >= 1, got {tuple(shape)}")
    for field, tensor in given.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}.{field} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not stats.logps.is_floating_point():
        raise TypeError(f"{name}.logps must be a floating-point tensor, got {stats.logps.dtype}")
    if stats.lengths.is_floating_point():
        raise TypeError(f"{name}.lengths must be an integer tensor, got {stats.lengths.dtype}")


def check_column(name: str, value: Tensor | None, config: PreferenceConfig, batch: torch.Size) -> None:
    """A (B,) tensor of the caller's own that every comparison reads."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != batch:
        raise ValueError(f"{name} must have shape {tuple(batch)}, got {tuple(value.shape)}")
    check_reads_column(name, config, name)


def check_reads_column(name: str, config: PreferenceConfig, shown: str) -> None:
    """Every loss of the sum reads this one of context_scale and pair_weight."""
    for loss in config.comparisons or config.loss_weights:
        if LINKS[loss].of in _UNREAD_BY[name]:
            raise ValueError(f"{shown} is not used by pref_loss_type {loss!r}: leave it out")


def check_extras(
    config: PreferenceConfig, *, chosen: AnySequenceStats, rejected: AnySequenceStats, reference: Reference | None
) -> None:
    """The fields of `ExtendedSequenceStats` that the objective reads are there."""
    policy = {"chosen": chosen, "rejected": rejected}
    both = policy if reference is None else policy | {"ref_chosen": reference[0], "ref_rejected": reference[1]}
    needs = [("use_weighting", "log_sum_sq_probs", policy)] * config.use_weighting
    if config.ld_alpha is not None and config.ld_alpha != 1:
        needs.append(("ld_alpha", "shared_logps", both))
    for option, field, sides in needs:
        for name, stats in sides.items():
            if getattr(stats, field, None) is None:
                raise ValueError(f"{name}.{field} must be a tensor where {option} is set, got None")


# What `reward_model_loss` reads, and what says only that something exists.
_REWARD_OPTIONS = {
    "pref_loss_type", "beta", "add_beta_head", "beta_head_config", "add_disco_head", "home_advantage",
    "label_smoothing", "hinge_delta", "discopop_tau", "variance_floor", "disco_prior_weight",
}  # fmt: skip


def check_reward_config(config: PreferenceConfig) -> None:
    """The objective is one that a reward model can have."""
    for name in config.loss_weights:
        if LINKS[name].fixed_beta or LINKS[name].of not in ("score", "noisy score"):
            raise ValueError(f"pref_loss_type must be a function of z alone for a reward model, got {name!r}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in _REWARD_OPTIONS:
            raise ValueError(f"{field.name} is not used by a reward model: leave it at its default, got {value!r}")


def check_rewards(name: str, value: Tensor | None, like: Tensor) -> None:
    """(B,) floating-point, as the chosen means; a margin may be None."""
    if value is None and name == "margin":
        return
    if not isinstance(value, Tensor) or (name != "margin" and not value.is_floating_point()):
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', value)}")
    if value.dim() != 1 or len(value) == 0 or value.shape != like.shape:
        shape = tuple(like.shape) if name != "chosen_mean" else "(B,) with B >= 1"
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != like.dtype and name != "margin":
        raise TypeError(f"{name} must have chosen_mean's dtype {like.dtype}, got {value.dtype}")
