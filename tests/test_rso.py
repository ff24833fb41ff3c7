"""`fastpo rso` and `fastpo rerank`: files in, files out, and what a bad or an interrupted one comes to."""

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import RECIPE
from test_rejection_sampling import FAILS, PASSES, REWARDS, p_value, plackett_luce
from tiny import tiny_model, tiny_tokenizer

from fastpo.cli import main
from fastpo.from_recipe import read_splits
from fastpo.heads import BetaHead
from fastpo.planted import planted_preferences
from fastpo.prompt_beta import prompt_scales
from fastpo.recipe import parse_recipe
from fastpo.reporting import read_metrics
from fastpo.tokenization import encode_prompt

ROOT = Path(__file__).parents[1]


def scored_rows(rows: int = 12, responses: int = 12, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Messages with rewards that are all different; about one response of six has no end."""
    rng = random.Random(seed)
    pairs = planted_preferences(rows * responses, seed)
    return [
        {
            "index": index,
            "prompt": pairs[index * responses]["prompt"],
            "responses": [
                [{"role": "assistant", "content": f"{pair['chosen'][0]['content']} {number}"}]
                for number, pair in enumerate(pairs[index * responses : (index + 1) * responses])
            ],
            "finished": [rng.random() > 1 / 6 for _ in range(responses)],
            "rewards": [rng.gauss(0, 1) for _ in range(responses)],
            **{name: values[index] for name, values in columns.items()},
        }
        for index in range(rows)
    ]


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row | {"prompt": row["prompt"][0]["content"], "responses": [turns[0]["content"] for turns in row["responses"]]}
        for row in rows
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(command: str, tmp_path: Path, rows: list[dict[str, Any]], name: str = "out", **options: Any) -> list[Any]:
    """The rows that a command makes; it must succeed."""
    output = tmp_path / f"{name}.jsonl"
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    dataset = write(tmp_path / f"{name}-scored.jsonl", rows)
    assert main([command, "--dataset", str(dataset), "--output_file", str(output), *overrides]) == 0
    return read(output)


def provenance(tmp_path: Path, name: str = "out") -> dict[str, Any]:
    return json.loads((tmp_path / f"{name}.jsonl.provenance.json").read_text())


def complaint(command: str, tmp_path: Path, rows: list[Any], capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What a command says that refuses the rows; nothing is left behind."""
    dataset, output = write(tmp_path / "bad.jsonl", rows), tmp_path / "refused.jsonl"
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert main([command, "--dataset", str(dataset), "--output_file", str(output), *overrides]) == 1
    assert not list(tmp_path.glob("*refused*"))
    return capsys.readouterr().err


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranking", "per_prompt"), [("first_round", 3), ("tournament", 5)])
def test_pairs_are_of_their_prompt_and_labelled_by_its_rewards(
    tmp_path: Path, ranking: str, per_prompt: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored_rows(task=[f"t{i}" for i in range(12)], ref_chosen_logps=[1.0] * 12, sigmas=[[0.5] * 12] * 12)
    pairs = run("rso", tmp_path, rows, ranking=ranking, num_samples=6, seed=3)
    assert len(pairs) == per_prompt * 12
    for pair in pairs:
        row = rows[pair["fastpo_prompt"]]
        assert pair["prompt"] == row["prompt"] and pair["task"] == row["task"] and pair["beta"] == 0.5
        places = [row["responses"].index(pair[side]) for side in ("chosen", "rejected")]
        assert [row["rewards"][x] for x in places] == [pair["score_chosen"], pair["score_rejected"]]
        assert pair["score_chosen"] > pair["score_rejected"] and all(row["finished"][x] for x in places)
        assert pair["sigma_chosen"] == pair["sigma_rejected"] == 0.5
        assert "ref_chosen_logps" not in pair and "rewards" not in pair  # of other completions, of all of them
    found = provenance(tmp_path)
    unfinished = sum(not x for row in rows for x in row["finished"])
    assert found["counts"] | {"trials": 0} == {
        "prompts": 12, "prompts_without_pair": 0, "responses": 144, "unfinished": unfinished, "empty": 0,
        "accepted": 72, "trials": 0, "pairs": len(pairs),
    }  # fmt: skip
    assert found["acceptance_rate"] == 72 / found["counts"]["trials"] and found["mean_beta"] == 0.5
    assert f"{len(pairs)} pairs of 12 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["rso", "rerank"])
def test_numbers_of_other_completions_do_not_travel_along(tmp_path: Path, command: str) -> None:
    """Such as of the pairs whose prompts were sampled: stage rm would read their margin."""
    names = ("margin", "sigma_chosen", "sigma_rejected", "sigma", "response", "task")
    for row in run(command, tmp_path, scored_rows(**{name: [1.0] * 12 for name in names})):
        assert set(names) & set(row) == {"task"}


def test_a_prompt_does_not_depend_on_the_others_nor_on_where_it_stands(tmp_path: Path) -> None:
    rows = scored_rows()
    whole = run("rso", tmp_path, rows)
    part = run("rso", tmp_path, [rows[9], rows[4]], name="part")
    for index in (4, 9):
        of_it = [pair for pair in whole if pair["fastpo_prompt"] == index]
        assert of_it and of_it == [pair for pair in part if pair["fastpo_prompt"] == index]
    assert run("rso", tmp_path, rows, name="seeded", seed=1) != whole


def test_fewer_responses_than_samples_and_prompts_without_a_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = scored_rows(4, 3, seed=2)
    for row in rows:
        row["finished"] = [True] * 3
    rows[0]["rewards"] = [1.0] * 3  # all alike
    rows[1]["responses"] = [rows[1]["responses"][0]] * 3  # the same said three times
    rows[2]["finished"] = [True, False, False]  # one left
    pairs = run("rso", tmp_path, rows, ranking="tournament")
    assert [pair["fastpo_prompt"] for pair in pairs] == [3, 3]
    counts = provenance(tmp_path)["counts"]
    assert counts["prompts_without_pair"] == 3 and counts["accepted"] == 3 + 3 + 1 + 3
    assert "all were accepted, whatever beta: no prompt has more than num_samples=8" in caplog.text
    caplog.clear()
    more = run("rso", tmp_path, rows, name="more", ranking="tournament", keep_unfinished=True)
    assert [pair["fastpo_prompt"] for pair in more] == [2, 2, 3, 3]
    run("rso", tmp_path, rows, name="few", num_samples=2)
    assert caplog.text.count("all were accepted") == 1


def test_empty_responses_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = scored_rows(3, 4)
    for row in rows:
        row["finished"] = [True] * 4
        row["rewards"] = [9.0, *row["rewards"][1:]]
        row["responses"][0] = [{"role": "assistant", "content": ""}]
    with caplog.at_level(logging.WARNING):
        pairs = run("rso", tmp_path, rows, ranking="tournament")
    assert len(pairs) == 6 and all(pair["score_chosen"] < 9 for pair in pairs)
    assert "left out 3 empty responses of 12" in caplog.text
    text = [{"prompt": "p", "responses": ["", "a", "b"], "rewards": [9.0, 1.0, 0.0], "finished": None}]
    [pair] = run("rso", tmp_path, text, name="text")
    assert (pair["chosen"], pair["rejected"], pair["fastpo_prompt"]) == ("a", "b", 0)


# --- beta of each prompt ----------------------------------------------------------------------------------------------


def test_a_small_beta_takes_the_best_and_a_large_one_takes_any(tmp_path: Path) -> None:
    rows = scored_rows(40, 12, beta=[1e-3, 1e3] * 20)
    pairs = run("rso", tmp_path, rows, num_samples=2)
    ranks: dict[int, list[int]] = {0: [], 1: []}
    for pair in pairs:
        row = rows[pair["fastpo_prompt"]]
        usable = sorted((r for r, ended in zip(row["rewards"], row["finished"], strict=True) if ended), reverse=True)
        ranks[pair["fastpo_prompt"] % 2] += [usable.index(pair[f"score_{side}"]) for side in ("chosen", "rejected")]
        assert pair["beta"] == row["beta"]
    assert set(ranks[0]) == {0, 1} and len(ranks[1]) == 40
    assert 3 < sum(ranks[1]) / 40 < 6  # of ten or so
    assert provenance(tmp_path)["mean_beta"] == pytest.approx(500.0005)


def test_of_a_file_the_pairs_have_the_exact_frequencies_at_each_prompts_beta(tmp_path: Path) -> None:
    betas = (0.25, 2.0)
    row = {"prompt": "p", "responses": list("abcde"), "rewards": list(REWARDS)}
    pairs = run("rso", tmp_path, [row | {"beta": betas[i % 2]} for i in range(6_000)], num_samples=2, seed=5)
    exact = [
        {pair: p + plackett_luce(REWARDS, beta)[pair[::-1]] for pair, p in plackett_luce(REWARDS, beta).items()}
        for beta in betas
    ]
    for turn in (0, 1):
        # Who has the higher reward is chosen, in whatever order the two were accepted.
        labelled = {pair: p for pair, p in exact[turn].items() if REWARDS[pair[0]] > REWARDS[pair[1]]}
        seen = [
            ("abcde".index(pair["chosen"]), "abcde".index(pair["rejected"]))
            for pair in pairs if pair["fastpo_prompt"] % 2 == turn
        ]  # fmt: skip
        assert len(seen) == 3_000 and p_value(seen, labelled) > PASSES
        other = {pair: exact[1 - turn][pair] for pair in labelled}
        assert p_value(seen, other) < FAILS


def test_a_beta_head_makes_beta_of_each_prompt(tmp_path: Path) -> None:
    reference, head, tokenizer = tiny_model(seed=7), BetaHead(32), tiny_tokenizer()
    torch.nn.init.normal_(head.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    for thing in (reference, tokenizer):
        thing.save_pretrained(tmp_path / "reference")
    head.save_pretrained(tmp_path / "policy")
    rows = as_text(scored_rows(6))
    for number, row in enumerate(rows):  # their last tokens tell a model of random weights apart
        row["prompt"] += f" And {row['prompt'].split()[number % 3]}"
    rows[2]["beta"] = 0.125  # its own wins
    folders = {"beta_head": tmp_path / "policy", "ref_model_name_or_path": tmp_path / "reference"}
    found = run("rso", tmp_path, rows, beta=2, max_length=5, batch_size=4, **folders)
    ids = [encode_prompt(row["prompt"], tokenizer)[-5:] for row in rows]
    scales = prompt_scales(reference, head, ids, batch_size=6, pad_token_id=tokenizer.pad_token_id)
    wanted = (2 * scales).tolist()
    wanted[2] = 0.125
    assert max(wanted) > 1.2 * min(x for x in wanted if x != 0.125)
    assert {pair["fastpo_prompt"]: pair["beta"] for pair in found} == pytest.approx(dict(enumerate(wanted)), rel=1e-5)
    best = run("rerank", tmp_path, rows, name="best", beta=2, max_length=5, **folders)
    assert [row["beta"] for row in best] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("command", ["rso", "rerank"])
def test_betas_of_an_earlier_round_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str) -> None:
    """Prompts that are taken from the pairs of `fastpo rso` come with the beta of then."""
    run(command, tmp_path, scored_rows(3))
    assert "of their own" not in caplog.text
    run(command, tmp_path, scored_rows(3, beta=[0.5, None, 0.5]), name="again", beta=0.1)
    assert "2 of 3 prompts have a beta of their own, which wins" in caplog.text


# --- what comes after and before --------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [False, True])
def test_the_pairs_train(tmp_path: Path, confidence: bool) -> None:
    run("rso", tmp_path, scored_rows(8, 12, task=["help"] * 8, sigmas=[[1.0] * 12] * 8))
    fields = RECIPE | {"dataset": str(tmp_path / "out.jsonl"), "output_dir": str(tmp_path / "run"), "max_steps": 2}
    if confidence:
        fields |= {"preset": "ledpo", "regularizers": {"confidence": 0.1}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields | {"save_strategy": "no"}))
    assert main(["train", str(recipe)]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("loss" in row for row in rows)
    assert any(row.get("regularizers/confidence", 0) > 0 for row in rows) == confidence


def test_pairs_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    run("rso", tmp_path, scored_rows(8, 12), ranking="tournament")
    fields = RECIPE | {"dataset": str(tmp_path / "out.jsonl"), "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    train, held_out = read_splits(parse_recipe(str(tmp_path / "recipe.yaml"), [])[0], 0, "dpo")
    assert len(set(held_out["fastpo_prompt"])) == 2 and len(held_out) == 14
    assert not set(held_out["fastpo_prompt"]) & set(train["fastpo_prompt"])


def test_the_best_ones_train(tmp_path: Path) -> None:
    run("rerank", tmp_path, scored_rows(8, 4))
    fields = RECIPE | {"stage": "sft", "dataset": str(tmp_path / "out.jsonl"), "output_dir": str(tmp_path / "run")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields | {"save_strategy": "no", "max_steps": 1}))
    assert main(["train", str(recipe)]) == 0


def test_provenance_reaches_back(tmp_path: Path) -> None:
    (tmp_path / "out-scored.jsonl.provenance.json").write_text('{"command": "fastpo score", "source": {"path": "x"}}')
    run("rso", tmp_path, scored_rows())
    source = provenance(tmp_path)["source"]
    assert source["provenance"]["source"] == {"path": "x"} and len(source["sha256"]) == 64


KILLED = """
import os, signal, sys
from pathlib import Path
from fastpo.resumable import ResumableJsonl
import fastpo.rso, fastpo.rerank

command, dataset, root = sys.argv[1:]
module = {"rso": fastpo.rso, "rerank": fastpo.rerank}[command]
events, deadly, folder = 0, None, None
append = ResumableJsonl.append

def happens():
    global events
    events += 1
    return events == deadly

def audit(event, arguments):
    if folder and event in ("open", "os.rename", "os.truncate") and folder in str(arguments[0]) and happens():
        os.kill(os.getpid(), signal.SIGKILL)

def half_written(self, rows):
    if happens():
        self._file.write(b'{"prompt": [{"role": "us')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, rows)

ResumableJsonl.append = half_written
sys.addaudithook(audit)

def work(place, killed_at=None):
    global events, deadly, folder
    events, deadly, folder = 0, killed_at, str(place)
    module.run(module.Arguments(dataset=dataset, output_file=str(place / "out.jsonl")))
    folder = None

def files(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}

whole = Path(root) / "whole"
whole.mkdir()
work(whole)
total = events
for number in range(1, total + 1):
    place = Path(root) / str(number)
    place.mkdir()
    child = os.fork()
    if child == 0:
        work(place, number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, number
    if not (place / "out.jsonl").exists():
        work(place)
    assert files(place) == files(whole), (number, total, sorted(files(place)))
print(total)
"""


@pytest.mark.parametrize("command", ["rso", "rerank"])
def test_killed_anywhere_and_resumed_the_files_are_identical(tmp_path: Path, command: str) -> None:
    dataset = write(tmp_path / "scored.jsonl", scored_rows(5))
    script = [sys.executable, "-c", KILLED, command, str(dataset), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > {"rso": 20, "rerank": 5}[command] + 5  # so many rows, and what opens and renames files


def test_a_provenance_that_is_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl.provenance.json").write_text("{")
    assert "bad.jsonl.provenance.json must be JSON" in complaint("rso", tmp_path, scored_rows(2), capsys)


def test_a_begun_file_wants_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("rso", tmp_path, scored_rows())
    (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.partial")
    whole = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    begun = {name: whole[name] for name in ("command", "settings", "source", "versions")}
    (tmp_path / "out.jsonl.provenance.json").write_text(json.dumps(begun))
    said = ["--dataset", str(tmp_path / "out-scored.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    assert main(["rso", *said, "--beta", "0.4"]) == 1
    assert "was begun with another settings.beta: repeat" in capsys.readouterr().err
    assert main(["rso", *said]) == 0


# --- rerank -----------------------------------------------------------------------------------------------------------


def test_the_best_and_its_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scored_rows(20, 6, task=["t"] * 20)
    best = run("rerank", tmp_path, rows, beta=0.7)
    weights = [(torch.tensor(row["rewards"], dtype=torch.float64) / 0.7).softmax(0) for row in rows]
    for row, found, weight in zip(rows, best, weights, strict=True):
        place = row["responses"].index(found["completion"])
        assert found["reward"] == max(row["rewards"]) == row["rewards"][place]
        assert found["weight"] == pytest.approx(float(weight.max()))
        assert (found["index"], found["prompt"], found["task"]) == (row["index"], row["prompt"], "t")
        assert found["finished"] == row["finished"][place]
    made = provenance(tmp_path)
    tilted = [
        float(w @ torch.tensor(row["rewards"], dtype=torch.float64)) for row, w in zip(rows, weights, strict=True)
    ]
    assert made["reward"] == pytest.approx(sum(sum(row["rewards"]) for row in rows) / 120)
    assert made["reward_tilted"] == pytest.approx(sum(tilted) / 20)
    assert made["reward_best"] == pytest.approx(sum(max(row["rewards"]) for row in rows) / 20)
    kl = [float((w * (w * 6).log()).sum()) for w in weights]
    assert made["kl"] == pytest.approx(sum(kl) / 20)
    assert made["effective_sample_size"] == pytest.approx(sum(float(1 / (w * w).sum()) for w in weights) / 20)
    assert f"{made['reward_best']:.4f} of the best ones" in capsys.readouterr().out


def test_drawn_ones_have_the_expected_reward(tmp_path: Path) -> None:
    rows = scored_rows(400, 5)
    drawn = run("rerank", tmp_path, rows, select="sample", beta=1.0)
    mean = sum(row["reward"] for row in drawn) / 400
    made = provenance(tmp_path)
    assert abs(mean - made["reward_tilted"]) < 3 * 0.8 / 20 < made["reward_best"] - made["reward_tilted"]
    assert made["reward_tilted"] - made["reward"] > 0.3
    assert run("rerank", tmp_path, rows, name="other", select="sample", beta=1.0, seed=1) != drawn


def test_risk_aversion_takes_deviations_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "p", "responses": ["sure", "bold"], "rewards": [1.0, 2.0], "sigmas": [0.0, 1.5]}
    assert run("rerank", tmp_path, [row])[0]["completion"] == "bold"
    [careful] = run("rerank", tmp_path, [row], name="careful", risk_aversion=1, beta=1)
    assert (careful["completion"], careful["reward"], careful["sigma"]) == ("sure", 1.0, 0.0)
    made = provenance(tmp_path, "careful")  # what is printed are means
    assert (made["reward"], made["reward_best"]) == (1.5, 1.0) and made["reward_tilted"] > 1
    assert careful["weight"] == pytest.approx(1 / (1 + torch.e**-0.5))
    bare = {name: value for name, value in row.items() if name != "sigmas"}
    said = complaint("rerank", tmp_path, [row, bare], capsys, risk_aversion=1)
    assert "risk_aversion must be 0 without sigmas, which" in said and "row 1 does not have" in said


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"rewards": [1.0, float("nan")]}, "row 7: 'rewards' must be finite numbers, got nan"),
    ({"rewards": [1.0, float("-inf")]}, "row 7: 'rewards' must be finite numbers, got -inf"),
    ({"rewards": [1.0, None]}, "row 7: 'rewards' must be finite numbers, got None"),
    ({"rewards": [1.0]}, "row 7: 'rewards' must be a list of 2, one a response, got [1.0]"),
    ({"responses": []}, "row 7: 'responses' must have at least one response, got none"),
    ({"responses": ["a", 3]}, "row 7: 'responses' must be text or a list of messages, got 3"),
    ({"responses": ["a", [{"role": "assistant", "content": "b"}]]}, "must all be text or all be messages"),
    ({"prompt": None}, "row 7: 'prompt' must be text or a list of messages, got None"),
    ({"sigmas": [1.0, -1.0]}, "row 7: 'sigmas' must be >= 0, got -1.0"),
    ({"finished": [True, "yes"]}, "row 7: 'finished' must hold true and false"),
    ({"beta": 0}, "row 7: 'beta' must be a finite number > 0, got 0"),
]


@pytest.mark.parametrize("command", ["rso", "rerank"])
@pytest.mark.parametrize(("fields", "message"), BAD_ROWS)
def test_a_bad_row_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, fields: dict[str, Any], message: str
) -> None:
    assert message in complaint(command, tmp_path, [GOOD, {**GOOD, "index": 7, **fields}], capsys)


def test_responses_without_rewards_say_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint("rso", tmp_path, [{"prompt": "p", "responses": ["a"]}], capsys)
    assert "row 0: there must be a column 'rewards' (`fastpo score` writes it), got prompt, responses" in said
    assert "must have at least one row, got none" in complaint("rso", tmp_path, [], capsys)


def test_an_interrupted_dataset_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, output = tmp_path / "scored.jsonl", tmp_path / "pairs.jsonl"
    (tmp_path / "scored.jsonl.partial").write_text(json.dumps(GOOD) + "\n")
    assert main(["rso", "--dataset", str(dataset), "--output_file", str(output)]) == 1
    assert "scored.jsonl.partial is not finished: run the command that makes it again" in capsys.readouterr().err
    dataset.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:30])
    assert main(["rso", "--dataset", str(dataset), "--output_file", str(output)]) == 1
    assert "line 2 must be JSON" in capsys.readouterr().err and not output.exists()


