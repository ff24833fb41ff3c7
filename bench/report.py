"""Markdown from results, and docs/benchmarks.md from the checked-in ones: ``python -m bench.report [--check]``."""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import step_report
from bench.machine import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GROUP = ("work", "tokens", "hidden", "vocab", "dtype", "completion_fraction")
TITLES = {
    "forward": "log-probs, forward",
    "frozen": "log-probs, forward + backward, frozen head",
    "trainable": "log-probs, forward + backward, trainable head",
    "dpo_frozen": "DPO step, policy + reference, frozen head",
    "dpo_trainable": "DPO step, policy + reference, trainable head",
}
Row = dict[str, Any]


def full_report(result: dict[str, Any]) -> str:
    """Every point of one result."""
    return f"# Benchmark, preset {result['meta']['preset']}\n\n" + "\n".join(_sections(result, every=True))


def page_section(results: Path = RESULTS) -> str | None:
    """What belongs between the page's markers: the main points of every preset's result; None without results."""
    read = (json.loads(path.read_text()) for path in sorted(results.glob("*.json")))
    found = [result for result in read if "rows" in result]  # bench.trl_swap has a page of its own
    lines = (line for result in found for line in _main_lines(result))
    return "\n".join(lines).rstrip() if found else None


def _main_lines(result: dict[str, Any]) -> Iterator[str]:
    return step_report.sections(result) if "shape" in result else _sections(result, every=False)


def _sections(result: dict[str, Any], *, every: bool) -> Iterator[str]:
    yield provenance(result)
    unit = ("ms", 1e3) if result["meta"]["device"] == "cuda" else ("s", 1.0)
    groups = [list(rows) for _, rows in groupby(result["rows"], key=lambda row: [row[key] for key in GROUP])]
    shown = [rows for rows in groups if every or rows[0]["main"]]
    if verdicts := [line for rows in shown for line in _verdicts(rows, unit[0] == "ms")]:
        yield (
            "| fastpo | work | tokens | / bare GEMM | / eager | / fastest peer without full logits "
            "| / fastest summed loss | memory / eager |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        yield from verdicts
        yield ""
    for rows in shown:
        yield from _table(rows, *unit)
    yield from _accuracy(result["accuracy"])
    if result["skipped"]:
        yield "Not run here: " + "; ".join(f"{x['contender']} ({x['reason']})" for x in result["skipped"]) + ".\n"


def _table(rows: list[Row], unit: str, scale: float) -> Iterator[str]:
    first = rows[0]
    labelled = next((f" ({row['labelled']} labelled)" for row in rows if row.get("labelled")), "")
    labelled = labelled if first["completion_fraction"] < 1 else ""
    yield (
        f"**{TITLES[first['work']]}**, {first['tokens']} tokens{labelled}, D={first['hidden']}, V={first['vocab']}, "
        f"{first['dtype']}\n"
    )
    is_dpo = first["work"].startswith("dpo")
    yield (
        f"| contender | first call {unit} | / bare | warm {unit} | min..max | / bare | extra MB | gives "
        f"| full logits | {'loss error*' if is_dpo else 'log-prob error'} | dh error{'*' * is_dpo} |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    bare = next((row for row in rows if row["contender"] == "bare GEMM" and "median" in row), None)
    for row in rows:
        if "failed" in row:
            yield f"| {row['contender']} | {row['failed']} |" + " |" * 9
            continue
        errors = row["gate_errors"]
        cells = [
            row["contender"],
            f"{row['first_median'] * scale:.3g}",
            f"{row['first_median'] / bare['first_median']:.2f}" if bare else "",
            f"{row['median'] * scale:.3g}",
            f"{row['min'] * scale:.3g}..{row['max'] * scale:.3g}",
            f"{row['median'] / bare['median']:.2f}" if bare else "",
            f"{row['extra_bytes'] / 1e6:.0f}",
            _gives(row),
            "yes" if row["full_logits"] else "no",
            _number(errors.get("loss") if is_dpo else row["error_logps"]),
            _number(errors.get("hidden_grad") if is_dpo else row["error_hidden_grad"]),
        ]
        yield "| " + " | ".join(cells) + " |"
    yield "\n\\* relative, on the gate's small problem\n" if is_dpo else ""


def _verdicts(rows: list[Row], on_gpu: bool) -> Iterator[str]:
    """fastpo's modes against the others of one point: ratios of a first call and of a warm one (a GPU's: warm).

    A contender that gives a summed loss alone is no peer at log-probs; it has a column of its own.
    """
    done = {row["contender"]: row for row in rows if "median" in row}
    peers = [row for row in done.values() if row["package"] != "fastpo" and row["contender"] != "bare GEMM"]
    frugal = [row for row in peers if not row["full_logits"] and not row["summed"]]
    summed = [row for row in peers if not row["full_logits"] and row["summed"]]
    eager = done.get("eager")

    def ratio(row: Row, others: list[Row]) -> str:
        keys = ("median",) if on_gpu else ("first_median", "median")
        if not others:
            return ""
        return " / ".join(f"{row[key] / min(other[key] for other in others):.2f}" for key in keys)

    for row in done.values():
        if row["package"] != "fastpo":
            continue
        memory = f"{row['extra_bytes'] / eager['extra_bytes']:.1%}" if eager and eager["extra_bytes"] else ""
        bare = [done["bare GEMM"]] if "bare GEMM" in done else []
        yield (
            f"| {row['contender'].removeprefix('fastpo ')} | {row['work']} | {row['tokens']} | {ratio(row, bare)} "
            f"| {ratio(row, [eager] if eager else [])} | {ratio(row, frugal)} | {ratio(row, summed)} | {memory} |"
        )


def _accuracy(found: dict[str, Any]) -> Iterator[str]:
    rows = found["rows"]
    if not rows:
        return
    best = min((row["max"] for name, row in rows.items() if name.startswith("fastpo")), default=None)
    yield (
        f"**Error of sequence log-probs** against float64, in nats: {found['sequences']} completions of "
        f"{found['shortest']} to {found['longest']} tokens, {found['dtype']} inputs, D={found['hidden']}, "
        f"V={found['vocab']}, logits up to about 20 (mean log-prob {found['mean_logp']:.2f}, mean entropy "
        f"{found['mean_entropy']:.2f}), the same data for all\n"
    )
    yield "| contender | root mean square | largest | / fastpo's largest |"
    yield "|---|---|---|---|"
    for name, row in rows.items():
        against = f"{row['max'] / best:.0f}" if best else ""
        yield f"| {name} | {row['rms']:.1e} | {row['max']:.1e} | {against} |"
    yield ""


def _gives(row: Row) -> str:
    if row["contender"] == "bare GEMM":
        return "nothing"
    if row["summed"] or row["work"].startswith("dpo"):
        return "a loss"
    return "log-probs, entropy" if row["entropy"] else "log-probs"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare: exit status 1 if the page differs")
    arguments = parser.parse_args(argv)
    section = page_section()
    if section is None:
        print(f"no results in {RESULTS.relative_to(ROOT)}", file=sys.stderr)
        return 1
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{section}\n{END}{after}"
    if arguments.check:
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
