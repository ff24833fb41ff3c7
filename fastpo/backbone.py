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
import torch.nn.functional as F
from torch import Tensor, nn, segment_reduce
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from fastpo.adapters import as_reference
from fastpo.attention import PACKS_BY_POSITION, SDPA_PATHS
from fastpo.layout import IGNORED, Rows, positions, prompts, responses, shared_lengths, sides
from fastpo.lm_head import LMHead
from fastpo.ops import linear_logps
from fastpo.types import AnySequenceStats, ExtendedSequenceStats, SequenceStats, TokenStats

# A batch's fields that a model reads.
TOKENS = ("input_ids", "attention_mask", "completion_mask", "paths")


@dataclass(frozen=True)
class Wanted:
    """What a forward shall answer beside log-probs, lengths and entropy.

    Attributes:
        shared_logps, log_sum_sq_probs, top1, mean_logits: the fields of `ExtendedSequenceStats`; of these, the
            reference answers with shared_logps alone.
        variance: the Disco head's mean and variance at the last token of each response.
        reference: the statistics of the model as its own reference too.
        prompt: prompt features of `BetaHeadConfig`, of the first `prompt_rows` rows; of the reference where
            `reference` is set.
        log_s: the Beta head's answer.
        one_side_at_a_time: hold the activations of the chosen or of the rejected responses, never both; the backward
            runs each forward again.
        tokens: log-prob and entropy of each token of padded rows; those of the sequences are then their sums and means.
        values: the value head's estimate before each token of padded rows.
        temperature: of the responses' distribution, policy's and reference's: that from which they were sampled. The
            features of prompts know none.

    Raises:
        ValueError: tokens are wanted together with what is known of sequences and pairs alone.
    """

    shared_logps: bool = False
    log_sum_sq_probs: bool = False
    top1: bool = False
    mean_logits: bool = False
    variance: bool = False
    reference: bool = False
    prompt: tuple[str, ...] = ()
    prompt_rows: int = 0
    log_s: bool = False
    one_side_at_a_time: bool = False
    tokens: bool = False
    values: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        of_pairs = ("shared_logps", "one_side_at_a_time") * self.tokens
        of_sequences = ("log_sum_sq_probs", "top1", "mean_logits") * self.tokens
        for name in (*of_pairs, *of_sequences):
            if getattr(self, name):
                raise ValueError(f"{name} must be False with tokens=True, got True")

    @property
    def extras(self) -> tuple[str, ...]:
        """Of the ops, which know top1 by the token."""
        names = {"log_sum_sq_probs": self.log_sum_sq_probs, "is_top1": self.top1, "mean_logits": self.mean_logits}
        return tuple(name for name, wanted in names.items() if wanted)


@dataclass
class StatsOutput(ModelOutput):
    """`SequenceStats` and what else was wanted, in the form in which wrappers pass a model's output on."""

    logps: Tensor | None = None
    lengths: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    shared_logps: Tensor | None = None
    top1: Tensor | None = None
    mean_logits: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_entropy: Tensor | None = None
    ref_shared_logps: Tensor | None = None
    mean: Tensor | None = None  # (R,) of the Disco head
    variance: Tensor | None = None  # (R,)
    prompt_hidden: Tensor | None = None  # (prompt_rows, D) at the last token of the prompt
    prompt_perplexity: Tensor | None = None  # (prompt_rows,)
    prompt_entropy: Tensor | None = None  # (prompt_rows,) mean over the prompt, divided by log V
    log_s: Tensor | None = None  # (B,) of the Beta head
    # (R, T), in nats, of the token at t given those before it; 0 where completion_mask is, and at t = 0.
    token_logps: Tensor | None = None
    token_entropy: Tensor | None = None
    ref_token_logps: Tensor | None = None
    token_values: Tensor | None = None  # (R, T) of the value head before the token at t, from the hidden state at t - 1

    def sequence_stats(self) -> AnySequenceStats:
        return ExtendedSequenceStats(*(self.get(name) for name in ExtendedSequenceStats._fields))

    def reference_stats(self) -> AnySequenceStats:
        found = {name: self.get(f"ref_{name}") for name in ("logps", "entropy", "shared_logps")}
        return ExtendedSequenceStats(lengths=self["lengths"], **found)

    def prompt_features(self) -> dict[str, Tensor]:
        """Name -> feature, those that were wanted."""
        return {name.removeprefix("prompt_"): value for name, value in self.items() if name.startswith("prompt_")}


