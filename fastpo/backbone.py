"""Reach a causal LM's hidden states and head from inside its own forward, so that logits are never made.

The trainer calls the wrapped model with a `completion_mask`; the wrappers (DDP, FSDP, PEFT, autocast) run their hooks
as for any forward, and the innermost causal LM answers with statistics in place of logits. Without a
`completion_mask` the model behaves as before: `generate`, evaluation by others and saving are untouched.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastpo.ops import linear_logps, linear_sequence_stats
from fastpo.types import AnySequenceStats, ExtendedSequenceStats, SequenceStats
from fastpo.vocab_parallel import mean_gradient

IGNORED = -100
# How config classes name what their forward does to the logits.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALE_FIELDS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}  # exponents
# Model types that mean something else by such a name: their own exponents.
SCALE_EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}, "mpt": {"logit_scale": 0}}


@dataclass(frozen=True)
class Wanted:
    """What a forward shall answer beside log-probs, lengths and entropy.

    Attributes:
        shared_logps, log_sum_sq_probs: the fields of `ExtendedSequenceStats`.
        variance: the Disco head's mean and variance at the last token of each response.
        prompt: prompt features of `BetaHeadConfig`, of the first `prompt_rows` rows.
    """

    shared_logps: bool = False
    log_sum_sq_probs: bool = False
    variance: bool = False
    prompt: tuple[str, ...] = ()
    prompt_rows: int = 0


@dataclass
class StatsOutput(ModelOutput):
    """`SequenceStats` and what else was wanted, in the form in which wrappers pass a model's output on."""

    logps: Tensor | None = None
    lengths: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    shared_logps: Tensor | None = None
    mean: Tensor | None = None  # (R,) of the Disco head
    variance: Tensor | None = None  # (R,)
    prompt_hidden: Tensor | None = None  # (prompt_rows, D) at the last token of the prompt
    prompt_perplexity: Tensor | None = None  # (prompt_rows,)
    prompt_entropy: Tensor | None = None  # (prompt_rows,) mean over the prompt, divided by log V
    log_s: Tensor | None = None  # (B,) of the Beta head

    def sequence_stats(self) -> AnySequenceStats:
        return ExtendedSequenceStats(*(self.get(name) for name in ExtendedSequenceStats._fields))


def model_stats(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    wanted: Wanted | None = None,
    prompt: Mapping[str, Tensor] | None = None,
) -> StatsOutput:
    """Statistics of each row's completion under `model`, which may be wrapped; see `install_stats_forward`.

    Args:
        batch: input_ids (R, T) int64, attention_mask (R, T), completion_mask (R, T): 1 on the tokens that count.
        wanted: what else to compute.
        prompt: prompt features by name, for the model's Beta head to make log s of.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    asked = {"wanted": wanted, "prompt": prompt}
    return model(**inputs, **{name: value for name, value in asked.items() if value is not None})


def sequence_stats(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> SequenceStats:
    """`model_stats` of a batch given by its fields, without anything further."""
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
    output = model_stats(model, batch)
    return SequenceStats(output["logps"], output["lengths"], output["entropy"])


def prompts_of(batch: Mapping[str, Tensor], pairs: int) -> dict[str, Tensor]:
    """The prompts alone of the first `pairs` rows, cut to the longest."""
    mask = batch["attention_mask"][:pairs] * (1 - batch["completion_mask"][:pairs])
    width = int(mask.sum(dim=1).max())
    ids = batch["input_ids"][:pairs, :width]
    return {"input_ids": ids, "attention_mask": mask[:, :width], "completion_mask": torch.zeros_like(ids)}


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
    """Weight (V, D) and bias (V,) of the output embedding, for use within the model's own forward.

    Looked up anew because PEFT and FSDP replace it, and because that is when DeepSpeed gathers what ZeRO-3 has
    partitioned; it does so again for the backward. A head that FSDP2 shards apart from its neighbours stays sharded, as
    a DTensor, which the ops take as it is.

    Raises:
        ValueError: as `head_shape`.
    """
    head = _output_embedding(lm)
    weight, bias = head.weight, getattr(head, "bias", None)
    return mean_gradient(weight), None if bias is None else mean_gradient(bias)


def head_shape(lm: Any) -> tuple[int, int]:
    """(V, D) of the output embedding, wherever its rows may be.

    Raises:
        ValueError: the model has no separate backbone, no output embedding, or LoRA on it.
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
    if hasattr(head, "base_layer"):
        raise ValueError("peft_config must not put LoRA on the LM head (use modules_to_save for it)")
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


