"""Peak memory of training, predicted and measured, of the recipes in bench/plan_recipes.

``python -m bench.plan`` trains each recipe for a few steps in processes of its own and prints a table.
``python -m bench.plan RECIPE.yaml`` measures one, in this process, and prints a JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastpo.planted import planted_preferences

RECIPES = Path(__file__).parent / "plan_recipes"
ROWS, STEPS = 32, 2


def long_pairs(rows: int) -> list[dict[str, Any]]:
    """Planted pairs, a few of them joined to one, so that most are longer than the recipes' max_length."""
    parts = planted_preferences(rows * 24, seed=0)
    pairs = []
    for first in range(0, len(parts), 24):
        group = parts[first : first + 24]
        texts = {side: [pair[side][0]["content"] for pair in group] for side in ("prompt", "chosen", "rejected")}
        # Every fourth row is short: a batch has padding, and an attention mask.
        count = 4 if first // 24 % 4 == 3 else 24
        pairs.append(
            {
                "prompt": [{"role": "user", "content": " ".join(texts["prompt"][:count])}],
                "chosen": [{"role": "assistant", "content": " ".join(texts["chosen"][:count])}],
                "rejected": [{"role": "assistant", "content": " ".join(texts["rejected"][:count])}],
            }
        )
    return pairs


def measure(recipe_file: str) -> dict[str, Any]:
    """Train, predict, report both in bytes."""
    from fastpo.callbacks import PeakMemory
    from fastpo.dry_run import lengths_of
    from fastpo.plan import Planner
    from fastpo.recipe import parse_recipe
    from fastpo.run import prepare_training

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        data.write_text("".join(json.dumps(pair) + "\n" for pair in long_pairs(ROWS)))
        overrides = ["--dataset", str(data), "--output_dir", folder, "--max_steps", str(STEPS), "--use_cpu", "true"]
        overrides += ["--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"]
        recipe, args = parse_recipe(recipe_file, overrides)
        trainer = prepare_training(recipe, args)
        trainer.train()
        memory = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PeakMemory))
        predicted = Planner(recipe, args, lengths_of(trainer.train_dataset), on_gpu=False).predict()
    return {"measured": memory.bytes, "predicted": predicted.total, "parts": predicted.parts}


def in_new_process(recipe: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.plan", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{recipe} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.recipe:
        print(json.dumps(measure(arguments.recipe)))
        return
    print("| recipe | predicted, MB | measured, MB | predicted / measured |\n|---|---|---|---|")
    for recipe in sorted(RECIPES.glob("*.yaml")):
        runs = [in_new_process(recipe) for _ in range(arguments.repeats)]
        peaks = [run["measured"] / 2**20 for run in runs]
        predicted = runs[0]["predicted"] / 2**20
        ratios = ", ".join(f"{predicted / peak:.3f}" for peak in peaks)
        measured = ", ".join(f"{peak:.0f}" for peak in peaks)
        print(f"| {recipe.stem} | {predicted:.0f} | {measured} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
