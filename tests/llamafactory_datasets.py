"""A folder of datasets in the forms that LLaMA-Factory's dataset_info.json describes."""

import json
from pathlib import Path
from typing import Any


def write_datasets(folder: Path) -> Path:
    """Write dataset_info.json and every form that is read, and some that are not; returns the folder."""
    (folder / "parts").mkdir(parents=True)

    def said(role: str, text: str) -> dict[str, str]:
        return {"from": role, "value": text}

    demo = [
        {
            "conversations": [said("system", "Count."), said("human", f"What comes after {i}?")],
            "chosen": said("gpt", f"{i + 1} comes after it"),
            "rejected": said("gpt", "I do not know"),
        }
        for i in range(24)
    ]
    roles = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    files: dict[str, list[Any]] = {
        "dpo_en_demo.json": demo,
        "alpaca.json": [
            {"instruction": "Add", "input": "1 and 2", "output": "3", "sys": "Terse.", "past": [["Hi", "Hello"]]},
            {"instruction": "Greet", "input": "", "output": "Hi", "sys": "", "past": []},
        ],
        "pairs.json": [{"q": f"Say {i}", "good": f"{i}", "bad": "no", "sys": "Obey." if i else ""} for i in range(5)],
        "roles.json": [
            {"messages": roles},
            {"messages": roles[1:]},
            {"messages": [*roles[:1], {"role": "tool", "content": "x"}]},
        ],
        "parts/a.json": [{"instruction": "one", "output": "1"}],
        "parts/b.json": [{"instruction": "two", "output": "2"}],
    }
    for name, rows in files.items():
        (folder / name).write_text(json.dumps(rows))
    dialogues = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    pairs = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "sys"}
    info = {
        "dpo_en_demo": {
            "file_name": "dpo_en_demo.json", "ranking": True, "formatting": "sharegpt", "columns": dialogues
        },
        "alpaca": {
            "file_name": "alpaca.json",
            "columns": {
                "prompt": "instruction", "query": "input", "response": "output", "system": "sys", "history": "past"
            },
        },
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": pairs},
        "many": {"file_name": "pairs.json", "ranking": True, "columns": pairs, "num_samples": 8},
        "roles": {
            "file_name": "roles.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "observation_tag": "tool",
            },
        },
        "parts": {"file_name": "parts"},
        "pictures": {"file_name": "alpaca.json", "columns": {"prompt": "instruction", "images": "sys"}},
        "kto": {"file_name": "alpaca.json", "columns": {"prompt": "instruction", "kto_tag": "sys"}},
        "hub": {
            "hf_hub_url": "some/rows", "file_name": "alpaca.json", "subset": "small", "folder": "here", "split": "test"
        },
        "script": {"script_url": "some"},
        "openai": {"file_name": "roles.json", "formatting": "openai"},
        "split": {"file_name": "alpaca.json", "split": "test"},
        "unranked": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "q"}},
        "columns": {"file_name": "alpaca.json", "columns": {"prompt": "question", "response": "output"}},
        "absent": {"file_name": "absent.json"},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
