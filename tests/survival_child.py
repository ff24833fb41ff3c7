"""A training run that test_survival ends: at a moment of its own, before a file operation, or by a limit of file size.

It runs in processes forked from one that has imported all of this, since importing takes longer than training.
"""

import gc
import os
import resource
import signal
import sys
import threading
from typing import Any

import matplotlib
import torch

import fastpo.run  # noqa: F401  what the command imports, ahead of the fork
from fastpo.cli import main

matplotlib.use("Agg")
import matplotlib.pyplot
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is one for all processes, and those that are killed leave it behind

WATCHED = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def train(
    recipe: str,
    overrides: list[str],
    log: str,
    kill_before: int | None = None,
    terminate_at: str | None = None,
    limit: tuple[str, int] | None = None,
) -> None:
    """`fastpo train`, its output in `log`.

    kill_before: SIGKILL before the file operation of this number in output_dir, counting from 0.
    terminate_at: SIGTERM before every file operation on a path with this text.
    limit: (text, bytes): from the first file operation on a path with this text, no file may be larger.
    """
    output_dir, count = overrides[overrides.index("--output_dir") + 1], 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        # shutil.rmtree names what it deletes relative to an open folder.
        if event not in WATCHED or not (str(args[0]).startswith(output_dir) or event in ("os.remove", "os.rmdir")):
            return
        if count == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if terminate_at is not None and terminate_at in str(args[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        if limit is not None and limit[0] in str(args[0]):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    gc.freeze()
    sys.addaudithook(watch)
    status = main(["train", recipe, *overrides])
    print(f"{count} file operations", flush=True)
    sys.exit(status)
