import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastpo import data
from fastpo.collation import PreferenceCollator
from fastpo.data import Pair, read_dataset
from fastpo.tokenization import tokenize_dataset, tokenize_pair

DEMO = Path(__file__).resolve().parents[2] / "shared" / "data"
END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, appends_end: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words " yes" and " no" and has no merges of digits or capitals."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", END, "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the answer is yes or no"] * 4, trainer)
    if appends_end:
        core.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token="<|pad|>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Dataset]:
    """Rows written as JSONL, read back and tokenised."""

    def load(*rows: dict[str, Any], stage: str = "dpo", **options: Any) -> Dataset:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tokenize_dataset(
            read_dataset(str(path)), tokenizer, **{"stage": stage, "max_length": 256, "source": "pairs", **options}
        )

    return load


def user(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def bot(text: str) -> dict[str, str]:
    return user(text, role="assistant")


def said(by: str, text: str) -> dict[str, str]:
    return {"from": by, "value": text}


ANSWERS = {"chosen": bot("yes"), "rejected": bot("no")}
PAIR = {"prompt": "the answer is", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": [user("well?")], "chosen": [bot("yes")], "rejected": [bot("no")]}
SHAREGPT = {"conversations": [said("system", "be kind"), said("human", "well?")]}
SHAREGPT |= {"chosen": said("gpt", "yes"), "rejected": said("gpt", "no")}
HH = "\n\nHuman: well?\n\nAssistant: perhaps\n\nHuman: now?\n\nAssistant:"
TURNS = [user("well?"), bot("perhaps"), user("now?")]
REPLY = "<|im_start|>assistant\n"
CHATML = f"<|im_start|>user\nwell?{END}\n"
MORE_CHATML = f"{CHATML}{REPLY}perhaps{END}\n<|im_start|>user\nnow?{END}\n"
YES, NO, YES_TURN, NO_TURN = f" yes{END}", f" no{END}", f"yes{END}\n", f"no{END}\n"
# form -> (row, what prompt, chosen and rejected say once tokenised)
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "text": (PAIR, ("the answer is", YES, NO)),
    "messages": (CHAT, (CHATML + REPLY, YES_TURN, NO_TURN)),
    "bare messages": ({"prompt": user("well?"), **ANSWERS}, (CHATML + REPLY, YES_TURN, NO_TURN)),
    "sharegpt": (SHAREGPT, (f"<|im_start|>system\nbe kind{END}\n{CHATML}{REPLY}", YES_TURN, NO_TURN)),
    "sharegpt with roles": ({"conversations": TURNS, **ANSWERS}, (MORE_CHATML + REPLY, YES_TURN, NO_TURN)),
    "HH": ({"chosen": HH + " yes", "rejected": HH + " no"}, (HH, YES, NO)),
    "HH, no markers": ({"chosen": "the answer is yes", "rejected": "the answer is no"}, ("the answer is", YES, NO)),
    "HH, messages": (
        {"chosen": [*TURNS, bot("yes")], "rejected": [*TURNS, bot("no")]}, (MORE_CHATML + REPLY, YES_TURN, NO_TURN),
    ),
    "completion": ({"prompt": "the answer is", "completion": " yes"}, ("the answer is", YES)),
    "completion, messages": ({"prompt": [user("well?")], "completion": [bot("yes")]}, (CHATML + REPLY, YES_TURN)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerFast) -> None:
    row, texts = FORMS[form]
    for stage in ("dpo", "sft") if len(texts) == 3 else ("sft",):
        names = ["prompt_ids", "chosen_ids", "rejected_ids"][: 3 if stage == "dpo" else 2]
        rows = load(row, row, stage=stage)
        assert sorted(rows.column_names) == sorted([*names, "index"]) and rows["index"][:] == [0, 1]
        assert tuple(tokenizer.decode(rows[1][name]) for name in names) == texts[: len(names)]


def test_chat_template_is_applied_as_transformers_does(
    load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = load({"prompt": TURNS, "chosen": [bot("yes")], "rejected": [bot("no"), user("?"), bot("yes")]})[0]
    apply = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    assert row["prompt_ids"] == apply(TURNS, add_generation_prompt=True)
    assert row["prompt_ids"] + row["chosen_ids"] == apply([*TURNS, bot("yes")])
    assert row["prompt_ids"] + row["rejected_ids"] == apply([*TURNS, bot("no"), user("?"), bot("yes")])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "max_length", "expected"),
    [
        (4, 3, 2, 10, (4, 4, 3)),  # all fits
        (20, 20, 10, None, (20, 21, 11)),  # there is no limit
        (20, 3, 2, 10, (6, 4, 3)),  # the prompt gets what the longer completion leaves
        (20, 1, 6, 10, (5, 2, 5)),  # but at least half
        (20, 20, 20, 10, (5, 5, 5)),
        (20, 20, 20, 7, (3, 4, 4)),
        (2, 20, 1, 10, (2, 8, 2)),  # a short prompt leaves its room
        (20, 20, 20, 2, (1, 1, 1)),
    ],
)
def test_truncation(
    prompt: int, chosen: int, rejected: int, max_length: int | None, expected: tuple[int, int, int],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    pair = Pair(("0123456789" * 2)[:prompt], "ABCDEFGHIJKLMNOPQRST"[:chosen], "ZYXWVUTSRQPONMLKJIHG"[:rejected])
    whole, cut = tokenize_pair(pair, tokenizer, 1000), tokenize_pair(pair, tokenizer, max_length)
    assert [len(ids) for ids in whole.values()] == [prompt, chosen + 1, rejected + 1]
    assert tuple(len(ids) for ids in cut.values()) == expected
    assert cut["prompt_ids"] == whole["prompt_ids"][-expected[0] :]
    assert cut["chosen_ids"] == whole["chosen_ids"][: expected[1]]
    assert cut["rejected_ids"] == whole["rejected_ids"][: expected[2]]


def test_a_token_over_the_border_belongs_to_the_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    """`is ` + `yes` is tokenised `is`, ` yes`; where one response alone moves the border, it moves for both."""
    for rejected in ("no", "X"):
        tokens = tokenize_pair(Pair("the answer is ", "yes", rejected), tokenizer, 100)
        assert [tokenizer.decode(ids) for ids in tokens.values()] == [
            "the answer is",
            f" yes{END}",
            f" {rejected}{END}",
        ]
        assert tokens["chosen_ids"] == tokenizer(" yes" + END)["input_ids"] and len(tokens["chosen_ids"]) == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=st.lists(st.text("aes yno\n.é漢0", max_size=12), min_size=3, max_size=3), chat=st.booleans())
def test_nothing_is_lost_or_added(parts: list[str], chat: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, chosen, rejected = "is" + parts[0], parts[1] + "s", parts[2] + "n"
    pair = Pair([user(prompt)], [bot(chosen)], [bot(rejected)]) if chat else Pair(prompt, chosen, rejected)
    tokens = tokenize_pair(pair, tokenizer, 1000)
    for name, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        whole = f"<|im_start|>user\n{prompt}{END}\n{REPLY}{text}{END}\n" if chat else prompt + text + END
        assert tokenizer.decode(tokens["prompt_ids"] + tokens[name]) == whole


@pytest.mark.parametrize(("appends_end", "chosen"), [(False, " yes"), (False, " yes" + END), (True, " yes")])
def test_end_of_sequence_comes_once(appends_end: bool, chosen: str) -> None:
    tokens = tokenize_pair(Pair("the answer is", chosen, None), build_tokenizer(appends_end=appends_end), 100)
    assert tokens == tokenize_pair(Pair("the answer is", " yes", None), build_tokenizer(), 100)


def test_tokenizer_without_end_of_sequence() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        tokenize_pair(Pair("the answer is", " yes", None), tokenizer, 100)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "chosen": None}, "'chosen' must be text or a list of messages, got None"),
        ({**PAIR, "chosen": 3}, "'chosen' must be text or a list of messages, got 3"),
        ({**PAIR, "rejected": ""}, "a completion must not be empty, got ''"),
        ({**PAIR, "prompt": ""}, "'prompt' must not be empty, got ''"),
        ({**PAIR, "chosen": [bot("yes")]}, "prompt and completions must all be text or all be messages"),
        ({**PAIR, "context_scale": None}, "'context_scale' must be a .*number, got None"),
        ({**PAIR, "context_scale": "x"}, "'context_scale' must be a .*number, got 'x'"),
        ({**PAIR, "context_scale": True}, "'context_scale' must be a .*number, got True"),
        ({**PAIR, "context_scale": float("nan")}, "'context_scale' must be a .*number, got nan"),
        ({**CHAT, "prompt": []}, r"'prompt' must be text or a list of messages, got \[\]"),
        ({**CHAT, "rejected": [bot("")]}, "a completion must not be empty, got a message without content"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "'content' in 'chosen' must be text, got None"),
        ({**CHAT, "chosen": ["yes"]}, "'chosen' must hold messages with 'role' and 'content', got 'yes'"),
        ({**CHAT, "chosen": [user("yes")]}, "a completion must start with the assistant's"),
        ({**CHAT, "prompt": [user("well?"), bot("no")]}, "last message of the prompt must not be the assistant's"),
        ({**CHAT, "prompt": [user("x", role="tool")]}, "the chat template cannot render it: no tools here"),
        ({**SHAREGPT, "conversations": [said("robot", "x")]}, "'from' .* got 'robot'"),
        ({**SHAREGPT, "conversations": []}, "'conversations' must be a message or a"),
        ({"chosen": "yes", "rejected": "no"}, "have no common beginning to serve as the prompt"),
        ({"chosen": [bot("yes")], "rejected": [bot("no")]}, "have no common beginning to serve as the prompt"),
        ({"chosen": "yes", "rejected": [bot("no")]}, "must both be text or both be messages"),
    ],
)
def test_bad_row(row: dict[str, Any], reason: str, load: Callable[..., Dataset]) -> None:
    good = [PAIR, CHAT, SHAREGPT, FORMS["HH"][0]]
    good = next(g for g in good if g.keys() <= row.keys() and type(g.get("prompt")) is type(row.get("prompt")))
    with pytest.raises(ValueError, match=f"^pairs row 1: .*{reason}.*skip_bad_rows=True"):
        load(good | {"context_scale": 1.5}, {"context_scale": 1} | row)