def test_no_pair_at_all_says_why_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b", ""], "rewards": [1.0, 2.0, 3.0], "finished": [True, False, True]},
        {"prompt": "p", "responses": ["a", "b"], "rewards": [1.0, 1.0]},
    ]
    said = complaint("rso", tmp_path, rows, capsys)
    assert "gives no pair: of 5 responses of 2 prompts 1 are unfinished (keep_unfinished takes them too)" in said
    assert "1 are empty, and the other 3 are alone with their prompt, or alike in text or reward" in said


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("rso", {"beta": 0}, "beta must be a finite number > 0, got 0.0"),
        ("rso", {"num_samples": 1}, "num_samples must be >= 2, got 1"),
        ("rso", {"ranking": "best"}, "ranking must be one of first_round, tournament, got 'best'"),
        ("rso", {"beta_head": "x"}, "must be given together, got beta_head alone"),
        ("rso", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ("rso", {"num_sample": 1}, "unknown option '--num_sample'; did you mean 'num_samples'?"),
        ("rerank", {"select": "worst"}, "select must be one of best, sample, got 'worst'"),
        ("rerank", {"risk_aversion": -1}, "risk_aversion must be >= 0, got -1.0"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: dict[str, Any], message: str
) -> None:
    assert message in complaint(command, tmp_path, [GOOD], capsys, **options)


@pytest.mark.parametrize("command", ["rso", "rerank"])
def test_a_head_and_a_reference_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    folders = {"beta_head": tmp_path / "policy", "ref_model_name_or_path": tmp_path / "reference"}
    for folder in folders.values():
        folder.mkdir()
    assert "policy' must hold a saved beta_head" in complaint(command, tmp_path, [GOOD], capsys, **folders)
    BetaHead(32).save_pretrained(tmp_path / "policy")
    said = complaint(command, tmp_path, [GOOD], capsys, **folders)
    assert f"ref_model_name_or_path must name a causal LM, got '{tmp_path / 'reference'}'" in said


@pytest.mark.parametrize("command", ["rso", "rerank"])
def test_the_dataset_and_the_output_are_named(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command]) == 1
    assert "dataset must be given, got none" in capsys.readouterr().err
    assert main([command, "--dataset", "nowhere.jsonl", "--output_file", "x.jsonl"]) == 1
    assert "dataset must be an existing JSONL file, got 'nowhere.jsonl'" in capsys.readouterr().err
