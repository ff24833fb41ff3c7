"""Preference data as token ids: prompts, completions, whole datasets, with the rows that cannot be used named."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from fastpo.data import (
    PROBLEM,
    VECTOR_COLUMNS,
    BadRowError,
    Messages,
    Pair,
    Text,
    common_beginning,
    find_form,
    shown,
)

logger = logging.getLogger(__name__)

Encode = Callable[[dict[str, Any]], dict[str, Any]]
MAX_NAMED_ROWS = 5


def tokenize_dataset(
    dataset: Dataset, tokenizer: Any, *, stage: str = "dpo", max_length: int | None = 1024, source: str = "dataset",
    skip_bad_rows: bool = False, num_proc: int | None = None,
    own_columns: Sequence[str] = ("context_scale", "pair_weight"),
) -> Dataset:  # fmt: skip
    """Columns prompt_ids, chosen_ids, (rejected_ids,) index, own_columns; already tokenised data passes through.

    A prompt keeps its last tokens and a completion its first ones: where both do not fit into max_length, the prompt
    gets what the longer completion leaves, but at least half. Chosen and rejected see the same prompt.

    Args:
        dataset: rows in any form that `FORMS` knows.
        tokenizer: with a chat template where the rows are messages.
        stage: "sft" has no rejected_ids.
        max_length: of prompt and completion together, in tokens.
        source: what errors call the dataset.
        skip_bad_rows: leave rows that cannot be used out, with a warning.
        num_proc: processes.
        own_columns: numbers of the dataset's own that are kept, where they are there.

    Raises:
        ValueError: the columns fit no known form, or rows cannot be used (named by `source` and index) and
            `skip_bad_rows` is off, or no row is left.
    """
    columns = dataset.column_names
    if {"prompt_ids", "chosen_ids"} <= set(columns):
        if stage != "sft" and "rejected_ids" not in columns:
            raise ValueError(f"{source} must have rejected_ids beside chosen_ids, got {', '.join(columns)}")
        for table in dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(1000):
            if (pc.list_value_length(table.column(0)).to_numpy() < 1).any():
                raise ValueError(f"{source} must have at least one token in every row of prompt_ids, got none")
        return dataset if "index" in columns else dataset.add_column("index", list(range(len(dataset))))
    form = find_form(columns, stage, source)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        pair = form(row)
        return tokenize_pair(pair._replace(rejected=None) if stage == "sft" else pair, tokenizer, max_length)

    rows = map_rows(
        dataset, encode, source=source, skip_bad_rows=skip_bad_rows, num_proc=num_proc, own_columns=own_columns
    )
    return rows.remove_columns("rejected_ids") if stage == "sft" else rows


def row_converter(
    encode: Encode, columns: Sequence[str], own_columns: Sequence[str]
) -> tuple[Callable[[dict[str, Any], int], dict[str, Any]], Features]:
    """What makes tokenised columns of a row and its position, with what is wrong with it in `problem`; their types."""
    own = {name: [0.0] if name in VECTOR_COLUMNS else 0.0 for name in own_columns if name in columns}

    def convert(row: dict[str, Any], position: int) -> dict[str, Any]:
        # A split keeps its rows' numbers in the file; anything else called index is the caller's own.
        index = row["index"] if type(row.get("index")) is int else position
        empty: dict[str, Any] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "index": index, "problem": ""}
        try:
            if row.get(PROBLEM):
                raise BadRowError(row[PROBLEM])
            tokens = encode(row)
            tokens |= {name: _numbers(name, row[name], name in VECTOR_COLUMNS) for name in own}
        except BadRowError as error:
            return empty | own | {"problem": str(error)}
        return empty | tokens

    # Types stated, not taken from the first thousand rows.
    ids = List(Value("int64"))
    features = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "index": Value("int64")}
    features["problem"] = Value("string")
    features |= {name: List(Value("float32")) if name in VECTOR_COLUMNS else Value("float64") for name in own}
    return convert, Features(features)


def map_rows(
    dataset: Dataset, encode: Encode, *, source: str, skip_bad_rows: bool, num_proc: int | None,
    own_columns: Sequence[str],
) -> Dataset:  # fmt: skip
    """Columns prompt_ids, chosen_ids, rejected_ids, index, own_columns.

    Args:
        encode: a row -> its token ids; raises `BadRowError`.
        source, skip_bad_rows, own_columns: as in `tokenize_dataset`.

    Raises:
        ValueError: rows cannot be used and `skip_bad_rows` is off, or no row is left.
    """
    if len(dataset) == 0:
        raise ValueError(f"{source} must have at least one row, got none")
    columns = dataset.column_names
    convert, features = row_converter(encode, columns, own_columns)
    # No cache, whose key does not see this module's code.
    result = dataset.map(
        convert, with_indices=True, remove_columns=columns, num_proc=num_proc, desc=f"Tokenizing {source}",
        features=features, load_from_cache_file=False,
    )  # fmt: skip
    problems = [(i, p) for i, p in zip(result["index"], result["problem"], strict=True) if p]
    if report_bad_rows(problems, len(result), source, skip_bad_rows):
        result = result.filter(lambda problem: not problem, input_columns="problem")
    if len(result) == 0:
        raise ValueError(f"{source} must have at least one usable row, got none")
    return result.remove_columns("problem")


def report_bad_rows(problems: list[tuple[int, str]], rows: int, source: str, skip_bad_rows: bool) -> bool:
    """Whether there are rows, given by index and problem, to leave out of so many; that is said.

    Raises:
        ValueError: there are, and they must not be left out.
    """
    if not problems:
        return False
    named = "; ".join(f"{source} row {index}: {problem}" for index, problem in problems[:MAX_NAMED_ROWS])
    more = f"; and {len(problems) - MAX_NAMED_ROWS} more rows" if len(problems) > MAX_NAMED_ROWS else ""
    if not skip_bad_rows:
        raise ValueError(f"{named}{more} (set skip_bad_rows=True to leave such rows out)")
    logger.warning("left out %d of %d rows: %s%s", len(problems), rows, named, more)
    return True


def _numbers(name: str, value: Any, vector: bool) -> Any:
    for number in value if vector and isinstance(value, list) and value else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            kind = "a list of finite numbers" if vector else "a finite number"
            raise BadRowError(f"{name!r} must be {kind}, got {shown(value)}")
    if name == "pair_weight" and value < 0:
        raise BadRowError(f"{name!r} must be >= 0, got {shown(value)}")
    return value


def tokenize_pair(pair: Pair, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Token ids of a pair; messages go through the tokenizer's chat template, text gets an end-of-sequence token."""
    completions = {"chosen": pair.chosen, **({} if pair.rejected is None else {"rejected": pair.rejected})}
    prompts, ids = [], {}
    for name, completion in completions.items():
        _check_said(completion)
        prompt_ids, whole = encode_completion(pair.prompt, completion, tokenizer)
        # A token that spans the border between prompt and completion belongs to the completion.
        prompt_ids = prompt_ids[: common_beginning(prompt_ids, whole)]
        prompts.append(prompt_ids)
        ids[name] = whole[len(prompt_ids) :]
        if not ids[name]:
            raise BadRowError(f"{name!r} must not be empty, got {shown(completion)}")
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        shared = common_beginning(*prompts)
        for name, own in zip(ids, prompts, strict=True):
            ids[name] = own[shared:] + ids[name]
        prompts[0] = prompts[0][:shared]
    prompt = prompts[0]
    if not prompt:
        raise BadRowError(f"'prompt' must not be empty, got {shown(pair.prompt)}")
    if max_length is None:
        return {"prompt_ids": prompt, **{f"{name}_ids": completion for name, completion in ids.items()}}
    room = max(max_length - max(map(len, ids.values())), max_length // 2, 1)
    prompt = prompt[-room:]
    tokens = {f"{name}_ids": completion[: max_length - len(prompt)] for name, completion in ids.items()}
    return {"prompt_ids": prompt, **tokens}


def _check_said(completion: Text) -> None:
    if not completion:
        raise BadRowError("a completion must not be empty, got ''")
    if not isinstance(completion, str) and any(not turn["content"] for turn in completion):
        raise BadRowError("a completion must not be empty, got a message without content")


def encode_prompt(prompt: Text, tokenizer: Any) -> list[int]:
    """Token ids of a prompt for a model to go on from.

    Raises:
        BadRowError: it is empty, ends with the assistant's message, or the chat template cannot render it.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # A tokenizer that appends its end-of-sequence token must not end the prompt with it.
        ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    elif prompt[-1]["role"] == "assistant":
        raise BadRowError("the last message of the prompt must not be the assistant's")
    else:
        ids = _render(prompt, tokenizer, add_generation_prompt=True)
    if not ids:
        raise BadRowError(f"'prompt' must not be empty, got {shown(prompt)}")
    return ids


def encode_completion(prompt: Text, completion: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt alone, and of prompt and completion together; the completion may be empty.

    Raises:
        BadRowError: as `encode_prompt`; or they are not both text or both messages, the assistant's first.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have an eos_token, which ends a completion, got None")
        whole = tokenizer(prompt + completion)["input_ids"]
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        return encode_prompt(prompt, tokenizer), whole
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRowError("prompt and completions must all be text or all be messages")
    if completion[0]["role"] != "assistant":
        raise BadRowError(f"a completion must start with the assistant's message, got {shown(completion[0])}")
    return encode_prompt(prompt, tokenizer), _render([*prompt, *completion], tokenizer)


def _render(messages: Messages, tokenizer: Any, **options: Any) -> list[int]:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    except Exception as error:  # templates raise what they like, to say what they cannot render
        raise BadRowError(f"the chat template cannot render it: {error}") from error
