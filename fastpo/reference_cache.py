"""The reference's statistics as columns of a dataset, computed once and kept on disk for later runs.

A cache is a folder of the key's name that holds shards of `SHARD_ROWS` rows, each an Arrow dataset. A shard appears
under its name whole or not at all, so an interrupted run goes on where it stopped, and any number of processes can
work on one cache.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from torch import Tensor
from tqdm.auto import tqdm
from xxhash import xxh3_128

from fastpo.data import VECTOR_COLUMNS
from fastpo.files import flush_tree
from fastpo.fingerprint import adapter_state, add_weights, config_of

SHARD_ROWS = 512
FORMAT = 1
HOUR = 3600
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def with_reference_columns(
    rows: Dataset,
    compute: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    folder: Path,
    *,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """`rows` with the columns that `compute` answers, from the shards in `folder`, of which missing ones are made.

    Args:
        rows: tokenised, see `fastpo.tokenization.tokenize_dataset`.
        compute: batch of rows -> name -> (rows,) or (rows, D).
        folder: of this cache alone; see `cache_key`.
        batch_size: rows that go to `compute` at once.
        process: this process's number and how many there are; each makes its share of the shards.
        wait: returns when all processes have called it.

    Raises:
        ValueError: a shard cannot be read.
        OSError: none can be written.
    """
    shards = [
        (range(first, min(first + SHARD_ROWS, len(rows))), folder / f"rows-{first:09d}")
        for first in range(0, len(rows), SHARD_ROWS)
    ]
    for partial in folder.glob(".rows-*"):  # of a killed run; younger ones may be another run's work
        if time.time() - partial.stat().st_mtime > HOUR:
            shutil.rmtree(partial, ignore_errors=True)
    todo = [shard for shard in shards[process[0] :: process[1]] if not shard[1].is_dir()]
    with tqdm(total=sum(len(part) for part, _ in todo), desc="Reference", disable=not todo or process[0] > 0) as bar:
        for part, path in todo:
            batches = rows.select(part).iter(batch_size)
            found = []
            for batch in batches:
                listed = _rows_of(batch)
                found.append(compute(listed))
                bar.update(len(listed))
            _write({name: torch.cat([x[name] for x in found]).float().cpu() for name in found[0]}, path)
    wait()
    columns = concatenate_datasets([_read(path, len(part)) for part, path in shards])
    replaced = [name for name in columns.column_names if name in rows.column_names]
    return concatenate_datasets([rows.remove_columns(replaced), columns], axis=1)


def cache_key(lm: Any, rows: Dataset, settings: dict[str, Any], *, below_adapter: bool) -> str:
    """Name of the cache of a model's statistics on tokenised rows: of its weights and config, the rows' tokens (and so
    of tokenizer, template and truncation), and of `settings`. With `below_adapter`, of the weights without the
    adapter's."""
    digest = xxh3_128()
    adapters = [] if below_adapter else adapter_state(lm)
    digest.update(json.dumps([FORMAT, config_of(lm), settings, adapters], sort_keys=True, default=str).encode())
    add_weights(digest, _own_weights(lm, below_adapter))
    for table in rows.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(1000):
        for column in table.columns:
            for values in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(values.to_numpy().tobytes())
    return digest.hexdigest()


def _own_weights(lm: Any, below_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Name, as it is without an adapter, and value of each weight that the statistics depend on."""
    from fastpo.architecture import HEADS

    added = set(HEADS) | ({"modules_to_save"} if below_adapter else set())
    if below_adapter:
        added |= {name for module in lm.modules() for name in getattr(module, "adapter_layer_names", ())}
    found = {}
    for name, tensor in lm.state_dict().items():
        parts = name.split(".")
        if isinstance(tensor, Tensor) and not added & set(parts):
            found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    yield from sorted(found.items())


def _rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _write(columns: dict[str, Tensor], path: Path) -> None:
    features = {name: List(Value("float32")) if name in VECTOR_COLUMNS else Value("float32") for name in columns}
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        Dataset.from_dict({name: x.numpy() for name, x in columns.items()}, features=Features(features)).save_to_disk(
            partial
        )
        flush_tree(partial)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if path.is_dir():  # another run made it meanwhile
            return
        if isinstance(error, OSError):
            raise OSError(error.errno, f"reference_cache_dir cannot be written: {error.strerror}", str(path)) from error
        raise
    finally:
        if shown:
            enable_progress_bar()


def _read(path: Path, rows: int) -> Dataset:
    try:
        shard = load_from_disk(str(path))
    except Exception as error:  # arrow and datasets raise what they like for a file that is not theirs
        raise ValueError(f"reference_cache_dir holds {path}, which cannot be read; delete it: {error}") from error
    if not isinstance(shard, Dataset) or len(shard) != rows:
        raise ValueError(f"reference_cache_dir holds {path}, which should have {rows} rows; delete it")
    return shard
