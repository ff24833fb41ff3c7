"""Datasets named in a `dataset_info.json`, LLaMA-Factory's list of what a folder holds and how to read it.

An entry says where the rows are (a file, a folder of files, or a dataset of the Hugging Face hub), which of two forms
they have (`alpaca`: columns of text; `sharegpt`: lists of messages), whether they are preferences (`ranking`), and what
their columns and roles are called. Every form becomes messages in the columns of `fastpo.data`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from fastpo.data import FILE_LOADERS, PROBLEM, BadRowError, Messages, read_dataset

INFO = "dataset_info.json"
CONVERSATION = "fastpo_conversation"  # column: the rows of one conversation have the same number
ONLINE = "ONLINE"  # in place of a folder: names are datasets of the hub, in alpaca's form
SOURCES = ("file_name", "hf_hub_url")
OPTIONS = ("formatting", "ranking", "split", "subset", "folder", "num_samples", "columns", "tags")
# What a column or a role is called where the entry has no `columns` or no `tags`.
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
NO_COLUMNS = ("system", "history", "chosen", "rejected", "tools")
NOT_TEXT = ("images", "videos", "audios", "kto_tag")
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A dataset as its entry describes it; a column that is None is not there."""

    name: str
    file_name: str | None = None
    hf_hub_url: str | None = None
    formatting: str = "alpaca"
    ranking: bool = False
    split: str = "train"
    subset: str | None = None
    folder: str | None = None
    num_samples: int | None = None
    columns: Mapping[str, str | None] = field(default_factory=lambda: {**dict.fromkeys(NO_COLUMNS), **COLUMNS})
    tags: Mapping[str, str] = field(default_factory=lambda: TAGS)


def read_entries(dataset_info: str, names: list[str]) -> list[Entry]:
    """The entries of these names.

    Args:
        dataset_info: the folder of a dataset_info.json, or ``ONLINE``.
        names: keys of that file.

    Raises:
        ValueError: there is no such file or name, or an entry has what cannot be read here.
    """
    if dataset_info == ONLINE:
        return [Entry(name, hf_hub_url=name) for name in names]
    path = Path(dataset_info, INFO)
    try:
        known = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"dataset_info must be a folder with a readable {INFO}, got {dataset_info!r}: {error}"
        ) from None
    for name in names:
        if name not in known:
            raise ValueError(f"dataset must name entries of {path} ({', '.join(known)}), got {name!r}")
    return [_entry(name, known[name], path) for name in names]


def _entry(name: str, said: Mapping[str, Any], path: Path) -> Entry:
    def refuse(what: str) -> ValueError:
        return ValueError(f"{name!r} in {path} {what}")

    sources = {key: said[key] for key in SOURCES if key in said}
    if not sources:
        raise refuse(f"must say {' or '.join(SOURCES)}, got {', '.join(said)}")
    options = {key: said[key] for key in OPTIONS if said.get(key) is not None}
    if options.get("formatting", "alpaca") not in FORMS:
        raise refuse(f"must have formatting {' or '.join(FORMS)}, got {said['formatting']!r}")
    columns = options.pop("columns", None)
    if columns is not None:
        for key in NOT_TEXT:
            if columns.get(key) is not None:
                raise refuse(f"has {key}, which fastpo does not train on: only text")
        # An entry that lists its columns has these and no others.
        options["columns"] = {key: columns.get(key) for key in (*COLUMNS, *NO_COLUMNS)}
        if said.get("ranking") and not (columns.get("chosen") and columns.get("rejected")):
            raise refuse("has ranking: true, and columns without chosen and rejected")
    if "tags" in options:
        options["tags"] = {key: said["tags"].get(key) for key in TAGS}
    # The hub wins where an entry has both.
    source = {"hf_hub_url": sources["hf_hub_url"]} if "hf_hub_url" in sources else sources
    return Entry(name, **source, **options)


