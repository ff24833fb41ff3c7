"""Markdown of a result of the preset step."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from bench.machine import provenance
from bench.step_contenders import CACHED
from bench.step_problem import LORA_RANK, StepShape

# What fastpo's LoRA with a cached reference is to need, as a share of TRL's time and of TRL's extra memory.
MOST_TIME, MOST_MEMORY = 0.5, 0.35
Row = dict[str, Any]


def full_report(result: dict[str, Any]) -> str:
    return f"# Benchmark, preset {result['meta']['preset']}\n\n" + "\n".join(sections(result))


def sections(result: dict[str, Any]) -> Iterator[str]:
    """The lines of the report, without a title."""
    yield provenance(result)
    yield (
        f"One step of {StepShape(**result['shape'])}; fp32, AdamW, LoRA of rank {LORA_RANK} on every linear layer but "
        "the head. The time is what a Trainer needs between `on_step_begin` and `on_step_end`: forward, backward, "
        "clipping, optimizer; the first step of a process warms up. Extra memory is the highest resident memory of "
        "training, the first step included, less that after loading: models (two where the whole model is trained), "
        "data and trainer. Set-up is all between the models and the first step: tokenising, the trainer, and the "
        "reference's log-probs where they are computed ahead, which a run pays once. Losses and gradient norms differ "
        "from the plain loop's by the error shown, relative.\n"
    )
    rows = result["rows"]
    done = {row["contender"]: row for row in rows if "median" in row}
    yield "| contender | step s | min..max | / TRL's | extra MB | / TRL's | loaded MB | set-up s | first s | error |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if "failed" in row:
            yield f"| {row['contender']} | {row['failed']} |" + " |" * 8
            continue
        peer = done.get(f"TRL, {row['trains']}")
        cells = [
            row["contender"],
            f"{row['median']:.3g}",
            f"{row['min']:.3g}..{row['max']:.3g}",
            f"{time_ratio(row, peer):.2f}" if peer else "",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{memory_ratio(row, peer):.2f}" if peer else "",
            f"{row['loaded_bytes'] / 1e6:.0f}",
            f"{row['setup_median']:.1f}",
            f"{row['first_median']:.3g}",
            f"{row['error']:.0e}",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield from _targets(done)
    if result["skipped"]:
        yield "Not run here: " + "; ".join(f"{x['contender']} ({x['reason']})" for x in result["skipped"]) + ".\n"


def time_ratio(row: Row, other: Row) -> float:
    """Median of the ratios of steps that were taken in the same round."""
    return median(a / b for a, b in zip(row["seconds"], other["seconds"], strict=True))


def memory_ratio(row: Row, other: Row) -> float:
    ratio: float = row["extra_bytes"] / other["extra_bytes"]
    return ratio


def _targets(done: dict[str, Row]) -> Iterator[str]:
    ours = [row for row in done.values() if row["package"] == "fastpo" and row["arguments"].items() >= CACHED.items()]
    peers = [row for row in done.values() if row["package"] == "trl"]
    if not ours or not peers:
        return
    yield (
        f"**Wanted of fastpo's LoRA with a cached reference**: at most {MOST_TIME} of TRL's time and {MOST_MEMORY} of "
        "its extra memory. Time / memory against each of TRL's ways:\n"
    )
    yield "| | " + " | ".join(row["contender"] for row in peers) + " |"
    yield "|---|" + "---|" * len(peers)
    for row in ours:
        cells = [
            f"{_verdict(time_ratio(row, peer), MOST_TIME)} / {_verdict(memory_ratio(row, peer), MOST_MEMORY)}"
            for peer in peers
        ]
        yield f"| {row['contender']} | " + " | ".join(cells) + " |"
    yield ""


def _verdict(ratio: float, most: float) -> str:
    return f"{ratio:.2f} {'met' if ratio <= most else 'missed'}"
