"""Completions of prompts, sampled by vLLM."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fastpo.generation import Completion, Sampling, end_tokens, seed_of

WEIGHTS = ("*.safetensors", "*.bin")


def load(name: str, tokenizer: str, dtype: str) -> Any:
    """A `vllm.LLM` of a model's folder or hub name.

    Raises:
        ValueError: vLLM is not installed.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"backend vllm needs vllm (pip install 'fastpo[vllm]'), which cannot be imported: {error}"
        ) from None
    return LLM(model=name, tokenizer=tokenizer, dtype=dtype)


def generate(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    pad_token_id: int | None,
    eos_token_id: int | Sequence[int] | None,
) -> list[Completion]:
    """As `fastpo.generation.generate`, with a `vllm.LLM` in place of the model.

    The same seeds do not promise the same completions where vLLM batches otherwise, or on another version of it.
    """
    from vllm import SamplingParams

    ends = end_tokens(None, eos_token_id)  # the model's own vLLM adds by itself
    each = [
        SamplingParams(
            n=1, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
            max_tokens=sampling.max_completion_length, seed=seed_of(seed, row), stop_token_ids=ends,
        )
        for row in range(len(prompts))
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], each, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [Completion(list(one.token_ids), one.finish_reason == "stop") for one in found]


def describe(name: str) -> tuple[Any, str]:
    """Config and fingerprint of a model that is not loaded: of its files in a folder, on the hub its commit.

    Raises:
        ValueError: there is no whole model of that name, such as an adapter's folder.
    """
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"backend vllm needs a whole model: model_name_or_path must hold a config.json, got {name!r}")
    config = AutoConfig.from_pretrained(name)
    if not Path(name).is_dir():
        return config, str(config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("config.json", *WEIGHTS) for path in Path(name).glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return config, digest.hexdigest()
