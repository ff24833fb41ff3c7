"""What a GPU should need, by counting: ``python -m bench.model [--tokens 8192] [--hidden 4096] [--gpu h200]``.

NOT a measurement. Time = matrix products at the rate that a vendor's GEMM sustains + every other byte at the memory's
rate, nothing overlapped, kernels launched for free; fastpo's own products at a stated share of the vendor's rate.
"""

import argparse
from typing import NamedTuple

from bench.presets import VOCAB
from fastpo.kernels.fused import MAX_COLS, SLICE_ELEMENTS


class Gpu(NamedTuple):
    """Sustained rates: bf16 products with fp32 accumulation in TFLOP/s, memory in TB/s."""

    tflops: float
    memory: float


# An H200 sustains about 680 of its 990 TFLOP/s when hot, and about 85 % of 4.8 TB/s.
GPUS = {"h200": Gpu(680, 4.1), "a100": Gpu(250, 1.6)}
OWN_SHARE = 0.92  # of the vendor's rate, for products inside a Triton kernel with an epilogue
FP32, HALF = 4, 2


class Cost(NamedTuple):
    """Units of 2 N D V operations in vendor GEMMs and in our kernels, and bytes moved besides."""

    vendor: float
    own: float
    moved: float


def costs(n: int, d: int, v: int) -> dict[str, Cost]:
    """Cost of each mode for the log-probs' gradient; bf16 inputs."""
    plane, sums, head = n * v, n * d * FP32, v * d
    width = min(v, MAX_COLS, SLICE_ELEMENTS // n)
    slices = -(-v // width)
    partials = 3 * 2 * FP32 * plane / 256  # written, then read
    add = slices * 4 * sums  # a product's result written, read, and the sum read and written
    slice_passes = 3 * HALF * plane  # d loss / d x written once and read by two products
    head_grad = head * (2 * FP32 + HALF)
    return {
        "no_grad": Cost(0, 1, partials),
        # e^(z - m): written, settled in place, read by the product that adds up E.
        "frozen": Cost(1, 1, partials + 4 * HALF * plane + add + 3 * sums),
        "lean": Cost(2, 2, partials + slice_passes + add + head_grad),
        "stash (all rows)": Cost(2, 1, partials + 2 * HALF * plane + slice_passes + add + head_grad),
        "skip, half the tiles kept": Cost(0, 1 + 3 * 0.5, partials + 0.5 * slice_passes + add / 2 + head_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    arguments = parser.parse_args()
    n, d, v, gpu = arguments.tokens, arguments.hidden, arguments.vocab, GPUS[arguments.gpu]
    unit = 2 * n * d * v / gpu.tflops / 1e12
    print(f"Expected on one {arguments.gpu.upper()}, NOT MEASURED: {n} tokens, D={d}, V={v}, bf16; bare unit")
    print(f"{unit * 1e3:.1f} ms at {gpu.tflops:g} TFLOP/s, ours at {OWN_SHARE:.0%} of it, {gpu.memory:g} TB/s\n")
    print("| mode | products ms | memory ms | sum ms | / one bare unit |")
    print("|---|---|---|---|---|")
    for mode, cost in costs(n, d, v).items():
        products = unit * (cost.vendor + cost.own / OWN_SHARE)
        memory = cost.moved / gpu.memory / 1e12
        total = products + memory
        print(f"| {mode} | {products * 1e3:.1f} | {memory * 1e3:.1f} | {total * 1e3:.1f} | {total / unit:.2f} |")


if __name__ == "__main__":
    main()
