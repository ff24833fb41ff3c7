"""The benchmark of whole training steps: that all contenders take the same step, and what it refuses and reports."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import __main__ as command
from bench import report, step
from bench.step import STEP_PRESETS
from bench.step_contenders import CACHED, CONTENDERS, ORACLES, StepContender
from bench.step_problem import (
    BETA,
    LORA_ALPHA,
    LORA_RANK,
    POLICY_SEED,
    REFERENCE_SEED,
    StepShape,
    fill_adapter,
    lora_config,
    make_dataset,
    make_model,
    make_pairs,
    make_tokenizer,
)
from bench.step_report import memory_ratio, time_ratio
from bench.step_worker import measure, unavailable

TINY = STEP_PRESETS["step-quick"].shape


def test_data_has_the_lengths_asked_for_and_text_becomes_the_same_tokens() -> None:
    from fastpo.tokenization import tokenize_dataset

    pairs = make_pairs(TINY)
    rows = tokenize_dataset(
        make_dataset(pairs),
        make_tokenizer(TINY.vocab),
        stage="dpo",
        max_length=TINY.prompt + TINY.completion,
        source="x",
    )
    assert (len(rows), len(rows["prompt_ids"][0]), len(rows["chosen_ids"][0])) == (4, 16, 16)
    for name in ("prompt", "chosen", "rejected"):
        assert torch.equal(torch.tensor(rows[f"{name}_ids"][:]), getattr(pairs, name))


def _row_logps(model: nn.Module, weights: dict[str, Tensor], prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-prob of one completion, alone in its batch."""
    ids = torch.cat((prompt, completion))
    logits = torch.func.functional_call(model, weights, (ids[None],)).logits[0, len(prompt) - 1 : -1]
    return (logits.gather(1, completion[:, None])[:, 0] - logits.logsumexp(1)).sum()


def _truth(lora: bool) -> tuple[float, float]:
    """Loss and gradient norm of the first step in float64, row by row, adapters as plain matrices."""
    model = make_model(TINY, POLICY_SEED).double()
    base = {name: weight.detach() for name, weight in model.named_parameters()}
    if lora:
        from peft import get_peft_model

        adapted = get_peft_model(make_model(TINY, POLICY_SEED), lora_config())
        fill_adapter(adapted)
        trained = {
            name: p.detach().double().requires_grad_() for name, p in adapted.named_parameters() if "lora" in name
        }
        weights, reference = dict(base), base
        for name in [name for name in trained if "lora_A" in name]:
            change = trained[name.replace("lora_A", "lora_B")] @ trained[name]
            inner = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            weights[inner] = base[inner] + LORA_ALPHA / LORA_RANK * change
    else:
        weights = trained = {name: p.requires_grad_() for name, p in base.items()}
        reference = {name: p.detach().double() for name, p in make_model(TINY, REFERENCE_SEED).named_parameters()}
    losses = []
    pairs = make_pairs(TINY)
    for prompt, *completions in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True):
        ratios = [_row_logps(model, weights, prompt, x) - _row_logps(model, reference, prompt, x) for x in completions]
        losses.append(torch.log1p(torch.exp(-BETA * (ratios[0] - ratios[1]))))
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), math.sqrt(sum(float(g.square().sum()) for g in grads))


@pytest.fixture(scope="module")
def truths() -> dict[str, tuple[float, float]]:
    return {"LoRA": _truth(True), "full": _truth(False)}


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_takes_the_step_of_the_plain_formula(name: str, truths: dict[str, tuple[float, float]]) -> None:
    contender = CONTENDERS[name]
    if reason := unavailable(contender):
        pytest.skip(reason)
    row = measure(name, TINY, 2)
    loss, norm = truths[contender.trains]
    assert abs(loss - math.log(2)) > 1e-3  # or else policy and reference agree, and nothing is tested
    assert row["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norms"][0] == pytest.approx(norm, rel=1e-5)
    assert row["losses"][1] < row["losses"][0]
    assert len(row["seconds"]) == len(row["first_seconds"]) == len(row["setup_seconds"]) == 1
    assert row["seconds"][0] > 0 and row["loaded_bytes"] > 0


def test_memory_counts_the_first_step_and_its_logits() -> None:
    shape = dataclasses.replace(TINY, vocab=20000, prompt=32, completion=32)
    logits = 2 * shape.pairs * (shape.prompt + shape.completion) * shape.vocab * 4
    plain, ours = (measure(name, shape, 1)["extra_bytes"] for name in ("eager, LoRA", "fastpo, LoRA"))
    assert plain > 2 * logits
    assert ours < logits


def test_arguments_that_a_trainer_does_not_know_make_it_unavailable() -> None:
    reason = unavailable(StepContender("fastpo", arguments={"max_length": 8, "no_such": 1}))
    assert reason == "PreferenceTrainingArguments has no no_such"
    assert unavailable(StepContender("fastpo", arguments={"max_length": 8})) is None


