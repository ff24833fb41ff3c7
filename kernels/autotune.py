"""Which of several tile configurations is fastest here: measured once if asked for, and remembered.

Off by default, so that results do not depend on what a machine measured: the first candidate is a sensible default.
``FASTPO_AUTOTUNE=1`` turns it on; choices are kept in ``$FASTPO_CACHE`` (default ``~/.cache/fastpo``)/tiles.json.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
import triton.testing

from fastpo.kernels.configs import TileConfig


def enabled() -> bool:
    return os.environ.get("FASTPO_AUTOTUNE", "0") == "1"


def cache_file() -> Path:
    return Path(os.environ.get("FASTPO_CACHE", Path.home() / ".cache" / "fastpo")) / "tiles.json"


def fastest(
    candidates: Sequence[TileConfig], key: str, launch: Callable[[TileConfig], None], *, may_measure: bool
) -> TileConfig:
    """The best of `candidates` for the work called `key` on the current GPU; the first one where nothing is known.

    Args:
        candidates: the default first.
        key: names kernel, dtype and shape.
        launch: runs the work with one of them.
        may_measure: False where nothing may synchronise.
    """
    if len(candidates) == 1 or not enabled() or not torch.cuda.is_available():
        return candidates[0]
    key = f"{torch.cuda.get_device_name()}, triton {triton.__version__}, {key}"
    known = _read()
    if key in known:
        wanted = TileConfig(**known[key])
        return wanted if wanted in candidates else candidates[0]
    if not may_measure:
        return candidates[0]
    best = min(candidates, key=lambda config: triton.testing.do_bench(lambda: launch(config), warmup=10, rep=50))
    _write(_read() | {key: best._asdict()})
    return best


def _read() -> dict[str, dict]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or a broken one: measure again
        return {}


def _write(choices: dict[str, dict]) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(choices, indent=1, sort_keys=True))
    partial.replace(path)
