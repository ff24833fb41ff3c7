"""Forms of rows that `fastpo score` knows: where their completions are, and where the rewards go."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from fastpo.data import BadRowError, Text, find_form, read_text, shown
from fastpo.tokenization import report_bad_rows

SIDES = ("chosen", "rejected")


class Said(NamedTuple):
    """The prompt of a row and its completions, all text or all messages."""

    prompt: Text
    completions: list[Text]


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        read: row -> prompt and completions; raises `BadRowError`.
        write: rewards of a row's completions and, of Gaussian ones, deviations -> columns.
        rewards: row with those columns -> its rewards.
        columns: names of those columns; what a row has of them is of an earlier scoring.
    """

    read: Callable[[Mapping[str, Any]], Said]
    write: Callable[[list[float], list[float] | None], dict[str, Any]]
    rewards: Callable[[Mapping[str, Any]], list[float]]
    columns: tuple[str, ...]


def find_score_form(columns: Sequence[str], source: str) -> Form:
    """The form of rows with these columns: prompt and responses, a preference pair, or one response or completion.

    Raises:
        ValueError: they fit none.
    """
    if {"prompt", "responses"} <= set(columns):
        return Form(_read_responses, _write_lists, lambda row: row["rewards"], ("rewards", "sigmas"))
    if set(SIDES) <= set(columns):
        pair = find_form(columns, "dpo", source)
        return Form(
            lambda row: _read_pair(pair(row)),
            _write_sides,
            lambda row: [row[f"score_{side}"] for side in SIDES],
            tuple(f"{name}_{side}" for name in ("score", "sigma") for side in SIDES),
        )
    for name in ("response", "completion"):
        if {"prompt", name} <= set(columns):
            return Form(
                lambda row, name=name: _said(read_text(row, "prompt"), [read_text(row, name)]),  # type: ignore[misc]
                _write_numbers,
                lambda row: [row["reward"]],
                ("reward", "sigma"),
            )
    raise ValueError(
        f"{source} must have prompt and responses, response or completion, or be preference pairs; got "
        f"{', '.join(columns)}"
    )


def usable_rows(rows: Dataset, form: Form, source: str, skip_bad_rows: bool) -> Dataset:
    """The rows that can be used, with their numbers in the file as index where they have none.

    Raises:
        ValueError: there are others and `skip_bad_rows` is off, or there are none.
    """
    usable, index, problems = [], [], []
    for position, row in enumerate(rows):
        number = row["index"] if type(row.get("index")) is int else position
        try:
            form.read(row)
        except BadRowError as error:
            problems.append((number, str(error)))
        else:
            usable.append(position)
            index.append(number)
    report_bad_rows(problems, len(rows), source, skip_bad_rows)
    if not usable:
        raise ValueError(f"{source} must have at least one usable row, got none")
    rows = rows.select(usable)
    return (rows.remove_columns("index") if "index" in rows.column_names else rows).add_column("index", index)


def _read_responses(row: Mapping[str, Any]) -> Said:
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise BadRowError(f"'responses' must be a list of at least one response, got {shown(responses)}")
    return _said(read_text(row, "prompt"), [read_text({"responses": said}, "responses") for said in responses])


def _read_pair(pair: Sequence[Any]) -> Said:
    prompt, *completions = pair
    return _said(prompt, completions)


def _said(prompt: Text, completions: list[Text]) -> Said:
    if any(isinstance(completion, str) != isinstance(prompt, str) for completion in completions):
        raise BadRowError("prompt and completions must all be text or all be messages")
    return Said(prompt, completions)


def _write_lists(rewards: list[float], sigmas: list[float] | None) -> dict[str, Any]:
    return {"rewards": rewards} | ({} if sigmas is None else {"sigmas": sigmas})


def _write_sides(rewards: list[float], sigmas: list[float] | None) -> dict[str, Any]:
    found = {"score": rewards} | ({} if sigmas is None else {"sigma": sigmas})
    return {f"{name}_{side}": x for name, values in found.items() for side, x in zip(SIDES, values, strict=True)}


def _write_numbers(rewards: list[float], sigmas: list[float] | None) -> dict[str, Any]:
    return {"reward": rewards[0]} | ({} if sigmas is None else {"sigma": sigmas[0]})
