"""Head benchmark on a CPU: ``python -m bench [--tokens 2048] [--repeats 5]``.

Every run is a fresh process; the contenders take turns, so that a slow minute of the machine hits all of them. What
counts is the ratio to two bare GEMM units of the same shape, measured in the same session.
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
    seconds, extra = defaultdict(list), defaultdict(list)
    for _ in range(arguments.repeats):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "bench.contenders", name, *shape]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            seconds[name].append(row["seconds"])
            extra[name].append(row["extra_bytes"])
            print(f"{name}: {row['seconds']:.2f} s", file=sys.stderr)
    unit = statistics.median(seconds["two bare GEMM units"])
    print(f"forward + backward, frozen head, fp32, T={shape[0]}, D={shape[1]}, V={shape[2]}, {os.cpu_count()} cores")
    print(f"{'contender':44} median s  min..max        / 2 GEMM  extra MB")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:44} {median:8.2f}  {min(times):6.2f}..{max(times):<6.2f} {median / unit:8.2f} "
            f"{max(extra[name]) / 2**20:9.0f}"
        )


if __name__ == "__main__":
    main()
