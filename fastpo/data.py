"""Preference data: read files, bring every known form to one, tokenise.

The one form is a `Pair`: a prompt and its completions, as text or as chat messages. To add a dataset form, write a
function from row to `Pair` and add its line to `FORMS`.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
Text = str | Messages
Encode = Callable[[dict[str, Any]], dict[str, Any]]
# The reference's statistics, computed beforehand; lengths follow from the tokens.
REFERENCE_COLUMNS = tuple(
    f"ref_{side}_{name}" for side in ("chosen", "rejected") for name in ("logps", "entropy", "shared_logps")
)
# Columns that travel to the loss, of numbers and of vectors; see `PreferenceBatch`.
NUMBER_COLUMNS = (
    "context_scale", "pair_weight", "score_chosen", "score_rejected", "prompt_perplexity", "prompt_entropy",
    *REFERENCE_COLUMNS,
)  # fmt: skip
VECTOR_COLUMNS = ("prompt_hidden",)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
HH_ASSISTANT = "\n\nAssistant:"
FILE_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Column of what is wrong with a row, where reading it has found that out; empty where nothing is.
PROBLEM = "fastpo_problem"
MAX_NAMED_ROWS = 5


class Pair(NamedTuple):
    """A prompt, a chosen and (in stage sft possibly no) rejected completion; all text, or all lists of messages."""

    prompt: Text
    chosen: Text
    rejected: Text | None


class BadRowError(ValueError):
    """A row that cannot be used; the message says why."""


# --- forms ----------------------------------------------------------------------------------------------------------


def from_prompt_pair(row: Mapping[str, Any]) -> Pair:
    """TRL's explicit form: prompt, chosen, rejected; text or lists of {role, content}.

    A text prompt beside lists of messages is a title: the dialogues hold the prompt themselves.
    """
    if isinstance(row.get("prompt"), str) and all(isinstance(row.get(side), list) for side in ("chosen", "rejected")):
        return from_transcripts(row)
    return Pair(*(_text(row, name) for name in ("prompt", "chosen", "rejected")))


def from_prompt_completion(row: Mapping[str, Any]) -> Pair:
    """TRL's form for stage sft: prompt, completion."""
    return Pair(_text(row, "prompt"), _text(row, "completion"), None)


def from_sharegpt(row: Mapping[str, Any]) -> Pair:
    """LLaMA-Factory's ranking form: conversations [{from, value}], chosen and rejected one {from, value} each.

    A `system` column holds the system message.
    """
    if row.get("tools"):
        raise BadRowError(f"'tools' must be empty, got {_shown(row['tools'])}")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return Pair(
        system + _sharegpt_messages(row, "conversations"),
        _sharegpt_messages(row, "chosen"),
        _sharegpt_messages(row, "rejected"),
    )