def _row(loss: float, norm: float = 2.0, seconds: float = 1.0, extra: int = 100) -> dict[str, Any]:
    return {
        "kind": "row",
        "seconds": [seconds],
        "first_seconds": [seconds],
        "setup_seconds": [seconds],
        "extra_bytes": extra,
        "loaded_bytes": 10,
        "losses": [loss, loss],
        "grad_norms": [norm, norm],
    }


def _spawned(rows: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has every process answer with the row of its contender; a name without one ends badly. Returns who ran."""
    ran: list[str] = []

    def answer(job: dict[str, Any], limit: float, threads: int | None, *, module: str) -> tuple[list[Any], str]:
        assert StepShape(**job["shape"]) == TINY and module == "bench.step_worker"
        ran.append(job["contender"])
        if ran[-1] not in rows:
            return [], "exit status 1: no"
        row = dict(rows[ran[-1]])
        if "extra_bytes" in row:
            row["extra_bytes"] //= ran.count(ran[-1])  # what a later round frees does not count
        return [row], ""

    monkeypatch.setattr(step, "spawn", answer)
    monkeypatch.setattr(step, "gemm_ceiling", lambda *_: 0.1)
    return ran


def _run(tmp_path: Path, *names: str, repeats: int = 1) -> int:
    only = [argument for name in names for argument in ("--only", name)]
    return command.main(["--preset", "step-quick", "--out", str(tmp_path), "--repeats", str(repeats), *only])


@pytest.mark.parametrize(
    "wrong", [_row(0.501), _row(math.nan), _row(0.5, norm=2.01), _row(0.5) | {"losses": []}, {"kind": "none"}]
)
def test_no_report_when_losses_or_gradients_disagree(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"eager, LoRA": _row(0.5), "fastpo, LoRA": wrong}
    _spawned({name: row for name, row in rows.items() if row["kind"] == "row"}, monkeypatch)
    assert _run(tmp_path, "fastpo, LoRA") == 1
    assert not list(tmp_path.iterdir())


def test_contenders_take_turns_and_what_they_leave_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "eager, LoRA": _row(0.5, seconds=4, extra=500),
        "TRL, LoRA": _row(0.50001, seconds=2, extra=400),
        "fastpo, LoRA": {"kind": "unavailable", "reason": "it is not there"},
        "fastpo, LoRA, cached": _row(0.5, seconds=0.9, extra=160),
    }
    ran = _spawned(rows, monkeypatch)
    names = ["fastpo, LoRA, cached", "fastpo, LoRA", "TRL, LoRA, precomputed", "TRL, LoRA"]
    assert _run(tmp_path, *names, repeats=2) == 0
    again = ["eager, LoRA", "TRL, LoRA", "fastpo, LoRA, cached"]
    assert ran == ["eager, LoRA", "TRL, LoRA", "TRL, LoRA, precomputed", *names[1::-1], *again]

    result = json.loads((tmp_path / "step-quick.json").read_text())
    assert result["meta"]["preset"] == "step-quick" and str(tmp_path) not in json.dumps(result)
    found = {row["contender"]: row for row in result["rows"]}
    assert found["TRL, LoRA"]["seconds"] == [2, 2] and found["TRL, LoRA"]["error"] == pytest.approx(2e-5)
    assert found["TRL, LoRA"]["extra_bytes"] == 400
    assert found["TRL, LoRA, precomputed"]["failed"] == "exit status 1: no"
    assert result["skipped"] == [{"contender": "fastpo, LoRA", "reason": "it is not there"}]

    text = (tmp_path / "step-quick.md").read_text()
    assert "| fastpo, LoRA, cached | 0.45 met / 0.40 missed |" in text
    assert "| TRL, LoRA, precomputed | exit status 1: no |" in text
    assert "Not run here: fastpo, LoRA (it is not there)." in text
    section = report.page_section(tmp_path)
    assert section is not None and section in text


def test_ratios_are_of_steps_in_the_same_round() -> None:
    ours, theirs = {"seconds": [1.0, 6.0, 3.0]}, {"seconds": [2.0, 10.0, 4.0]}
    assert time_ratio(ours, theirs) == 0.6  # of 0.5, 0.6, 0.75; the medians' ratio would be 0.75
    assert memory_ratio({"extra_bytes": 3}, {"extra_bytes": 4}) == 0.75


def test_a_process_of_its_own_answers(tmp_path: Path) -> None:
    assert _run(tmp_path, "eager, LoRA") == 0
    row = json.loads((tmp_path / "step-quick.json").read_text())["rows"][0]
    assert row["contender"] == "eager, LoRA" and row["error"] == 0 and row["median"] > 0


def test_the_contenders_are_what_they_are_called() -> None:
    for name, contender in CONTENDERS.items():
        trainer, trains, *options = name.split(", ")
        assert contender.trainer == trainer.lower() and contender.trains == trains
        cached = {"precomputed", "cached"} & set(options)
        assert bool(cached) == (contender.arguments.items() >= CACHED.items())
        assert ("prefix-shared" in options) == contender.arguments.get("prefix_sharing", False)
    assert set(ORACLES.values()) <= set(CONTENDERS)
