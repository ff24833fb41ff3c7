"""Reach a causal LM's hidden states and head from inside its own forward, so that logits are never made.

The trainer calls the wrapped model with a `completion_mask`; the wrappers (DDP, FSDP, PEFT, autocast) run their hooks
as for any forward, and the innermost causal LM answers with statistics in place of logits. Without a
`completion_mask` the model behaves as before: `generate`, evaluation by others and saving are untouched.
"""

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from fastpo.ops import linear_sequence_stats
from fastpo.types import SequenceStats

IGNORED = -100
# How config classes name what their forward does to the logits.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALE_FIELDS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}  # exponents
# Model types that mean something else by such a name: their own exponents.
SCALE_EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}, "mpt": {"logit_scale": 0}}


@dataclass
class StatsOutput(ModelOutput):
    """`SequenceStats` in the form in which wrappers pass a model's output on."""

    logps: Tensor | None = None
    lengths: Tensor | None = None
    entropy: Tensor | None = None


def sequence_stats(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> SequenceStats:
    """Statistics of each row's completion under `model`, which may be wrapped; see `install_stats_forward`.

    Args:
        input_ids: (R, T) int64.
        attention_mask: (R, T), 0 on padding.
        completion_mask: (R, T), 1 on the tokens whose log-probability counts.
    """
    output = model(input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask)
    return SequenceStats(output["logps"], output["lengths"], output["entropy"])


def causal_lm(model: Any) -> Any:
    """The causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install_stats_forward(model: Any) -> None:
    """Teach a causal LM to answer a `completion_mask` with `StatsOutput`. Calling it twice changes nothing."""
    lm = causal_lm(model)
    if "_plain_forward" in lm.__dict__:
        return
    plain = lm.forward

    def forward(self: Any, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_mask is None:
            return self._plain_forward(*args, **kwargs)
        return _stats_forward(self, completion_mask=completion_mask, **kwargs)

    # generate() and the Trainer read the signature; functools.wraps would let accelerate unwrap us away.
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    # Bound methods, not closures, so that a deep copy calls itself and not the model it was copied from.
    lm._plain_forward = plain
    lm.forward = MethodType(forward, lm)


def head_parameters(lm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the output embedding, looked up anew because PEFT and FSDP replace it.

    Raises:
        ValueError: the model has no separate backbone, no output embedding, LoRA on it, or ZeRO-3 shards of it.
    """
    if not hasattr(lm, "get_output_embeddings") or getattr(lm, "base_model", lm) is lm:
        raise ValueError(f"model must be a causal LM with a backbone below its head, got {type(lm).__name__}")
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have an output embedding, got {type(lm).__name__} without one")
    if hasattr(head, "base_layer"):
        raise ValueError("peft_config must not put LoRA on the LM head (use modules_to_save for it)")
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor) and weight.requires_grad:
        raise ValueError("an LM head that is trained and sharded apart (FSDP2) is not supported in this version")
    if hasattr(weight, "ds_id"):
        raise ValueError("DeepSpeed ZeRO-3 shards of the LM head are not supported in this version; use ZeRO-2")
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def logit_options(config: Any) -> dict[str, Any]:
    """`logit_scale` and `softcap` that the model's own forward would apply to its logits, by its config's fields."""
    scale = 1.0
    for name, exponent in (SCALE_FIELDS | SCALE_EXCEPTIONS.get(config.model_type, {})).items():
        value = getattr(config, name, None)
        if exponent and value is not None:
            scale *= float(value) ** exponent
    caps = [cap for name in SOFTCAP_FIELDS if (cap := getattr(config, name, None)) is not None]
    return {"logit_scale": scale, "softcap": caps[0] if caps else None}


def _stats_forward(
    lm: Any, *, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **kwargs: Any
) -> StatsOutput:
    given = {name: value for name, value in kwargs.items() if value is not None}
    hidden = lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)[0]
    weight, bias = head_parameters(lm)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)  # norms kept in fp32 (k-bit training) feed a 16-bit head
    stats = linear_sequence_stats(
        hidden, weight, aligned_labels(input_ids, completion_mask).to(hidden.device), bias, ignore_index=IGNORED,
        **logit_options(lm.config.get_text_config()),
    )  # fmt: skip
    return StatsOutput(**stats._asdict())


def aligned_labels(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """(R, T) labels such that position t predicts labels[t]: the next token where it belongs to the completion."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(completion_mask[:, 1:].bool(), input_ids[:, 1:], IGNORED)
    return labels
