"""The reference computed beforehand: kept, found again, resumed, and never mistaken for another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer

from fastpo import PreferenceTrainer, reference_cache
from fastpo.data import REFERENCE_COLUMNS
from fastpo.reference_model import Reference

LEDPO: dict[str, Any] = {
    "add_beta_head": True, "beta_mode": "dynamic_scaling", "regularizers": {"entropy": 0.1},
    "contextual_scaling": "mallows", "pref_loss_type": "sigmoid",
}  # fmt: skip


def trainer_for(path: Path, model: Any = None, reference: Any = None, lora: bool = False, **fields: Any) -> Any:
    data = fields.pop("train_dataset", tiny_pairs(12))
    held_out = fields.pop("eval_dataset", tiny_pairs(6, seed=2))
    return PreferenceTrainer(
        tiny_model() if model is None else model, reference, tiny_args(path, **fields), train_dataset=data,
        eval_dataset=held_out, processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
    )  # fmt: skip


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("reference/*/rows-*"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_from_the_cache_is_the_live_run(tmp_path: Path, lora: bool) -> None:
    logs = []
    for name, cached in (("live", False), ("cached", True)):
        torch.manual_seed(0)
        trainer = trainer_for(tmp_path / name, lora=lora, precompute_ref_log_probs=cached, max_steps=4, **LEDPO)
        assert (trainer.ref_model is None) == (cached or lora)
        trainer.train()
        trainer.evaluate()
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        logs[-1].append(trainer.state.log_history[-1]["eval_loss"])
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-5, atol=1e-5)
    assert len(shards(tmp_path / "cached")) == 2 and not shards(tmp_path / "live")


def test_a_second_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer_for(tmp_path, precompute_ref_log_probs=True)
    monkeypatch.setattr(Reference, "ask", None)
    again = trainer_for(tmp_path, precompute_ref_log_probs=True)
    assert again.train_dataset.to_dict() == first.train_dataset.to_dict()
    assert set(REFERENCE_COLUMNS) <= set(first.train_dataset.column_names)


def test_an_interrupted_cache_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 4)
    whole = trainer_for(tmp_path / "whole", precompute_ref_log_probs=True).train_dataset
    compute, calls = Reference.ask, []

    def dies(self: Any, policy: Any, unwrapped: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        calls.append(inputs["index"].tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, policy, unwrapped, inputs, *args, **options)

    fields: dict[str, Any] = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
    monkeypatch.setattr(Reference, "ask", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, **fields)
    assert len(shards(tmp_path)) == 1 and [p.name for p in shards(tmp_path)[0].parent.iterdir()] == ["rows-000000000"]
    calls[:] = [[]] * 3
    rows = trainer_for(tmp_path, **fields).train_dataset
    assert all(rows[name] == pytest.approx(whole[name], rel=1e-5) for name in REFERENCE_COLUMNS)
    assert [i for call in calls[3:7] for i in call] == list(range(4, 12))


@pytest.mark.parametrize(
    "change", [{"model": 7}, {"data": 3}, {"reference": 7}, {"max_length": 24}, LEDPO, {"rope_theta": 5e5}]
)
def test_what_changes_the_statistics_changes_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    def key(model: int = 0, data: int = 1, reference: int | None = None, **fields: Any) -> set[str]:
        config = {"rope_theta": fields.pop("rope_theta", 1e4)}
        before = {p.parent.name for p in shards(tmp_path)}
        trainer_for(
            tmp_path, tiny_model(seed=model, rope_parameters={"rope_type": "default", **config}),
            None if reference is None else tiny_model(seed=reference),
            train_dataset=tiny_pairs(4, data), eval_dataset=None, precompute_ref_log_probs=True, **fields,
        )  # fmt: skip
        return {p.parent.name for p in shards(tmp_path)} - before

    assert key() and not key() and key(**change)


def test_adapters_and_heads_do_not_change_the_key(tmp_path: Path) -> None:
    """Of the same base model, full, with LoRA, and with LoRA of another seed."""
    for seed, lora in ((0, False), (1, True), (2, True)):
        torch.manual_seed(seed)
        model = tiny_model()
        torch.manual_seed(seed)
        trainer_for(tmp_path, model, lora=lora, precompute_ref_log_probs=True, add_disco_head=seed > 0)
    assert len(shards(tmp_path)) == 2


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    trainer_for(tmp_path, precompute_ref_log_probs=True)
    broken = shards(tmp_path)[0]
    next(broken.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"reference_cache_dir holds .*{broken.name}.* delete it"):
        trainer_for(tmp_path, precompute_ref_log_probs=True)


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="reference_cache_dir cannot be written"):
        trainer_for(tmp_path, precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "file" / "below"))


def test_a_dataset_with_the_columns_needs_no_reference(tmp_path: Path) -> None:
    first = trainer_for(tmp_path / "first")
    rows, held_out = (first.precompute_reference(part) for part in (tiny_pairs(12), tiny_pairs(6, seed=2)))
    second = PreferenceTrainer(
        tiny_model(), None, tiny_args(tmp_path / "second"), train_dataset=rows, eval_dataset=held_out,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    assert second.ref_model is None
    first.train()
    second.train()
    expected, found = ([r["loss"] for r in t.state.log_history if "loss" in r] for t in (first, second))
    assert found == pytest.approx(expected, rel=1e-5)


def test_data_without_the_columns_is_refused_once_the_reference_is_gone(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="dataset must have the columns ref_chosen_logps"):
        trainer.evaluate(Dataset.from_list(tiny_pairs(2).to_list()))
