"""JSON lines that a killed process goes on writing, and how they came to be."""

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastpo.files import flush, replacing, writing

logger = logging.getLogger(__name__)


class ResumableJsonl:
    """A JSONL file that is written in chunks, aside, and takes its place when it is whole.

    Lies aside as FILE.partial, with FILE.provenance.json: how it is made, which a resumed run must repeat. Of what a
    killed process, or a machine that went down, left, the whole chunks at the beginning are kept.

    Args:
        path: FILE.
        provenance: what the content depends on, as JSON.
        chunk: lines that are written together.

    Raises:
        ValueError: FILE is there, or what lies aside was made otherwise (which settings differ is said), or another
            process is writing it.
        SaveError: its folder cannot be written.
    """

    def __init__(self, path: str | Path, provenance: dict[str, Any], chunk: int = 1) -> None:
        self.path, self.chunk = Path(path), chunk
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.provenance_path = self.path.with_name(f"{self.path.name}.provenance.json")
        self.provenance = json.loads(json.dumps(provenance))
        self._check()
        self.done = 0

    def __enter__(self) -> Self:
        with writing(self.path, clean=lambda: None):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("ab", buffering=0)
        try:
            self._lock()
            self._check()  # again: another process may have been at work until now
            with writing(self.path, clean=lambda: None):
                if self._begun():
                    self.done, size = self._kept()
                    dropped = self.partial.stat().st_size - size
                    if dropped:
                        logger.info("%s: %d lines are kept, %d bytes after them not", self.partial, self.done, dropped)
                    self._file.truncate(size)
                else:
                    self._write_provenance(self.provenance)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write a chunk of rows: all of them or none.

        Raises:
            SaveError: they could not be written; what was there before is kept.
        """
        # It is not flushed to the disk: that would cost more than it saves, since a resumed run checks what it finds.
        left = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        size = self._file.seek(0, os.SEEK_END)
        with writing(self.path, clean=lambda: os.truncate(self.partial, size)):
            while left:
                left = left[self._file.write(left) :]

    def finish(self, result: dict[str, Any] | None = None) -> None:
        """Put the file in its place; `result` is added to the provenance."""
        with writing(self.path, clean=lambda: None):
            flush(self.partial)
            self._write_provenance({**self.provenance, **(result or {})})
            self.partial.replace(self.path)
            flush(self.path.parent)

    def _write_provenance(self, provenance: dict[str, Any]) -> None:
        with replacing(self.provenance_path) as aside:
            aside.write_text(json.dumps(provenance, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the system, however this ends
        except BlockingIOError:
            raise ValueError(f"output_file {str(self.path)!r} is being written by another process") from None
        except OSError:
            logger.debug("%s: this filesystem has no locks", self.partial)

    def _begun(self) -> bool:
        return self.partial.exists() and self.partial.stat().st_size > 0

    def _check(self) -> None:
        check_not_there(self.path)
        if not self._begun():
            return
        try:
            before = json.loads(self.provenance_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"output_file {str(self.path)!r} was begun, but how is not known: {self.provenance_path.name} cannot "
                f"be read ({error}); delete {self.partial.name} to begin anew"
            ) from None
        differing = sorted(_differing(before, self.provenance))
        if differing:
            raise ValueError(
                f"output_file {str(self.path)!r} was begun with another {', '.join(differing)}: repeat its settings, "
                f"or delete {self.partial.name} to begin anew"
            )

    def _kept(self) -> tuple[int, int]:
        """Lines, and their bytes, of the whole chunks that the partial file begins with."""
        kept, lines, size = (0, 0), 0, 0
        with self.partial.open("rb") as file:
            for line in file:
                if not _is_row(line):
                    break
                lines, size = lines + 1, size + len(line)
                if lines % self.chunk == 0:
                    kept = (lines, size)
        return kept


def check_output_file(path: str | Path) -> None:
    """Prove that a new file can be written, before any work is done; its folder is made.

    Raises:
        ValueError: it is there already, or its folder cannot be written.
    """
    path = Path(path)
    try:
        check_not_there(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output_file must be in a writable folder, got {str(path)!r}: {error.strerror}") from None


def check_one_process(command: str) -> None:
    """Raise ValueError where several processes were launched: they would all write the same file."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"{command} must be started as one process, got {processes}: split the dataset into files and start it on "
            "each of them, with an output_file of its own (and CUDA_VISIBLE_DEVICES for a GPU of its own)"
        )


def check_not_there(path: Path) -> None:
    """Raise ValueError for an output file that is there already."""
    if path.exists():
        raise ValueError(f"output_file must not exist yet, got {str(path)!r}")


def _differing(before: Any, now: dict[str, Any]) -> Iterator[str]:
    """Names of settings that are not as they were; a result that was added to what was before is none."""
    before = before if isinstance(before, dict) else {}
    for name, value in now.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _differing(before.get(name), value))
        elif name not in before or before[name] != value:
            yield name


def _is_row(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as a JSONL file that is made at once; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        ValueError: no such file, or a line that is no JSON object (named by its number).
    """
    path = Path(path)
    if not path.is_file():
        partial = path.with_name(f"{path.name}.partial")
        more = f"; {partial.name} is not finished: run the command that makes it again" if partial.exists() else ""
        raise ValueError(f"dataset must be an existing JSONL file, got {str(path)!r}{more}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} must be JSON, got {line[:60]!r}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} must be a JSON object, got {line[:60]!r}")
            yield row
