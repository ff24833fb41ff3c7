"""JSON lines that a killed process goes on writing, and how they came to be."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastpo.files import flush, replacing, writing


class ResumableJsonl:
    """A JSONL file that is written in chunks, aside, and takes its place when it is whole.

    Lies aside as FILE.partial, with FILE.provenance.json: how it is made, which a resumed run must repeat. A line, or a
    chunk, that a killed process left half-written is dropped.

    Args:
        path: FILE.
        provenance: what the content depends on, as JSON.
        chunk: lines that are written together: of a partial file whole chunks are kept.

    Raises:
        ValueError: FILE is there, or what lies aside was made otherwise (which settings differ is said).
    """

    def __init__(self, path: str | Path, provenance: dict[str, Any], chunk: int = 1) -> None:
        self.path, self.chunk = Path(path), chunk
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.provenance_path = self.path.with_name(f"{self.path.name}.provenance.json")
        self.provenance = json.loads(json.dumps(provenance))
        if self.path.exists():
            raise ValueError(f"output_file must not exist yet, got {str(path)!r}")
        if self.partial.exists():
            self._check_same()
        self.done = 0

    def __enter__(self) -> Self:
        with writing(self.path, clean=lambda: None):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(self.partial) if self.partial.exists() else []
            self.done = len(lines) // self.chunk * self.chunk
            if not self.partial.exists():
                with replacing(self.provenance_path) as aside:
                    aside.write_text(json.dumps(self.provenance, indent=2) + "\n")
            self._file = self.partial.open("ab")
            os.truncate(self.partial, sum(map(len, lines[: self.done])))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write a chunk of rows.

        Raises:
            SaveError: they could not be written; what was there before is kept.
        """
        with writing(self.path, clean=lambda: None):
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            self._file.flush()

    def finish(self, result: dict[str, Any] | None = None) -> None:
        """Put the file in its place; `result` is added to the provenance."""
        with writing(self.path, clean=lambda: None):
            flush(self.partial)
            with replacing(self.provenance_path) as aside:
                aside.write_text(json.dumps({**self.provenance, **(result or {})}, indent=2) + "\n")
            self.partial.replace(self.path)
            flush(self.path.parent)

    def _check_same(self) -> None:
        try:
            before = json.loads(self.provenance_path.read_text())
        except (OSError, ValueError):
            before = {}
        # A run killed while it finished has added its result already.
        differing = sorted(k for k in self.provenance if before.get(k) != self.provenance[k])
        if differing:
            raise ValueError(
                f"output_file {str(self.path)!r} was begun with another {', '.join(differing)}: repeat its settings, "
                f"or delete {self.partial.name} to begin anew"
            )


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


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
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} must be JSON, got {line[:60]!r}: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} must be a JSON object, got {line[:60]!r}")
            yield row
