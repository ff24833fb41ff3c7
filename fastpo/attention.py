"""Attention over responses laid end to end in one row of tokens, without padding and without a mask.

A path is a prompt and one response to it. Each path is one call of causal attention; a prompt that two paths share is
in the row once. The paths travel where transformers lets a caller's own mask travel, as (1, 1, S, 4) int64 in place of
a mask, so that every layer, also a recomputed one, gets them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SDPA_PATHS = "sdpa_paths"
# These tell packed sequences apart by their position_ids.
PACKS_BY_POSITION = ("flash_attention_2", "flash_attention_3", "flex_attention")


def path_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, path by path where `attention_mask` holds paths, else as it is.

    Args:
        query: (1, heads, N, d); key, value: (1, key-value heads, N, d).
        attention_mask: (1, 1, S, 4) int64 paths, see `fastpo.layout`, or any mask that SDPA takes.

    Returns:
        (1, N, heads, d), as transformers wants it.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    done, pieces = 0, []
    for prompt_start, prompt_end, start, end in sorted(attention_mask[0, 0].tolist(), key=lambda path: path[2]):
        shared = prompt_end - prompt_start
        if prompt_end == start:
            parts = [x[:, :, prompt_start:end] for x in (query, key, value)]
        else:  # The prompt's queries run again: cheaper than the mask that attention from the response alone needs.
            parts = [torch.cat((x[:, :, prompt_start:prompt_end], x[:, :, start:end]), 2) for x in (query, key, value)]
        out = sdpa_attention_forward(module, *parts, None, **options)[0]
        pieces.append(out if prompt_start == done else out[:, shared:])
        done = end
    return torch.cat(pieces, 1), None


def use_path_attention(lms: Iterable[Any], *, shared: bool) -> str | None:
    """Have causal LMs attend along paths, with prompts in common where `shared`; or say why one of them cannot."""
    lms = list(lms)
    reasons = [reason for lm in lms if (reason := _obstacle(lm, shared))]
    if reasons:
        return reasons[0]
    AttentionInterface.register(SDPA_PATHS, path_attention)
    AttentionMaskInterface.register(SDPA_PATHS, sdpa_mask)
    for lm in lms:
        if lm.config._attn_implementation == "sdpa":
            lm.set_attn_implementation(SDPA_PATHS)
    return None


def _obstacle(lm: Any, shared: bool) -> str | None:
    config, name = lm.config.get_text_config(), type(lm).__name__
    implementation = lm.config._attn_implementation
    if implementation in PACKS_BY_POSITION and not shared:
        return None
    if implementation not in ("sdpa", SDPA_PATHS):
        return f"{name} has attn_implementation {implementation!r}, not 'sdpa'"
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if slides or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return f"{name} has layers other than full attention"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{name} caps its attention logits"
    if not (lm._can_set_attn_implementation() and lm._supports_attention_backend):
        return f"{name} does not let its attention be replaced"
    return None