def from_transcripts(row: Mapping[str, Any]) -> Pair:
    """The HH form: chosen and rejected are whole dialogues, text or messages, with a common beginning."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common(chosen, rejected)
        # The last turn starts at the last marker that both have; without markers, at the last common space.
        marker = chosen.rfind(HH_ASSISTANT, 0, shared)
        split = marker + len(HH_ASSISTANT) if marker >= 0 else chosen.rfind(" ", 0, shared)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        split = _common(chosen[:-1], rejected[:-1])
    else:
        raise BadRowError("'chosen' and 'rejected' must both be text or both be messages")
    if split <= 0:
        raise BadRowError("'chosen' and 'rejected' have no common beginning to serve as the prompt")
    return Pair(chosen[:split], chosen[split:], rejected[split:])


# The columns that tell a form, in the order in which forms are tried.
FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Pair]] = {
    ("conversations", "chosen", "rejected"): from_sharegpt,
    ("prompt", "chosen", "rejected"): from_prompt_pair,
    ("chosen", "rejected"): from_transcripts,
    ("prompt", "completion"): from_prompt_completion,
}


def find_form(columns: Sequence[str], stage: str, source: str) -> Callable[[Mapping[str, Any]], Pair]:
    """The form of a dataset with these columns."""
    usable = {needed: form for needed, form in FORMS.items() if stage == "sft" or form is not from_prompt_completion}
    for needed, form in usable.items():
        if set(needed) <= set(columns):
            return form
    known = "; ".join(" + ".join(needed) for needed in usable)
    raise ValueError(f"{source} must have the columns of one of: {known}; got {', '.join(columns) or 'none'}")


def _text(row: Mapping[str, Any], name: str) -> Text:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value:
        return [_message(name, turn, "role", "content") for turn in value]
    raise BadRowError(f"{name!r} must be text or a list of messages, got {_shown(value)}")


def _sharegpt_messages(row: Mapping[str, Any], name: str) -> Messages:
    value = row.get(name)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{name!r} must be a message or a list of messages, got {_shown(value)}")
    keys = ("from", "value") if isinstance(turns[0], Mapping) and "from" in turns[0] else ("role", "content")
    return [_message(name, turn, *keys) for turn in turns]


def _message(name: str, turn: Any, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role_key), str):
        raise BadRowError(f"{name!r} must hold messages with {role_key!r} and {content_key!r}, got {_shown(turn)}")
    if not isinstance(turn.get(content_key), str):
        raise BadRowError(f"{content_key!r} in {name!r} must be text, got {_shown(turn.get(content_key))}")
    role = turn[role_key]
    if role_key == "from":
        if role not in SHAREGPT_ROLES:
            raise BadRowError(f"'from' in {name!r} must be one of {', '.join(SHAREGPT_ROLES)}, got {role!r}")
        role = SHAREGPT_ROLES[role]
    return {"role": role, "content": turn[content_key]}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- reading --------------------------------------------------------------------------------------------------------


def read_dataset(name: str, split: str = "train") -> Dataset:
    """A JSON, JSONL or Parquet file, or the name of a dataset that `datasets.load_dataset` knows.

    Raises:
        ValueError: nothing of that name, an unreadable file, no such split, or no rows.
    """
    suffix = Path(name).suffix.lower()
    looks_like_file = suffix in FILE_LOADERS or Path(name).is_file()
    if looks_like_file and not Path(name).is_file():
        raise ValueError(f"dataset must be an existing file or a dataset name, got {name!r}: no such file")
    if looks_like_file and suffix not in FILE_LOADERS:
        raise ValueError(f"dataset must end in {', '.join(FILE_LOADERS)}, got {name!r}")
    try:
        if looks_like_file:
            with Path(name).open("rb") as file:
                start = file.read(65)
            if len(start) <= 64 and not start.strip(b"[]{} \t\r\n"):
                raise ValueError(f"dataset {name!r} must have at least one row, got an empty file")
            dataset = load_dataset(FILE_LOADERS[suffix], data_files=name, split="train")
        else:
            dataset = load_dataset(name, split=split)
    except (DatasetGenerationError, DatasetNotFoundError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"dataset {name!r} cannot be read: {_diagnose_json(name) or cause}") from error
    if isinstance(dataset, DatasetDict) or len(dataset) == 0:
        raise ValueError(f"dataset {name!r} must have at least one row, got none")
    return dataset


def _diagnose_json(name: str) -> str | None:
    """Where a JSON or JSONL file breaks off being one table: arrow's own messages name neither row nor line."""
    path = Path(name)
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return None
    text = path.read_text(errors="replace")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        return f"not JSON at line {error.lineno}: {error.msg}"
    if rows is None:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                rows.append(json.loads(line) if line.strip() else {})
            except json.JSONDecodeError as error:
                return f"not JSON at line {number}: {error.msg}"
    types: dict[str, str] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            return f"row {index} must be an object, got {_shown(row)}"
        for key, value in row.items():
            kind = "number" if isinstance(value, int | float) else type(value).__name__
            if value is not None and types.setdefault(key, kind) != kind:
                return f"row {index}: {key!r} is {kind} where earlier rows have {types[key]}"
    return None