def read_named_datasets(
    names: str, dataset_info: str, stage: str, seed: int, max_samples: int | None, last_answer_only: bool
) -> Dataset:
    """Rows of the datasets, one after the other: columns prompt, chosen, rejected, or prompt, completion for sft.

    In stage sft `CONVERSATION` numbers the conversations.

    Args:
        names: separated by commas.
        dataset_info: as in `read_entries`.
        stage: sft reads conversations, dpo preferences.
        seed: of `num_samples`' choice.
        max_samples: at most so many rows of each.
        last_answer_only: of a conversation in stage sft, or else a row for each of its answers.

    Raises:
        ValueError: as `read_entries`; a dataset cannot be read, or is none for this stage.
    """
    parts, random, first = [], np.random.RandomState(seed), 0
    for entry in read_entries(dataset_info, [name.strip() for name in names.split(",")]):
        if entry.ranking != (stage != "sft"):
            wanted = "conversations (no ranking)" if stage == "sft" else "preferences (ranking: true)"
            raise ValueError(f"stage {stage} needs {wanted}, got dataset {entry.name!r} with ranking={entry.ranking}")
        rows = _read(entry, dataset_info)
        numbers = np.arange(len(rows))
        if entry.num_samples is not None:
            numbers = _sample(len(rows), entry.num_samples, random)
        numbers = numbers[:max_samples]
        missing = [name for name in _needed(entry) if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"dataset {entry.name!r} must have the columns {', '.join(_needed(entry))}, "
                f"got {', '.join(rows.column_names)}"
            )
        parts.append(_as_messages(rows.select(numbers), numbers, entry, last_answer_only, first))
        first += len(numbers)
    return concatenate_datasets(parts)


def _read(entry: Entry, dataset_info: str) -> Dataset:
    if entry.hf_hub_url is not None:
        try:
            return load_dataset(entry.hf_hub_url, name=entry.subset, data_dir=entry.folder, split=entry.split)
        except Exception as error:  # whatever the hub, the network or a file in it says
            raise ValueError(f"dataset {entry.name!r} cannot be read from {entry.hf_hub_url!r}: {error}") from error
    if entry.split != "train":
        raise ValueError(f"dataset {entry.name!r} is a file, which has no split but train, got {entry.split!r}")
    path = Path(dataset_info, str(entry.file_name))
    files = sorted(file for file in path.iterdir() if file.suffix in FILE_LOADERS) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"dataset {entry.name!r} must have files that end in {', '.join(FILE_LOADERS)} in {path}")
    return concatenate_datasets([read_dataset(str(file)) for file in files])


def _sample(rows: int, wanted: int, random: np.random.RandomState) -> np.ndarray:
    """So many rows by chance: all different as far as there are so many, all of them and further ones beyond."""
    chosen = random.permutation(rows)[:wanted]
    return np.concatenate((chosen, random.choice(rows, wanted - len(chosen)))) if wanted > len(chosen) else chosen


def _needed(entry: Entry) -> list[str]:
    read = ["messages"] if entry.formatting == "sharegpt" else ["prompt", "query", "history"]
    read += ["chosen", "rejected"] if entry.ranking else ["response"] * (entry.formatting == "alpaca")
    named = {key: entry.columns[key] for key in [*read, "system"]}
    # The default entry names columns that a dataset may leave out.
    optional = ("query",) if entry.columns["query"] == COLUMNS["query"] else ()
    return [column for key, column in named.items() if column is not None and key not in optional]


