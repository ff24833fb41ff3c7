"""What the head adds to memory, at the size of a 0.5B model: 2,048 tokens and 151,936 logits each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo.memory import head_memory, peak_bytes_of

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FULL_LOGITS = """
import torch
from fastpo.memory import peak_bytes_of

hidden, weight, labels = torch.randn(2048, 64), torch.randn(151936, 64), torch.randint(0, 151936, (2048, 1))
hidden[:2] @ weight[:512].T
with torch.no_grad():
    print(peak_bytes_of(lambda: (hidden @ weight.T).log_softmax(-1).gather(1, labels), torch.device("cpu")))
"""

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux lets a process reset its peak resident memory"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes start where `fastpo` imports and see no GPU, where other tile sizes apply."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: a core each, or their threads wait on one another
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_chunked_head_adds_at_most_100_mb(trainable: bool) -> None:
    extra = head_memory("chunked", tokens=2048, hidden_size=896, vocab_size=151936, trainable=trainable)
    assert 5 * MB < extra <= 100 * MB


def test_full_logits_add_more_than_1_2_gb() -> None:
    """The forward alone, which no hidden size changes; with its backward, eager code holds several such tensors."""
    done = subprocess.run([sys.executable, "-c", FULL_LOGITS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1200 * MB


def test_head_memory_sees_logits() -> None:
    """256 tokens of the eager implementation already hold more than the chunked one may at 2,048."""
    logits = 256 * 151936 * 4
    assert 2 * logits < head_memory("reference", tokens=256, hidden_size=64, vocab_size=151936) < 8 * logits


def ones(megabytes: int, device: str) -> torch.Tensor:
    return torch.ones(megabytes * MB, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
class TestPeakBytesOf:
    def test_touched_memory(self, device: str) -> None:
        assert 60 * MB <= peak_bytes_of(lambda: ones(64, device), torch.device(device)) <= 80 * MB

    def test_the_peak_counts_and_not_the_end(self, device: str) -> None:
        def work() -> torch.Tensor:
            for _ in range(3):
                ones(64, device)
            return ones(32, device)

        assert 60 * MB <= peak_bytes_of(work, torch.device(device)) <= 80 * MB

    def test_memory_held_or_freed_before_does_not_count(self, device: str) -> None:
        ones(128, device)
        held = ones(64, device)
        assert 28 * MB <= peak_bytes_of(lambda: ones(32, device), torch.device(device)) <= 48 * MB
        assert held.all()

    def test_nothing(self, device: str) -> None:
        assert 0 <= peak_bytes_of(lambda: None, torch.device(device)) <= 4 * MB
