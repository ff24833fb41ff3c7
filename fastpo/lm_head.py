"""The LM head of a model: its weight wherever that is, and what its logits go through on the way to statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.adapters import check_head_lora, head_lora
from fastpo.layout import IGNORED, Rows
from fastpo.ops import joint_linear_logps, joint_linear_sequence_stats, linear_logps, linear_sequence_stats
from fastpo.types import AnySequenceStats, ExtendedSequenceStats, TokenStats
from fastpo.vocab_parallel import mean_gradient

# How config classes name what their forward does to the logits.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALE_FIELDS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}  # exponents
# Model types that mean something else by such a name: their own exponents.
SCALE_EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}, "mpt": {"logit_scale": 0}}


def head_parameters(lm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the output embedding, for use within the model's own forward.

    Looked up anew because PEFT and FSDP replace it, and because that is when DeepSpeed gathers what ZeRO-3 has
    partitioned; it does so again for the backward. A head that FSDP2 shards apart from its neighbours stays sharded, as
    a DTensor, which the ops take as it is.

    What LoRA adds to them is not in them: see `fastpo.adapters.head_lora`.

    Raises:
        ValueError: as `head_shape`.
    """
    head = _output_embedding(lm)
    weight, bias = head.weight, getattr(head, "bias", None)
    return _head_part(weight), None if bias is None else _head_part(bias)


def _head_part(parameter: Any) -> Tensor:
    replicated = hasattr(parameter, "device_mesh") and all(x.is_replicate() for x in parameter.placements)
    if replicated and not parameter.requires_grad:
        return parameter.to_local()
    return mean_gradient(parameter)


def head_shape(lm: Any) -> tuple[int, int]:
    """(V, D) of the output embedding, wherever its rows may be.

    Raises:
        ValueError: the model has no separate backbone, no output embedding, a quantised one, or on it an adapter that
            is not plain LoRA.
    """
    weight = _output_embedding(lm).weight
    rows, size = getattr(weight, "ds_shape", weight.shape)
    return rows, size


def _output_embedding(lm: Any) -> Any:
    if not hasattr(lm, "get_output_embeddings") or getattr(lm, "base_model", lm) is lm:
        raise ValueError(f"model must be a causal LM with a backbone below its head, got {type(lm).__name__}")
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have an output embedding, got {type(lm).__name__} without one")
    if hasattr(head, "base_layer") and not hasattr(head, "lora_A"):
        raise ValueError(f"peft_config must put LoRA or modules_to_save on the LM head, got {type(head).__name__}")
    check_head_lora(head)
    if not head.weight.is_floating_point():
        raise ValueError(f"the LM head must not be quantised, got a weight of {head.weight.dtype}")
    return head


def logit_options(config: Any) -> dict[str, Any]:
    """`logit_scale` and `softcap` that the model's own forward would apply to its logits, by its config's fields."""
    scale = 1.0
    for name, exponent in (SCALE_FIELDS | SCALE_EXCEPTIONS.get(config.model_type, {})).items():
        value = getattr(config, name, None)
        if exponent and value is not None:
            scale *= float(value) ** exponent
    caps = [cap for name in SOFTCAP_FIELDS if (cap := getattr(config, name, None)) is not None]
    return {"logit_scale": scale, "softcap": caps[0] if caps else None}


class LMHead(NamedTuple):
    """K rows of hidden states, and the LM head that they go through."""

    hidden: Tensor  # (K, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    lora: tuple[Tensor, Tensor] | None  # (K, r), (V, r)
    options: dict[str, Any]  # of the ops

    @classmethod
    def of(cls, lm: Any, hidden: Tensor, temperature: float = 1.0) -> "LMHead":
        weight, bias = head_parameters(lm)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # norms kept in fp32 (k-bit training) feed a 16-bit head
        transform = {**logit_options(lm.config.get_text_config()), "temperature": temperature}
        options = {"ignore_index": IGNORED, **transform}
        return cls(hidden, weight, bias, head_lora(lm.get_output_embeddings(), hidden), options)

    def stats(self, rows: Rows, shared: Tensor | None, extras: tuple[str, ...] = ()) -> AnySequenceStats:
        """Statistics of the sequences in `rows`; with shared (S,), also of so many of their first tokens."""
        ends = rows.ends if shared is None else rows.split_ends(shared)
        stats = linear_sequence_stats(
            self.hidden, self.weight, rows.labels, self.bias, cu_seqlens=ends, extras=extras, lora=self.lora,
            **self.options,
        )  # fmt: skip
        return stats if shared is None else _joined(stats)

    def stats_beside(
        self, reference: "LMHead", rows: Rows, shared: Tensor | None, extras: tuple[str, ...]
    ) -> tuple[AnySequenceStats, ...]:
        """Its statistics, with extras, and the reference's; in one pass where both have the same head."""
        if not self.joins(reference):
            return self.stats(rows, shared, extras), reference.stats(rows, shared)
        ends = rows.ends if shared is None else rows.split_ends(shared)
        found = joint_linear_sequence_stats(
            self.hidden, reference.hidden, self.weight, rows.labels, self.bias, cu_seqlens=ends, extras=extras,
            **self.options,
        )  # fmt: skip
        return tuple(stats if shared is None else _joined(stats) for stats in (found.policy, found.reference))

    def tokens(self, rows: Rows) -> TokenStats:
        """Statistics (K,) of what each row predicts."""
        return linear_logps(self.hidden, self.weight, rows.labels, self.bias, lora=self.lora, **self.options)

    def tokens_beside(self, reference: "LMHead", rows: Rows) -> tuple[TokenStats, TokenStats]:
        """Its statistics and the reference's, as `stats_beside`."""
        if not self.joins(reference):
            return self.tokens(rows), reference.tokens(rows)
        joint = joint_linear_logps(self.hidden, reference.hidden, self.weight, rows.labels, self.bias, **self.options)
        return joint.policy, joint.reference

    def joins(self, reference: "LMHead") -> bool:
        """Whether one pass over the head can serve both."""
        return self.weight is reference.weight and self.bias is reference.bias and self.lora is None


def _joined(parts: AnySequenceStats) -> ExtendedSequenceStats:
    """Statistics of rows from those of their two parts."""
    lengths = parts.lengths.view(-1, 2).sum(dim=1)
    entropy = (parts.entropy * parts.lengths).view(-1, 2).sum(dim=1) / lengths.clamp(min=1)
    logps, found = parts.logps.view(-1, 2), parts._asdict()
    sums = {name: found[name].view(-1, 2).sum(dim=1) for name in _SUMMED if found.get(name) is not None}
    return ExtendedSequenceStats(logps.sum(dim=1), lengths, entropy, shared_logps=logps[:, 0], **sums)


_SUMMED = ("log_sum_sq_probs", "top1", "mean_logits")
