"""`fastpo compare`: run a study's plan, going on where it was stopped, and report."""

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastpo.files import replacing
from fastpo.from_recipe import check_output_dir
from fastpo.lab.folder import LOCK, STUDY, Run
from fastpo.lab.jobs import Job, Outcome, base_folder, do_all, is_done, locked
from fastpo.lab.language import check_recipe, is_ready
from fastpo.lab.plan_file import read_study
from fastpo.lab.report import headlines, make_report
from fastpo.lab.study import Study

logger = logging.getLogger(__name__)


class RunsFailedError(RuntimeError):
    """Some of a study's runs failed; the others are done and reported."""


def compare(plan: str, **overrides: Any) -> str:
    """Run what is left of a plan, and write its report; returns what to print.

    Args:
        overrides: as in `read_study`.

    Raises:
        ValueError, TypeError: the plan, or what its output_dir holds already, is not as it must be; before any run.
        RunsFailedError: see there.
    """
    study = read_study(plan, **overrides)
    check_output_dir(study.output_dir)
    folder, runs = Path(study.output_dir), study.runs()
    # Of methods that are not asked for now too: the report has them.
    everything = [Run(data, method, seed) for data in study.data for method in study.methods for seed in study.seeds]
    done = {run for run in everything if is_done(study, run)}
    left = [run for run in runs if run not in done]
    _check_recipes(study)
    with locked(folder / LOCK), replacing(folder / STUDY) as path:
        path.write_text(json.dumps(study.describe(), indent=2) + "\n")
    logger.info("%s: %d runs, of which %d are done already", folder, len(runs), len(runs) - len(left))
    failed = _do(study, _bases(study, left), "base models")
    failed |= _do(study, [Job(*run) for run in left if _has_base(study, run)], "runs")
    if failed:
        job, why = next(iter(failed.items()))
        message = f"{len(failed)} jobs failed, and are tried again by the same command; the first, {job}: {why}"
        with contextlib.suppress(ValueError), locked(folder / LOCK):  # where there is anything to report
            make_report(folder)
        raise RunsFailedError(message)
    with locked(folder / LOCK):
        report, *_ = make_report(folder)
    return "\n".join([f"{len(runs)} runs in {folder}", *headlines(folder), f"report: {report}"])


def _check_recipes(study: Study) -> None:
    """Every method of every data set is parsed as a recipe before anything is trained."""
    for run in study.runs():
        if run.seed == study.seeds[0] and study.data[run.data].trains_language:
            try:
                check_recipe(study, run)
            except (TypeError, ValueError) as error:
                raise type(error)(f"data {run.data}, method {run.method}: {error}") from None


def _bases(study: Study, runs: Sequence[Run]) -> list[Job]:
    """Those that the runs start from, once each."""
    wanted = {
        base_folder(study, run.data, run.seed): Job(run.data, None, run.seed)
        for run in runs
        if study.data[run.data].trains_language
    }
    return [job for folder, job in wanted.items() if not is_ready(folder)]


def _has_base(study: Study, run: Run) -> bool:
    return not study.data[run.data].trains_language or is_ready(base_folder(study, run.data, run.seed))


def _do(study: Study, jobs: Sequence[Job], what: str) -> dict[Job, str]:
    """Do jobs under a bar of progress; returns why those failed that did."""
    failed: dict[Job, str] = {}
    if not jobs:
        return failed
    with tqdm(total=len(jobs), desc=what, unit="run") as bar:

        def done(outcome: Outcome) -> None:
            bar.update()
            bar.set_postfix_str(str(outcome.job))
            if outcome.error is not None:
                failed[outcome.job] = outcome.error
                logger.warning("%s failed: %s", outcome.job, outcome.error)

        do_all(study, jobs, done)
    return failed