def _as_messages(rows: Dataset, numbers: np.ndarray, entry: Entry, last_answer_only: bool, first: int) -> Dataset:
    """Rows in messages; `numbers` are theirs in the dataset, by which one that cannot be used is named.

    `first` is the number of the first conversation.
    """
    message = [{"role": Value("string"), "content": Value("string")}]
    sides = ("chosen", "rejected") if entry.ranking else ("completion",)
    features = Features({"prompt": message, **dict.fromkeys(sides, message), PROBLEM: Value("string")})
    if not entry.ranking:
        features[CONVERSATION] = Value("int64")

    def convert(batch: dict[str, list[Any]], positions: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in features}
        for position, values in zip(positions, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                found = _conversations(row, entry, last_answer_only)
            except BadRowError as error:
                found = [{PROBLEM: f"{entry.name} row {numbers[position]}: {error}"}]
            for one in found:
                plain = {CONVERSATION: first + position, PROBLEM: ""}
                for name, column in made.items():
                    column.append(one.get(name, plain.get(name, [])))
        return made

    return rows.map(
        convert, batched=True, with_indices=True, remove_columns=rows.column_names, features=features,
        load_from_cache_file=False, desc=f"Reading {entry.name}",
    )  # fmt: skip


def _conversations(row: Mapping[str, Any], entry: Entry, last_answer_only: bool) -> list[dict[str, Any]]:
    """One preference, or a prompt and completion for each answer that is trained on."""
    if (tools := _column(row, entry, "tools")) and tools != "[]":
        raise BadRowError(f"tools must be empty, got {str(tools)[:60]!r}")
    system, turns, answers = FORMS[entry.formatting](row, entry)
    if system is not None and not isinstance(system, str):
        raise BadRowError(f"the system message must be text, got {system!r}")
    for turn in [*turns, *answers]:
        if not isinstance(turn["content"], str):
            raise BadRowError(f"a message must be text, got {turn['content']!r}")
    roles = [turn["role"] for turn in turns]
    last = "user" if entry.ranking else "assistant"
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or roles[-1:] != [last]:
        raise BadRowError(
            f"user and assistant must take turns, from the user to the {last}, got {', '.join(roles)[:60]}"
        )
    start = [{"role": "system", "content": system}] if system else []
    if entry.ranking:
        return [{"prompt": start + turns, "chosen": answers[:1], "rejected": answers[1:]}]
    ends = [len(turns)] if last_answer_only else range(2, len(turns) + 1, 2)
    return [{"prompt": start + turns[: end - 1], "completion": turns[end - 1 : end]} for end in ends]


Conversation = tuple[str | None, Messages, Messages]


def _alpaca(row: Mapping[str, Any], entry: Entry) -> Conversation:
    """Texts: what was said before in `history`, instruction and input, which make one message, and the answers."""
    turns = []
    for pair in _column(row, entry, "history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError(f"history must hold pairs of question and answer, got {pair!r}")
        turns += [_user(pair[0]), _assistant(pair[1])]
    parts = [part for key in ("prompt", "query") if (part := _column(row, entry, key))]
    if not all(isinstance(part, str) for part in parts):
        raise BadRowError(f"a prompt must be text, got {parts!r}")
    turns.append(_user("\n".join(parts)))
    system = _column(row, entry, "system")
    if entry.ranking:
        return system, turns, [_assistant(_column(row, entry, side)) for side in ("chosen", "rejected")]
    return system, [*turns, _assistant(_column(row, entry, "response"))], []


def _sharegpt(row: Mapping[str, Any], entry: Entry) -> Conversation:
    """Messages, of which the first may be the system's; of a preference one more for each side."""
    messages, system = _column(row, entry, "messages"), _column(row, entry, "system")
    if not isinstance(messages, list) or not messages:
        raise BadRowError(f"{entry.columns['messages']!r} must be a list of messages, got {messages!r}")
    turns = [_message(message, entry) for message in messages]
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if not entry.ranking:
        return system, turns, []
    answers = [_message(_column(row, entry, side), entry) for side in ("chosen", "rejected")]
    for answer in answers:
        if answer["role"] != "assistant":
            raise BadRowError(f"chosen and rejected must be the assistant's, got the {answer['role']}'s")
    return system, turns, answers


FORMS: dict[str, Callable[[Mapping[str, Any], Entry], Conversation]] = {"alpaca": _alpaca, "sharegpt": _sharegpt}


def _message(message: Any, entry: Entry) -> dict[str, str]:
    tags = entry.tags
    if not isinstance(message, Mapping) or not {tags["role_tag"], tags["content_tag"]} <= set(message):
        wanted = f"{tags['role_tag']!r} and {tags['content_tag']!r}"
        raise BadRowError(f"a message must have {wanted}, got {str(message)[:60]!r}")
    role = message[tags["role_tag"]]
    roles = {tags[f"{name}_tag"]: name for name in ("system", "user", "assistant")}
    if role is not None and role in (tags["observation_tag"], tags["function_tag"]):
        raise BadRowError(f"{role!r} is a tool's message, which is not trained on here")
    if not isinstance(role, str) or role not in roles:
        raise BadRowError(f"{tags['role_tag']!r} must be one of {', '.join(map(str, roles))}, got {role!r}")
    return {"role": roles[role], "content": message[tags["content_tag"]]}


def _column(row: Mapping[str, Any], entry: Entry, key: str) -> Any:
    column = entry.columns[key]
    return None if column is None else row.get(column)


def _user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
