"""Eager oracles: readable, any floating dtype including float64. Optimised code never imports them."""

import torch
from torch import Tensor


def linear_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
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
        logit_scale, softcap, temperature: as in `fastpo.linear_logps`.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    logps = log_probs.gather(-1, labels[:, None])[:, 0]
    # 0 log 0 = 0; the inner where keeps the gradient of the branch not taken finite.
    possible = log_probs != -torch.inf
    surprise = torch.where(possible, -log_probs, 0)
    return logps, (torch.where(possible, log_probs, -torch.inf).exp() * surprise).sum(-1)
