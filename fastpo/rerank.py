"""`fastpo rerank`: of each prompt's scored responses the best one, or one drawn from the closed form of pi*."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastpo.config import option
from fastpo.file_commands import check_fields
from fastpo.rejection_sampling import row_generator
from fastpo.reranking import divergence, draw, effective_sample_size, expected_reward, risk_adjusted, tilted_weights
from fastpo.scored import Scored, read_scored
from fastpo.tilting import TiltArguments, append_missing, begin, rows_with_beta


@dataclass(frozen=True)
class Arguments(TiltArguments):
    """What `fastpo rerank` is told.

    Raises:
        ValueError: a field is missing or out of its range.
    """

    select: str = option("best", "best: of the highest reward; sample: drawn from pi_ref exp(reward / beta).")
    risk_aversion: float = option(0.0, "How many deviations of a Gaussian reward to take off its mean.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, given=(), least={}, known={"select": ("best", "sample")})
        if not self.risk_aversion >= 0:
            raise ValueError(f"risk_aversion must be >= 0, got {self.risk_aversion!r}")


@dataclass
class Totals:
    """Sums over prompts."""

    prompts: int = 0
    candidates: float = 0.0
    tilted: float = 0.0
    best: float = 0.0
    divergence: float = 0.0
    effective: float = 0.0


def run(arguments: Arguments) -> str:
    """Write a completion of each prompt and the provenance; returns what to print.

    Raises:
        ValueError: the dataset has a row that cannot be used, or no sigmas that `risk_aversion` reads; the output file
            is there, or was begun with other settings.
        SaveError: it cannot be written.
    """
    if arguments.risk_aversion:
        _check_sigmas(arguments.dataset)
    file, totals = begin("fastpo rerank", arguments), Totals()
    rows = rows_with_beta(arguments)
    with file:
        append_missing(file, _completions(rows, arguments, totals))
        n = totals.prompts
        means = {
            "reward": totals.candidates / n,
            "reward_tilted": totals.tilted / n,
            "reward_best": totals.best / n,
            "kl": totals.divergence / n,
            "effective_sample_size": totals.effective / n,
        }
        file.finish({"prompts": n, **means})
    return (
        f"mean reward over {n} prompts: {means['reward']:.4f} of all responses, {means['reward_tilted']:.4f} under "
        f"pi_ref exp(reward / beta), {means['reward_best']:.4f} of the best ones\n"
        f"KL from pi_ref {means['kl']:.4f} nats, effective sample size {means['effective_sample_size']:.1f}; "
        f"written: {arguments.output_file}"
    )


def _completions(
    rows: Iterable[tuple[Scored, float]], arguments: Arguments, totals: Totals
) -> Iterator[dict[str, Any]]:
    for row, beta in rows:
        rewards = torch.tensor(row.rewards, dtype=torch.float64)
        judged = rewards
        if row.sigmas is not None:
            judged = risk_adjusted(rewards, torch.tensor(row.sigmas, dtype=torch.float64), arguments.risk_aversion)
        weights = tilted_weights(judged, beta)
        best = int(judged.argmax())
        totals.prompts += 1
        totals.candidates += float(rewards.mean())
        totals.tilted += expected_reward(rewards, weights)
        totals.best += row.rewards[best]
        totals.divergence += divergence(weights)
        totals.effective += effective_sample_size(weights)
        taken = best if arguments.select == "best" else draw(weights, row_generator(arguments.seed, row.index))
        yield _completion(row, taken, float(weights[taken]), beta)


def _completion(row: Scored, taken: int, weight: float, beta: float) -> dict[str, Any]:
    columns = {
        "index": row.index, "prompt": row.prompt, "completion": row.responses[taken], "reward": row.rewards[taken],
        "weight": weight, "beta": beta, "finished": row.finished[taken],
    }  # fmt: skip
    if row.sigmas is not None:
        columns["sigma"] = row.sigmas[taken]
    return columns | {name: value for name, value in row.others.items() if name not in columns}


def _check_sigmas(dataset: str) -> None:
    for row in read_scored(dataset):
        if row.sigmas is None:
            raise ValueError(f"risk_aversion must be 0 without sigmas, which {dataset} row {row.index} does not have")
