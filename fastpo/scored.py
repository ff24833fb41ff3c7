"""Files of responses with their rewards, as `fastpo score` writes them."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.data import REFERENCE_COLUMNS, BadRowError, Text, read_text, shown
from fastpo.rejection_sampling import is_beta
from fastpo.resumable import read_jsonl


@dataclass(frozen=True)
class Scored:
    """Of one prompt, N responses.

    Attributes:
        index: its number.
        prompt: text or messages.
        responses: N, in the prompt's form.
        rewards: N; of Gaussian rewards their means.
        sigmas: N deviations of Gaussian rewards, or None.
        finished: N, whether a response came to its end-of-sequence token; taken for granted where the file does not
            say.
        beta: the row's own, or None.
        others: further columns, but for those of completions that the prompt came with.
    """

    index: int
    prompt: Text
    responses: list[Text]
    rewards: list[float]
    sigmas: list[float] | None
    finished: list[bool]
    beta: float | None
    others: dict[str, Any]


OWN = ("index", "prompt", "responses", "rewards", "sigmas", "finished", "beta")
OF_OTHER_COMPLETIONS = (
    "chosen", "rejected", "completion", "response", "conversations", "score_chosen", "score_rejected", "sigma_chosen",
    "sigma_rejected", "reward", "sigma", "margin", "pair_weight", *REFERENCE_COLUMNS,
)  # fmt: skip


def read_scored(path: str | Path) -> Iterator[Scored]:
    """Rows of a scored file, one prompt each.

    Raises:
        ValueError: no such file; no rows; a row that cannot be used (named by its index).
    """
    row: dict[str, Any] | None = None
    for position, row in enumerate(read_jsonl(path)):
        index = row["index"] if type(row.get("index")) is int else position
        try:
            yield _scored(index, row)
        except BadRowError as error:
            raise ValueError(f"{path} row {index}: {error}") from None
    if row is None:
        raise ValueError(f"{path} must have at least one row, got none")


def _scored(index: int, row: dict[str, Any]) -> Scored:
    prompt = read_text(row, "prompt")
    responses = _column(row, "responses", None)
    if not responses:
        raise BadRowError("'responses' must have at least one response, got none")
    texts = [read_text({"responses": response}, "responses") for response in responses]
    if any(isinstance(text, str) != isinstance(prompt, str) for text in texts):
        raise BadRowError("'prompt' and 'responses' must all be text or all be messages")
    rewards = _numbers(row, "rewards", len(texts))
    sigmas = _numbers(row, "sigmas", len(texts)) if row.get("sigmas") is not None else None
    if sigmas is not None and min(sigmas) < 0:
        raise BadRowError(f"'sigmas' must be >= 0, got {shown(min(sigmas))}")
    finished = _column(row, "finished", len(texts)) if row.get("finished") is not None else [True] * len(texts)
    if not all(isinstance(value, bool) for value in finished):
        raise BadRowError(f"'finished' must hold true and false, got {shown(finished)}")
    beta = row.get("beta")
    if beta is not None and not is_beta(beta):
        raise BadRowError(f"'beta' must be a finite number > 0, got {shown(beta)}")
    others = {name: value for name, value in row.items() if name not in (*OWN, *OF_OTHER_COMPLETIONS)}
    return Scored(index, prompt, texts, rewards, sigmas, finished, beta, others)


def _column(row: dict[str, Any], name: str, count: int | None) -> list[Any]:
    if name not in row:
        hint = " (`fastpo score` writes it)" if name == "rewards" else ""
        raise BadRowError(f"there must be a column {name!r}{hint}, got {', '.join(row)}")
    value = row[name]
    if not isinstance(value, list) or (count is not None and len(value) != count):
        number = "" if count is None else f" of {count}, one a response"
        raise BadRowError(f"{name!r} must be a list{number}, got {shown(value)}")
    return value


def _numbers(row: dict[str, Any], name: str, count: int) -> list[float]:
    values = _column(row, name, count)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRowError(f"{name!r} must be finite numbers, got {shown(value)}")
    return values


def is_empty(response: Text) -> bool:
    """Whether nothing was said, or nothing in one of its messages: such a completion cannot be trained on."""
    return not response if isinstance(response, str) else any(not turn["content"] for turn in response)


def origin(path: str | Path) -> dict[str, Any]:
    """What a file is and how it came to be, for the provenance of what is made of it: path, sha256, its provenance.

    Raises:
        ValueError: the provenance beside it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        found: dict[str, Any] = {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    beside = path.with_name(f"{path.name}.provenance.json")
    if beside.is_file():
        try:
            found["provenance"] = json.loads(beside.read_text())
        except ValueError as error:
            raise ValueError(f"{beside} must be JSON, got what cannot be read: {error}") from None
    return found
