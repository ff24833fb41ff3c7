"""`fastpo score`: the rewards it adds, exactly, and that nothing is lost when one is bad or the process dies."""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import command_child
import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastpo import DiscoHead
from fastpo.architecture import attach_head
from fastpo.cli import main
from fastpo.data import read_dataset
from fastpo.resumable import read_jsonl
from fastpo.reward_functions import load_reward_function
from fastpo.scoring import RewardModel, Rewards
from fastpo.tokenization import tokenize_dataset

ROWS = 7
FUNCTIONS = '''
calls = []

def length(prompts, completions, bonus, **columns):
    """Told apart by all that it reads."""
    assert len(prompts) == len(completions) == len(bonus) and all(len(x) == len(bonus) for x in columns.values())
    assert not {"responses", "finished", "chosen", "rejected", "completion", "response"} & set(columns)
    calls.append(sorted(columns))
    return [len(p[0]["content"]) / 3 + 100 * len(c[0]["content"]) + b for p, c, b in zip(prompts, completions, bonus)]

def of_text(prompts, completions, **columns):
    return [float(len(prompt) + len(said)) for prompt, said in zip(prompts, completions)]

def one_too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)

def infinite(index, **columns):
    return [float("inf") if i == 5 else 1.0 for i in index]

def none(index, **columns):
    return [None if i == 5 else 1.0 for i in index]

def fails(index, **columns):
    raise ValueError("the judge is ill")

def forgets(**columns):
    [1.0 for _ in columns["completions"]]

number = 3
'''


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answered() -> list[dict[str, Any]]:
    """Rows as of fastpo sample, with empty responses and different numbers of them."""
    return [
        {
            "index": 3 + i, "prompt": asked("why? " * (i + 1)), "finished": [True] * (1 + i % 3), "bonus": i / 7,
            "responses": [said("so " * j) for j in range(1 + i % 3)],
        }
        for i in range(ROWS)
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "out.jsonl"
    path.parent.mkdir()
    (path.parent / "functions.py").write_text(FUNCTIONS)
    path.write_text("".join(json.dumps(row) + "\n" for row in answered()))
    return path


@pytest.fixture
def argv(data: Path, tmp_path: Path) -> list[str]:
    return ["score", "--dataset", str(data), "--output_file", str(tmp_path / "scored.jsonl"), "--batch_size", "2"]


def by(data: Path, function: str) -> list[str]:
    return ["--reward_funcs", f"{data.parent / 'functions.py'}:{function}"]


def written(tmp_path: Path, name: str = "scored.jsonl") -> list[dict[str, Any]]:
    return list(read_jsonl(tmp_path / name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A scalar reward model and a Gaussian one."""
    found = {}
    for name in ("scalar", "gaussian"):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny_model(num_labels=1).config)
        if name == "gaussian":
            attach_head(model, DiscoHead(32))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_function_reads_prompts_completions_and_columns(argv: list[str], data: Path, tmp_path: Path) -> None:
    assert main([*argv, *by(data, "length")]) == 0
    expected = [
        {
            **row,
            "rewards": [
                len(row["prompt"][0]["content"]) / 3 + 100 * len(message["content"]) + row["bonus"]
                for [message] in row["responses"]
            ],
        }
        for row in answered()
    ]
    assert written(tmp_path) == expected
    provenance = json.loads((tmp_path / "scored.jsonl.provenance.json").read_text())
    flat = [reward for row in expected for reward in row["rewards"]]
    assert provenance["completions"] == len(flat) and provenance["mean"] == pytest.approx(np.mean(flat))
    assert provenance["deviation"] == pytest.approx(np.std(flat))


def test_single_completions_and_pairs(argv: list[str], data: Path, tmp_path: Path) -> None:
    texts = [{"prompt": "a" * i, "name": i} for i in range(1, 4)]
    forms: dict[str, tuple[list[dict[str, Any]], Any]] = {
        "response": ([{**row, "response": "b"} for row in texts], lambda i: {"reward": i + 1.0}),
        "completion": ([{**row, "completion": "bb"} for row in texts], lambda i: {"reward": i + 2.0}),
        "pair": (
            [{**row, "chosen": "ccc", "rejected": ""} for row in texts],
            lambda i: {"score_chosen": i + 3.0, "score_rejected": float(i)},
        ),
    }
    for name, (rows, rewards) in forms.items():
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
        output = ["--dataset", str(tmp_path / f"{name}.parquet"), "--output_file", str(tmp_path / f"{name}.jsonl")]
        assert main([*argv, *output, *by(data, "of_text")]) == 0
        expected = [{**row, "index": i, **rewards(i + 1)} for i, row in enumerate(rows)]
        assert written(tmp_path, f"{name}.jsonl") == expected


def test_deviations_of_another_judge_do_not_stay_beside_new_rewards(
    argv: list[str], data: Path, tmp_path: Path
) -> None:
    text, pair = {"prompt": "a", "sigma": 1.0, "reward": 9.0}, {"chosen": "b", "rejected": "", "sigma_chosen": 1.0}
    forms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "responses": ({"prompt": "a", "responses": ["b"], "rewards": [9.0], "sigmas": [1.0]}, {"rewards": [2.0]}),
        "completion": ({**text, "completion": "b"}, {"reward": 2.0}),
        "pair": ({"prompt": "a", **pair, "sigma_rejected": 2.0}, {"score_chosen": 2.0, "score_rejected": 1.0}),
    }
    for name, (row, rewards) in forms.items():
        data.write_text(json.dumps(row) + "\n")
        assert main([*argv, "--output_file", str(tmp_path / name), *by(data, "of_text")]) == 0
        [found] = written(tmp_path, name)
        assert {key: found[key] for key in found if key.startswith(("reward", "score", "sigma"))} == rewards


def test_scored_pairs_train(argv: list[str], data: Path, tmp_path: Path) -> None:
    """As the confidence regulariser reads them."""
    Dataset.from_list([{"prompt": "a", "chosen": "bc", "rejected": "d"}]).to_json(tmp_path / "pairs.jsonl")
    assert main([*argv, "--dataset", str(tmp_path / "pairs.jsonl"), *by(data, "of_text")]) == 0
    names = ("score_chosen", "score_rejected")
    rows = tokenize_dataset(read_dataset(str(tmp_path / "scored.jsonl")), tiny_tokenizer(), own_columns=names)
    assert (rows[0]["score_chosen"], rows[0]["score_rejected"]) == (3.0, 2.0)


def test_functions_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("def f(**columns): return [1.0]")  # a name that another module has
    found = load_reward_function(f"{tmp_path / 'json.py'}:f")
    assert found() == [1.0] and json.loads("1") == 1
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "long.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass F:\n  x: int = 1"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)  # which an installed command does not look into
    assert load_reward_function("scorers.long:F")().x == 1
    assert load_reward_function(f"{tmp_path / 'scorers' / 'long.py'}:F")().x == 1
    (tmp_path / "broken.py").write_text("import nowhere_at_all")
    for name, message in (
        ("length", "reward_funcs must be package.module:function or path/to/file.py:function, got 'length'"),
        ("scorers.long:", "reward_funcs must be package.module:function"),
        ("scorers.short:f", "cannot be imported: ModuleNotFoundError: No module named 'scorers.short'"),
        ("nowhere.py:f", "cannot be imported: FileNotFoundError: no file nowhere.py"),
        (f"{tmp_path / 'broken.py'}:f", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("scorers.long:g", "reward_funcs must name a function of scorers.long, got 'scorers.long:g'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_reward_function(name)


# --- reward models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scalar", "gaussian"])
def test_a_reward_model(argv: list[str], models: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert main([*argv, "--reward_model", str(models[name]), "--dtype", "float32"]) == 0
    model, rows = RewardModel(models[name], dtype="float32"), written(tmp_path)
    means, sigmas = [], []
    for row, source in zip(rows, answered(), strict=True):
        assert {key: row[key] for key in source} == source
        assert ("sigmas" in row) == (name == "gaussian")
        for i, response in enumerate(row["responses"]):
            alone = model.score([row["prompt"]], [response])
            assert row["rewards"][i] == pytest.approx(alone.mean.item(), rel=1e-4, abs=1e-5)
            assert float(np.float32(row["rewards"][i])) == row["rewards"][i]
            means.append(row["rewards"][i])
            if alone.variance is not None:
                assert row["sigmas"][i] == pytest.approx(alone.variance.sqrt().item(), rel=1e-4)
                sigmas.append(row["sigmas"][i])
    assert len(set(means)) == len(means) and (name == "scalar" or np.std(sigmas) > 0)


def test_rewards_are_written_to_the_last_bit(argv: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    mean, variance = torch.randn(13) * 1e3, torch.rand(13) * 1e-5
    given = iter(range(13))
    with pytest.MonkeyPatch.context() as patch:

        def rewards(_: Any, prompts: Any, completions: Any) -> Rewards:
            rows = [next(given) for _ in prompts]
            return Rewards(mean[rows], variance[rows])

        patch.setattr(RewardModel, "score", rewards)
        assert main([*argv, "--reward_model", str(models["scalar"])]) == 0
    flat = [pair for row in written(tmp_path) for pair in zip(row["rewards"], row["sigmas"], strict=True)]
    assert torch.equal(torch.tensor([reward for reward, _ in flat]), mean)
    assert [sigma for _, sigma in flat] == [math.sqrt(value) for value in variance.tolist()]


def test_a_model_that_fails_names_its_row(
    argv: list[str], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mean, variance in ((math.nan, 1.0), (1.0, math.inf)):
        with pytest.MonkeyPatch.context() as patch:

            def rewards(_: Any, prompts: Any, completions: Any, bad: Any = (mean, variance)) -> Rewards:
                last = prompts[-1][0]["content"] == "why? " * 6
                values = [(1.0, 1.0)] * (len(prompts) - last) + [bad] * last
                return Rewards(*torch.tensor(values).unbind(1))

            patch.setattr(RewardModel, "score", rewards)
            assert main([*argv, "--reward_model", str(models["scalar"])]) == 1
        assert f"reward_model must give finite rewards, got {mean} for dataset row 8" in capsys.readouterr().err
        assert len((tmp_path / "scored.jsonl.partial").read_bytes().splitlines()) == 4


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """One process that imports, from which all runs are forked."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(here.parent), str(here))))
        forkserver.set_forkserver_preload(["command_child"])
        forkserver.ensure_running()


@pytest.mark.parametrize("source", ["function", "gaussian"])
def test_killed_and_resumed_the_file_is_the_same(
    argv: list[str], data: Path, models: dict[str, Path], tmp_path: Path, source: str
) -> None:
    argv = [*argv, *(by(data, "length") if source == "function" else ["--reward_model", str(models[source])])]
    assert main(argv) == 0
    names = ("scored.jsonl", "scored.jsonl.provenance.json")
    whole = [(tmp_path / name).read_bytes() for name in names]
    for name in names:
        (tmp_path / name).unlink()
    function = "fastpo.score.function_rewards" if source == "function" else "fastpo.score._model_rewards"
    process = multiprocessing.get_context("forkserver").Process(target=command_child.run, args=(argv, function, 2))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len((tmp_path / "scored.jsonl.partial").read_bytes().splitlines()) == 4
    assert main(argv) == 0
    assert [(tmp_path / name).read_bytes() for name in names] == whole


@pytest.mark.parametrize(
    ("function", "done", "message"),
    [
        ("one_too_few", 0, "one_too_few must give one reward for each of 3 completions (dataset rows 3 to 4), got 2"),
        ("infinite", 2, "reward_funcs infinite must give finite numbers, got inf for dataset row 5"),
        ("none", 2, "reward_funcs none must give finite numbers, got None for dataset row 5"),
        ("fails", 0, "the judge is ill"),
        ("forgets", 0, "reward_funcs forgets must give a list of numbers, got None"),
        ("of_text:x", None, "cannot be imported"),
        ("number", None, "reward_funcs must name a function"),
    ],
)
def test_a_bad_reward_is_named_and_nothing_is_lost(
    argv: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    function: str,
    done: int | None,
    message: str,
) -> None:
    assert main([*argv, *by(data, function)]) == 1
    [complaint] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastpo: error:")]
    assert message in complaint
    partial = tmp_path / "scored.jsonl.partial"
    assert (len(partial.read_bytes().splitlines()) if done is not None else partial.exists()) == (done or 0)
    if function == "infinite":  # which is mended, and goes on
        source = data.parent / "functions.py"
        source.write_text(source.read_text().replace('float("inf") if i == 5 else', ""))
        assert main([*argv, *by(data, function)]) == 0
        assert [row["rewards"] for row in written(tmp_path)] == [[1.0] * (1 + i % 3) for i in range(ROWS)]


BAD_INPUT: dict[str, tuple[list[str], list[Any], str]] = {
    # name: (overrides, rows, what the one line must say)
    "neither": (["--reward_funcs="], [], "either reward_model or reward_funcs must be given, got neither"),
    "both": (["--reward_model", "x"], [], "either reward_model or reward_funcs must be given, got both"),
    "no batch": (["--batch_size", "0"], [], "batch_size must be >= 1, got 0"),
    "no length": (["--max_length", "1"], [], "max_length must be >= 2, got 1"),
    "no dataset": (["--dataset="], [], "dataset must be given, got none"),
    "other columns": ([], [{"prompt": "a", "text": "b"}], "must have prompt and responses, response or completion, or"),
    "no responses": ([], [{"prompt": "a", "responses": []}], "row 0: 'responses' must be a list of at least one"),
    "mixed": ([], [{"prompt": "a", "responses": [said("b")]}], "row 0: prompt and completions must all be text or all"),
    "hole": ([], [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}], "row 1: 'response' must be"),
    "half a pair": ([], [{"prompt": "a", "chosen": "b", "rejected": None}], "row 0: 'rejected' must be text"),
}


@pytest.mark.parametrize(("overrides", "rows", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_clear_line(
    argv: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    rows: list[Any],
    message: str,
) -> None:
    if rows:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*argv, *by(data, "of_text"), *overrides]) == 1
    [complaint] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastpo: error:")]
    assert message in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_the_template_cannot_render_names_its_rows(
    argv: list[str], data: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = answered()
    rows[3]["responses"][0] = asked("not the assistant")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*argv, "--reward_model", str(models["scalar"])]) == 1
    assert "row 6: a completion must start with the assistant's message" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert main([*argv, "--reward_model", str(models["scalar"]), "--skip_bad_rows"]) == 0
    assert [row["index"] for row in written(tmp_path)] == [row["index"] for row in rows if row["index"] != 6]


def test_bad_rows_can_be_left_out(argv: list[str], data: Path, tmp_path: Path) -> None:
    data.write_text("".join(json.dumps({"prompt": "a", "response": text}) + "\n" for text in ("b", None, "c")))
    assert main([*argv, *by(data, "of_text"), "--skip_bad_rows"]) == 0
    assert [(row["index"], row["reward"]) for row in written(tmp_path)] == [(0, 2.0), (2, 2.0)]
