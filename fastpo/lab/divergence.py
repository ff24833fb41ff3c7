"""Exact KL(policy || reference) of responses, without logits, also where each has an LM head of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpo.adapters import as_reference
from fastpo.backbone import causal_lm
from fastpo.lab.measures import two_head_kl
from fastpo.layout import responses
from fastpo.lm_head import LMHead
from fastpo.ops import joint_linear_sequence_stats


@torch.no_grad()
def response_kl(policy: Any, reference: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(R,) KL(policy || reference) of the next token, summed over each response, in nats.

    Over responses that the policy sampled, its mean is an unbiased estimate of the KL of whole responses.

    Args:
        policy: a causal LM, possibly with an adapter, in evaluation mode.
        reference: another one; None: the policy without its adapter.
        batch: padded input_ids, attention_mask, completion_mask (R, T) on the models' device.
    """
    lm = causal_lm(policy)
    rows = responses(batch)

    def head_of(model: Any) -> LMHead:
        hidden = model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )[0]
        return LMHead.of(model, rows.of(hidden))

    own = head_of(lm)
    if reference is None:
        with as_reference(lm):
            other = head_of(lm)
    else:
        other = head_of(causal_lm(reference))
    if own.joins(other):  # as under an adapter: one head, read once
        found = joint_linear_sequence_stats(
            own.hidden, other.hidden, own.weight, rows.labels, own.bias, cu_seqlens=rows.ends, kl=True, **own.options
        )
        assert found.kl is not None
        return found.kl
    return two_head_kl(_parts(own), _parts(other), rows.labels, cu_seqlens=rows.ends, **own.options)


def _parts(head: LMHead) -> list[tuple[Tensor, Tensor]]:
    """Hidden states (K, d) and weights (V, d) whose products add up to the logits."""
    parts = [(head.hidden, head.weight)]
    if head.bias is not None:
        parts.append((torch.ones_like(head.hidden[:, :1]), head.bias[:, None]))
    if head.lora is not None:
        parts.append(head.lora)
    return parts
