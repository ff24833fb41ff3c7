"""`fastpo score`: rewards of responses, of single completions, or of both sides of preference pairs."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from fastpo.config import option
from fastpo.data import Text, read_dataset
from fastpo.file_commands import DTYPES, check_fields, provenance, write_batches
from fastpo.fingerprint import model_fingerprint, rows_fingerprint
from fastpo.resumable import check_one_process, check_output_file
from fastpo.reward_functions import function_rewards, load_reward_function
from fastpo.score_forms import Form, Said, find_score_form, usable_rows
from fastpo.scoring import RewardModel

# What of a row a reward function does not get as a further column.
OF_COMPLETIONS = ("prompt", "responses", "response", "completion", "chosen", "rejected", "conversations", "finished")


@dataclass(frozen=True)
class Arguments:
    """What `fastpo score` is told.

    Raises:
        ValueError: a field is missing or out of its range.
    """

    reward_model: str | None = option(None, "The reward model: folder or hub name.")
    reward_funcs: str | None = option(
        None, "A Python function instead, with the signature of TRL's: package.module:function or file.py:function."
    )
    dataset: str = option("", "Responses of fastpo sample, rows with one response or completion, or preference pairs.")
    dataset_split: str = option("train", "Split of a named dataset.")
    skip_bad_rows: bool = option(False, "Leave rows that cannot be used out, with a warning.")
    output_file: str = option("", "The JSONL file to write.")
    batch_size: int = option(16, "Completions that the reward model reads at once; rows that are written at once.")
    max_length: int | None = option(1024, "Of prompt and completion together, in tokens, for the reward model.")
    dtype: str = option("auto", "Of the reward model: float32, bfloat16, float16, or auto: as saved.")

    def __post_init__(self) -> None:
        if bool(self.reward_model) == bool(self.reward_funcs):
            got = "both" if self.reward_model else "neither"
            raise ValueError(f"either reward_model or reward_funcs must be given, got {got}")
        check_fields(
            self, given=("dataset", "output_file"), least={"batch_size": 1, "max_length": 2}, known={"dtype": DTYPES}
        )


class Scorer(NamedTuple):
    """What gives rewards.

    Attributes:
        score: N prompts, N completions, further columns by name, N dataset rows -> N rewards and, of Gaussian ones,
            N deviations, else None.
        depends_on: what the rewards depend on beside the arguments.
        check: prompt, completion -> nothing; raises `BadRowError` for what it cannot read.
    """

    score: Callable[..., tuple[list[float], list[float] | None]]
    depends_on: dict[str, Any]
    check: Callable[[Text, Text], Any]


def run(arguments: Arguments) -> str:
    """Write the rows with their rewards, and the provenance; returns what to print.

    Raises:
        ValueError, OSError: bad input, a reward that is not finite, a file that cannot be written; what was written
            before is kept.
    """
    check_one_process("fastpo score")
    check_output_file(arguments.output_file)
    rows = read_dataset(arguments.dataset, arguments.dataset_split)
    form = find_score_form(rows.column_names, arguments.dataset)
    rows = usable_rows(rows, form, arguments.dataset, arguments.skip_bad_rows)
    scorer = _of_function(arguments.reward_funcs) if arguments.reward_funcs else _of_model(arguments)
    rows = usable_rows(rows, _checked(form, scorer), arguments.dataset, arguments.skip_bad_rows)
    fingerprint = rows_fingerprint(rows)
    source = provenance(
        "fastpo score", arguments, ("fastpo", "torch", "transformers"),
        dataset_fingerprint=fingerprint, **scorer.depends_on,
    )  # fmt: skip
    summary = write_batches(
        arguments.output_file, source, rows, arguments.batch_size,
        lambda batch, _: _scored(batch, form, scorer), partial(_summarize, form),
    )  # fmt: skip
    return (
        f"{summary['completions']} completions of {summary['rows']} rows: mean reward {summary['mean']:.4g}, standard "
        f"deviation {summary['deviation']:.4g}\nscored: {arguments.output_file}"
    )


def _of_function(name: str) -> Scorer:
    function = load_reward_function(name)
    return Scorer(lambda *said: (function_rewards(function, *said), None), {}, lambda *_: None)


def _of_model(arguments: Arguments) -> Scorer:
    assert arguments.reward_model is not None
    model = RewardModel(
        arguments.reward_model, batch_size=arguments.batch_size, max_length=arguments.max_length, dtype=arguments.dtype
    )
    depends_on = {"model_fingerprint": model_fingerprint(model.model), "device": str(model.model.device)}
    return Scorer(partial(_model_rewards, model), depends_on, model.encode)


def _model_rewards(
    model: RewardModel, prompts: list[Text], completions: list[Text], columns: Mapping[str, Any], index: list[int]
) -> tuple[list[float], list[float] | None]:
    mean, variance = model.score(prompts, completions)
    rewards, variances = mean.tolist(), None if variance is None else variance.tolist()
    for row, *values in zip(index, rewards, variances or rewards, strict=True):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"reward_model must give finite rewards, got {values[0]} for dataset row {row}")
    return rewards, None if variances is None else list(map(math.sqrt, variances))


def _checked(form: Form, scorer: Scorer) -> Form:
    """The form, of rows that the scorer can read."""

    def read(row: Mapping[str, Any]) -> Said:
        said = form.read(row)
        for completion in said.completions:
            scorer.check(said.prompt, completion)
        return said

    return form._replace(read=read)


def _scored(batch: Sequence[Mapping[str, Any]], form: Form, scorer: Scorer) -> list[dict[str, Any]]:
    said = [form.read(row) for row in batch]
    each = [(row, prompt, one) for row, (prompt, completions) in zip(batch, said, strict=True) for one in completions]
    columns = {name: [row[name] for row, _, _ in each] for name in batch[0] if name not in OF_COMPLETIONS}
    rewards, sigmas = scorer.score(
        [prompt for _, prompt, _ in each], [one for _, _, one in each], columns, [row["index"] for row, _, _ in each]
    )
    scored, first = [], 0
    for row, (_, completions) in zip(batch, said, strict=True):
        part = slice(first, first + len(completions))
        others = {name: value for name, value in row.items() if name not in form.columns}
        scored.append({**others, **form.write(rewards[part], None if sigmas is None else sigmas[part])})
        first = part.stop
    return scored


def _summarize(form: Form, rows: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    rewards = [form.rewards(row) for row in rows]
    flat = [reward for row in rewards for reward in row]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    return {"rows": len(rewards), "completions": len(flat), "mean": mean, "deviation": deviation}
