"""The contenders of the head benchmark: forward + backward of token log-probs through a frozen LM head, in fp32.

``python -m bench.contenders NAME TOKENS HIDDEN VOCAB`` runs one, alone in its process, and prints one JSON line.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import linear_logps
from fastpo.memory import peak_bytes_of

SLICE = 2048


def two_gemm_units(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The least that any frozen-head method must multiply: hidden @ weight.T and its transpose product."""
    tile = torch.empty(hidden.shape[0], SLICE)
    out = torch.zeros_like(hidden)
    with torch.no_grad():
        for first in range(0, weight.shape[0], SLICE):
            w = weight[first : first + SLICE]
            product = tile[:, : w.shape[0]]
            torch.mm(hidden, w.t(), out=product)
            out.addmm_(product, w)


def fastpo_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    stats = linear_logps(hidden, weight, labels, impl="chunked")  # the entropy comes along
    stats.logps.sum().backward()


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options).backward()


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Full logits, log-probs only."""
    logps = torch.log_softmax(hidden @ weight.t(), dim=-1).gather(-1, labels[:, None])
    logps.sum().backward()


CONTENDERS = {
    "two bare GEMM units": two_gemm_units,
    "fastpo chunked, with entropy": fastpo_chunked,
    "torch linear_cross_entropy, 256-row chunks": torch_linear_cross_entropy,
    "eager full logits": eager,
}


def main() -> None:
    name, tokens, hidden_size, vocab_size = sys.argv[1], *(int(n) for n in sys.argv[2:5])
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size)
    weight = torch.randn(vocab_size, hidden_size).mul_(hidden_size**-0.5)
    labels = torch.randint(0, vocab_size, (tokens,))
    hidden.requires_grad_()
    seconds = []

    def work() -> None:
        hidden.grad = None
        start = time.perf_counter()
        CONTENDERS[name](hidden, weight, labels)
        seconds.append(time.perf_counter() - start)

    peak = peak_bytes_of(work, hidden.device)
    work()
    row = {"first_seconds": seconds[0], "second_seconds": seconds[1], "extra_bytes": peak - hidden.numel() * 4}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
