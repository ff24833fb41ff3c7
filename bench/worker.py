"""One contender in a process of its own: ``python -m bench.worker`` reads a job from stdin and prints JSON lines.

A job: {"contender", "device", "dtype", "gate": works, "points": specs, "seconds" a GPU point may repeat for, "deadline"
in seconds, "accuracy": spec or null, "truth": path}. With "truth" and no contender it writes the float64 truth of
"accuracy" there, and measures the machine.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, gate
from bench.contenders import CONTENDERS
from bench.measure import gemm_ceiling, measure
from bench.problem import DTYPES, spec_from_json

MARK = "bench: "


def emit(kind: str, **fields: Any) -> None:
    print(MARK + json.dumps({"kind": kind} | fields), flush=True)


def run(job: dict[str, Any]) -> None:
    begun = time.monotonic()
    device = torch.device(job["device"])
    contender = CONTENDERS[job["contender"]]
    wrong: dict[str, str] = {}
    for work in job["gate"]:
        verdict = gate.check(contender, work, job["dtype"], device)
        emit("gate", work=work, **verdict)
        if not verdict["ok"]:
            wrong[work] = verdict["reason"]
    if job["accuracy"] is not None and "forward" not in wrong:
        errors = accuracy.sequence_error(contender, spec_from_json(job["accuracy"]), device, Path(job["truth"]))
        if errors is not None:
            emit("accuracy", **errors)
    for fields in job["points"]:
        spec = spec_from_json(fields)
        if spec.work in wrong:
            emit("row", spec=fields, failed=f"wrong: {wrong[spec.work]}")
            continue
        if time.monotonic() - begun > job["deadline"]:
            emit("row", spec=fields, failed="out of time")
            continue
        if contender.per_shape:  # not to meet the limit on recompilations
            torch.compiler.reset()
        try:
            emit("row", spec=fields, **measure(contender, spec, device, job["seconds"]))
        except (torch.OutOfMemoryError, MemoryError):
            emit("row", spec=fields, failed="out of memory")
        except Exception as error:  # a peer's failure is a result, not ours to raise
            emit("row", spec=fields, failed=f"{type(error).__name__}: {str(error)[:200]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    job = json.load(sys.stdin)
    if job["contender"] is not None:
        run(job)
        return
    device = torch.device(job["device"])
    emit("ceiling", tflops=gemm_ceiling(device, DTYPES[job["dtype"]]), threads=torch.get_num_threads())
    if job["accuracy"] is not None:
        emit("truth", **accuracy.write_truth(spec_from_json(job["accuracy"]), device, Path(job["truth"])))


if __name__ == "__main__":
    main()
