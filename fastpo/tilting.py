"""What the commands that tilt pi_ref by exp(r / beta) share: arguments, the beta of each prompt, how they write."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastpo.config import option
from fastpo.data import BadRowError
from fastpo.file_commands import check_fields, provenance
from fastpo.prompt_beta import PromptScaler
from fastpo.rejection_sampling import check_beta
from fastpo.resumable import ResumableJsonl, check_one_process, check_output_file
from fastpo.scored import Scored, origin, read_scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TiltArguments:
    """A scored file, and the beta of its prompts.

    Raises:
        ValueError: a field is missing or out of its range.
    """

    dataset: str = option("", "The JSONL file of responses and rewards that fastpo score wrote.")
    output_file: str = option("", "The JSONL file to write.")
    beta: float = option(0.5, "Of pi_ref exp(reward / beta), in units of reward; a row's own beta wins.")
    beta_head: str | None = option(None, "A folder with a saved Beta head: beta is times its s(x).")
    ref_model_name_or_path: str | None = option(None, "The reference whose features of the prompt the Beta head reads.")
    max_length: int | None = option(1024, "Of a prompt that the Beta head reads, in tokens; it keeps its last ones.")
    batch_size: int = option(16, "Prompts that the reference reads at once.")
    seed: int = option(0, "Of what is drawn; each prompt's draws depend on it and on the prompt's index alone.")

    def __post_init__(self) -> None:
        check_fields(self, given=("dataset", "output_file"), least={"max_length": 1, "batch_size": 1}, known={})
        check_beta(self.beta)
        if (self.beta_head is None) != (self.ref_model_name_or_path is None):
            given = "beta_head" if self.beta_head is not None else "ref_model_name_or_path"
            raise ValueError(f"beta_head and ref_model_name_or_path must be given together, got {given} alone")


def begin(command: str, arguments: TiltArguments) -> ResumableJsonl:
    """The output file, before anything is written, with what it depends on as its provenance.

    Raises:
        ValueError: a row of the dataset cannot be used; the file is there, or was begun with other settings, or cannot
            be written; several processes were launched.
    """
    check_one_process(command)
    check_output_file(arguments.output_file)
    own = [row.beta is not None for row in read_scored(arguments.dataset)]
    if any(own):
        logger.warning("%d of %d prompts have a beta of their own, which wins", sum(own), len(own))
    packages = ("fastpo", "torch") if arguments.beta_head else ("fastpo",)
    made = provenance(command, arguments, packages, source=origin(arguments.dataset))
    return ResumableJsonl(arguments.output_file, made)


def append_missing(file: ResumableJsonl, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows, but for the first ones that a killed run has written: to make those again costs next to nothing."""
    for row in itertools.islice(rows, file.done, None):
        file.append([row])


def rows_with_beta(arguments: TiltArguments) -> Iterator[tuple[Scored, float]]:
    """Rows of the dataset and the beta_eff(x) of each: its column beta, or `beta` times s(x), or `beta`.

    Raises:
        ValueError: at once, what PromptScaler.load does; as it goes, a prompt that cannot be tokenised.
    """
    scaler = None
    if arguments.beta_head is not None and arguments.ref_model_name_or_path is not None:
        scaler = PromptScaler.load(
            arguments.beta_head, arguments.ref_model_name_or_path,
            max_length=arguments.max_length, batch_size=arguments.batch_size,
        )  # fmt: skip
    return _with_beta(arguments, scaler)


def _with_beta(arguments: TiltArguments, scaler: PromptScaler | None) -> Iterator[tuple[Scored, float]]:
    rows = read_scored(arguments.dataset)
    while part := list(itertools.islice(rows, arguments.batch_size)):
        unknown = [row for row in part if row.beta is None]
        scales = iter(_scales(scaler, unknown, arguments.dataset))
        for row in part:
            yield row, arguments.beta * next(scales) if row.beta is None else row.beta


def _scales(scaler: PromptScaler | None, rows: list[Scored], source: str) -> list[float]:
    if scaler is None:
        return [1.0] * len(rows)
    ids = []
    for row in rows:
        try:
            ids.append(scaler.encode(row.prompt))
        except BadRowError as error:
            raise ValueError(f"{source} row {row.index}: {error}") from None
    return scaler(ids)
