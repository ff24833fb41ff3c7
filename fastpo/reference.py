"""Eager oracles: readable, any floating dtype including float64. Optimised code never imports them."""

import torch
from torch import Tensor


def linear_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None = None,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Label log-probs and entropies (N,), in nats, from full logits; fp32 (float64 for float64 inputs).

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,) int64 in [0, V).
        bias: (V,) or None.
        lora: projected (N, r) and lora_B (V, r), or None.
        logit_scale, softcap, temperature: as in `fastpo.linear_logps`.
    """
    log_probs = _logits(hidden, weight, bias, lora, logit_scale, softcap, temperature).log_softmax(-1)
    logps = log_probs.gather(-1, labels[:, None])[:, 0]
    # 0 log 0 = 0; the inner where keeps the gradient of the branch not taken finite.
    possible = log_probs != -torch.inf
    surprise = torch.where(possible, -log_probs, 0)
    return logps, (torch.where(possible, log_probs, -torch.inf).exp() * surprise).sum(-1)


def linear_kl_reference(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """KL(policy || reference) over the vocabulary (N,), in nats, from full logits; arguments as above."""
    log_p = _logits(hidden, weight, bias, None, logit_scale, softcap, temperature).log_softmax(-1)
    log_q = _logits(
        ref_hidden, weight.detach(), None if bias is None else bias.detach(), None, logit_scale, softcap, temperature
    ).log_softmax(-1)
    possible = log_p != -torch.inf
    ratio = torch.where(possible, log_p - torch.where(possible, log_q, 0), 0)
    return (torch.where(possible, log_p, -torch.inf).exp() * ratio).sum(-1)


def extras_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None = None,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> dict[str, Tensor]:
    """What `extras` of `fastpo.linear_logps` can name, (N,) each, from full logits; arguments as above."""
    logits = _logits(hidden, weight, bias, lora, logit_scale, softcap, temperature)
    return {
        "log_sum_sq_probs": torch.logsumexp(2 * logits.log_softmax(-1), dim=-1),
        "is_top1": logits.gather(-1, labels[:, None])[:, 0] == logits.amax(-1),
        "mean_logits": logits.mean(-1),
    }


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """(N, V) logits."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if lora is not None:
        projected, lora_b = lora
        logits = logits + projected.to(dtype) @ lora_b.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature
