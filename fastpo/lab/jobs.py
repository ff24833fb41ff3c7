"""A study's jobs: base models and runs, in this process or in several, none done twice, each whole or not there."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from fastpo.files import replacing
from fastpo.lab.folder import RESULT, SETTINGS, WORKERS_LOG, Run
from fastpo.lab.study import Study, item_settings

WORKER = [sys.executable, "-m", "fastpo.lab.jobs"]


class Job(NamedTuple):
    """What a process does in one piece: a run, or where method is None the base of a data set and seed."""

    data: str
    method: str | None
    seed: int

    def __str__(self) -> str:
        return f"{self.data} {self.method or 'base'} seed {self.seed}"


class Outcome(NamedTuple):
    """What became of a job: error is None, or says why it failed."""

    job: Job
    error: str | None


def base_folder(study: Study, data: str, seed: int) -> Path:
    """Of what its runs start from; data sets that differ in how methods are trained share it."""
    settings = json.dumps({**study.base_settings(data, seed), "seed": seed}, sort_keys=True)
    return Path(study.output_dir) / "base" / hashlib.sha256(settings.encode()).hexdigest()[:16]


def do_job(study: Study, job: Job) -> None:
    """Do what is not done yet.

    Raises:
        Exception: whatever training raises; nothing half-written is left where a result belongs.
    """
    torch.set_num_threads(study.threads)
    if job.method is None:
        from fastpo.lab.language import prepare_base

        folder = base_folder(study, job.data, job.seed)
        with locked(folder.with_suffix(".lock")):
            prepare_base(study, job.data, job.seed, folder)
        return
    run = Run(job.data, job.method, job.seed)
    folder = Path(study.output_dir) / run.path
    with locked(folder.with_suffix(".lock")):
        if is_done(study, run):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS) as aside:  # of a run that is stopped, whose checkpoints are gone on from
            aside.write_text(json.dumps(study.settings(run)) + "\n")
        start = time.perf_counter()
        found = _trained(study, run, folder)
        if not any(map(math.isfinite, found["measures"].values())):
            raise FloatingPointError("all measures are NaN or infinite")
        result = {"data": run.data, "method": run.method, "seed": run.seed, "settings": study.settings(run), **found}
        result["seconds"] = round(time.perf_counter() - start, 2)
        with replacing(folder / RESULT) as aside:
            aside.write_text(json.dumps(result) + "\n")
        if study.data[run.data].trains_language:
            from fastpo.lab.language import drop_checkpoints

            drop_checkpoints(folder)


def is_done(study: Study, run: Run) -> bool:
    """Whether its result is there.

    Raises:
        ValueError: what is there, finished or begun, is of other settings.
    """
    folder = Path(study.output_dir) / run.path
    for path in (folder / RESULT, folder / SETTINGS):
        if path.exists():
            try:
                before = json.loads(path.read_text())
                before = before["settings"] if path.name == RESULT else before
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} must be what a run left, got something else ({error}): delete it") from None
            differing = sorted(_differing(before, json.loads(json.dumps(study.settings(run)))))
            if differing:
                raise ValueError(
                    f"output_dir {study.output_dir!r} holds {run.path} with another {', '.join(differing)}: "
                    "name another output_dir, or delete that run"
                )
    return (folder / RESULT).exists()


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [
            found for key in keys for found in _differing(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [name]


def _trained(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    plan = study.data[run.data]
    if not plan.trains_language:
        from fastpo.lab.recommender import train_items

        return train_items(plan.of(run.seed), *item_settings(study.settings(run)["training"]), seed=run.seed)
    from fastpo.lab.language import run_language

    return run_language(study, run, base_folder(study, run.data, run.seed), folder)


def do_all(study: Study, jobs: Sequence[Job], done: Callable[[Outcome], None]) -> None:
    """Do jobs in `study.processes` processes, or where that is 1 in this one; `done` is told of each."""
    if study.processes == 1 or len(jobs) < 2:
        for job in jobs:
            done(_attempt(study, job))
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    finished: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    workers = [
        threading.Thread(target=_feed, args=(study, number, waiting, finished), daemon=True)
        for number in range(min(study.processes, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for _ in jobs:
        outcome = finished.get()
        if isinstance(outcome, Exception):
            raise outcome
        done(outcome)
    for worker in workers:
        worker.join()


def _feed(study: Study, number: int, waiting: Any, finished: Any) -> None:
    """Keep one worker process busy; what goes wrong with that, and not with a job, is the main thread's to raise."""
    try:
        _keep_busy(study, number, waiting, finished)
    except Exception as error:
        finished.put(error)


def _keep_busy(study: Study, number: int, waiting: Any, finished: Any) -> None:
    """Give a worker process one job after the other, and replace it where a job kills it."""
    while not waiting.empty():
        with (Path(study.output_dir) / WORKERS_LOG).open("a") as log, _worker(study, number, log) as process:
            alive = _tell(process, pickle.dumps(study).hex())
            while alive:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                alive = _tell(process, json.dumps(job))
                answer = process.stdout.readline() if alive and process.stdout else ""
                alive = bool(answer)
                error = json.loads(answer) if alive else f"its process died with status {process.wait()}"
                finished.put(Outcome(job, error))


def _tell(process: subprocess.Popen[str], line: str) -> bool:
    """Whether the process took it."""
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _worker(study: Study, number: int, log: IO[str]) -> subprocess.Popen[str]:
    """A process that does the jobs which it reads; it ends when this one does, or stops to feed it."""
    env = {**os.environ, "OMP_NUM_THREADS": str(study.threads), "TQDM_DISABLE": "1"}
    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[number % count]
    return subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)


def work() -> None:
    """Of a worker: the study and then jobs from standard input, errors or null to what was standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the study's to stop
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    study: Study = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    jobs = queue.SimpleQueue[Job]()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(Job(*json.loads(line)))
        os._exit(0)  # the study's process is gone, or has no more jobs

    threading.Thread(target=read, daemon=True).start()
    while True:
        answers.write(json.dumps(_attempt(study, jobs.get()).error) + "\n")
        answers.flush()


def _attempt(study: Study, job: Job) -> Outcome:
    try:
        do_job(study, job)
    except Exception as error:  # one run that fails, say by a loss that is not finite, must not end the others
        return Outcome(job, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Outcome(job, None)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock back, however a process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    work()
