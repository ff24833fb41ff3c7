"""A writer of a resumable file that test_resumable ends: before a file operation, or in the middle of a write."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastpo.resumable import ResumableJsonl

WATCHED = {"open", "os.mkdir", "os.remove", "os.rename", "os.truncate"}
ROWS = [{"index": i, "text": "höchst\n\u2028 ungerade " * i, "values": [i / 3, True, None]} for i in range(8)]
CHUNK = 3
PROVENANCE = {"command": "test", "settings": {"seed": 0, "beta": 0.1}}


class Torn:
    """A file that is killed once so many bytes more are written."""

    def __init__(self, file: Any, budget: int) -> None:
        self.file, self.budget = file, budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        written = self.file.write(data[: self.budget])
        if written < len(data):
            os.kill(os.getpid(), signal.SIGKILL)
        self.budget -= written
        return written


def write(path: Path, rows: Any = ROWS, budget: int | None = None) -> int:
    """Write the rows that are not there yet; returns how many were."""
    with ResumableJsonl(path, PROVENANCE, chunk=CHUNK) as file:
        if budget is not None:
            file._file = Torn(file._file, budget)  # type: ignore[assignment]
        for first in range(file.done, len(rows), CHUNK):
            file.append(rows[first : first + CHUNK])
        file.finish({"rows": len(rows)})
    return file.done


def run(path: str, kill_before: int | None = None, budget: int | None = None) -> None:
    """`write`, with SIGKILL before the file operation of this number, counting from 0, or once `budget` is written.

    The exit status is the number of operations.
    """
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WATCHED and str(args[0]).startswith(str(Path(path).parent)):
            if count == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    write(Path(path), budget=budget)
    os._exit(count)
