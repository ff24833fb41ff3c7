"""The drop-in for TRL's DPOTrainer: its scenarios, and its own answers in the same process."""

import copy
import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, DatasetDict, disable_progress_bars
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny import tiny_model, tiny_pairs, tiny_tokenizer
from transformers import AutoConfig, BitsAndBytesConfig, TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fastpo import PreferenceTrainingArguments
from fastpo.integrations import trl as ours
from fastpo.integrations.trl.dpo_data import TOKENS, tokenize_as_trl

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(`return_outputs=True`|is deprecated and will be removed in v2.0.0):FutureWarning"
)
disable_progress_bars()
OF_PAIRS = (
    "loss", "num_tokens", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
# Of tokens, in each batch of a device.
OF_TOKENS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
SAME_METRICS = (*OF_PAIRS, *OF_TOKENS)
Fields = dict[str, Any]


def config(path: Path, kind: Any = ours.DPOConfig, **fields: Any) -> Any:
    defaults: Fields = {
        "output_dir": str(path / "run"), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    if issubclass(kind, ours.DPOConfig):
        defaults["reference_cache_dir"] = str(path / "reference")
    return kind(**{**defaults, **fields})


def trainer_of(path: Path, library: Any = ours, **fields: Any) -> Any:
    """A trainer of ours or of TRL; what are no fields of the config are its own arguments."""
    names = ("model", "ref_model", "train_dataset", "eval_dataset", "processing_class", "peft_config", "data_collator")
    names += ("quantization_config", "compute_metrics")
    given = {name: fields.pop(name) for name in names if name in fields}
    given = {"model": tiny_model(), "train_dataset": uneven_pairs(), "processing_class": tokenizer()} | given
    return library.DPOTrainer(args=config(path, library.DPOConfig, **fields), **given)


def uneven_pairs() -> Dataset:
    """Pairs of many lengths, the chosen response being the longer one in some and the shorter one in others."""

    def cut(row: Fields, i: int) -> Fields:
        ends = {"prompt": 12 + i, "chosen": 12 + 7 * (i % 4), "rejected": 40 - 5 * i}
        return {name: [{**row[name][0], "content": row[name][0]["content"][:end]}] for name, end in ends.items()}

    return tiny_pairs().map(cut, with_indices=True, load_from_cache_file=False)


def tokenizer() -> Any:
    return copy.deepcopy(tiny_tokenizer())  # which a trainer may change


def curve(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same(got: list[dict[str, float]], want: list[dict[str, float]], names: Any = SAME_METRICS) -> None:
    assert len(got) == len(want) > 0
    for row, other in zip(got, want, strict=True):
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


# --- losses -----------------------------------------------------------------------------------------------------------

MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
LOSSES: dict[str, Fields] = {
    **{
        name: {"loss_type": [name]}
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
    },
    **{name: {"loss_type": name} for name in ("apo_zero", "apo_down", "sigmoid_norm")},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.1},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "ld_alpha": {"ld_alpha": 0.4, "beta": 0.5},
    "wpo": {"use_weighting": True},
    "mpo": MPO,
    "ipo_in_a_sum": {"loss_type": ["ipo", "sigmoid", "ipo"], "loss_weights": [0.3, 1.0, 0.2], "ld_alpha": 0.3},
}


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_losses_and_metrics_are_those_of_trl(tmp_path: Path, fields: Fields) -> None:
    got, want = (curve(trainer_of(tmp_path, kind, ref_model=tiny_model(seed=1), **fields)) for kind in (ours, trl))
    assert_same(got, want)
    assert got[0]["loss"] != got[1]["loss"]


def test_sft_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, loss_type=["sft"])
    assert trainer.ref_model is None  # TRL runs one, for metrics alone
    assert_same(curve(trainer), curve(trainer_of(tmp_path, trl, loss_type=["sft"], ref_model=tiny_model())), ["loss"])


SWITCHES: dict[str, Fields] = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding_free": {"padding_free": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 16},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "trl_columns": {"remove_unused_columns": True},
    "split_responses": {"split_responses": True},
}


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_what_saves_memory_or_time_changes_no_number(tmp_path: Path, fields: Fields, plain: Any) -> None:
    names = OF_PAIRS if "gradient_accumulation_steps" in fields else SAME_METRICS
    assert_same(curve(trainer_of(tmp_path, ref_model=tiny_model(seed=1), **fields)), plain, names)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """TRL's curve of the two tiny models."""
    return curve(trainer_of(tmp_path_factory.mktemp("trl"), trl, ref_model=tiny_model(seed=1)))


