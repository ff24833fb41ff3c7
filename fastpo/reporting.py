"""What a run leaves behind for people: metrics.jsonl, curves as PNG, a final table."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpo.files import append_line, replacing

METRICS_FILE = "metrics.jsonl"
CURVES = {
    "loss": ("loss", "eval_loss"),
    "accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "margin": ("rewards/margins", "eval_rewards/margins"),
    "nll": ("nll", "eval_nll"),
    "ece": ("eval_ece",),
    "reward": ("reward", "eval_reward"),
    "kl": ("kl/completion", "eval_kl/completion"),
}
TABLE_ROWS = (
    "loss", "nll", "ece", "reward", "kl/completion", "kl", "entropy", "completions/mean_length",
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "logps/chosen", "logps/rejected", "entropy/chosen", "entropy/rejected", "beta/mean", "beta/std", "variance/mean",
)  # fmt: skip


class MetricsFile(TrainerCallback):
    """Appends every log to DIR/metrics.jsonl, one JSON object a line; a resumed run goes on from its checkpoint's.

    Raises:
        SaveError: the file cannot be written.
    """

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # The file may say more than the checkpoint remembers, which is about to be logged again, or end in the
            # middle of a line.
            with replacing(self.path) as path:
                path.write_text("".join(_line(row["step"], row) + "\n" for row in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_line(self.path, _line(state.global_step, logs))


def _line(step: int, logs: dict[str, Any]) -> str:
    return json.dumps({"step": step, **logs})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a killed run left half-written is dropped."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def draw_curves(output_dir: str | Path) -> list[Path]:
    """loss.png and the others of `CURVES` beside metrics.jsonl, for those logged; beta.png of a learned beta."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, drawn = read_metrics(Path(output_dir) / METRICS_FILE), []
    for title, names in CURVES.items():
        lines = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
        if not any(lines.values()):
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for name, points in lines.items():
            if points:
                marker = "o" if len(points) < 25 else None
                axes.plot(*zip(*points, strict=True), marker=marker, label="held out" if "eval" in name else "training")
        axes.set(xlabel="optimiser step", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
        drawn.append(Path(output_dir) / f"{title}.png")
        with replacing(drawn[-1]) as path:
            figure.savefig(path, dpi=120)
        pyplot.close(figure)
    learned = [row for row in rows if "log_s/mean" in row]
    if learned:
        drawn.append(Path(output_dir) / "beta.png")
        _draw_beta(learned, drawn[-1])
    return drawn


def _draw_beta(rows: list[dict[str, Any]], path: Path) -> None:
    """Spread of beta_eff over training, and its last histogram in multiples of beta."""
    from matplotlib import pyplot

    figure, (course, last) = pyplot.subplots(ncols=2, figsize=(10, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    mean, std, low, high = ([row[f"beta/{name}"] for row in rows] for name in ("mean", "std", "min", "max"))
    course.plot(steps, mean, label="mean")
    inner = [[m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1)]
    course.fill_between(steps, *inner, alpha=0.4, label="one deviation")
    course.fill_between(steps, low, high, alpha=0.15, label="least to greatest")
    course.set(xlabel="optimiser step", ylabel="beta_eff(x)")
    course.grid(alpha=0.3)
    course.legend()
    bins = {name.rpartition("/")[2]: x for name, x in rows[-1].items() if name.startswith("beta/histogram/")}
    last.bar(list(bins), list(bins.values()))
    last.set(xlabel="beta_eff(x) / beta", ylabel="share of prompts, last log")
    last.tick_params(axis="x", rotation=45)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def final_table(output_dir: str | Path) -> str:
    """First and last training log and last evaluation, side by side."""
    rows = read_metrics(Path(output_dir) / METRICS_FILE)
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    columns = {
        "first": training[0] if training else {},
        "last": training[-1] if training else {},
        "held out": {k.removeprefix("eval_"): v for k, v in evaluations[-1].items()} if evaluations else {},
    }
    lines = [f"{'':22}" + "".join(f"{name:>12}" for name in columns)]
    for name in TABLE_ROWS:
        values = [column.get(name) for column in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{name:22}" + "".join(f"{'':>12}" if v is None else f"{v:12.4f}" for v in values))
    return "\n".join(lines)
