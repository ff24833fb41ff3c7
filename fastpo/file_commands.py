"""What `fastpo sample` and `fastpo score` share: checks of their arguments, provenance, the way over batches."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from fastpo.resumable import ResumableJsonl, read_jsonl

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_fields(
    arguments: Any, *, given: Sequence[str], least: Mapping[str, int], known: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError for a field that is not `given`, below its `least` value (None is none), or not `known`."""
    for name in given:
        if not getattr(arguments, name):
            raise ValueError(f"{name} must be given, got none")
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be >= {smallest}, got {value!r}")
    for name, choices in known.items():
        if getattr(arguments, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(arguments, name)!r}")


def provenance(command: str, arguments: Any, packages: Sequence[str], **found: Any) -> dict[str, Any]:
    """What an output file depends on: the arguments but for its own name, versions, and what was found."""
    settings = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments) if f.name != "output_file"}
    return {"command": command, "settings": settings, **found, "versions": {name: _version(name) for name in packages}}


def write_batches(
    path: str,
    provenance: dict[str, Any],
    rows: Dataset,
    batch_size: int,
    work: Callable[[list[dict[str, Any]], int], list[dict[str, Any]]],
    summarize: Callable[[Iterator[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Write what `work` makes of each batch of rows and its number, from where an earlier run was stopped.

    Returns:
        what `summarize` says of all rows that were written, which is added to the provenance.

    Raises:
        ValueError, SaveError: as `ResumableJsonl`.
    """
    with ResumableJsonl(path, provenance, chunk=batch_size) as file:
        logger.info("%s: %d rows, of which %d are done already", path, len(rows), file.done)
        with tqdm(total=len(rows), initial=file.done, unit="row") as bar:
            for first in range(file.done, len(rows), batch_size):
                batch = rows.select(range(first, min(first + batch_size, len(rows)))).to_list()
                file.append(work(batch, first // batch_size))
                bar.update(len(batch))
        summary = summarize(read_jsonl(file.partial))
        file.finish(summary)
    return summary


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a checkout
        return None