def test_collator_of_trl(tmp_path: Path, plain: Any) -> None:
    collator = DataCollatorForPreference(pad_token_id=tiny_tokenizer().pad_token_id, max_length=64)
    for fields in ({}, {"remove_unused_columns": True}):
        trainer = trainer_of(tmp_path, ref_model=tiny_model(seed=1), data_collator=collator, **fields)
        assert_same(curve(trainer), plain)


def test_noise_on_embeddings_is_that_of_trl(tmp_path: Path) -> None:
    noise = {"neftune_noise_alpha": 20.0, "max_steps": 1}
    got, want = (curve(trainer_of(tmp_path, kind, ref_model=tiny_model(seed=1), **noise)) for kind in (ours, trl))
    assert_same(got, want)


def test_the_batch_is_padded_to_the_multiple(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, pad_to_multiple_of=48, max_length=47)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (8, 48)


def test_a_beta_head_trains_what_trl_cannot(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, ref_model=tiny_model(seed=1), add_beta_head=True, beta_mode="dynamic_scaling", max_steps=4,
        beta_head_config={"lr_multiplier": 1.0},
    )  # fmt: skip
    rows = curve(trainer)
    assert rows[0]["beta/mean"] == pytest.approx(0.1) and rows[-1]["beta/std"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]


# --- data -------------------------------------------------------------------------------------------------------------

USER, THEN = {"role": "user", "content": "What is fast?"}, {"role": "user", "content": "And then?"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
ROWS_OF_TEXT: list[Fields] = [
    {"prompt": "The sky is", "chosen": " blue, mostly", "rejected": " green"},
    {"prompt": "Is it? ", "chosen": "yes<|im_end|>", "rejected": "no"},
]
ROWS: dict[str, list[Fields]] = {
    "text": ROWS_OF_TEXT,
    "implicit text": [{"chosen": "The sky is blue", "rejected": "The sky is bleak and grey"}],
    "messages": [
        {"prompt": [USER], "chosen": [says("light")], "rejected": [says("a snail, they say")]},
        {"prompt": [USER, says("light"), THEN], "chosen": [says("sound")], "rejected": [says("no")]},
    ],
    "implicit messages": [{"chosen": [USER, says("light")], "rejected": [USER, says("a snail")]}],
    "tools": [{"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")], "tools": json.dumps(TOOLS)}],
    "further columns": [{**row, "conversations": "of another tool", "index": "a"} for row in ROWS_OF_TEXT],
    "template": [
        {"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")], "chat_template_kwargs": {"thinking": True}}
    ],
}


def tokens_of_trl(rows: Dataset, max_length: int | None) -> list[list[list[int]]]:
    """Chosen and rejected sequences without padding, as TRL's trainer and collator make them."""
    own, args = with_template(), SimpleNamespace(max_length=max_length, truncation_mode="keep_start")
    args.dataset_num_proc = None
    holder = SimpleNamespace(_tokenizer=own)
    prepared = trl.DPOTrainer._prepare_dataset(holder, rows, own, args, "train")
    return sequences(DataCollatorForPreference(own.pad_token_id, max_length)(list(prepared)))


def sequences(batch: dict[str, Any]) -> list[list[list[int]]]:
    columns = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True)
    return [[ids[mask].tolist(), completion[mask].tolist()] for ids, mask, completion in columns]


def with_template() -> Any:
    """A tokenizer whose chat template reads tools and an argument of its own."""
    own = tokenizer()
    own.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}{% if thinking %}think{% endif %}" + (
        own.chat_template
    )
    return own


@pytest.mark.parametrize("max_length", [None, 0.9, 0.6])  # of the longest sequence
@pytest.mark.parametrize("kind", ROWS)
def test_tokens_are_those_of_trl(kind: str, max_length: float | None) -> None:
    rows, own = Dataset.from_list(ROWS[kind]), with_template()
    want = tokens_of_trl(rows, None)
    if max_length is not None:
        longest, shortest = (of(len(ids) for ids, _ in want) for of in (max, min))
        max_length = max(int(max_length * longest), shortest - 2)
        want = tokens_of_trl(rows, max_length)
        assert max(len(ids) for ids, _ in want) <= max_length
    found = tokenize_as_trl(rows, own, max_length=max_length, source="rows")
    streamed = tokenize_as_trl(rows.to_iterable_dataset(), own, max_length=max_length, source="rows")
    for got in (found, streamed):
        batch = DataCollatorForPreference(own.pad_token_id)(list(got))
        assert sequences(batch) == want


