"""Whole training steps of fastpo, TRL and a plain loop: ``python -m bench --preset step --out DIR``.

Each contender trains in fresh processes, the contenders taking turns. The losses and gradient norms of all that train
the same parameters must agree; if they do not, nothing is written and the exit status is 1. Otherwise DIR gets
NAME.json and NAME.md.
"""

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.machine import describe
from bench.measure import gemm_ceiling
from bench.runner import GateError, spawn
from bench.step_contenders import CONTENDERS, ORACLES, PACKAGES
from bench.step_problem import StepShape
from bench.step_report import full_report

TOLERANCE = 1e-3  # relative, of losses and gradient norms
ADDED = ("seconds", "first_seconds", "setup_seconds")


@dataclass(frozen=True)
class StepPreset:
    name: str
    shape: StepShape
    repeats: int  # rounds of fresh processes
    steps: int  # of one process; the first warms up
    process_limit: float  # seconds


STEP_PRESETS = {
    preset.name: preset
    for preset in (
        # Qwen3-0.6B's layers and head, 4 layers of them.
        StepPreset("step", StepShape(1024, 4, 16, 8, 128, 3072, 151936, 4, 256, 256), 3, 2, 900),
        StepPreset("step-quick", StepShape(32, 2, 4, 2, 8, 64, 500, 4, 16, 16), 1, 2, 120),
    )
}


def main(argv: list[str], command: str) -> int:
    """The exit status; `command` is what the report shows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=STEP_PRESETS, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--only", action="append", choices=CONTENDERS, metavar="NAME", help="a contender; repeatable")
    parser.add_argument("--repeats", type=int, help="rounds of fresh processes")
    parser.add_argument("--threads", type=int, help="threads of a worker; the machine's own choice by default")
    arguments = parser.parse_args(argv)
    preset = STEP_PRESETS[arguments.preset]
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    session = StepSession(preset, arguments.only or list(CONTENDERS), arguments.threads)
    device = torch.device("cpu")
    meta = describe(device, command, torch.get_num_threads()) | {"preset": preset.name}
    ceiling = gemm_ceiling(device, torch.float32)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for repeat in range(arguments.repeats or preset.repeats):
            session.round(f"round {repeat + 1}")
            # After every round, so that one who cannot wait has those that are done.
            result = {"meta": meta, "gemm_ceiling_tflops": ceiling} | session.as_json()
            (arguments.out / f"{preset.name}.json").write_text(json.dumps(result, indent=1) + "\n")
            (arguments.out / f"{preset.name}.md").write_text(full_report(result))
    except GateError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print(full_report(result))
    return 0


class StepSession:
    """One run of a preset. The oracles of what is trained always take part."""

    def __init__(self, preset: StepPreset, names: list[str], threads: int | None) -> None:
        oracles = {ORACLES[CONTENDERS[name].trains] for name in names}
        self.names = sorted(oracles | set(names), key=list(CONTENDERS).index)
        self.preset, self.threads = preset, threads
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}

    def round(self, title: str) -> None:
        """One fresh process of every contender that has not failed.

        Raises:
            GateError: losses disagree, or fastpo or an oracle failed.
        """
        for name in self.names:
            if name in self.skipped or "failed" in self.rows.get(name, {}):
                continue
            job = {"contender": name, "shape": dataclasses.asdict(self.preset.shape), "steps": self.preset.steps}
            begun = time.monotonic()
            lines, trouble = spawn(job, self.preset.process_limit, self.threads, module="bench.step_worker")
            self._file(name, lines, trouble)
            print(f"{title}: {name} {time.monotonic() - begun:.0f} s {trouble}".rstrip(), file=sys.stderr, flush=True)

    def _file(self, name: str, lines: list[dict[str, Any]], trouble: str) -> None:
        if not lines:
            if name in ORACLES.values() or CONTENDERS[name].trainer == "fastpo":
                raise GateError(f"{name} did not end well: {trouble}")
            self.rows[name] = {"failed": trouble}
            return
        line = dict(lines[0])
        if line.pop("kind") == "unavailable":
            self.skipped[name] = line["reason"]
            return
        row = self.rows.setdefault(name, line)
        if row is not line:
            for key in ADDED:
                row[key] = row[key] + line[key]
            for key in ("extra_bytes", "loaded_bytes"):
                row[key] = max(row[key], line[key])
        row["error"] = max(row.get("error", 0.0), self._error(name, line))
        if not row["error"] <= TOLERANCE:
            oracle = ORACLES[CONTENDERS[name].trains]
            raise GateError(f"{name} disagrees with {oracle}: {row['error']:.1e} > {TOLERANCE:.0e}")

    def _error(self, name: str, line: dict[str, Any]) -> float:
        """Largest relative difference of a loss or a gradient norm from the oracle's; infinite if any is missing."""
        truth = self.rows[ORACLES[CONTENDERS[name].trains]]
        found = [line[key] for key in ("losses", "grad_norms")]
        wanted = [truth[key] for key in ("losses", "grad_norms")]
        if any(len(x) != self.preset.steps for x in (*found, *wanted)):
            return float("inf")
        errors = torch.tensor(found, dtype=torch.float64) / torch.tensor(wanted, dtype=torch.float64) - 1
        return float(errors.abs().nan_to_num(float("inf")).max())

    def as_json(self) -> dict[str, Any]:
        """Everything but the meta data."""
        rows = []
        for name, row in self.rows.items():
            contender = CONTENDERS[name]
            about = {
                "contender": name,
                "package": PACKAGES[contender.trainer],
                "trains": contender.trains,
                "arguments": dict(contender.arguments),
            }
            rows.append(about | row | _summary(row))
        return {
            "shape": dataclasses.asdict(self.preset.shape),
            "rows": rows,
            "skipped": [{"contender": name, "reason": reason} for name, reason in self.skipped.items()],
        }


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return {}
    times = row["seconds"]
    medians = {key.replace("seconds", "median"): median(row[key]) for key in ADDED[1:]}
    return {"median": median(times), "min": min(times), "max": max(times)} | medians
