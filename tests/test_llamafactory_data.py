"""Datasets named in a dataset_info.json: every form comes to messages, and what cannot be read is named."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from llamafactory_datasets import write_datasets

from fastpo.integrations.llamafactory_recipes import datasets as named
from fastpo.integrations.llamafactory_recipes.datasets import read_named_datasets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_datasets(tmp_path / "data")


def read(data: Path, names: str, stage: str, **options: Any) -> list[dict[str, Any]]:
    defaults = {"seed": 42, "max_samples": None, "last_answer_only": False}
    return read_named_datasets(names, str(data), stage, **{**defaults, **options}).to_list()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_sharegpt_preferences(data: Path) -> None:
    rows = read(data, "dpo_en_demo", "dpo", max_samples=2)
    assert rows[1] == {
        "prompt": [message("system", "Count."), message("user", "What comes after 1?")],
        "chosen": [message("assistant", "2 comes after it")],
        "rejected": [message("assistant", "I do not know")],
        "fastpo_problem": "",
    }
    assert len(rows) == 2


def test_alpaca_preferences_and_several_datasets_with_so_many_rows_of_each(data: Path) -> None:
    rows = read(data, "pairs, dpo_en_demo", "dpo", max_samples=3)
    assert [row["prompt"][-1]["content"] for row in rows] == [
        *("Say 0", "Say 1", "Say 2"), *(f"What comes after {i}?" for i in range(3))
    ]  # fmt: skip
    assert rows[0]["prompt"] == [message("user", "Say 0")] and rows[1]["prompt"][0] == message("system", "Obey.")
    assert rows[1]["chosen"] == [message("assistant", "1")] and rows[1]["rejected"] == [message("assistant", "no")]


def test_alpaca_conversations_have_a_row_for_each_answer_or_for_the_last(data: Path) -> None:
    rows = read(data, "alpaca", "sft")
    start = [message("system", "Terse."), message("user", "Hi")]
    assert rows[0]["prompt"] == start and rows[0]["completion"] == [message("assistant", "Hello")]
    assert rows[1]["prompt"] == [*start, message("assistant", "Hello"), message("user", "Add\n1 and 2")]
    assert rows[1]["completion"] == [message("assistant", "3")]
    assert rows[2]["prompt"] == [message("user", "Greet")] and len(rows) == 3
    assert read(data, "alpaca", "sft", last_answer_only=True) == rows[1:]
    assert [row["fastpo_conversation"] for row in rows] == [0, 0, 1]
    assert [row["prompt"] for row in read(data, "parts", "sft")] == [[message("user", x)] for x in ("one", "two")]


def test_rows_that_cannot_be_used_say_why(data: Path) -> None:
    rows = read(data, "roles", "sft", last_answer_only=True)
    assert rows[0]["completion"] == [message("assistant", "d")]
    assert "take turns, from the user to the assistant, got assistant, user" in rows[1]["fastpo_problem"]
    assert "'tool' is a tool's message" in rows[2]["fastpo_problem"]


def test_num_samples_are_all_rows_first_and_the_same_for_a_seed(data: Path) -> None:
    texts = [row["prompt"][-1]["content"] for row in read(data, "many", "dpo")]
    assert len(texts) == 8 and set(texts[:5]) == {f"Say {i}" for i in range(5)}
    assert texts == [row["prompt"][-1]["content"] for row in read(data, "many", "dpo")]
    assert texts != [row["prompt"][-1]["content"] for row in read(data, "many", "dpo", seed=1)]


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("nothing", "sft", r"must name entries of .*dataset_info.json \(dpo_en_demo, alpaca"),
        ("pictures", "sft", "has images"),
        ("kto", "sft", "has kto_tag"),
        ("script", "sft", "must say file_name or hf_hub_url, got script_url"),
        ("openai", "sft", "formatting alpaca or sharegpt, got 'openai'"),
        ("split", "sft", "no split but train, got 'test'"),
        ("unranked", "dpo", "columns without chosen and rejected"),
        ("columns", "sft", "must have the columns question, output"),
        ("absent", "sft", "no such file"),
        ("alpaca", "dpo", "stage dpo needs preferences"),
        ("pairs", "sft", "stage sft needs conversations"),
    ],
)
def test_datasets_that_cannot_be_read(data: Path, name: str, stage: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(data, name, stage)


def test_a_folder_without_a_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder with a readable dataset_info\.json, got '.*none'"):
        read(tmp_path / "none", "demo", "sft")


def test_a_dataset_of_the_hub_is_asked_for_as_its_entry_says(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, **options: Any) -> Dataset:
        asked.append((path, options))
        return Dataset.from_list([{"instruction": "Hi", "input": "", "output": "Hello"}])

    monkeypatch.setattr(named, "load_dataset", load)
    assert read(data, "hub", "sft")[0]["completion"] == [message("assistant", "Hello")]
    assert asked == [("some/rows", {"name": "small", "data_dir": "here", "split": "test"})]
    rows = read_named_datasets("some/other", "ONLINE", "sft", 42, None, False)
    assert asked[1] == ("some/other", {"name": None, "data_dir": None, "split": "train"}) and len(rows) == 1
