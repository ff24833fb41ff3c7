"""A command that test_sample and test_score kill in the middle of its work."""

import importlib
import logging
import os
import signal
from typing import Any

import torch

import fastpo.sample
import fastpo.score  # noqa: F401  ahead of the fork
from fastpo.cli import main


def run(argv: list[str], function: str, calls: int) -> None:
    """`fastpo` with these arguments, with SIGKILL at that call, counted from 0, of ``module.function``."""
    place, _, name = function.rpartition(".")
    module, count = importlib.import_module(place), 0
    plain = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return plain(*args, **kwargs)

    setattr(module, name, counted)
    torch.set_num_threads(1)
    logging.disable()
    main(argv)
