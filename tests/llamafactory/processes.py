"""Processes of this environment, one thread each, without GPUs."""

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

STUBS = [str(Path(__file__).parent / "stubs")] * (importlib.util.find_spec("torchaudio") is None)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *STUBS])),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    """A finished process."""
    return subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
