"""Head benchmark on a CPU: ``python -m bench [--tokens 2048] [--repeats 5]``.

Every run is a fresh process that does the work twice; the contenders take turns, so that a slow minute of the machine
hits all of them. The first call has a library's own start-up in it, the second has not. What counts is the ratio to
two bare GEMM units of the same shape, measured in the same session.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from bench.contenders import CONTENDERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=896)
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    shape = [str(arguments.tokens), str(arguments.hidden_size), str(arguments.vocab_size)]
    # Huge pages: without them the contenders with large buffers mostly measure page faults.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    rows = defaultdict(list)
    for _ in range(arguments.repeats):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "bench.contenders", name, *shape]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {rows[name][-1]['first_seconds']:.2f} s", file=sys.stderr)
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("first_seconds", "second_seconds")}
        for name, runs in rows.items()
    }
    unit = median["two bare GEMM units"]
    print(f"forward + backward, frozen head, fp32, T={shape[0]}, D={shape[1]}, V={shape[2]}, {os.cpu_count()} cores")
    print("| contender | first call s | / 2 GEMM | second call s | / 2 GEMM | first call min..max | extra MB |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in rows.items():
        first, second = median[name]["first_seconds"], median[name]["second_seconds"]
        times = [run["first_seconds"] for run in runs]
        print(
            f"| {name} | {first:.2f} | {first / unit['first_seconds']:.2f} "
            f"| {second:.2f} | {second / unit['second_seconds']:.2f} "
            f"| {min(times):.2f}..{max(times):.2f} | {max(run['extra_bytes'] for run in runs) / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()