def model_stats(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    wanted: Wanted | None = None,
    prompt: Mapping[str, Tensor] | None = None,
) -> StatsOutput:
    """Statistics of each row's completion under `model`, which may be wrapped; see `install_stats_forward`.

    Args:
        batch: input_ids (R, T) int64, attention_mask (R, T), completion_mask (R, T): 1 on the tokens that count; or
            input_ids (1, N) and paths (R, 4), see `fastpo.layout`.
        wanted: what else to compute.
        prompt: prompt features by name, for the model's Beta head to make log s of, as far as `wanted.prompt` does
            not name them.
    """
    inputs = {name: batch[name] for name in TOKENS if name in batch}
    asked = {"wanted": wanted, "prompt": prompt}
    return model(**inputs, **{name: value for name, value in asked.items() if value is not None})


def sequence_stats(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> SequenceStats:
    """`model_stats` of a batch given by its fields, without anything further."""
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
    output = model_stats(model, batch)
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

    def forward(self: Any, *args: Any, wanted: Wanted | None = None, prompt: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("completion_mask") is None and kwargs.get("paths") is None:
            return self._plain_forward(*args, **kwargs)
        batch = {name: kwargs.pop(name) for name in TOKENS if kwargs.get(name) is not None}
        others = {name: value for name, value in kwargs.items() if value is not None and name not in TOKENS}
        return _stats_forward(self, batch, Wanted() if wanted is None else wanted, prompt or {}, others)

    # generate() and the Trainer read the signature; functools.wraps would let accelerate unwrap us away.
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    # Bound methods, not closures, so that a deep copy calls itself and not the model it was copied from.
    lm._plain_forward = plain
    lm.forward = MethodType(forward, lm)


def _stats_forward(
    lm: Any, batch: dict[str, Tensor], wanted: Wanted, prompt: Mapping[str, Tensor], others: dict[str, Any]
) -> StatsOutput:
    # The first side is the chosen one: its prompts are the pairs'.
    parts = sides(batch) if wanted.one_side_at_a_time else (batch,)
    shared = shared_lengths(batch).chunk(len(parts)) if wanted.shared_logps else (None,) * len(parts)
    found = [
        _side_stats(lm, part, wanted, others, split, wanted.prompt if i == 0 else ())
        for i, (part, split) in enumerate(zip(parts, shared, strict=True))
    ]
    stats = {name: torch.cat([part[name] for part in found if name in part]) for name in found[0]}
    if wanted.log_s:
        features = {**prompt, **{name: stats[f"prompt_{name}"] for name in wanted.prompt}}
        stats["log_s"] = lm.beta_head.log_s(**{name: features[name] for name in lm.beta_head.config.features})
    return StatsOutput(**stats)


def _side_stats(
    lm: Any,
    batch: dict[str, Tensor],
    wanted: Wanted,
    others: dict[str, Any],
    shared: Tensor | None,
    features: tuple[str, ...],
) -> dict[str, Tensor]:
    """Fields of `StatsOutput`, of one side or of both; features of the prompt only as far as named."""
    if (wanted.tokens or wanted.values) and "paths" in batch:
        raise ValueError("tokens and values must be asked of a padded batch (completion_mask), got one with paths")
    rows = responses(batch)
    found: dict[str, Tensor] = {}
    reference: LMHead | None = None
    if wanted.reference:
        # First, so that its activations are gone before the policy's come.
        with as_reference(lm):
            hidden = _hidden_states(lm, batch, others)
            reference = LMHead.of(lm, rows.of(hidden), wanted.temperature)
            found |= _prompt_features(lm, hidden, batch, features, wanted.prompt_rows)
            features = ()
            if wanted.one_side_at_a_time:  # whose policy is run twice
                found |= _of_reference(reference.stats(rows, shared))
                reference = None

    def policy() -> dict[str, Tensor]:
        hidden = _hidden_states(lm, batch, others)
        head = LMHead.of(lm, rows.of(hidden), wanted.temperature)
        own = _token_fields(head, reference, rows) if wanted.tokens else _fields(head, reference, rows, shared, wanted)
        if wanted.variance:
            own["mean"], own["variance"] = lm.disco_head(hidden.flatten(0, 1)[rows.last])
        if wanted.values:
            own["token_values"] = _token_values(lm, hidden, rows)
        return own | _prompt_features(lm, hidden, batch, features, wanted.prompt_rows)

    if wanted.one_side_at_a_time and torch.is_grad_enabled():
        return found | checkpoint(policy, use_reentrant=False)
    return found | policy()


def _hidden_states(lm: Any, batch: Mapping[str, Tensor], others: dict[str, Any]) -> Tensor:
    """(R, T, D) of a batch on the model's device."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    if "paths" in batch:
        implementation, paths = lm.config._attn_implementation, batch["paths"]
        if implementation == SDPA_PATHS:
            inputs["attention_mask"] = paths.cpu()[None, None]
        elif implementation not in PACKS_BY_POSITION or len(paths[:, 0].unique()) < len(paths):
            raise ValueError(
                f"paths need attention along them (see fastpo.attention), got attn_implementation {implementation!r}"
            )
        inputs["position_ids"] = positions(batch)
    return lm.base_model(**inputs, use_cache=False, **others)[0]


def _fields(
    head: LMHead, reference: LMHead | None, rows: Rows, shared: Tensor | None, wanted: Wanted
) -> dict[str, Tensor]:
    """Fields of `StatsOutput` of sequences, of a policy's head and of a reference's beside it."""
    if reference is None:
        return _named(head.stats(rows, shared, wanted.extras))
    stats, beside = head.stats_beside(reference, rows, shared, wanted.extras)
    return _named(stats) | _of_reference(beside)


def _token_fields(head: LMHead, reference: LMHead | None, rows: Rows) -> dict[str, Tensor]:
    """The same with those of tokens, of which those of sequences are made."""
    if reference is None:
        stats, beside = head.tokens(rows), None
    else:
        stats, beside = head.tokens_beside(reference, rows)
    count = rows.lengths.clamp(min=1)

    def summed(tokens: TokenStats) -> tuple[Tensor, Tensor, SequenceStats]:
        logps, entropy = (_at_tokens(x, rows) for x in tokens)
        return logps, entropy, SequenceStats(logps.sum(dim=1), rows.lengths, entropy.sum(dim=1) / count)

    logps, entropy, sequences = summed(stats)
    found = {"token_logps": logps, "token_entropy": entropy, **_named(sequences)}
    if beside is not None:
        found["ref_token_logps"], _, sequences = summed(beside)
        found |= _of_reference(sequences)
    return found


def _token_values(lm: Any, hidden: Tensor, rows: Rows) -> Tensor:
    """(R, T) of the value head; rows that predict nothing that counts are not read."""
    keep = rows.labels != IGNORED
    values = lm.value_head(rows.of(hidden)[keep])
    return _at_tokens(values.new_zeros(keep.shape).masked_scatter(keep, values), rows)


def _at_tokens(predicted: Tensor, rows: Rows) -> Tensor:
    """(R, T) at each token, of (R * T,) at the row that predicts it."""
    return F.pad(predicted.view(len(rows.lengths), -1)[:, :-1], (1, 0))


def _named(stats: AnySequenceStats) -> dict[str, Tensor]:
    return {name: value for name, value in stats._asdict().items() if value is not None}


def _of_reference(stats: AnySequenceStats) -> dict[str, Tensor]:
    return {f"ref_{name}": value for name, value in _named(stats).items() if name != "lengths"}


@torch.no_grad()
def _prompt_features(
    lm: Any, hidden: Tensor, batch: Mapping[str, Tensor], names: tuple[str, ...], count: int
) -> dict[str, Tensor]:
    """Fields prompt_* of `StatsOutput`; perplexity and entropy project the prompt's positions."""
    found: dict[str, Tensor] = {}
    if not names:
        return found
    take, lengths = prompts(batch, count)
    last = lengths.cumsum(0) - 1
    if "hidden" in names:
        found["prompt_hidden"] = hidden.flatten(0, 1)[take[last]]
    if "perplexity" in names or "entropy" in names:
        head = LMHead.of(lm, hidden.flatten(0, 1)[take])
        # The last token of the prompt predicts none of it, but its entropy counts: any label will do there.
        labels = batch["input_ids"].flatten()[take].roll(-1)
        logps, entropy = linear_logps(head.hidden, head.weight, labels, head.bias, lora=head.lora, **head.options)
        logps[last] = 0
        nll, total = (segment_reduce(x, "sum", lengths=lengths) for x in (-logps, entropy))
        found["prompt_perplexity"] = (nll / (lengths - 1).clamp(min=1)).exp()
        found["prompt_entropy"] = total / lengths / math.log(head.weight.shape[0])
    return found
