"""Preference data: read files, bring every known form to one.

The one form is a `Pair`: a prompt and its completions, as text or as chat messages. To add a dataset form, write a
function from row to `Pair` and add its line to `FORMS`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

Messages = list[dict[str, str]]
Text = str | Messages
# The reference's statistics, computed beforehand; lengths follow from the tokens.
REFERENCE_COLUMNS = tuple(
    f"ref_{side}_{name}" for side in ("chosen", "rejected") for name in ("logps", "entropy", "shared_logps")
)
# Columns that travel to the loss, of numbers and of vectors; see `PreferenceBatch`.
NUMBER_COLUMNS = (
    "context_scale", "pair_weight", "margin", "score_chosen", "score_rejected", "prompt_perplexity", "prompt_entropy",
    *REFERENCE_COLUMNS,
)  # fmt: skip
VECTOR_COLUMNS = ("prompt_hidden",)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
HH_ASSISTANT = "\n\nAssistant:"
FILE_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Column of what is wrong with a row, where reading it has found that out; empty where nothing is.
PROBLEM = "fastpo_problem"
# Column of a number that rows of one prompt share: they are held out together.
PROMPT_NUMBER = "fastpo_prompt"


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
    return Pair(*(read_text(row, name) for name in ("prompt", "chosen", "rejected")))


def from_prompt_completion(row: Mapping[str, Any]) -> Pair:
    """TRL's form for stage sft: prompt, completion."""
    return Pair(read_text(row, "prompt"), read_text(row, "completion"), None)


def from_sharegpt(row: Mapping[str, Any]) -> Pair:
    """LLaMA-Factory's ranking form: conversations [{from, value}], chosen and rejected one {from, value} each.

    A `system` column holds the system message.
    """
    if row.get("tools"):
        raise BadRowError(f"'tools' must be empty, got {shown(row['tools'])}")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return Pair(
        system + _sharegpt_messages(row, "conversations"),
        _sharegpt_messages(row, "chosen"),
        _sharegpt_messages(row, "rejected"),
    )


def from_transcripts(row: Mapping[str, Any]) -> Pair:
    """The HH form: chosen and rejected are whole dialogues, text or messages, with a common beginning."""
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = common_beginning(chosen, rejected)
        # The last turn starts at the last marker that both have; without markers, at the last common space.
        marker = chosen.rfind(HH_ASSISTANT, 0, shared)
        split = marker + len(HH_ASSISTANT) if marker >= 0 else chosen.rfind(" ", 0, shared)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        split = common_beginning(chosen[:-1], rejected[:-1])
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


def read_text(row: Mapping[str, Any], name: str) -> Text:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value:
        return [_message(name, turn, "role", "content") for turn in value]
    raise BadRowError(f"{name!r} must be text or a list of messages, got {shown(value)}")


def _sharegpt_messages(row: Mapping[str, Any], name: str) -> Messages:
    value = row.get(name)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{name!r} must be a message or a list of messages, got {shown(value)}")
    keys = ("from", "value") if isinstance(turns[0], Mapping) and "from" in turns[0] else ("role", "content")
    return [_message(name, turn, *keys) for turn in turns]


def _message(name: str, turn: Any, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role_key), str):
        raise BadRowError(f"{name!r} must hold messages with {role_key!r} and {content_key!r}, got {shown(turn)}")
    if not isinstance(turn.get(content_key), str):
        raise BadRowError(f"{content_key!r} in {name!r} must be text, got {shown(turn.get(content_key))}")
    role = turn[role_key]
    if role_key == "from":
        if role not in SHAREGPT_ROLES:
            raise BadRowError(f"'from' in {name!r} must be one of {', '.join(SHAREGPT_ROLES)}, got {role!r}")
        role = SHAREGPT_ROLES[role]
    return {"role": role, "content": turn[content_key]}


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def common_beginning(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
            return f"row {index} must be an object, got {shown(row)}"
        for key, value in row.items():
            kind = "number" if isinstance(value, int | float) else type(value).__name__
            if value is not None and types.setdefault(key, kind) != kind:
                return f"row {index}: {key!r} is {kind} where earlier rows have {types[key]}"
    return None
