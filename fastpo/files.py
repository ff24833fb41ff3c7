"""Files that are whole or not there: written aside, flushed, put in place by one rename."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PROBE_BYTES = 1 << 20
TORCH_SAVE = ("inline_container", "iostream", "PytorchStreamWriter")  # what its errors say when it cannot write


class SaveError(OSError):
    """Something could not be written; the message names the path and the reason."""


@contextlib.contextmanager
def writing(target: Path, clean: Callable[[], None]) -> Iterator[None]:
    """Around whatever writes `target`; `clean` removes what a failure leaves half-written.

    Raises:
        SaveError: the disk is full, the path cannot be written, ...
    """
    try:
        yield
    except BaseException as error:
        reason = _reason(error, target.parent)
        clean()
        if reason is None:
            raise
        raise SaveError(f"cannot write {target}: {reason}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write instead of `path`, with the same suffix; in the end it takes the place of `path` at once.

    Raises:
        SaveError: as `writing`; what was at `path` is still there.
    """
    aside = path.with_name(f".incomplete-{path.name}")
    with writing(path, clean=lambda: _remove(aside)):
        yield aside
        flush(aside)
        aside.replace(path)
        flush(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file: all of it or nothing.

    Raises:
        SaveError: as `writing`.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise SaveError(f"cannot write {path}: {error.strerror}") from error


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; for all that is in a folder see `flush_tree`."""
    # Not every filesystem flushes folders; that is no reason to stop.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Have everything in a folder reach the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _reason(error: BaseException, folder: Path) -> str | None:
    """What the operating system says of a failed write; None for an error about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if code := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return os.strerror(int(code[1]))
    if isinstance(error, RuntimeError) and any(text in str(error) for text in TORCH_SAVE):  # which keeps the reason
        return _probe(folder) or str(error)
    return None


def _probe(folder: Path) -> str | None:
    """What goes wrong when something more is written into a folder, or None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return error.strerror
    return None
