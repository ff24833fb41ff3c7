"""`fastpo rso`: scored responses to pairs, by statistical rejection sampling (arXiv:2309.06657)."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastpo.config import option
from fastpo.data import PROMPT_NUMBER
from fastpo.file_commands import check_fields
from fastpo.rejection_sampling import RANKINGS, RankedPair, accept, row_generator
from fastpo.scored import Scored, is_empty
from fastpo.tilting import TiltArguments, append_missing, begin, rows_with_beta

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments(TiltArguments):
    """What `fastpo rso` is told; beta, num_samples and ranking are by default those of arXiv:2309.06657.

    Raises:
        ValueError: a field is missing or out of its range.
    """

    num_samples: int = option(8, "How many responses of a prompt to accept.")
    ranking: str = option("first_round", "first_round: K/2 pairs of K accepted ones; tournament: K-1.")
    keep_unfinished: bool = option(False, "Take responses without an end-of-sequence token too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, given=(), least={"num_samples": 2}, known={"ranking": tuple(RANKINGS)})


@dataclass
class Counts:
    """Of prompts, their responses, and what became of them."""

    prompts: int = 0
    prompts_without_pair: int = 0
    responses: int = 0
    unfinished: int = 0
    empty: int = 0
    accepted: int = 0
    trials: int = 0
    pairs: int = 0

    @property
    def usable(self) -> int:
        return self.responses - self.unfinished - self.empty


def run(arguments: Arguments) -> str:
    """Write the pairs and their provenance; returns what to print.

    Raises:
        ValueError: the dataset has a row that cannot be used, or no pair comes of it; the output file is there, or was
            begun with other settings.
        SaveError: it cannot be written.
    """
    file = begin("fastpo rso", arguments)
    counts, betas = Counts(), list[float]()
    rows = _pair_rows(arguments, counts, betas)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{arguments.dataset} gives no pair: {_why(counts)}")
    with file:
        append_missing(file, itertools.chain([first], rows))
        rates = {"acceptance_rate": counts.accepted / counts.trials, "mean_beta": sum(betas) / len(betas)}
        file.finish({"counts": dataclasses.asdict(counts), **rates})
    if counts.empty:
        logger.warning("left out %d empty responses of %d", counts.empty, counts.responses)
    if counts.accepted == counts.usable:
        logger.warning(
            "all were accepted, whatever beta: no prompt has more than num_samples=%d", arguments.num_samples
        )
    return (
        f"{counts.pairs} pairs of {counts.prompts - counts.prompts_without_pair} prompts "
        f"({counts.prompts_without_pair} prompts without a pair): {arguments.output_file}\n"
        f"accepted {counts.accepted} of {counts.responses} responses in {counts.trials} trials "
        f"({rates['acceptance_rate']:.1%}) at a mean beta of {rates['mean_beta']:.4g}; "
        f"{counts.unfinished} were unfinished, {counts.empty} empty"
    )


def _pair_rows(arguments: Arguments, counts: Counts, betas: list[float]) -> Iterator[dict[str, Any]]:
    for row, beta in rows_with_beta(arguments):
        pairs = _choose(row, beta, arguments, counts)
        counts.prompts += 1
        counts.prompts_without_pair += not pairs
        counts.pairs += len(pairs)
        betas.append(beta)
        for pair in pairs:
            yield _pair_row(row, pair, beta)


def _choose(row: Scored, beta: float, arguments: Arguments, counts: Counts) -> list[RankedPair]:
    usable = []
    for position, response in enumerate(row.responses):
        empty = is_empty(response)
        unfinished = not empty and not row.finished[position] and not arguments.keep_unfinished
        counts.empty += empty
        counts.unfinished += unfinished
        if not empty and not unfinished:
            usable.append(position)
    generator = row_generator(arguments.seed, row.index)
    found = accept([row.rewards[position] for position in usable], beta, arguments.num_samples, generator)
    accepted = [usable[position] for position in found.positions]
    counts.responses += len(row.responses)
    counts.accepted += len(accepted)
    counts.trials += found.trials
    return RANKINGS[arguments.ranking](accepted, row.rewards, row.responses, generator)


def _pair_row(row: Scored, pair: RankedPair, beta: float) -> dict[str, Any]:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    columns: dict[str, Any] = {"prompt": row.prompt}
    columns |= {side: row.responses[position] for side, position in sides.items()}
    columns |= {f"score_{side}": row.rewards[position] for side, position in sides.items()}
    if row.sigmas is not None:
        columns |= {f"sigma_{side}": row.sigmas[position] for side, position in sides.items()}
    columns |= {"beta": beta, PROMPT_NUMBER: row.index}
    return columns | {name: value for name, value in row.others.items() if name not in columns}


def _why(counts: Counts) -> str:
    return (
        f"of {counts.responses} responses of {counts.prompts} prompts {counts.unfinished} are unfinished "
        f"(keep_unfinished takes them too), {counts.empty} are empty, and the other {counts.usable} "
        "are alone with their prompt, or alike in text or reward"
    )