def test_bad_rows_are_skipped_on_request(load: Callable[..., Dataset], caplog: pytest.LogCaptureFixture) -> None:
    bad = {**PAIR, "chosen": ""}
    rows = load(*[bad] * 6, PAIR, bad, PAIR, skip_bad_rows=True)
    assert rows["index"][:] == [6, 8] and "problem" not in rows.column_names
    assert "left out 7 of 9 rows: pairs row 0: a completion must not be empty" in caplog.text
    assert "row 4" in caplog.text and "and 2 more rows" in caplog.text and "row 5" not in caplog.text
    with pytest.raises(ValueError, match="pairs must have at least one usable row, got none"):
        load(bad, bad, skip_bad_rows=True)
    with pytest.raises(ValueError, match="pairs must have at least one row, got none"):
        tokenize_dataset(Dataset.from_list([PAIR]).select([]), None, source="pairs")


def test_a_thousand_bad_rows_first(load: Callable[..., Dataset]) -> None:
    """`datasets` takes column types from the first thousand rows, which here have no token ids."""
    assert load(*[{**PAIR, "chosen": ""}] * 1000, PAIR, skip_bad_rows=True)["index"][:] == [1000]


def test_file_kinds(tmp_path: Path) -> None:
    rows = [SHAREGPT] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read_dataset(str(tmp_path / name)).to_list() == rows