def test_rows_without_room_for_a_completion_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([*ROWS["text"], {"prompt": "long " * 9, "chosen": "a", "rejected": "b"}])
    with caplog.at_level(logging.WARNING, "fastpo"):
        found = tokenize_as_trl(rows, tokenizer(), max_length=24, source="rows")
    assert len(found) == 2 == len(tokens_of_trl(rows, 24)) / 2 and "left out 1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="max_length=2 leaves no row of rows room"):
        tokenize_as_trl(rows, tokenizer(), max_length=2, source="rows")


def test_ids_and_sharegpt_rows_are_read_too() -> None:
    ids = Dataset.from_dict({"prompt_ids": [[5, 6, 7]], "chosen_ids": [[8, 9, 10]], "rejected_ids": [[9]]})
    row = tokenize_as_trl(ids, tokenizer(), max_length=5, source="rows")[0]
    assert [row[name] for name in TOKENS] == [[5, 6, 7], [8, 9], [9]]
    with pytest.raises(ValueError, match="max_length=3 leaves no row of rows room"):
        tokenize_as_trl(ids, tokenizer(), max_length=3, source="rows")
    for index in (7, "a"):
        numbered = tokenize_as_trl(ids.add_column("index", [index]), tokenizer(), max_length=5, source="rows")[0]
        assert (numbered["chosen_ids"], numbered["index"]) == ([8, 9], 7 if index == 7 else 0)
    again = tokenize_as_trl(ids, tokenizer(), max_length=6, source="rows").add_column("ref_chosen_logps", [-1.0])
    assert tokenize_as_trl(again, tokenizer(), max_length=6, source="rows") is again
    said = {"human": USER["content"], "gpt": "light"}
    turns = [{"from": name, "value": text} for name, text in said.items()]
    sharegpt = {
        "conversations": turns[:1],
        "chosen": turns[1],
        "rejected": {"from": "gpt", "value": "a snail, they say"},
    }
    found, want = (
        tokenize_as_trl(Dataset.from_list([rows]), tokenizer(), max_length=None, source="rows")[0]
        for rows in (sharegpt, ROWS["messages"][0])
    )
    assert found == want


