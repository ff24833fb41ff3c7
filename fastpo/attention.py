"""Attention over responses laid end to end in one row of tokens, without padding.

A path is a prompt and one response to it. Each path is one call of causal attention; a prompt that two paths share is
in the row once, before the first of the two responses. The paths travel where transformers lets a caller's own mask
travel, as (1, 1, S, 4) int64 in place of a mask, so that every layer, also a recomputed one, gets them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# Whose packed and shared batches have been held to padded ones. Others may hide what a path must not see: convolutions,
# positions that count the padding, attention that passes no positions on.
CHECKED = ("gemma", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
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
    for prompt_start, prompt_end, start, end in sorted(attention_mask[0, 0].tolist(), key=lambda path: path[2:]):
        if end == done:  # an empty response
            continue
        prompt, response = slice(prompt_start, prompt_end), slice(start, end)
        shared, own, mask = prompt_end - prompt_start, end - start, None
        if prompt_end == start:
            parts = [x[:, :, prompt_start:end] for x in (query, key, value)]
        else:
            parts = [torch.cat((x[:, :, prompt], x[:, :, response]), 2) for x in (query, key, value)]
            if own <= shared:  # else the prompt's queries run again: cheaper than a mask as long as it is wide
                mask = torch.ones(own, shared + own, dtype=torch.bool, device=query.device).tril(shared)
                parts[0] = query[:, :, response]
        out = sdpa_attention_forward(module, *parts, mask, **options)[0]
        pieces.append(out[:, out.shape[1] - (end - done) :])  # the prompt's own attention is in its first path
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
    by_position = implementation in PACKS_BY_POSITION and not shared
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    obstacles = {
        f"{name} is none of the models for which that has been checked: {', '.join(CHECKED)}": (
            config.model_type not in CHECKED
        ),
        f"{name} has attn_implementation {implementation!r}, not 'sdpa'": (
            not by_position and implementation not in ("sdpa", SDPA_PATHS)
        ),
        f"{name} has layers other than full attention": not by_position and bool(slides or kinds),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)
