"""Pictures of a result: time, memory and achieved TFLOP/s against tokens, one line a contender."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.problem import USEFUL_UNITS

Row = dict[str, Any]
WORKS = {"frozen": "frozen head", "trainable": "trainable head"}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes NAME-time.png, NAME-memory.png and NAME-tflops.png; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    name = result["meta"]["preset"]
    lines = _lines(result["rows"])
    if not lines:
        return []
    pictures = (
        ("time", "seconds, forward + backward", lambda row: row["median"], None),
        ("memory", "extra memory, MB", lambda row: max(row["extra_bytes"] / 1e6, 1), None),
        ("tflops", "TFLOP/s of useful products", achieved_tflops, result["gemm_ceiling_tflops"]),
    )
    return [
        _draw_one(folder / f"{name}-{kind}.png", label, lines, value, ceiling)
        for kind, label, value, ceiling in pictures
    ]


def achieved_tflops(row: Row) -> float:
    """Products that the result needs over the time taken: recomputing a projection earns nothing."""
    flops = USEFUL_UNITS[row["work"]] * 2 * row["labelled"] * row["hidden"] * row["vocab"]
    return float(flops / row["median"] / 1e12)


def _lines(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """work -> contender -> rows by tokens, at the hidden size that has the most points."""
    able = [row for row in rows if "median" in row and row["work"] in WORKS]
    if not able:
        return {}
    sizes = [row["hidden"] for row in able]
    hidden = max(set(sizes), key=lambda size: (sizes.count(size), size))
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(able, key=lambda row: row["tokens"]):
        if row["hidden"] == hidden:
            found[row["work"]][row["contender"]].append(row)
    return found


def _draw_one(
    path: Path, label: str, lines: dict[str, dict[str, list[Row]]], value: Any, ceiling: float | None
) -> Path:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for contenders in lines.values() for name in contenders))
    markers = "osv^D*PX<>ph"
    fig, axes = plt.subplots(1, len(lines), figsize=(6 * len(lines), 5), squeeze=False, sharey=True)
    for ax, (work, contenders) in zip(axes[0], lines.items(), strict=True):
        for name, rows in contenders.items():
            i = names.index(name)
            ours = name.startswith("fastpo")
            ax.plot(
                [row["tokens"] for row in rows], [value(row) for row in rows], label=name, color=f"C{i % 10}",
                marker=markers[i % len(markers)], linewidth=2.5 if ours else 1.2,
                linestyle=":" if name == "bare GEMM" else "-" if ours else "--",
            )  # fmt: skip
        if ceiling is not None:
            ax.axhline(ceiling, color="black", linewidth=0.8)
            ax.annotate("measured GEMM ceiling", (0.02, ceiling), xycoords=("axes fraction", "data"), va="bottom")
        ax.set_title(f"{WORKS[work]}, D={next(iter(contenders.values()))[0]['hidden']}")
        ax.set_xlabel("tokens")
        ax.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for rows in contenders.values() for row in rows})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        if ceiling is None:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.1 * max(ceiling, *(value(row) for rows in contenders.values() for row in rows)))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0][0].set_ylabel(label)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path
