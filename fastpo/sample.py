"""`fastpo sample`: several responses of each prompt, into a file that a killed run goes on with."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.adapters import check_adapter
from fastpo.chat_templates import check_chat_template, set_chat_template
from fastpo.config import option
from fastpo.data import read_dataset
from fastpo.file_commands import DTYPES, check_fields, provenance, write_batches
from fastpo.fingerprint import model_fingerprint, rows_fingerprint
from fastpo.generation import Completion, Sampling, check_positions, generate, said, seed_of
from fastpo.prompts import tokenize_prompts
from fastpo.resumable import check_one_process, check_output_file

logger = logging.getLogger(__name__)

BACKENDS = ("transformers", "vllm")
# Columns that are written anew, or would be about other responses.
OWN = ("index", "prompt", "responses", "finished", "rewards", "sigmas")


@dataclass(frozen=True)
class Arguments(Sampling):
    """What `fastpo sample` is told.

    Raises:
        ValueError: a field is missing or out of its range.
    """

    model_name_or_path: str = option("", "The model: folder or hub name, or an adapter's folder.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer; default: the model's.")
    chat_template: str | None = option(None, "A template of fastpo.chat_templates in place of the tokenizer's own.")
    dtype: str = option("auto", "Of the model: float32, bfloat16, float16, or auto: as saved.")
    backend: str = option("transformers", "What generates: transformers, or vllm.")
    dataset: str = option("", "A JSON, JSONL or Parquet file, or a dataset's name, in any form that has prompts.")
    dataset_split: str = option("train", "Split of a named dataset.")
    max_samples: int | None = option(None, "Use the first so many rows.")
    max_prompt_length: int | None = option(None, "Of a longer prompt keep the last so many tokens.")
    skip_bad_rows: bool = option(False, "Leave rows that cannot be used out, with a warning.")
    output_file: str = option("", "The JSONL file to write.")
    num_generations: int = option(8, "Responses of each prompt.")
    batch_size: int = option(8, "Prompts at once; each has num_generations rows in the batch.")
    seed: int = option(0, "Of the draws; each batch has a seed of its own, derived from it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            given=("model_name_or_path", "dataset", "output_file"),
            least=dict.fromkeys(("max_samples", "max_prompt_length", "num_generations", "batch_size"), 1),
            known={"backend": BACKENDS, "dtype": DTYPES},
        )
        if self.chat_template is not None:
            check_chat_template(self.chat_template)


class Backend(NamedTuple):
    """What generates.

    Attributes:
        generate: `fastpo.generation.generate` without its model.
        config: of the model.
        fingerprint: of its weights.
        device: what its numbers may depend on.
    """

    generate: Callable[..., list[Completion]]
    config: Any
    fingerprint: str
    device: str


def run(arguments: Arguments) -> str:
    """Write the responses and their provenance; returns what to print.

    Raises:
        ValueError, OSError: bad input, before anything is generated; a folder that cannot be written.
    """
    check_one_process("fastpo sample")
    check_output_file(arguments.output_file)
    tokenizer = _tokenizer(arguments)
    rows = _prompts(arguments, tokenizer)
    prompts = rows_fingerprint(rows)
    backend = _backend(arguments)
    check_positions(backend.config, max(map(len, rows["prompt_ids"])), arguments)
    source = provenance(
        "fastpo sample", arguments, ("fastpo", "torch", arguments.backend),
        prompts_fingerprint=prompts, model_fingerprint=backend.fingerprint, device=backend.device,
    )  # fmt: skip
    summary = write_batches(
        arguments.output_file, source, rows, arguments.batch_size,
        lambda batch, number: _responses(batch, arguments, tokenizer, backend, number), summarize,
    )  # fmt: skip
    if summary["empty"]:
        logger.warning("%d of %d responses are empty", summary["empty"], summary["responses"])
    unfinished, empty, distinct = (summary[name] / summary["responses"] for name in ("unfinished", "empty", "distinct"))
    return (
        f"{summary['rows']} prompts, {summary['responses']} responses: {unfinished:.1%} unfinished, {empty:.1%} empty, "
        f"{distinct:.1%} distinct among those of their prompt\nresponses: {arguments.output_file}"
    )


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Numbers of rows, responses, unfinished ones, empty ones, and distinct ones among those of a prompt."""
    counts = dict.fromkeys(("rows", "responses", "unfinished", "empty", "distinct"), 0)
    for row in rows:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in row["responses"]]
        counts["rows"] += 1
        counts["responses"] += len(texts)
        counts["unfinished"] += row["finished"].count(False)
        counts["empty"] += texts.count("")
        counts["distinct"] += len(set(texts))
    return counts


def _responses(
    batch: Sequence[Mapping[str, Any]], arguments: Arguments, tokenizer: Any, backend: Backend, number: int
) -> list[dict[str, Any]]:
    n = arguments.num_generations
    completions = backend.generate(
        [row["prompt_ids"] for row in batch for _ in range(n)], arguments, seed=seed_of(arguments.seed, number),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    found = []
    for i, row in enumerate(batch):
        drawn = completions[i * n : (i + 1) * n]
        found.append(
            {
                "index": row["index"],
                "prompt": row["prompt"],
                "responses": [said(tokenizer, row["prompt"], row["prompt_ids"], one) for one in drawn],
                "finished": [one.finished for one in drawn],
                **{name: value for name, value in row.items() if name not in (*OWN, "prompt_ids")},
            }
        )
    return found


def _prompts(arguments: Arguments, tokenizer: Any) -> Dataset:
    rows = read_dataset(arguments.dataset, arguments.dataset_split)
    if arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    return tokenize_prompts(
        rows, tokenizer, max_length=arguments.max_prompt_length, source=arguments.dataset,
        skip_bad_rows=arguments.skip_bad_rows,
    )  # fmt: skip


def _tokenizer(arguments: Arguments) -> Any:
    name = arguments.tokenizer_name_or_path or arguments.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer_name_or_path must name a tokenizer, got {name!r}: {error}") from error
    if arguments.chat_template is not None:
        set_chat_template(tokenizer, arguments.chat_template)
    return tokenizer


def _backend(arguments: Arguments) -> Backend:
    name, device = arguments.model_name_or_path, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if arguments.backend == "vllm":
        from fastpo import vllm_backend

        config, fingerprint = vllm_backend.describe(name)
        llm = vllm_backend.load(name, arguments.tokenizer_name_or_path or name, arguments.dtype)
        return Backend(partial(vllm_backend.generate, llm), config, fingerprint, device)
    model = _load(name, arguments.dtype)
    return Backend(partial(generate, model), model.config, model_fingerprint(model), device)


def _load(name: str, dtype: str) -> Any:
    """A causal LM, with the adapter that is saved there, on the GPU where there is one."""
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = _load_whole(PeftConfig.from_pretrained(name).base_model_name_or_path, dtype)
        model = PeftModel.from_pretrained(base, name)
        check_adapter(model, is_reference=False, always=False)
    else:
        model = _load_whole(name, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_whole(name: str, dtype: str) -> Any:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path must name a causal LM, got {name!r}: {error}") from error
    if any(key.startswith("score.") for key in found["unexpected_keys"]):  # with tied weights nothing is missing
        raise ValueError(f"model_name_or_path must name a causal LM, got a reward model in {name!r}")
    if found["missing_keys"]:
        raise ValueError(
            f"model_name_or_path must name a causal LM, got {name!r} without {', '.join(sorted(found['missing_keys']))}"
        )
    return model
