"""Completions of prompts, sampled by transformers' `generate`."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from fastpo.backbone import causal_lm
from fastpo.config import option
from fastpo.data import Messages, Text, common_beginning


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: tokens by softmax(logits / temperature), of the top_k, of these the top_p.

    Raises:
        ValueError: a field is out of its range.
    """

    max_completion_length: int = option(256, "Longest completion, in tokens.")
    temperature: float = option(1.0, "What logits are divided by.")
    top_p: float = option(1.0, "Draw from the likeliest tokens of this total probability.")
    top_k: int = option(0, "Draw from the so many likeliest tokens; 0: from all.")

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be >= 1, got {self.max_completion_length!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k!r}")


class Completion(NamedTuple):
    """Token ids of a completion, its end-of-sequence token included, and whether it came to that one."""

    ids: list[int]
    finished: bool


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    pad_token_id: int | None,
    eos_token_id: int | Sequence[int] | None,
) -> list[Completion]:
    """One completion of each prompt; the same ones for the same batch and seed.

    Of the model's own generation settings only its end-of-sequence tokens count.

    Args:
        model: a causal LM, possibly with adapters; it is left as it came, in training or not.
        prompts: token ids, none empty; a prompt that is wanted more than once stands there more than once.
        sampling: how to draw.
        seed: of this batch; torch's own generators are left as they were.
        pad_token_id: of the tokenizer; None: an end-of-sequence token fills up, which is never attended to.
        eos_token_id: of the tokenizer, one or several; the model's own end a completion too.

    Raises:
        ValueError: no prompt or an empty one, no end-of-sequence token, or more tokens than the model has positions.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts must be lists of at least one token each, got none or an empty one")
    lm, width = causal_lm(model), max(map(len, prompts))
    check_positions(lm.config, width, sampling)
    ends = end_tokens(lm.generation_config, eos_token_id)
    padding = ends[0] if pad_token_id is None else pad_token_id
    ids = torch.full((len(prompts), width), padding, device=lm.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, where a decoder's padding is
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=sampling.max_completion_length, do_sample=True, temperature=sampling.temperature,
        top_p=sampling.top_p, top_k=sampling.top_k, pad_token_id=padding, eos_token_id=ends,
    )  # fmt: skip
    with _sampling_only(lm, seed):
        whole = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_until_end(row.tolist(), set(ends)) for row in whole[:, width:]]


def seed_of(*parts: int) -> int:
    """A seed, below 2**63, of a part of some work, such as a batch: those of different parts are independent."""
    # Hashed, since a CPU's generator reads the low 32 bits alone.
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def end_tokens(generation_config: Any, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a completion: the tokenizer's and those of a model's generation config.

    Raises:
        ValueError: there is none.
    """
    found: list[int] = []
    for ends in (eos_token_id, getattr(generation_config, "eos_token_id", None)):
        found += [ends] if isinstance(ends, int) else list(ends or ())
    if not found:
        raise ValueError("eos_token_id must be a token of the tokenizer or the model, got none")
    return list(dict.fromkeys(found))


def check_positions(config: Any, prompt_length: int, sampling: Sampling) -> None:
    """Raise ValueError for a prompt of so many tokens that, with its completion, a model of this config cannot hold."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_length + sampling.max_completion_length > positions:
        raise ValueError(
            f"a prompt of {prompt_length} tokens and max_completion_length={sampling.max_completion_length} must fit "
            f"into the model's {positions} positions: lower it, or max_prompt_length"
        )


def said(tokenizer: Any, prompt: Text, prompt_ids: Sequence[int], completion: Completion) -> Text:
    """A completion in the form of its prompt: text that goes on from it, or the assistant's message.

    White space that the chat template puts around a message is no part of it: rendered again it would be there twice.
    """
    alone = tokenizer.decode(completion.ids, skip_special_tokens=True)
    if not isinstance(prompt, str):
        before, after = _around_message(tokenizer, prompt)
        content = alone.removeprefix(before)
        return [{"role": "assistant", "content": content.removesuffix(after) if completion.finished else content}]
    # Tokenizers after sentencepiece drop the space that a text begins with, so the whole is decoded.
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion.ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else alone


def _around_message(tokenizer: Any, prompt: Messages) -> tuple[str, str]:
    """White space that the model writes before the assistant's message, and between it and the eos_token."""
    begun = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "x"}], tokenize=False)
    before, _, after = whole[common_beginning(begun, whole) :].partition("x")
    after, end, _ = after.partition(tokenizer.eos_token) if tokenizer.eos_token else ("", "", "")
    for token in tokenizer.all_special_tokens:  # which decoding leaves out
        after = after.replace(token, "")
    return before if before.isspace() else "", after if end and after.isspace() else ""


@contextlib.contextmanager
def _sampling_only(lm: Any, seed: int) -> Iterator[None]:
    """A causal LM in evaluation mode and without generation settings of its own, torch's generators at a seed."""
    modes = [(module, module.training) for module in lm.modules()]
    own, lm.generation_config = lm.generation_config, GenerationConfig()  # generate fills in from it what is not set
    devices = [lm.device] if lm.device.type == "cuda" else []
    lm.eval()
    try:
        with torch.random.fork_rng(devices):
            # Not torch.manual_seed, which would set the generators of all GPUs.
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        lm.generation_config = own
        for module, training in modes:
            module.training = training


def _until_end(ids: list[int], ends: set[int]) -> Completion:
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return Completion(ids, False) if end is None else Completion(ids[: end + 1], True)