LONG = json.dumps({**PAIR, "prompt": "x" * 10**6, "chosen": bot("yes")})
BROKEN_FILES = {
    "empty.json": ("", "must have at least one row"),
    "no_rows.json": ("[]", "must have at least one row"),
    "no_rows_either.json": ("[\n]\n", "must have at least one row"),
    "blank.jsonl": ("\n", "must have at least one row"),
    "cut.json": ('[{"prompt": "a"},\n{"prompt":', "not JSON at line 2: Expecting value"),
    "cut.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b"\n', "not JSON at line 3: Expecting ',' delimiter"),
    "scalar.json": ('[{"prompt": "a"}, 7]', "row 1 must be an object, got 7"),
    # More than the 10 MB from which arrow takes the columns' types.
    "changing.jsonl": (f"{LONG}\n" * 11 + json.dumps(PAIR), "row 11: 'chosen' is str where earlier rows have dict"),
    "table.csv": ("prompt,chosen\n", "must end in .json, .jsonl, .parquet, got"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_file(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^dataset .*{message}"):
        read_dataset(str(tmp_path / name))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be an existing file or a dataset name, got '.*none.json': no such"):
        read_dataset(str(tmp_path / "none.json"))


def test_unknown_columns(load: Callable[..., Dataset]) -> None:
    known = r"conversations \+ chosen \+ rejected; prompt \+ chosen"
    with pytest.raises(ValueError, match=f"^pairs must have the columns of one of: {known}.*; got question, answer"):
        load({"question": "a", "answer": "b"})
    with pytest.raises(ValueError, match="; got prompt, completion"):
        load({"prompt": "a", "completion": "b"}, stage="dpo")


@pytest.mark.parametrize(("index", "kept"), [([17, 4], [17, 4]), (["a", "b"], [0, 1])])
def test_index_column(index: list[Any], kept: list[int], load: Callable[..., Dataset]) -> None:
    """A split keeps its rows' numbers; an `index` that is no row number is the caller's own column."""
    assert load(*({**PAIR, "index": i, "problem": 3} for i in index))["index"][:] == kept


def test_tokenised_data_passes_through(load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"stage": "dpo", "max_length": 1, "source": "pairs"}
    rows = load(PAIR, {**PAIR, "prompt": "no"})
    assert tokenize_dataset(rows, tokenizer, **options).to_list() == rows.to_list()
    assert tokenize_dataset(rows.remove_columns("index"), tokenizer, **options).to_list() == rows.to_list()
    with pytest.raises(ValueError, match="rejected_ids"):
        tokenize_dataset(rows.remove_columns("rejected_ids"), tokenizer, **options)


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_demo_files(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    if not (DEMO / name).exists():
        pytest.skip(f"{DEMO} is not here")
    raw = read_dataset(str(DEMO / name))
    rows = tokenize_dataset(raw, tokenizer, stage="dpo", max_length=512, source=name)
    assert rows["index"][:] == list(range(300))
    for row, source in zip(rows.to_list(), raw.to_list(), strict=True):
        lengths = [len(row[ids]) for ids in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert min(lengths) > 0 and lengths[0] + max(lengths[1:]) <= 512
        chosen = tokenizer.decode(row["chosen_ids"]).rstrip("\ufffd")  # a character may be cut in two
        assert f"{source['chosen']['value']}{END}\n".startswith(chosen)


ROWS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1], "index": 3, "context_scale": 2},
    {"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [4, 4, 4, 1], "index": 0, "context_scale": 0.5},
]


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_collator(stage: str) -> None:
    ids = [[5, 6, 7, 8, 1], [5, 1, 2, 2, 2], [5, 6, 9, 1, 2], [5, 4, 4, 4, 1]]
    attention = [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    completion = [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]
    batch = PreferenceCollator(pad_token_id=2, stage=stage)(ROWS)
    n = 4 if stage == "dpo" else 2
    expected = {"input_ids": ids[:n], "attention_mask": attention[:n], "completion_mask": completion[:n]}
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        **expected, "index": [3, 0], "context_scale": [2, 0.5],
    }  # fmt: skip
    assert {batch[name].dtype for name in (*expected, "index")} == {torch.int64}
    assert batch["context_scale"].dtype == torch.float32
    wider = PreferenceCollator(pad_token_id=2, stage=stage, pad_to_multiple_of=4)(ROWS)
    padding = {"input_ids": 2, "attention_mask": 0, "completion_mask": 0}
    for name, pad in padding.items():
        assert wider[name].tolist() == [[*row, pad, pad, pad] for row in expected[name]]


def test_context_scale_reaches_the_batch(load: Callable[..., Dataset]) -> None:
    rows = load({**PAIR, "context_scale": 2}, {**PAIR, "context_scale": 1})
    assert PreferenceCollator(0)(rows.to_list())["context_scale"].tolist() == [2, 1]
    assert "context_scale" not in PreferenceCollator(0)(load(PAIR).to_list())


def test_system_column_and_full_dialogues_beside_a_text_prompt() -> None:
    turn = {"from": "human", "value": "q"}
    pair = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    made = data.from_sharegpt({"conversations": [turn], "system": "be brief", **pair})
    assert made.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    with pytest.raises(data.BadRowError, match="'tools' must be empty"):
        data.from_sharegpt({"conversations": [turn], "tools": "[]x", **pair})
    user = {"role": "user", "content": "q"}
    dialogues = {side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert data.from_prompt_pair({"prompt": "q", **dialogues}).prompt == [user]
