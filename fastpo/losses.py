"""`preference_loss`: every preference objective as one formula over `SequenceStats`."""

import math

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.links import LINKS, LinkParams
from fastpo.scores import mallows_scale, response_score, score_difference
from fastpo.types import LossOutput, SequenceStats


def preference_loss(
    chosen: SequenceStats,
    rejected: SequenceStats,
    config: PreferenceConfig,
    *,
    ref_chosen: SequenceStats | None = None,
    ref_rejected: SequenceStats | None = None,
    beta: float | Tensor | None = None,
    context_scale: Tensor | None = None,
    chosen_variance: Tensor | None = None,
    rejected_variance: Tensor | None = None,
    vocab_size: int | None = None,
) -> LossOutput:
    """The preference loss of B pairs.

    With a(y) the length normalisation, D the score difference of policy or reference, A the reference's weight, b the
    beta of each pair, m the margin and phi the contextual scale:

        h    = D_pi - A D_ref
        z    = phi (b h - m)     or, in log-ratio units,     phi b (h - m)
        loss = (1 - eps) f(z) + eps f(-z) + sft_weight SFT

    This covers DPO (arXiv:2305.18290), IPO, SLiC, SimPO, Mallows-DPO and RainbowPO (arXiv:2410.04203). A term whose
    coefficient is 0 is not formed. The result keeps the inputs' dtype.

    Args:
        chosen: the policy's statistics of the chosen responses, fields of shape (B,).
        rejected: the policy's statistics of the rejected responses.
        config: what is optimised.
        ref_chosen: the reference's statistics of the chosen responses; never read with `reference_free`.
        ref_rejected: the reference's statistics of the rejected responses.
        beta: None (`config.beta`), a positive number, or a (B,) tensor beta_eff(x), differentiable.
        context_scale: (B,) phi(x) of the caller's own, taken as it is and detached; it wins over
            `config.contextual_scaling`.
        chosen_variance: for `pref_loss_type="disco"`, which this version does not compute yet.
        rejected_variance: likewise.
        vocab_size: V, rows of the LM head; needed where phi(x) is computed.

    Returns:
        LossOutput; rewards are b a(y) (log pi - log ref), detached.

    Raises:
        TypeError, ValueError: an argument is missing, misshapen or out of range; the message names it.
    """
    if not isinstance(config, PreferenceConfig):
        raise TypeError(f"config must be a PreferenceConfig, got {type(config).__name__}")
    _check_stats("chosen", chosen, None)
    batch = chosen.logps.shape
    _check_stats("rejected", rejected, batch)
    if config.pref_loss_type not in LINKS:
        raise ValueError(f"pref_loss_type must be one of {', '.join(LINKS)} here, got {config.pref_loss_type!r}")
    if chosen_variance is not None or rejected_variance is not None:
        raise ValueError("chosen_variance and rejected_variance must be None unless pref_loss_type is 'disco'")
    reference = _usable_reference(config, ref_chosen, ref_rejected, batch, chosen.logps.dtype)
    b = _beta_tensor(config.beta if beta is None else beta, chosen.logps)
    phi = _context_scale(config, context_scale, reference, chosen.logps, vocab_size)

    h = score_difference(chosen, rejected, config.length_normalization)
    if config.reference_weight != 0 and reference is not None:
        h = h - config.reference_weight * score_difference(*reference, config.length_normalization)
    z = b * h - config.margin if config.margin_units == "reward" else b * (h - config.margin)
    if phi is not None:
        z = phi * z

    link, params = LINKS[config.pref_loss_type], LinkParams(b, config.hinge_delta)
    eps = config.label_smoothing
    losses = link(z, params) if eps == 0 else (1 - eps) * link(z, params) + eps * link(-z, params)
    if config.sft_weight != 0 and config.sft_reduction != "token":
        losses = losses - config.sft_weight * response_score(chosen, config.sft_reduction == "mean")
    loss = losses.mean()
    if config.sft_weight != 0 and config.sft_reduction == "token":
        tokens = chosen.lengths.sum().clamp(min=1)
        loss = loss - config.sft_weight * chosen.logps.sum() / tokens.to(loss.dtype)

    with torch.no_grad():
        chosen_rewards = b * _log_ratio(chosen, None if reference is None else reference[0], config)
        rejected_rewards = b * _log_ratio(rejected, None if reference is None else reference[1], config)
        margins = chosen_rewards - rejected_rewards
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": chosen.logps.mean(),
            "logps/rejected": rejected.logps.mean(),
            "entropy/chosen": chosen.entropy.mean(),
            "entropy/rejected": rejected.entropy.mean(),
            **_spread("beta", b),
            **({} if phi is None else _spread("phi", phi)),
        }
        metrics = {name: value.detach() for name, value in metrics.items()}
    return LossOutput(loss, losses, chosen_rewards, rejected_rewards, margins, metrics)