def _stats_forward(
    lm: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    wanted: Wanted | None = None,
    prompt: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> StatsOutput:
    wanted = Wanted() if wanted is None else wanted
    given = {name: value for name, value in kwargs.items() if value is not None}
    hidden = lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)[0]
    weight, bias = head_parameters(lm)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)  # norms kept in fp32 (k-bit training) feed a 16-bit head
    input_ids, attention_mask, completion_mask = (
        x.to(hidden.device) for x in (input_ids, attention_mask, completion_mask)
    )
    options = {"ignore_index": IGNORED, **logit_options(lm.config.get_text_config())}
    extras = ("log_sum_sq_probs",) * wanted.log_sum_sq_probs
    labels = aligned_labels(input_ids, completion_mask)
    stats: AnySequenceStats
    if wanted.shared_logps:
        ends = _shared_ends(completion_mask)
        stats = _joined(
            linear_sequence_stats(
                hidden.flatten(0, 1), weight, labels.flatten(), bias, cu_seqlens=ends, extras=extras, **options
            )
        )
    else:
        stats = linear_sequence_stats(hidden, weight, labels, bias, extras=extras, **options)
    found: dict[str, Any] = stats._asdict()
    if wanted.variance:
        found["mean"], found["variance"] = lm.disco_head(hidden[_rows_of(hidden), _last(completion_mask)])
    if wanted.prompt:
        rows = slice(wanted.prompt_rows)
        mask = attention_mask[rows] * (1 - completion_mask[rows])
        found |= _prompt_features(hidden[rows], weight, input_ids[rows], mask, bias, wanted.prompt, options)
    if prompt is not None:
        found["log_s"] = lm.beta_head.log_s(**prompt)
    return StatsOutput(**found)


def aligned_labels(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """(R, T) labels such that position t predicts labels[t]: the next token where it belongs to the completion."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(completion_mask[:, 1:].bool(), input_ids[:, 1:], IGNORED)
    return labels


def _last(mask: Tensor) -> Tensor:
    """(R,) position of each row's last 1; 0 in a row without."""
    return (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)


def _rows_of(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[0], device=hidden.device)


def _shared_ends(completion_mask: Tensor) -> Tensor:
    """(2R+1,) boundaries, in flattened rows, of [prompt and the tokens within the shorter response | the rest]."""
    rows, width = completion_mask.shape
    lengths = completion_mask.sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    # A completion that starts at token c is predicted from c - 1.
    split = (_last(completion_mask) - lengths + shared).clamp(min=0)
    ends = torch.arange(rows + 1, device=split.device) * width
    return torch.cat((torch.stack((ends[:-1], ends[:-1] + split), dim=1).flatten(), ends[-1:]))


def _joined(parts: AnySequenceStats) -> ExtendedSequenceStats:
    """Statistics of rows from those of their two parts."""
    lengths = parts.lengths.view(-1, 2).sum(dim=1)
    entropy = (parts.entropy * parts.lengths).view(-1, 2).sum(dim=1) / lengths.clamp(min=1)
    logps, squares = parts.logps.view(-1, 2), getattr(parts, "log_sum_sq_probs", None)
    squares = None if squares is None else squares.view(-1, 2).sum(dim=1)
    return ExtendedSequenceStats(logps.sum(dim=1), lengths, entropy, squares, shared_logps=logps[:, 0])


@torch.no_grad()
def _prompt_features(
    hidden: Tensor,
    weight: Tensor,
    input_ids: Tensor,
    prompt_mask: Tensor,
    bias: Tensor | None,
    names: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Fields prompt_* of `StatsOutput`; perplexity and entropy project the prompt's positions."""
    found = {}
    if "hidden" in names:
        found["prompt_hidden"] = hidden[_rows_of(hidden), _last(prompt_mask)]
    if "perplexity" in names or "entropy" in names:
        labels = aligned_labels(input_ids, prompt_mask)
        predicted = labels != IGNORED
        # The last token of the prompt predicts none of it, but its entropy counts: any label will do there.
        logps, entropy = linear_logps(
            hidden, weight, torch.where(prompt_mask.bool() & ~predicted, 0, labels), bias, **options
        )
        nll = -torch.where(predicted, logps, 0).sum(dim=1) / predicted.sum(dim=1).clamp(min=1)
        found["prompt_perplexity"] = nll.exp()
        found["prompt_entropy"] = entropy.sum(dim=1) / prompt_mask.sum(dim=1).clamp(min=1) / math.log(weight.shape[0])
    return found
