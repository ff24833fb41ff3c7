"""The memory plan: parts against exact counts, searches against brute force, a recipe against a measurement."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SHAPE

from fastpo import dry_run, plan, shape_mode
from fastpo.cli import main
from fastpo.dry_run import Lengths, longest_batches, planned_config
from fastpo.from_recipe import build_model, build_peft_config
from fastpo.kernels import fused
from fastpo.memory import PeakMeter
from fastpo.plan import GB, Planner, memory_of, parse_memory, usable
from fastpo.planted import planted_preferences
from fastpo.recipe import parse_recipe
from fastpo.reporting import read_metrics
from fastpo.shape_mode import ShapeMode

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {
    "stage": "dpo",
    "model_config": {"model_type": "qwen3", "vocab_size": 300, **SHAPE},
    "tokenizer_vocab_size": 300,
    "dtype": "float32",
    "use_cpu": True,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "report_to": "none",
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "run")}))
    return path


def planner(tmp_path: Path, rows: list[Lengths] | None = None, on_gpu: bool = False, **fields: Any) -> Planner:
    path = tmp_path / "planned.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path), "dataset": "none", **fields}))
    return Planner(*parse_recipe(str(path), []), rows, on_gpu)


def model_of(of: Planner) -> Any:
    """The real one, with its adapter."""
    model = build_model(of.recipe, of.args, dry_run._Tokenizer(2))
    config = build_peft_config(of.recipe)
    if config is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, config)


def bytes_of(tensors: Any) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def trainable(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def stretches(of: Planner) -> list[dict[str, int]]:
    (rows,) = of._batches(of.args)
    return dry_run.dry_run(of.recipe, of.args, rows, planned_config(of.recipe), of.on_gpu)


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def most(found: list[dict[str, int]], part: str) -> int:
    return max(parts.get(part, 0) for parts in found)


# --- tensors without data -------------------------------------------------------------------------------------------


def test_floats_have_shapes_and_integers_have_values() -> None:
    with ShapeMode():
        huge = torch.empty(1 << 20, 1 << 20)
        labels = torch.tensor([3, -100, 5])
        rows = (labels >= 0).nonzero()[:, 0]
        taken = huge[:3, :7][rows]
        assert rows.tolist() == [0, 2] and taken.shape == (2, 7)
        assert bool(torch.isfinite(taken).all()) and (taken @ taken.T).sum().item() == 1.0


def test_timeline_has_what_is_alive_at_the_highest_moment() -> None:
    mode = ShapeMode()
    with mode:
        a = torch.empty(1000)
        with mode.part("other"):
            b = torch.empty(250) + 1
            view = b.view(50, 5)[3:]
            del b
        del a
        torch.empty(500)
    found = mode.timeline.stretches()
    assert max(found, key=total) == {"activations": 4000, "other": 2000}
    assert found[-1] == {"activations": 2000, "other": 1000}
    assert view.shape == (47, 5)


def test_the_head_run_over_its_first_rows_is_the_head_run_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**RECIPE["model_config"], "vocab_size": 40_000, "tie_word_embeddings": False}
    for fields in ({}, {"use_peft": True}):
        of = planner(tmp_path, model_config=config, **fields)
        short = stretches(of)
        monkeypatch.setattr(shape_mode, "HEAD_ROWS", 1 << 30)
        whole = stretches(of)
        # Fewer tiles, so that a stretch's halves meet elsewhere; its highest moment is the same.
        highest = [[max(map(total, found[i : i + 2])) for i in range(0, len(found), 2)] for found in (short, whole)]
        assert highest[0] == highest[1]
        monkeypatch.undo()


# --- parts ----------------------------------------------------------------------------------------------------------


def test_full_training(tmp_path: Path) -> None:
    of = planner(tmp_path)
    model, found = model_of(of), stretches(of)
    weights, trained = bytes_of([*model.parameters(), *model.buffers()]), bytes_of(trainable(model))
    assert most(found, "weights") == weights == most(found, "reference")
    # Of fp32 AdamW: two states of each weight and one number a tensor.
    assert most(found, "optimizer") == 2 * trained + 4 * len(trainable(model))
    at_the_step = next(parts for parts in reversed(found) if parts.get("gradients") == trained)
    assert at_the_step["optimizer"] == most(found, "optimizer")


def test_a_tied_heads_gradient_is_a_gradient_from_the_first(tmp_path: Path) -> None:
    shape = {**RECIPE["model_config"], "vocab_size": 20_000, "tie_word_embeddings": True}
    found, head = stretches(planner(tmp_path, model_config=shape)), 20_000 * SHAPE["hidden_size"] * 4
    # The head's waits for the embedding's, to be added to it.
    assert most(found, "gradients") >= 2 * head
    assert max(found, key=lambda parts: parts.get("head", 0))["gradients"] >= head


def test_lora(tmp_path: Path) -> None:
    of = planner(tmp_path, use_peft=True, lora_r=4, lora_modules_to_save=None)
    model, found = model_of(of), stretches(of)
    adapter = bytes_of(trainable(model))
    assert most(found, "weights") == bytes_of([*model.parameters(), *model.buffers()])
    assert most(found, "reference") == 0
    assert most(found, "gradients") == adapter
    assert most(found, "optimizer") == 2 * adapter + 4 * len(trainable(model))


def test_a_reference_of_its_own_and_none(tmp_path: Path) -> None:
    alone = planner(tmp_path, preset="simpo")
    assert most(stretches(alone), "reference") == 0
    cached = planner(tmp_path, precompute_ref_log_probs=True)
    assert most(stretches(cached), "reference") == 0
    assert most(stretches(planner(tmp_path, stage="sft")), "reference") == 0


def test_bf16_weights_are_half(tmp_path: Path) -> None:
    full, half = (stretches(planner(tmp_path, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert most(half, "reference") < 0.51 * most(full, "reference")  # rotary frequencies stay in fp32
    assert most(half, "optimizer") < 0.51 * most(full, "optimizer")


def test_eight_bit_states(tmp_path: Path) -> None:
    of = planner(tmp_path, optim="adamw_8bit")
    expected = 0
    for p in trainable(model_of(of)):
        n = p.numel()
        expected += 2 * (4 * n if n < 4096 else n + 4 * -(-n // 256))
    assert most(stretches(of), "optimizer") == expected


@pytest.mark.parametrize("switch", [
    {"gradient_checkpointing": True}, {"bf16": True}, {"split_responses": True}, {"per_device_train_batch_size": 1},
    {"max_length": 64}, {"prefix_sharing": None},
], ids=str)  # fmt: skip
def test_what_saves_activations_is_seen_to(tmp_path: Path, switch: dict[str, Any]) -> None:
    shape = {**RECIPE["model_config"], "num_hidden_layers": 4}
    of = planner(tmp_path, model_config=shape, max_length=128, prefix_sharing=False)
    assert of.predict(**switch).parts["activations"] < 0.9 * of.predict().parts["activations"]


def test_accumulation_keeps_the_gradients_beside_the_activations(tmp_path: Path) -> None:
    shape = {**RECIPE["model_config"], "vocab_size": 4000}
    once, twice = (
        planner(tmp_path, model_config=shape, stage="sft", gradient_accumulation_steps=n).predict().total
        for n in (1, 8)
    )
    assert twice > once


def test_the_fused_head_has_its_buffers(tmp_path: Path) -> None:
    on_cpu, on_gpu = (planner(tmp_path, on_gpu=on_gpu).predict() for on_gpu in (False, True))
    assert on_cpu.parts["libraries"] == plan.LIBRARIES and "libraries" not in on_gpu.parts
    call = {
        "labels": torch.arange(100) % 50 - 10, "weight": torch.empty(1 << 15, 8, dtype=torch.bfloat16),
        "ref_hidden": None, "mode": "frozen",
    }  # fmt: skip
    rows = int((call["labels"] >= 0).sum())
    assert dry_run._fused_workspace(call) == 12 * rows * (1 << 15) // 64 + 2 * rows * (1 << 14)
    assert (dry_run.SLICE_COLS, dry_run.SLICE_STEP, dry_run.SLICE_ELEMENTS) == (
        fused.MAX_COLS, fused.SLICE_STEP, fused.SLICE_ELEMENTS,
    )  # fmt: skip


# --- many layers and rows, lengths of the data ----------------------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {}, {"use_peft": True, "gradient_checkpointing": True},
    # A backward pass and the next forward pass with no head between them.
    {"use_peft": True, "lora_r": 2, "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
     "split_responses": True, "max_length": 256, "per_device_train_batch_size": 2},
], ids=str)  # fmt: skip
def test_straight_lines_end_where_the_whole_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    shape = {**RECIPE["model_config"], "num_hidden_layers": 9, "intermediate_size": 256}
    arguments = {"model_config": shape, "per_device_train_batch_size": 6, **fields}
    carried_on = planner(tmp_path, **arguments).predict()
    monkeypatch.setattr(plan, "MORE", 100)
    whole = planner(tmp_path, **arguments).predict()
    assert carried_on.total == pytest.approx(whole.total, rel=0.01)
    assert carried_on.parts["weights"] == whole.parts["weights"]


def test_the_longest_batches() -> None:
    rows = [Lengths(5, 5, 5), Lengths(5, 5, 5), Lengths(1, 8, 1), Lengths(4, 5, 5), Lengths(1, 1, 1)]
    # Two rows of ten tokens a side have no padding; the next shorter one takes the second's place.
    assert longest_batches(rows, 2) == [[rows[0], rows[3]], [rows[0], rows[1]]]
    assert longest_batches(rows[2:], 1) == [[rows[2]], [rows[3]]] or longest_batches(rows[2:], 1) == [[rows[3]]]


def test_without_a_longest_length_a_plan_needs_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length must be given for a plan without the data, got none"):
        planner(tmp_path, max_length=None)
    rows = [Lengths(4, 8, 8)] * 4
    assert planner(tmp_path, rows, max_length=None).predict() == planner(tmp_path, rows).predict()


def test_shorter_data_needs_less(tmp_path: Path) -> None:
    full = planner(tmp_path).predict().total
    data = planner(tmp_path, rows=[Lengths(8, 8, 8), Lengths(4, 8, 8), Lengths(4, 4, 4)]).predict().total
    assert data < full


# --- searches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [
    lambda n: 7 * n, lambda n: 100 + n, lambda n: 50 + 3 * n + n * n // 40, lambda n: max(120, 11 * n), lambda n: 30,
], ids=range(5))  # fmt: skip
@pytest.mark.parametrize("budget", [5, 30, 101, 119, 120, 640, 10_000])
@pytest.mark.parametrize("guess", [0.5, 4, 90])
def test_the_largest_that_fits(cost: Any, budget: int, guess: float) -> None:
    calls = []
    found = plan._largest_within(lambda n: (calls.append(n), cost(n))[1], budget, guess, 200)
    assert found == max((n for n in range(1, 201) if cost(n) <= budget), default=0)
    assert len(calls) <= 16 and len(calls) == len(set(calls))


def test_the_largest_batch_and_length(tmp_path: Path) -> None:
    of = planner(tmp_path)
    budget = of.predict(per_device_train_batch_size=5).total
    assert of.largest("per_device_train_batch_size", budget) == 5
    assert of.largest("per_device_train_batch_size", of.predict(per_device_train_batch_size=1).total - 1) is None
    assert of.largest("max_length", of.predict(max_length=192).total + 1) == 192
    short = planner(tmp_path, model_config={**RECIPE["model_config"], "max_position_embeddings": 128})
    assert short.largest("max_length", 100 * GB) == 128


def test_amounts_of_memory() -> None:
    assert parse_memory("24GB") == parse_memory("24") == memory_of("rtx 4090") == 24 * GB
    assert parse_memory("22.5 GiB") == round(22.5 * 2**30)
    assert usable(24 * GB, on_gpu=True) == round(24 * GB * 0.95) - 600 * 10**6


# --- the command ----------------------------------------------------------------------------------------------------


def said(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["plan", str(recipe), *more]) == 0
    return capsys.readouterr().out


def test_plan_of_a_recipe_without_data(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(recipe_file, capsys, "--cpu")
    for part in ("weights", "reference", "optimizer", "activations", "total"):
        assert f"  {part}" in text
    assert "Say --memory" in text and not (tmp_path / "run").exists()
    text = said(recipe_file, capsys, "--gpu", "T4", "--max_length", "32", "--model_config", json.dumps(
        {**RECIPE["model_config"], "max_position_embeddings": 64}
    ))  # fmt: skip
    assert "2 pairs of at most 32 tokens a side, on one GPU" in text and "it fits" in text
    assert "largest max_length with per_device_train_batch_size 2: 64" in text


def test_plan_says_what_would_make_it_fit(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = json.dumps({**RECIPE["model_config"], "vocab_size": 20_000, "hidden_size": 64})
    need = planner(recipe_file.parent, model_config=json.loads(shape), max_length=256).predict().total
    memory = f"{(need * 0.97 + plan.IMPORTS) / 10**6:.1f}MB"
    text = said(recipe_file, capsys, "--cpu", "--memory", memory, "--model_config", shape, "--max_length", "256")
    assert "it does not fit" in text
    helped = [line for line in text.splitlines() if line.endswith("  fits")]
    assert any("precompute_ref_log_probs: true" in line for line in helped)
    assert "together" not in text
    text = said(recipe_file, capsys, "--cpu", "--memory", "501MB", "--max_length", "256")
    assert "all of it together does not fit" in text and "none fits" in text


def test_plan_from_data(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in planted_preferences(8, seed=1)))
    arguments = ["--cpu", "--max_length", "2048", "--dataset", str(data)]
    by_data, by_length = (
        float(said(recipe_file, capsys, *arguments, *more).split("total")[1].split()[0])
        for more in (["--from_data"], [])
    )
    assert by_data < by_length


BAD_INPUT = {
    "memory": (["--memory", "plenty"], "memory must be a number of GB such as 24GB or 22.5GiB, got 'plenty'"),
    "card": (["--gpu", "H9000"], "gpu must be one of T4"),
    "both": (["--gpu", "H100", "--memory", "80GB"], "give either --memory or --gpu"),
    "card and cpu": (["--gpu", "H100", "--cpu"], "--cpu goes with --memory"),
    "optimizer": (["--optim", "lion_32bit"], "optim must be an adamw_torch one"),
    "no data": (["--from_data"], "--from_data needs the recipe, or --dataset, to name a dataset"),
    "recipe": (["--max_length", "1"], "max_length must be an integer >= 2"),
    "vocabulary": (
        ["--model_config", '{"model_type": "qwen3"}', "--tokenizer_vocab_size", "0", "--tokenizer_name_or_path", "x"],
        "model_config must state its vocab_size for a memory plan",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(recipe_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["plan", str(recipe_file), *arguments]) == 1
    assert message in capsys.readouterr().err


# --- against what is measured ---------------------------------------------------------------------------------------


def test_training_says_what_was_predicted_and_measured(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in planted_preferences(8, seed=1)))
    overrides = ["--dataset", str(data), "--max_steps", "2", "--save_strategy", "no"]
    with caplog.at_level("INFO"):
        assert main(["train", str(recipe_file), *overrides]) == 0
    (row,) = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "memory/predicted_gb" in row)
    assert row["memory/predicted_gb"] * GB > plan.LIBRARIES and row["memory/measured_gb"] >= 0
    assert "peak memory: predicted 0.0" in caplog.text


def test_peak_meter_counts_from_before_the_weights_to_the_highest_moment() -> None:
    meter = PeakMeter(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    torch.ones(128 << 20, dtype=torch.uint8)
    meter.start()
    torch.ones(32 << 20, dtype=torch.uint8)
    assert 90 << 20 < meter.peak() < 120 << 20
    assert held.all()


def test_freed_blocks_go_back_to_the_system() -> None:
    code = """
import torch
from fastpo.memory import PeakMeter, _resident, hand_back_what_is_freed
hand_back_what_is_freed()
for _ in range(2):  # by itself, glibc stops returning blocks of a size once it has freed one
    blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(48)]
    before = _resident()
    del blocks[::2]
    print((before - _resident()) >> 20)
    del blocks
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(line) >= 90 for line in done.stdout.split()] == [True, True], done.stdout


def test_a_recipe_within_a_tenth_of_what_is_measured() -> None:
    """One of the five of `python -m bench.plan`, in a process of its own."""
    recipe = ROOT / "bench" / "plan_recipes" / "dpo_full.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", str(recipe)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.1)
