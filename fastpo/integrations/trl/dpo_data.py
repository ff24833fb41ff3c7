"""Preference data as TRL's DPOTrainer reads it: the same rows become the same tokens."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from trl import extract_prompt, is_conversational

from fastpo.data import BadRowError, from_sharegpt
from fastpo.tokenization import Encode, map_rows, row_converter

logger = logging.getLogger(__name__)

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokenize_as_trl(
    dataset: Dataset | IterableDataset, tokenizer: Any, *, max_length: int | None, source: str,
    skip_bad_rows: bool = False, num_proc: int | None = None, own_columns: Sequence[str] = (),
) -> Dataset | IterableDataset:  # fmt: skip
    """Columns prompt_ids, chosen_ids, rejected_ids, index, own_columns; a streamed dataset is tokenised as it comes.

    Rows hold prompt, chosen and rejected, or chosen and rejected with a common beginning; text or messages, with
    `tools` and `chat_template_kwargs` for the chat template; or token ids; or LLaMA-Factory's ranking form. Prompt and
    completion together keep their first `max_length` tokens (None: all), and rows whose prompt alone has as many are
    left out.

    Args:
        source: what errors call the dataset.
        skip_bad_rows: leave unusable rows out.
        num_proc: processes that tokenise a `datasets.Dataset`.
        own_columns: further columns to keep, where they are there.

    Raises:
        TypeError: not a dataset.
        ValueError: columns or rows cannot be used, or none is left; of a stream, when it comes to them.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"{source} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")
    columns = list(dataset.column_names or next(iter(dataset)))
    if {*TOKENS, "index"} <= set(columns) and _is_tokenized(dataset, max_length):
        return dataset
    if {"image", "images"} & set(columns):
        raise ValueError(f"{source} must hold no images: language models alone are trained here")
    if not set(TOKENS) <= set(columns) and not {"chosen", "rejected"} <= set(columns):
        raise ValueError(f"{source} must have chosen and rejected, and mostly prompt; got {', '.join(columns)}")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        tokens = {name: row[name] for name in TOKENS} if TOKENS[0] in row else _token_ids(row, tokenizer)
        if not tokens["prompt_ids"]:
            raise BadRowError("'prompt' must have at least one token in common with prompt + completion, got none")
        room = None if max_length is None else max(max_length - len(tokens["prompt_ids"]), 0)
        return tokens | {name: tokens[name][:room] for name in TOKENS[1:]}

    def fits(prompt_ids: list[int]) -> bool:
        return max_length is None or len(prompt_ids) < max_length

    if isinstance(dataset, IterableDataset):
        return _stream(dataset, encode, columns, source, skip_bad_rows, own_columns).filter(
            fits, input_columns="prompt_ids"
        )
    rows = map_rows(
        dataset, encode, source=source, skip_bad_rows=skip_bad_rows, num_proc=num_proc, own_columns=own_columns
    )
    kept = rows.filter(fits, input_columns="prompt_ids", load_from_cache_file=False)
    if len(kept) == 0:
        raise ValueError(f"max_length={max_length} leaves no row of {source} room for a completion")
    if len(kept) < len(rows):
        logger.warning(
            "left out %d of %d rows of %s: their prompts fill max_length", len(rows) - len(kept), len(rows), source
        )
    return kept


def _is_tokenized(dataset: Dataset | IterableDataset, max_length: int | None) -> bool:
    """Whether rows of token ids are numbered and cut off already; a stream that has all columns is taken to be."""
    if isinstance(dataset, IterableDataset):
        return True
    if dataset.features["index"].dtype != "int64":
        return False
    if max_length is None:
        return True
    ids = dataset.select_columns(list(TOKENS)).with_format("arrow")
    for table in ids.iter(1000):
        prompt, *completions = (pc.list_value_length(table[name]).to_numpy() for name in TOKENS)
        if max(int((prompt + completion).max()) for completion in completions) > max_length:
            return False
    return True


def token_ids(row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """prompt_ids, chosen_ids, rejected_ids of a row, nothing cut off."""
    row = _explicit(row)
    if is_conversational(row):
        tools = row.get("tools")
        template = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        template |= row.get("chat_template_kwargs") or {}

        def ids(messages: Any, **more: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template, **more)[
                "input_ids"
            ]

        prompt = ids(row["prompt"], add_generation_prompt=True)
        whole = [ids(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    else:
        end = tokenizer.eos_token
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [
            tokenizer(row["prompt"] + row[side].removesuffix(end) + end)["input_ids"] for side in ("chosen", "rejected")
        ]
    # Both sides see the same prompt, so the completions begin where the first of them leaves it.
    shared = 0
    for tokens in zip(prompt, *whole, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return dict(zip(TOKENS, (prompt[:shared], *(tokens[shared:] for tokens in whole)), strict=True))


def _token_ids(row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    try:
        return token_ids(row, tokenizer)
    except BadRowError:
        raise
    except Exception as error:  # whatever the chat template, the tokenizer or TRL says of what it cannot read
        raise BadRowError(f"cannot be tokenised: {error}") from error


def _explicit(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with prompt, chosen and rejected."""
    if "prompt" in row:
        return dict(row)
    if "conversations" in row:
        return {**row, **from_sharegpt(row)._asdict()}
    return {**row, **extract_prompt(dict(row))}


def _stream(
    dataset: IterableDataset,
    encode: Encode,
    columns: list[str],
    source: str,
    skip_bad_rows: bool,
    own_columns: Sequence[str],
) -> IterableDataset:
    convert, features = row_converter(encode, columns, own_columns)

    def checked(row: dict[str, Any], position: int) -> dict[str, Any]:
        found = convert(row, position)
        if found["problem"] and not skip_bad_rows:
            raise ValueError(f"{source} row {position}: {found['problem']} (set skip_bad_rows=True to leave it out)")
        return found

    rows = dataset.map(checked, with_indices=True, remove_columns=columns, features=features)
    return rows.filter(lambda problem: not problem, input_columns="problem").remove_columns("problem")