# --- tokenising -----------------------------------------------------------------------------------------------------


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
    if problems:
        named = "; ".join(f"{source} row {index}: {problem}" for index, problem in problems[:MAX_NAMED_ROWS])
        more = f"; and {len(problems) - MAX_NAMED_ROWS} more rows" if len(problems) > MAX_NAMED_ROWS else ""
        if not skip_bad_rows:
            raise ValueError(f"{named}{more} (set skip_bad_rows=True to leave such rows out)")
        logger.warning("left out %d of %d rows: %s%s", len(problems), len(result), named, more)
        result = result.filter(lambda problem: not problem, input_columns="problem")
    if len(result) == 0:
        raise ValueError(f"{source} must have at least one usable row, got none")
    return result.remove_columns("problem")


def _numbers(name: str, value: Any, vector: bool) -> Any:
    for number in value if vector and isinstance(value, list) and value else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            kind = "a list of finite numbers" if vector else "a finite number"
            raise BadRowError(f"{name!r} must be {kind}, got {_shown(value)}")
    if name == "pair_weight" and value < 0:
        raise BadRowError(f"{name!r} must be >= 0, got {_shown(value)}")
    return value


def tokenize_pair(pair: Pair, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Token ids of a pair; messages go through the tokenizer's chat template, text gets an end-of-sequence token."""
    completions = {"chosen": pair.chosen, **({} if pair.rejected is None else {"rejected": pair.rejected})}
    prompts, ids = [], {}
    for name, completion in completions.items():
        prompt_ids, whole = _encode(pair.prompt, completion, tokenizer)
        # A token that spans the border between prompt and completion belongs to the completion.
        prompt_ids = prompt_ids[: _common(prompt_ids, whole)]
        prompts.append(prompt_ids)
        ids[name] = whole[len(prompt_ids) :]
        if not ids[name]:
            raise BadRowError(f"{name!r} must not be empty, got {_shown(completion)}")
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        shared = _common(*prompts)
        for name, own in zip(ids, prompts, strict=True):
            ids[name] = own[shared:] + ids[name]
        prompts[0] = prompts[0][:shared]
    prompt = prompts[0]
    if not prompt:
        raise BadRowError(f"'prompt' must not be empty, got {_shown(pair.prompt)}")
    if max_length is None:
        return {"prompt_ids": prompt, **{f"{name}_ids": completion for name, completion in ids.items()}}
    room = max(max_length - max(map(len, ids.values())), max_length // 2, 1)
    prompt = prompt[-room:]
    tokens = {f"{name}_ids": completion[: max_length - len(prompt)] for name, completion in ids.items()}
    return {"prompt_ids": prompt, **tokens}


def _encode(prompt: Text, completion: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt alone, and of prompt and completion together."""
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRowError("a completion must not be empty, got ''")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have an eos_token, which ends a completion, got None")
        prompt_ids = tokenizer(prompt)["input_ids"]
        # A tokenizer that appends its end-of-sequence token must not end the prompt with it.
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        whole = tokenizer(prompt + completion)["input_ids"]
        return prompt_ids, whole if whole[-1:] == [tokenizer.eos_token_id] else [*whole, tokenizer.eos_token_id]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRowError("prompt and completions must all be text or all be messages")
    if any(not turn["content"] for turn in completion):
        raise BadRowError("a completion must not be empty, got a message without content")
    if completion[0]["role"] != "assistant":
        raise BadRowError(f"a completion must start with the assistant's message, got {_shown(completion[0])}")
    if prompt[-1]["role"] == "assistant":
        raise BadRowError("the last message of the prompt must not be the assistant's")
    template = {"tokenize": True, "return_dict": False}
    try:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **template)
        return prompt_ids, tokenizer.apply_chat_template([*prompt, *completion], **template)
    except Exception as error:  # templates raise what they like, to say what they cannot render
        raise BadRowError(f"the chat template cannot render it: {error}") from error


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
