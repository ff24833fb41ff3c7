"""What a result has to say about where it was measured."""

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "fastpo", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy")


def describe(device: torch.device, command: str, threads: int) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb()} GB",
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "--", "fastpo", "kernels", "bench/*.py")),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "threads": threads,
    }


def provenance(result: dict[str, Any]) -> str:
    """The line that a report starts with."""
    meta = result["meta"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items() if number)
    gpu = f"{meta['gpu']}, driver {meta['driver']}, CUDA {meta['cuda']}; " if meta["gpu"] else ""
    threads = "" if meta["gpu"] else f", {meta['threads']} threads"
    return (
        f"`{meta['command']}` on {gpu}{meta['hardware']}{threads}; {meta['date']}, commit "
        f"{(meta['commit'] or 'unknown')[:12]}{' with changes' if meta['dirty'] else ''}; Python {meta['python']}, "
        f"{versions}. Plain matrix products reach {result['gemm_ceiling_tflops']:.3g} TFLOP/s here.\n"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _driver() -> str | None:
    return (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0] or None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
