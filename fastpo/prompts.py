"""Prompts alone: of datasets in any form, as text and as the token ids that a model goes on from."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from fastpo.data import FORMS, BadRowError, Text, find_form, read_text
from fastpo.tokenization import encode_prompt, report_bad_rows


def find_prompt(columns: list[str], source: str) -> Callable[[Mapping[str, Any]], Text]:
    """What reads the prompt of a row, of a dataset with these columns: a form of `fastpo.data`, or a prompt alone.

    Raises:
        ValueError: the columns fit none.
    """
    if any(set(needed) <= set(columns) for needed in FORMS):
        form = find_form(columns, "sft", source)
        return lambda row: form(row).prompt
    if "prompt" in columns:
        return lambda row: read_text(row, "prompt")
    raise ValueError(f"{source} must have a column prompt, or those of a form of pairs; got {', '.join(columns)}")


def tokenize_prompts(
    dataset: Dataset, tokenizer: Any, *, max_length: int | None, source: str = "dataset", skip_bad_rows: bool = False
) -> Dataset:
    """The dataset with prompt (text or messages), prompt_ids, which keep a prompt's last tokens, and index.

    Other columns stay as they are, but for those of completions.

    Args:
        dataset: rows in any form of `fastpo.data`, or with a column prompt.
        tokenizer: with a chat template where prompts are messages.
        max_length: of a prompt, in tokens; None: no limit.
        source: what errors call the dataset.
        skip_bad_rows: leave rows that cannot be used out, with a warning.

    Raises:
        ValueError: the columns fit no form, or rows cannot be used (named by `source` and index) and `skip_bad_rows` is
            off, or no row is left.
    """
    if len(dataset) == 0:
        raise ValueError(f"{source} must have at least one row, got none")
    read = find_prompt(dataset.column_names, source)
    rows, problems = [], []
    for position, row in enumerate(dataset):
        index = row["index"] if type(row.get("index")) is int else position
        kept = {name: value for name, value in row.items() if name not in _COMPLETIONS}
        try:
            prompt = read(row)
            rows.append(kept | {"prompt": prompt, "prompt_ids": encode_prompt(prompt, tokenizer)[-(max_length or 0) :]})
            rows[-1]["index"] = index
        except BadRowError as error:
            problems.append((index, str(error)))
    report_bad_rows(problems, len(dataset), source, skip_bad_rows)
    if not rows:
        raise ValueError(f"{source} must have at least one usable row, got none")
    return Dataset.from_list(rows)


_COMPLETIONS = ("chosen", "rejected", "completion", "conversations")
