"""Runs the contenders of a preset, each in fresh processes, and collects what they print."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.contenders import CONTENDERS
from bench.gate import STRICT, TOLERANCES
from bench.presets import Preset
from bench.problem import Spec
from bench.worker import MARK

ROOT = Path(__file__).parents[1]
SIZE_ERRORS = ("error_logps", "error_hidden_grad")


class GateError(RuntimeError):
    """fastpo is wrong, so nothing is reported."""


def spawn(
    job: dict[str, Any], limit: float, threads: int | None = None, *, module: str = "bench.worker"
) -> tuple[list[dict[str, Any]], str]:
    """The lines that one worker printed within `limit` seconds, and why it ended badly ("" if it did not)."""
    # Huge pages: without them the contenders with large buffers mostly measure page faults.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(json.dumps(job), timeout=max(limit, 1))
            trouble = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            trouble = f"no end within {limit:.0f} s"
        errors.seek(0)
        if trouble and (last := errors.read().strip().splitlines()):
            trouble += f": {last[-1][:200]}"
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    return [json.loads(line) for line in lines], trouble


class Session:
    """One run of a preset: what is known so far, and how much time is left."""

    def __init__(
        self, preset: Preset, device: torch.device, names: list[str], *, repeats: int, threads: int | None, folder: Path
    ) -> None:
        self.preset, self.device, self.repeats, self.threads = preset, device, repeats, threads
        self.truth = folder / "truth.pt"
        self.end = time.monotonic() + preset.budget
        self.rows: dict[tuple[Spec, str], dict[str, Any]] = {}
        self.gate: dict[str, dict[str, Any]] = {}
        self.accuracy: dict[str, Any] = {"rows": {}}
        self.skipped: Counter[tuple[str, str]] = Counter()
        self.machine: dict[str, Any] = {}
        self.plan: dict[str, list[Spec]] = {}
        for name in names:
            reasons = {spec: CONTENDERS[name].missing(device, spec) for spec in preset.points}
            able = [spec for spec, reason in reasons.items() if reason is None and preset.wants(name, spec)]
            unavailable = CONTENDERS[name].unavailable(device)
            if unavailable is not None:
                self.skipped[name, unavailable] += 1
            elif able or "forward" in CONTENDERS[name].works:  # these show their sequences' error at least
                self.plan[name] = able

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> None:
        self._look_at_machine()
        if self.preset.fresh_per_point:
            for name in self.plan:
                self._job(name, [], first=True)
            for repeat in range(self.repeats):
                for spec in self.preset.points:
                    for name in self.plan:
                        if spec in self.plan[name]:
                            self._job(name, [spec])
                self._say(f"round {repeat + 1} of {self.repeats} done")
            return
        begun = time.monotonic()
        for name, points in self.plan.items():
            self._job(name, points, first=True)
        round_seconds = time.monotonic() - begun
        for _ in range(1, self.repeats):
            # The main points are a part of the first round's; starting the processes is the rest.
            if self.left < 0.7 * round_seconds:
                self._say("no time for another round")
                break
            begun = time.monotonic()
            for name, points in self.plan.items():
                self._job(name, [spec for spec in points if spec.main])
            round_seconds = (time.monotonic() - begun) / 0.7

    def _look_at_machine(self) -> None:
        lines, trouble = spawn(self._request(None, []), self.preset.process_limit, self.threads)
        found = {line.pop("kind"): line for line in lines}
        if "truth" not in found:
            raise RuntimeError(f"the float64 truth could not be computed: {trouble}")
        self.machine = found["ceiling"]
        self.accuracy |= found["truth"]

    def _request(self, name: str | None, points: list[Spec], *, first: bool = False) -> dict[str, Any]:
        contender = None if name is None else CONTENDERS[name]
        works = {spec.work for spec in self.plan[name]} or {"forward"} if name is not None and first else set()
        scored = contender is None or (first and "forward" in contender.works)
        return {
            "contender": name,
            "device": str(self.device),
            "dtype": self.preset.dtype,
            "gate": sorted(works),
            "points": [spec.as_json() for spec in points],
            "seconds": self.preset.seconds,
            "deadline": 0.9 * min(self.preset.process_limit, self.left),
            "accuracy": self.preset.accuracy.as_json() if scored else None,
            "truth": str(self.truth),
        }

    def _job(self, name: str, points: list[Spec], *, first: bool = False) -> None:
        points = [spec for spec in points if self._worth_running(name, spec)]
        if not points and not first:
            return
        if self.left < 5:
            for spec in points:
                self._collect(name, spec, {"failed": "out of time"})
            return
        begun = time.monotonic()
        limit = min(self.preset.process_limit, self.left)
        lines, trouble = spawn(self._request(name, points, first=first), limit, self.threads)
        self._file(name, lines, {json.dumps(spec.as_json()): spec for spec in points})
        if trouble:
            for spec in points:
                if (spec, name) not in self.rows:
                    self._collect(name, spec, {"failed": trouble})
            if first:
                self._distrust(name, trouble)
        self._say(f"{name}: {len(lines)} results in {time.monotonic() - begun:.0f} s {trouble}".rstrip())

    def _worth_running(self, name: str, spec: Spec) -> bool:
        verdict = self.gate.get(name, {}).get(spec.work, {"ok": True})
        if not verdict["ok"]:
            self._collect(name, spec, {"failed": f"wrong: {verdict['reason']}"})
        return "failed" not in self.rows.get((spec, name), {})

    def _file(self, name: str, lines: list[dict[str, Any]], points: dict[str, Spec]) -> None:
        for line in lines:
            kind = line.pop("kind")
            if kind == "gate":
                self._judge(name, line)
            elif kind == "accuracy":
                self.accuracy["rows"][name] = line
            else:
                self._collect(name, points[json.dumps(line.pop("spec"))], line)

    def _distrust(self, name: str, trouble: str) -> None:
        """A contender whose first process ended badly is not timed where it has not passed the gate."""
        if CONTENDERS[name].package == "fastpo":
            raise GateError(f"{name} did not end well: {trouble}")
        for spec in self.plan[name]:
            unknown = {"ok": False, "errors": {}, "reason": trouble}
            self.gate.setdefault(name, {}).setdefault(spec.work, unknown)

    def _judge(self, name: str, verdict: dict[str, Any]) -> None:
        self.gate.setdefault(name, {})[verdict.pop("work")] = verdict
        if not verdict["ok"] and CONTENDERS[name].package == "fastpo":
            raise GateError(f"{name} is wrong: {verdict['reason']}")

    def _collect(self, name: str, spec: Spec, result: dict[str, Any]) -> None:
        contender = CONTENDERS[name]
        limits = STRICT if contender.fp32_statistics else TOLERANCES[spec.dtype]
        for error, limit in zip(SIZE_ERRORS, limits, strict=True):
            if (result.get(error) or 0) > limit:
                if contender.package == "fastpo":
                    raise GateError(f"{name} is wrong at {spec}: {error} {result[error]:.1e} > {limit:.0e}")
                result = {"failed": f"wrong: {error} {result[error]:.1e}"}
                break
        row = self.rows.setdefault((spec, name), {})
        if "failed" in result:
            if not row.get("seconds"):
                row["failed"] = result["failed"]
            return
        for key in ("seconds", "first_seconds"):
            result[key] = row.get(key, []) + result[key]
        result["extra_bytes"] = max(result["extra_bytes"], row.get("extra_bytes", 0))
        row |= result

    def as_json(self) -> dict[str, Any]:
        """Everything but the meta data."""
        rows = []
        order = {name: i for i, name in enumerate(CONTENDERS)}
        for (spec, name), result in sorted(
            self.rows.items(), key=lambda item: (self.preset.points.index(item[0][0]), order[item[0][1]])
        ):
            contender = CONTENDERS[name]
            fields = {key: value for key, value in spec.as_json().items() if key != "contenders"}
            rows.append(
                fields
                | {"contender": name, "package": contender.package}
                | {
                    "entropy": contender.entropy,
                    "full_logits": contender.full_logits,
                    "summed": contender.summed and spec.work != "forward",
                }
                | result
                | _summary(result)
                | {"gate_errors": self.gate.get(name, {}).get(spec.work, {}).get("errors", {})}
            )
        return {
            "gemm_ceiling_tflops": self.machine["tflops"],
            "rows": rows,
            "accuracy": self.accuracy,
            "gate": self.gate,
            "skipped": [{"contender": name, "reason": reason} for name, reason in self.skipped],
        }

    def _say(self, text: str) -> None:
        print(f"[{self.preset.budget - self.left:5.0f} s] {text}", file=sys.stderr, flush=True)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    if "failed" in result:
        return {}
    times = result["seconds"]
    return {
        "median": median(times),
        "min": min(times),
        "max": max(times),
        "first_median": median(result["first_seconds"]),
    }