def _log_ratio(stats: SequenceStats, reference: SequenceStats | None, config: PreferenceConfig) -> Tensor:
    score = response_score(stats, config.length_normalization)
    return score if reference is None else score - response_score(reference, config.length_normalization)


def _spread(name: str, values: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/mean": values.mean(),
        f"{name}/std": values.std(correction=0),
        f"{name}/min": values.min(),
        f"{name}/max": values.max(),
    }


def _usable_reference(
    config: PreferenceConfig,
    ref_chosen: SequenceStats | None,
    ref_rejected: SequenceStats | None,
    batch: torch.Size,
    dtype: torch.dtype,
) -> tuple[SequenceStats, SequenceStats] | None:
    """The reference pair where it may be read, None where the formula leaves it out."""
    if config.reference_free:
        return None
    if ref_chosen is None and ref_rejected is None and config.reference_weight == 0:
        return None
    for name, stats in (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if stats is None:
            raise ValueError(f"{name} must be the reference's SequenceStats unless reference_free=True, got None")
        _check_stats(name, stats, batch)
    assert ref_chosen is not None and ref_rejected is not None
    return _cast(ref_chosen, dtype), _cast(ref_rejected, dtype)


def _cast(stats: SequenceStats, dtype: torch.dtype) -> SequenceStats:
    return stats._replace(logps=stats.logps.to(dtype), entropy=stats.entropy.to(dtype))


def _beta_tensor(beta: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(beta, Tensor):
        if beta.shape not in ((), like.shape):
            raise ValueError(f"beta must have shape {tuple(like.shape)} or (), got {tuple(beta.shape)}")
        return beta.to(like)
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta must be a number or a tensor, got {type(beta).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be > 0 and finite, got {beta!r}")
    return torch.full((), beta, dtype=like.dtype, device=like.device)


def _context_scale(
    config: PreferenceConfig,
    own: Tensor | None,
    reference: tuple[SequenceStats, SequenceStats] | None,
    like: Tensor,
    vocab_size: int | None,
) -> Tensor | None:
    if own is not None:
        if not isinstance(own, Tensor):
            raise TypeError(f"context_scale must be a tensor, got {type(own).__name__}")
        if own.shape != like.shape:
            raise ValueError(f"context_scale must have shape {tuple(like.shape)}, got {tuple(own.shape)}")
        return own.detach().to(like)
    if config.contextual_scaling == "none":
        return None
    if reference is None:
        raise ValueError(
            "contextual_scaling='mallows' needs the reference's entropy: pass ref_chosen and ref_rejected (with "
            "reference_free=False), or a context_scale of your own"
        )
    if not isinstance(vocab_size, int) or vocab_size < 2:
        raise ValueError(
            f"contextual_scaling='mallows' needs vocab_size, the LM head's number of rows (>= 2), got {vocab_size!r}"
        )
    return mallows_scale(*reference, config.contextual_scaling_coef, vocab_size).to(like)


def _check_stats(name: str, stats: SequenceStats, batch: torch.Size | None) -> None:
    if not isinstance(stats, SequenceStats):
        raise TypeError(f"{name} must be SequenceStats, got {type(stats).__name__}")
    for field, tensor in stats._asdict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{field} must be a tensor, got {type(tensor).__name__}")
    shape = stats.logps.shape if batch is None else batch
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{name}.logps must have shape (B,) with B >= 1, got {tuple(shape)}")
    for field, tensor in stats._asdict().items():
        if tensor.shape != shape:
            raise ValueError(f"{name}.{field} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not stats.logps.is_floating_point():
        raise TypeError(f"{name}.logps must be a floating-point tensor, got {stats.logps.dtype}")
    if stats.lengths.is_floating_point():
        raise TypeError(f"{name}.lengths must be an integer tensor, got {stats.lengths.dtype}")
