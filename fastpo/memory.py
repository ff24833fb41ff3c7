"""Peak memory of a piece of work, and of one head forward + backward in a fresh process.

``python -m fastpo.memory --impl chunked`` prints one JSON line.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastpo.op_checks import IMPLEMENTATIONS
from fastpo.ops import linear_logps

M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_bytes_of(work: Callable[[], object], device: torch.device) -> int:
    """How far memory in use rose, at its highest, above where it stood before `work`.

    On a GPU: the allocator's figure. On a CPU: resident memory, whose high-water mark Linux lets a process reset;
    elsewhere the mark can only rise, and work smaller than what came before reads as 0.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _hand_back_free_memory()
    _reset_resident_peak()
    before = _resident_peak()
    work()
    return _resident_peak() - before


class PeakMeter:
    """Peak of what a process holds for training: weights, and whatever comes and goes between `start` and `peak`.

    On a GPU: the allocator's bytes in use, all told. On a CPU: resident memory above where it stood when the meter was
    made, which is after libraries and data and before the first weight.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        if device.type != "cuda":
            _hand_back_free_memory()
            self.before = _resident()

    def start(self) -> None:
        """What was there only while the model was built does not count from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _hand_back_free_memory()
            _reset_resident_peak()

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _resident_peak() - self.before)


def hand_back_what_is_freed() -> None:
    """Have the C library return blocks of a megabyte and more to the system when they are freed (glibc alone).

    By itself it keeps ever larger freed blocks for later, in pieces that later tensors do not fit: a training step with
    gradient checkpointing has been seen to hold two and a half times its tensors. A threshold in the environment wins.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _hand_back_free_memory() -> None:
    """Freed memory that the C library still holds would be used again without counting."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    return _status("VmHWM:")


def _resident() -> int:
    return _status("VmRSS:")


def _status(field: str) -> int:
    """Bytes; where there is no /proc, the peak since the process began stands for either field."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def head_memory(
    impl: str, *, tokens: int = 2048, hidden_size: int = 896, vocab_size: int = 151936, trainable: bool = False
) -> int:
    """Bytes that forward + backward of the LM head add over inputs and required gradients (fp32), in a new process."""
    command = [sys.executable, "-m", "fastpo.memory", "--impl", impl, "--tokens", str(tokens)]
    command += ["--hidden_size", str(hidden_size), "--vocab_size", str(vocab_size)]
    done = subprocess.run(
        command + ["--trainable"] * trainable, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return int(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=896)
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--trainable", action="store_true", help="the head needs a gradient too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = torch.randn(arguments.tokens, arguments.hidden_size, device=device)
    weight = torch.randn(arguments.vocab_size, arguments.hidden_size, device=device).mul_(arguments.hidden_size**-0.5)
    labels = torch.randint(0, arguments.vocab_size, (arguments.tokens,), device=device)
    # Libraries load and thread pools start outside the measurement.
    linear_logps(
        hidden[:2].clone().requires_grad_(), weight[:512], labels[:2] % 512, impl=arguments.impl
    ).logps.sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_(arguments.trainable)

    def forward_backward() -> None:
        linear_logps(hidden, weight, labels, impl=arguments.impl).logps.sum().backward()

    peak = peak_bytes_of(forward_backward, device)
    required = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight) if x.grad is not None)
    print(json.dumps({"peak_bytes": peak, "required_bytes": required, "extra_bytes": peak - required}))


if __name__ == "__main__":
    main()