BAD_DATA: dict[str, tuple[Any, str]] = {
    "images": (Dataset.from_list([{**ROWS["text"][0], "images": ["a"]}]), "must hold no images"),
    "columns": (Dataset.from_list([{"text": "a"}]), "must have chosen and rejected"),
    "prompt": (Dataset.from_list([{"prompt": "", "chosen": "a", "rejected": "b"}]), "row 0: 'prompt' must have"),
    "none": (
        Dataset.from_list([ROWS["text"][0], {"prompt": "a", "chosen": None, "rejected": "b"}]),
        "row 1: cannot be",
    ),
    "mixed": (Dataset.from_list([{"prompt": "a", "chosen": [says("a")], "rejected": [says("b")]}]), "row 0: cannot be"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_unusable_data_is_refused(tmp_path: Path, rows: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, train_dataset=rows)
    streamed = rows.to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        curve(trainer_of(tmp_path, train_dataset=streamed))


def test_bad_rows_can_be_skipped() -> None:
    rows = Dataset.from_list([{"prompt": "", "chosen": "a", "rejected": "b"}, ROWS["text"][0]])
    for source in (rows, rows.to_iterable_dataset()):
        found = tokenize_as_trl(source, tokenizer(), max_length=None, source="rows", skip_bad_rows=True)
        assert [row["index"] for row in found] == [1]


def test_streams_train_and_evaluate(tmp_path: Path) -> None:
    streamed = tiny_pairs().to_iterable_dataset()
    both = [
        trainer_of(tmp_path, kind, ref_model=tiny_model(seed=1), train_dataset=streamed, eval_dataset=streamed)
        for kind in (ours, trl)
    ]
    got, want = (curve(trainer) for trainer in both)
    assert_same(got, want)
    got, want = (trainer.evaluate() for trainer in both)
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="max_steps"):
        curve(trainer_of(tmp_path, train_dataset=streamed, max_steps=-1))
    with pytest.raises(ValueError, match="precompute_ref_log_probs must be False with an IterableDataset"):
        trainer_of(tmp_path, train_dataset=streamed, precompute_ref_log_probs=True)


def test_evaluation_sets(tmp_path: Path) -> None:
    sets = DatasetDict({"first": tiny_pairs(4, seed=2), "second": tiny_pairs(8, seed=3)})
    both = [
        trainer_of(tmp_path, kind, ref_model=tiny_model(seed=1), eval_dataset=sets, eval_strategy="steps", eval_steps=1)
        for kind in (ours, trl)
    ]
    for trainer in both:
        trainer.train()
    got, want = (trainer.evaluate() for trainer in both)
    for name in ("first", "second"):
        assert got[f"eval_{name}_loss"] == pytest.approx(want[f"eval_{name}_loss"], rel=1e-4)
        assert 0 <= got[f"eval_{name}_rewards/accuracies"] <= 1
    another = tiny_pairs(4, seed=5)  # not tokenised
    got, want = (trainer.evaluate(another) for trainer in both)
    for name in SAME_METRICS:
        assert name == "num_tokens" or got[f"eval_{name}"] == pytest.approx(want[f"eval_{name}"], rel=1e-4, abs=1e-4)


def test_compute_metrics_gets_rewards(tmp_path: Path) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        return {"right": float(np.mean(prediction.predictions[:, 0] > prediction.predictions[:, 1]))}

    trainer = trainer_of(
        tmp_path, ref_model=tiny_model(seed=1), eval_dataset=tiny_pairs(8, seed=2), compute_metrics=metrics
    )
    found = trainer.evaluate()
    assert found["eval_right"] == pytest.approx(found["eval_rewards/accuracies"])


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model in 16 bits and its tokenizer, which has no padding token."""
    folder = str(tmp_path_factory.mktemp("saved"))
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    own = tokenizer()
    own.pad_token = None
    own.save_pretrained(folder)
    return folder


def test_a_model_by_its_name(tmp_path: Path, saved: str) -> None:
    fields = {"model": saved, "processing_class": None, "bf16": None}
    both = [trainer_of(tmp_path, kind, **fields) for kind in (ours, trl)]
    got, want = (curve(trainer) for trainer in both)
    assert both[0].args.bf16 and both[0].model.dtype == torch.float32
    # Under autocast to 16 bits the two round in different places.
    for row, other in zip(got, want, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.05)
    own, model = both[0].processing_class, both[0].model
    assert own.pad_token == own.eos_token
    assert model.config.pad_token_id == model.generation_config.pad_token_id == own.pad_token_id
    trainer = trainer_of(tmp_path, model=saved, model_init_kwargs={"dtype": "bfloat16"}, pad_token="<|im_start|>")
    assert trainer.model.dtype == torch.bfloat16 and trainer.processing_class.pad_token == "<|im_start|>"


def test_without_arguments(tmp_path: Path, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = ours.DPOTrainer(saved, train_dataset=tiny_pairs())
    assert trainer.args.output_dir == f"{Path(saved).name}-DPO" and trainer.args.gradient_checkpointing


def mixture() -> Any:
    shape = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "output_router_logits": True}
    return tiny_model("qwen3_moe", **shape)


MISUSE: dict[str, tuple[Fields, type[Exception], str]] = {
    "data": ({"train_dataset": None}, ValueError, "train_dataset must be given"),
    "no dataset": ({"train_dataset": [1]}, TypeError, "train_dataset must be a datasets"),
    "processor": ({"processing_class": object()}, TypeError, "processing_class must be a tokenizer, got object"),
    "pad_token": ({"pad_token": "<none>"}, ValueError, "pad_token must be one of the tokenizer's tokens"),
    "quantised": (
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, ValueError, "quantization_config must be None",
    ),
    "router": ({"router_aux_loss_coef": 0.1}, ValueError, "router_aux_loss_coef is for a mixture of experts"),
    "prompt learning": (
        {"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}, ValueError,
        "peft_config must adapt layers",
    ),
    "nothing to move": ({"sync_ref_model": True, "loss_type": ["sft"]}, ValueError, "sync_ref_model needs a second"),
    "head to move": (
        {"sync_ref_model": True, "add_disco_head": True, "pref_loss_type": "disco"}, ValueError, "sync_ref_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "message"), MISUSE.values(), ids=MISUSE)
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_misuse_is_refused(tmp_path: Path, fields: Fields, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, **fields)


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model must be another object"):
        trainer_of(tmp_path, model=model, ref_model=model)
    with pytest.raises(TypeError, match=r"must be a DPOConfig of fastpo.integrations.trl, got .*trl.trainer"):
        ours.DPOTrainer(model, args=config(tmp_path, trl.DPOConfig), train_dataset=tiny_pairs())
    model.config.vision_config = AutoConfig.for_model("siglip_vision_model")
    with pytest.raises(ValueError, match="model must be a language model"):
        trainer_of(tmp_path, model=model)


def test_a_mixture_of_experts_trains_unbalanced_when_asked_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0.0 .* from the model"):
        trainer_of(tmp_path, model=mixture())
    fields = {"router_aux_loss_coef": 0.0, "max_steps": 1}
    got, want = (
        curve(trainer_of(tmp_path, kind, model=mixture(), ref_model=mixture(), **fields)) for kind in (ours, trl)
    )
    assert_same(got, want)


def test_the_reference_follows_the_policy(tmp_path: Path) -> None:
    fields = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 4}
    both = [trainer_of(tmp_path, kind, ref_model=tiny_model(seed=1), **fields) for kind in (ours, trl)]
    got, want = (curve(trainer) for trainer in both)
    assert_same(got, want)
    before = tiny_model(seed=1).get_input_embeddings().weight
    assert not torch.equal(both[0].ref_model.get_input_embeddings().weight, before)


def test_a_resumed_run_says_that_its_reference_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"sync_ref_model": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(tmp_path, **fields).train()
    assert "sync_ref_model" not in caplog.text
    trainer_of(tmp_path, **fields | {"max_steps": 2}).train(resume_from_checkpoint=True)
    assert "sync_ref_model: checkpoints do not hold the reference" in caplog.text


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an adapter that does something."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), lora(modules_to_save=["norm"]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter) * ("lora" in name or "norm" in name))
    model.save_pretrained(folder)
    return folder


def adapted(folder: str) -> Any:
    return PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_new_adapter(tmp_path: Path, checkpointing: bool) -> None:
    fields = {"peft_config": lora(lora_dropout=0.3), "max_steps": 3, "gradient_checkpointing": checkpointing}
    got, want = (curve(trainer_of(tmp_path, kind, **fields)) for kind in (ours, trl))
    assert got[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and got[-1]["loss"] < 0.69
    assert_same(got, want)  # both seed what the adapter begins with


def test_the_reference_of_an_earlier_trainer_is_not_taken_for_the_model_as_it_is(tmp_path: Path, adapter: str) -> None:
    model = trainer_of(tmp_path, model=adapted(adapter)).model
    with pytest.raises(ValueError, match="model has an adapter 'ref'"):
        trainer_of(tmp_path, model=model)
    model.delete_adapter("ref")
    assert "ref" in trainer_of(tmp_path, model=model).model.peft_config


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_that_is_there_is_its_own_reference_as_it_was(
    tmp_path: Path, adapter: str, checkpointing: bool
) -> None:
    fields = {"max_steps": 3, "gradient_checkpointing": checkpointing}
    both = [trainer_of(tmp_path, kind, model=adapted(adapter), **fields) for kind in (ours, trl)]
    start = {name: p.clone() for name, p in both[0].model.named_parameters() if ".ref." in name}
    got, want = (curve(trainer) for trainer in both)
    assert got[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and got[-1]["loss"] < 0.69
    assert_same(got, want)
    now = dict(both[0].model.named_parameters())
    assert any("lora_B" in name for name in start) and any("norm" in name for name in start)
    for name, parameter in start.items():
        assert torch.equal(parameter, now[name]) and not now[name].requires_grad
        assert not torch.equal(parameter, now[name.replace(".ref.", ".default.")])


def test_a_cached_reference_is_the_adapter_too(tmp_path: Path, adapter: str) -> None:
    live, cached = (
        curve(trainer_of(tmp_path, model=adapted(adapter), precompute_ref_log_probs=precomputed))
        for precomputed in (False, True)
    )
    assert_same(cached, live)
    given = trainer_of(tmp_path, model=adapted(adapter), ref_model=tiny_model())
    assert "ref" not in given.model.peft_config
    assert curve(given)[0]["loss"] != pytest.approx(np.log(2), abs=1e-5)  # another reference


def test_adapters_that_are_refused(tmp_path: Path, adapter: str) -> None:
    with pytest.raises(ValueError, match="peft_config must be None for a model that already has an adapter"):
        trainer_of(tmp_path, model=adapted(adapter), peft_config=lora())
    with pytest.raises(ValueError, match="sync_ref_model needs a second model"):
        trainer_of(tmp_path, model=adapted(adapter), sync_ref_model=True)
    model = get_peft_model(tiny_model(), lora())
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="model must have one active adapter"):
        trainer_of(tmp_path, model=model)


def test_a_trained_adapter_loads_as_one(tmp_path: Path, adapter: str) -> None:
    trainer = trainer_of(tmp_path, model=adapted(adapter))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "out"))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "a", ref_model=tiny_model(seed=1), **fields)
    want = curve(whole)
    resumed = trainer_of(tmp_path / "a", ref_model=tiny_model(seed=1), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    got = [row for row in resumed.state.log_history if "loss" in row]
    assert_same(got, want)


def test_a_resumed_adapter_keeps_its_reference(tmp_path: Path, adapter: str) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    want = curve(trainer_of(tmp_path, model=adapted(adapter), **fields))
    resumed = trainer_of(tmp_path, model=adapted(adapter), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same([row for row in resumed.state.log_history if "loss" in row], want)
    assert not (tmp_path / "run/checkpoint-4/ref").exists() and "ref" in resumed.model.peft_config


def test_tags_and_card(tmp_path: Path, saved: str) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert {"fastpo", "trl", "dpo"} <= set(trainer.model.model_tags)
    card = (tmp_path / "run/README.md").read_text()
    assert "# run" in card and "- trl" in card
    trainer.create_model_card(model_name="mine", dataset_name="some/data", tags="further")
    card = (tmp_path / "run/README.md").read_text()
    assert "# mine" in card and "datasets:\n- some/data" in card and "- further" in card and "- dpo" in card


def test_evaluation_data_that_comes_later_is_precomputed_while_the_reference_is_there(tmp_path: Path) -> None:
    late = tiny_pairs(4, seed=9)
    want = trainer_of(tmp_path).evaluate(late)["eval_loss"]
    trainer = trainer_of(tmp_path, precompute_ref_log_probs=True)
    assert trainer.evaluate(late)["eval_loss"] == pytest.approx(want, abs=1e-5)
    trainer.train()
    with pytest.raises(ValueError, match="must be called before training"):
        trainer.evaluate(tiny_pairs(4, seed=10))
    other = trainer_of(tmp_path, precompute_ref_log_probs=True, ref_model=tiny_model(seed=1))
    with pytest.raises(ValueError, match="before the ref_model is let go"):
        other.evaluate(late)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_every_field_of_trl_and_of_fastpo_with_its_default(tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(ours.DPOConfig)}
    for kind in (trl.DPOConfig, PreferenceTrainingArguments):
        assert fields >= {field.name for field in dataclasses.fields(kind)}
    mine, theirs = ours.DPOConfig(str(tmp_path), use_cpu=True), trl.DPOConfig(str(tmp_path), use_cpu=True)
    assert isinstance(mine, trl.DPOConfig) and isinstance(mine, PreferenceTrainingArguments)
    other = {"remove_unused_columns", "dataloader_pin_memory"}  # the collator picks its columns; nothing to pin for
    other |= {"label_names", "logging_dir", "run_name"}
    for field in dataclasses.fields(trl.DPOConfig):
        if field.name not in other:
            assert getattr(mine, field.name) == getattr(theirs, field.name), field.name


YAML = """
model_name_or_path: some/model
dataset_name: some/data
output_dir: out
use_cpu: true
loss_type: [sigmoid, ipo, sft]
loss_weights: [0.8, 0.2, 1.0]
model_init_kwargs: {dtype: bfloat16}
gradient_checkpointing_kwargs: {use_reentrant: false}
"""


def test_yaml_and_command_line_of_trl(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(YAML)
    parser = trl.TrlParser((trl.ScriptArguments, ours.DPOConfig, trl.ModelConfig))
    line = ["--config", str(tmp_path / "dpo.yaml"), "--beta", "0.3", "--pad_to_multiple_of", "8"]
    line += ["--beta_schedule", '{"points": [[0, 0.3], [1, 0.1]], "interpolation": "linear"}']
    script, args, model = parser.parse_args_and_config(line)
    assert (script.dataset_name, model.model_name_or_path) == ("some/data", "some/model")
    assert args.preference_config.pref_loss_type == {"sigmoid": 0.8, "ipo_norm": 0.2, "sft": 1.0}
    assert args.preference_config.beta == 0.3 and args.preference_config.beta_schedule["interpolation"] == "linear"
    assert args.model_init_kwargs == {"dtype": "bfloat16"} and args.pad_to_multiple_of == 8
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    parser = trl.TrlParser((trl.ScriptArguments, ours.DPOConfig, trl.ModelConfig))
    _, args, _ = parser.parse_args_and_config(["--output_dir", "out", "--use_cpu", "--pref_loss_type", '{"cauchy": 1}'])
    assert args.preference_config.loss_weights == {"cauchy": 1.0}


def test_a_changed_copy_states_its_own_objective(tmp_path: Path) -> None:
    args = config(tmp_path, loss_type=["hinge"])
    assert args.pref_loss_type is None and args.preference_config.pref_loss_type == "hinge"
    changed = dataclasses.replace(args, loss_type=["cauchy", "cauchy"])  # not one of TRL's
    assert changed.preference_config.pref_loss_type == {"cauchy": 2.0}


def test_fields_that_are_set_later_count_as_in_trl(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.beta, args.loss_type = 0.7, ["hinge"]
    trainer = ours.DPOTrainer(tiny_model(), args=args, train_dataset=uneven_pairs(), processing_class=tokenizer())
    assert (trainer.objective.beta, trainer.objective.pref_loss_type) == (0.7, "hinge")
    reward = ours.RewardConfig(str(tmp_path / "reward"), use_cpu=True, bf16=False)
    reward.pref_loss_type = "hinge"
    assert reward.preference_config.pref_loss_type == "hinge"
    args.loss_type = ["exo_pair"]
    with pytest.raises(ValueError, match="label_smoothing"):
        ours.DPOTrainer(tiny_model(), args=args, train_dataset=uneven_pairs(), processing_class=tokenizer())


REFUSED: dict[str, tuple[Fields, str]] = {
    "two losses": ({"loss_type": ["hinge"], "pref_loss_type": "hinge"}, "pref_loss_type must be None where loss_type"),
    "weights": ({"loss_weights": [1.0, 2.0]}, "loss_weights must hold one number for each loss_type"),
    "name": ({"loss_type": ["sigmod"]}, "loss_type must name some of sigmoid, .*got 'sigmod'"),
    "smoothing": ({"label_smoothing": 0.1}, "label_smoothing is ignored by TRL's 'sigmoid'"),
    "smoothing one of two": (
        {"loss_type": ["robust", "hinge"], "label_smoothing": 0.1}, "label_smoothing is ignored by TRL's 'hinge'",
    ),
    "unused": ({"discopop_tau": 0.1}, "discopop_tau is not used by pref_loss_type 'sigmoid'"),
    "divergence": ({"loss_type": ["bco_pair"], "f_divergence_type": "js_divergence"}, "f_divergence_type is not used"),
    "torn": ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting weighs pairs"),
    "exo_pair": ({"loss_type": ["exo_pair"]}, "'exo_pair' needs label_smoothing"),
    "keep_end": ({"truncation_mode": "keep_end"}, "truncation_mode must be 'keep_start'"),
    "offloading": ({"activation_offloading": True}, "activation_offloading must be False"),
    "stage": ({"stage": "sft"}, "stage must be 'dpo'"),
    "moving cache": (
        {"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs must be False",
    ),
    "noise by length": ({"neftune_noise_alpha": 5.0, "padding_free": True}, "neftune_noise_alpha .* must be None"),
    "multiple without padding": ({"pad_to_multiple_of": 8, "padding_free": True}, "pad_to_multiple_of must be None"),
    "learned ipo": (
        {"loss_type": ["ipo"], "add_beta_head": True, "beta_mode": "dynamic_scaling"}, "cannot be paired with",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_fields(tmp_path: Path, fields: Fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_labels_are_smoothed_in_fastpos_name(tmp_path: Path) -> None:
    args = config(tmp_path, pref_loss_type="sigmoid", label_smoothing=0.1)
    assert args.preference_config.label_smoothing == 0.1


def test_the_migration_table_names_every_field_of_trl() -> None:
    text = (Path(__file__).parents[1] / "docs/trl.md").read_text()
    from_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)} - from_transformers
    assert len(own) > 20 and [name for name in sorted(own) if f"`{name}" not in text] == []
