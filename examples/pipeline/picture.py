"""The true reward of each model's held-out responses: a table, report.json and pipeline.png."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

from fastpo.resumable import read_jsonl

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = ("sft", "best_of_4", "dpo", "rso_dpo", "ppo", "ppo_disco")
folder = Path(sys.argv[1])


def true_rewards(name: str) -> list[float]:
    """Mean true reward of the responses to each held-out prompt."""
    rows = read_jsonl(folder / "held_out" / f"{name}.true.jsonl")
    return [statistics.mean(row["rewards"] if "rewards" in row else [row["reward"]]) for row in rows]


start, report = true_rewards("sft"), {}
for name in NAMES:
    rewards = true_rewards(name)
    gains = [after - before for after, before in zip(rewards, start, strict=True)]  # of the same prompts
    report[name] = {
        "true_reward": statistics.mean(rewards),
        "gain": statistics.mean(gains),
        "standard_error": statistics.stdev(gains) / len(gains) ** 0.5,
    }
    print(
        "{:10} true reward {true_reward:6.3f}   gain {gain:6.3f} +- {standard_error:.3f}".format(name, **report[name])
    )
(folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")

figure, (bars, course) = pyplot.subplots(ncols=2, figsize=(11, 4), layout="constrained")
bars.bar(NAMES, [report[name]["true_reward"] for name in NAMES])
bars.errorbar(
    NAMES, [report[name]["true_reward"] for name in NAMES],
    yerr=[2 * report[name]["standard_error"] for name in NAMES], fmt="none", color="black", capsize=4,
)  # fmt: skip
bars.set(ylabel="true reward, held-out prompts", title="mean, and two standard errors of the gain over sft")
for name in ("ppo", "ppo_disco"):
    rows = [row for row in read_jsonl(folder / name / "metrics.jsonl") if "reward" in row]
    course.plot([row["kl"] for row in rows], [row["reward"] for row in rows], marker=".", label=name)
course.set(xlabel="KL to the reference, nats a token", ylabel="reward of the rollouts", title="reward against KL")
course.legend()
for axes in (bars, course):
    axes.grid(alpha=0.3)
figure.savefig(folder / "pipeline.png", dpi=120)
print(f"picture: {folder / 'pipeline.png'}")
