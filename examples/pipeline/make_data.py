"""The pipeline's data: responses to learn to speak from, noisy preferences, prompts to improve on, held-out ones."""

import json
import sys
from pathlib import Path

from fastpo.planted_rewards import graded_preferences, graded_responses

folder = Path(sys.argv[1])
sizes = {"responses": 4096, "preferences": 2048, "held_out": 256, "prompts": 256, "held_out_prompts": 128}
scale = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0  # less of everything, for a quick look

rows = {name: max(8, round(scale * size)) for name, size in sizes.items()}
data = {
    "responses": graded_responses(rows["responses"], seed=1),
    "preferences": graded_preferences(rows["preferences"], seed=2),
    "held_out": graded_preferences(rows["held_out"], seed=3),
    "prompts": [{"prompt": row["prompt"]} for row in graded_responses(rows["prompts"], seed=4)],
    "held_out_prompts": [{"prompt": row["prompt"]} for row in graded_responses(rows["held_out_prompts"], seed=5)],
}
folder.mkdir(parents=True, exist_ok=True)
for name, lines in data.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
