"""`fastpo sample`: what it writes, that a killed run ends as one that was not, and what it refuses."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from datetime import datetime
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import command_child
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpo import sample
from fastpo.cli import main
from fastpo.data import read_dataset
from fastpo.generation import Completion
from fastpo.planted import planted_preferences
from fastpo.resumable import read_jsonl

ROWS = 7
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model about half of whose completions end within twelve tokens, by one of its many end tokens."""
    folder = tmp_path_factory.mktemp("model")
    lm, tokenizer = tiny_model(), tiny_tokenizer()
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(40, 60)]
    lm.generation_config.top_k = 1
    lm.generation_config.do_sample = True
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{**row, "level": i, "note": {"é": [i]}} for i, row in enumerate(planted_preferences(ROWS, seed=1))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def argv(model: Path, data: Path, tmp_path: Path) -> list[str]:
    settings = {
        "model_name_or_path": model, "dataset": data, "output_file": tmp_path / "out.jsonl", "num_generations": 3,
        "max_completion_length": 12, "batch_size": 2,
    }  # fmt: skip
    return ["sample", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]


def written(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path))


def answers(monkeypatch: pytest.MonkeyPatch, *completions: Completion) -> list[Any]:
    """Have these in turn drawn for each row of a batch, and note what was asked."""
    asked: list[Any] = []

    def generate(_: Any, prompts: Any, sampling: Any, **named: Any) -> list[Completion]:
        asked.append((prompts, sampling, named))
        return [completions[i % len(completions)] for i in range(len(prompts))]

    monkeypatch.setattr(sample, "generate", generate)
    return asked


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_the_file(argv: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    rows = written(tmp_path / "out.jsonl")
    given = [json.loads(line) for line in data.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(ROWS))
    for row, source in zip(rows, given, strict=True):
        assert list(row) == ["index", "prompt", "responses", "finished", "level", "note"]
        assert all(row[name] == source[name] for name in ("prompt", "level", "note"))
        assert len(row["responses"]) == len(row["finished"]) == 3
        for [message] in row["responses"]:
            assert message["role"] == "assistant" and "<|im_end|>" not in message["content"]
    finished = [value for row in rows for value in row["finished"]]
    assert True in finished and False in finished
    texts = [[message["content"] for [message] in row["responses"]] for row in rows]
    assert len({text for row in texts for text in row}) > 15  # top_k=1 of the model's generation_config does not count
    provenance = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert provenance["settings"]["num_generations"] == 3 and "output_file" not in provenance["settings"]
    assert set(provenance["versions"]) == {"fastpo", "torch", "transformers"}
    counted = {
        "rows": ROWS, "responses": 3 * ROWS, "unfinished": finished.count(False),
        "empty": sum(row.count("") for row in texts), "distinct": sum(len(set(row)) for row in texts),
    }  # fmt: skip
    assert {name: provenance[name] for name in counted} == counted
    printed = capsys.readouterr().out
    assert f"7 prompts, 21 responses: {finished.count(False) / 21:.1%} unfinished" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.provenance.json"}


def test_the_same_settings_give_the_same_bytes(argv: list[str], tmp_path: Path) -> None:
    found = []
    for more in ([], [], ["--seed", "1"], ["--temperature", "0.9"]):
        assert main([*argv, *more]) == 0
        found.append((tmp_path / "out.jsonl").read_bytes())
        (tmp_path / "out.jsonl").unlink()
    assert found[0] == found[1] and len(set(found)) == 3


def test_text_is_answered_by_text_and_long_prompts_keep_their_end(
    argv: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = ["How do I start baking bread?", "Is chess hard?", "Tea"]
    Dataset.from_list([{"prompt": prompt} for prompt in prompts]).to_parquet(tmp_path / "text.parquet")
    drawn = Completion([*tokenizer(" at once.")["input_ids"], tokenizer.eos_token_id], True)
    asked = answers(monkeypatch, drawn)
    more = ["--dataset", str(tmp_path / "text.parquet"), "--max_samples", "2", "--max_prompt_length", "5"]
    assert main([*argv, *more, "--batch_size", "8", "--top_p", "0.5"]) == 0
    assert [row["responses"] for row in written(tmp_path / "out.jsonl")] == [[" at once."] * 3] * 2
    [(given, sampling, named)] = asked
    assert given == [tokenizer(prompt)["input_ids"][-5:] for prompt in prompts[:2] for _ in range(3)]
    assert (sampling.top_p, sampling.max_completion_length) == (0.5, 12)
    assert named["eos_token_id"] == tokenizer.eos_token_id and named["pad_token_id"] == tokenizer.pad_token_id


def test_another_chat_template(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, Completion([5], False))
    assert main([*argv, "--chat_template", "default", "--max_samples", "1"]) == 0
    text = tiny_tokenizer().decode(asked[0][0][0])
    assert text.startswith("Human: ") and text.endswith("Assistant:")


def test_empty_responses_are_kept_and_said(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = answers(monkeypatch, Completion([tiny_tokenizer().eos_token_id], True))
    with caplog.at_level(logging.WARNING):
        assert main(argv) == 0
    assert [row["responses"] for row in written(tmp_path / "out.jsonl")] == [
        [[{"role": "assistant", "content": ""}]] * 3
    ] * ROWS
    assert len({named["seed"] for _, _, named in asked}) == 4  # batches
    assert "21 of 21 responses are empty" in caplog.text
    assert "0.0% unfinished, 100.0% empty, 33.3% distinct" in capsys.readouterr().out


def test_an_adapter(argv: list[str], model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    found = []
    for name in ("adapter", "merged", None):
        chosen = ["--model_name_or_path", str(tmp_path / name)] if name else []
        assert main([*argv, *chosen, "--top_k", "1"]) == 0
        found.append((tmp_path / "out.jsonl").read_bytes())
        (tmp_path / "out.jsonl").unlink()
    assert found[0] == found[1] != found[2]


def test_vllm(
    argv: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **named: Any) -> None:
            made.append(named)

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> Any:
            one = SimpleNamespace(token_ids=tiny_tokenizer()("yes")["input_ids"], finish_reason="length")
            return [SimpleNamespace(outputs=[one]) for _ in prompts]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert main([*argv, "--backend", "vllm"]) == 0
    assert made == [{"model": str(model), "tokenizer": str(model), "dtype": "auto"}]
    row = written(tmp_path / "out.jsonl")[0]
    assert row["responses"] == [[{"role": "assistant", "content": "yes"}]] * 3 and row["finished"] == [False] * 3
    provenance = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    other = shutil.copytree(model, tmp_path / "other")
    tiny_model(seed=1).save_pretrained(other)
    again = ["--output_file", str(tmp_path / "b.jsonl"), "--model_name_or_path", str(other)]
    assert main([*argv, "--backend", "vllm", *again]) == 0
    later = json.loads((tmp_path / "b.jsonl.provenance.json").read_text())
    assert later["model_fingerprint"] != provenance["model_fingerprint"]
    (other / "config.json").unlink()
    assert main([*argv, "--backend", "vllm", *again, "--output_file", str(tmp_path / "c.jsonl")]) == 1
    assert "backend vllm needs a whole model" in capsys.readouterr().err


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """One process that imports, from which all runs are forked."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(here.parent), str(here))))
        forkserver.set_forkserver_preload(["command_child"])
        forkserver.ensure_running()


def test_killed_and_resumed_the_file_is_the_same(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    out = tmp_path / "out.jsonl"
    names = ("out.jsonl", "out.jsonl.provenance.json")
    whole = [(tmp_path / name).read_bytes() for name in names]
    for name in names:
        (tmp_path / name).unlink()
    for batch, done in ((1, 2), (1, 4)):  # once more, where it was resumed
        process = processes.Process(target=command_child.run, args=(argv, "fastpo.sample.generate", batch))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not out.exists() and len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == done
    capsys.readouterr()
    assert main([*argv, "--seed", "1", "--temperature", "2"]) == 1
    assert "was begun with another settings.seed, settings.temperature" in capsys.readouterr().err
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'{"index": 4, "pro')
    assert main(argv) == 0
    assert [(tmp_path / name).read_bytes() for name in names] == whole
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_another_model_or_dataset_of_the_same_name_is_noticed(
    argv: list[str], model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, rows = shutil.copytree(model, tmp_path / "model"), tmp_path / "rows.jsonl"
    rows.write_bytes(data.read_bytes())
    argv = [*argv, "--model_name_or_path", str(other), "--dataset", str(rows)]
    with pytest.MonkeyPatch.context() as patch:
        drawn = iter([[Completion([5], False)] * 6])
        patch.setattr(sample, "generate", lambda *_, **__: next(drawn))
        with pytest.raises(StopIteration):
            main(argv)
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == 2
    tiny_model(seed=1).save_pretrained(other)
    rows.write_text(data.read_text().replace('"level": 6', '"level": 7'))
    assert main(argv) == 1
    assert "with another model_fingerprint, prompts_fingerprint:" in capsys.readouterr().err


# --- refused ----------------------------------------------------------------------------------------------------------

ROW = {"prompt": [{"role": "user", "content": "a"}]}
BAD_INPUT: dict[str, tuple[list[str], str]] = {
    # name: (overrides, what the one line must say); {x} are files made below
    "no model": (["--model_name_or_path", ""], "model_name_or_path must be given, got none"),
    "no dataset": (["--dataset", ""], "dataset must be given, got none"),
    "no output": (["--output_file="], "output_file must be given, got none"),
    "no responses": (["--num_generations", "0"], "num_generations must be >= 1, got 0"),
    "no rows": (["--max_samples", "0"], "max_samples must be >= 1, got 0"),
    "no temperature": (["--temperature", "0"], "temperature must be a finite number > 0, got 0.0"),
    "a probability above one": (["--top_p", "1.5"], "top_p must be in (0, 1], got 1.5"),
    "unknown backend": (["--backend", "tgi"], "backend must be one of transformers, vllm, got 'tgi'"),
    "unknown dtype": (["--dtype", "int3"], "dtype must be one of auto, float32, bfloat16, float16, got 'int3'"),
    "unknown template": (["--chat_template", "klingon"], "chat_template must be one of"),
    "unknown option": (["--num_generation", "3"], "unknown option '--num_generation'; did you mean 'num_generations'?"),
    "value of another kind": (["--batch_size", "two"], "invalid int value: 'two'"),
    "output that is there": (["--output_file", "{there}"], "output_file must not exist yet"),
    "output below a file": (["--output_file", "{there}/out"], "output_file must be in a writable folder"),
    "missing dataset": (["--dataset", "nowhere.jsonl"], "dataset must be an existing file or a dataset name"),
    "no prompts": (["--dataset", "{no_prompt}"], "must have a column prompt, or those of a form of pairs; got text"),
    "bad rows": (["--dataset", "{hole}"], "hole.jsonl row 1: 'prompt' must be text or a list of messages, got None"),
    "answered already": (["--dataset", "{answered}"], "row 0: the last message of the prompt must not be the assist"),
    "dates": (["--dataset", "{dates}"], "dataset column 'day' must hold what JSON can"),
    "missing model": (["--model_name_or_path", "/nowhere"], "tokenizer_name_or_path must name a tokenizer, got '/now"),
    "missing weights": (["--model_name_or_path", "{no_weights}"], "model_name_or_path must name a causal LM, got"),
    "a reward model": (["--model_name_or_path", "{reward}"], "must name a causal LM, got a reward model"),
    "a reward model with tied weights": (["--model_name_or_path", "{tied}"], "got a reward model"),
    "a headless model": (["--model_name_or_path", "{headless}"], "without lm_head.weight"),
    "virtual tokens": (["--model_name_or_path", "{virtual}"], "must adapt layers, got PROMPT_TUNING"),
    "too long": (["--max_completion_length", "40000"], "must fit into the model's 32768 positions"),
    "no vllm": (["--backend", "vllm"], "backend vllm needs vllm (pip install 'fastpo[vllm]')"),
}
LOADS = {
    "missing weights", "a reward model", "a reward model with tied weights", "a headless model", "virtual tokens",
    "too long", "no vllm",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    content: dict[str, list[Any]] = {
        "there": [ROW], "no_prompt": [{"text": "a"}], "hole": [ROW, {"prompt": None}, ROW],
        "answered": [{"prompt": [*ROW["prompt"], {"role": "assistant", "content": "b"}]}],
    }  # fmt: skip
    found = {name: folder / f"{name}.jsonl" for name in content}
    for name, rows in content.items():
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found["dates"] = folder / "dates.parquet"
    Dataset.from_list([{**ROW, "day": datetime(2026, 1, 1)}]).to_parquet(found["dates"])
    for name in ("no_weights", "reward", "tied", "headless", "virtual"):
        found[name] = folder / name
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model().config.save_pretrained(folder / "no_weights")
    for name, tied in (("reward", False), ("tied", True)):
        config = tiny_model(num_labels=1, tie_word_embeddings=tied).config
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
    tiny_model(tie_word_embeddings=False).base_model.save_pretrained(folder / "headless")
    tiny_model().save_pretrained(folder / "virtual" / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "virtual" / "base")
    prompted = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompted).save_pretrained(folder / "virtual")
    return found


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    argv: list[str],
    files: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    overrides, message = BAD_INPUT[name]
    if name not in LOADS:
        monkeypatch.setattr(sample, "_load", lambda *_: pytest.fail("loaded the model first"))
    answers(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main([*argv, *(text.format(**files) for text in overrides)]) == 1
    complaint = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastpo: error:")]
    assert len(complaint) == 1 and message in complaint[0], complaint
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_can_be_left_out(argv: list[str], files: dict[str, Path], tmp_path: Path) -> None:
    assert main([*argv, "--dataset", str(files["hole"]), "--skip_bad_rows", "true"]) == 0
    assert [row["index"] for row in written(tmp_path / "out.jsonl")] == [0, 2]


def test_several_processes(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(argv) == 1
    assert "fastpo sample must be started as one process, got 4" in capsys.readouterr().err


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_file_of_settings(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dict(zip([name[2:] for name in argv[1::2]], argv[2::2], strict=True))
    recipe = tmp_path / "sample.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "num_generations": 2, "max_samples": None, "temperature": "5e-1"}))
    assert main(["sample", str(recipe), "--max_samples", "3"]) == 0
    assert [len(row["responses"]) for row in written(tmp_path / "out.jsonl")] == [2] * 3
    assert json.loads((tmp_path / "out.jsonl.provenance.json").read_text())["settings"]["temperature"] == 0.5
    for text, message in (
        ("num_generation: 3", "unknown key 'num_generation'; did you mean 'num_generations'?"),
        ("num_generations: [3]", "num_generations must be one value, got [3]"),
        ("num_generations:", "num_generations must be one value, got None"),
        ("num_generations: 2.5", "invalid int value: '2.5'"),
        ("skip_bad_rows: maybe", "Truthy value expected"),
        ("- 3", "must hold keys and values, got list"),
    ):
        recipe.write_text(text)
        assert main(["sample", str(recipe)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "score"])
def test_help_lists_every_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = __import__(f"fastpo.{command}", fromlist=["Arguments"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"usage: fastpo {command} [FILE.yaml] [--key value ...]" in printed
    for name, field in module.Arguments.__dataclass_fields__.items():
        assert f"--{name} " in printed and field.metadata["help"] in printed, name
    assert "(default: None)" not in printed and "(default: 1" in printed


def test_the_file_is_a_dataset(argv: list[str], tmp_path: Path) -> None:
    assert main(argv) == 0
    assert read_dataset(str(tmp_path / "out.jsonl")).column_names[:4] == ["index", "prompt", "responses", "finished"]
