import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fastpo import PreferenceTrainer
from fastpo.adapters import as_reference
from fastpo.backbone import causal_lm, install_stats_forward, model_stats, sequence_stats
from fastpo.collation import PreferenceCollator
from fastpo.kernels import chunked
from fastpo.reporting import MetricsFile, read_metrics
from fastpo.tokenization import tokenize_dataset

# TRL's names, and ours beside them.
TRAINING_KEYS = {
    "loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "entropy/chosen", "entropy/rejected",
    "beta/mean", "beta/std", "beta/min", "beta/max",
}  # fmt: skip


def trainer_for(path: Path, model: Any = None, rows: int = 8, **fields: Any) -> PreferenceTrainer:
    extra = {
        name: fields.pop(name) for name in ("ref_model", "peft_config", "eval_dataset", "callbacks") if name in fields
    }
    return PreferenceTrainer(
        tiny_model() if model is None else model, args=tiny_args(path, **fields), train_dataset=tiny_pairs(rows),
        processing_class=tiny_tokenizer(), **extra,
    )  # fmt: skip


def batch_of(rows: int = 4, stage: str = "dpo") -> dict[str, Tensor]:
    tokenized = tokenize_dataset(tiny_pairs(rows), tiny_tokenizer(), stage=stage, max_length=64, source="pairs")
    return PreferenceCollator(tiny_tokenizer().pad_token_id, stage)(list(tokenized))


def stats_from_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums and mean entropies by the model's own logits, in float64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    log_probs = logits[:, :-1].log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    tokens = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return (tokens * mask).sum(1), (entropies * mask).sum(1) / mask.sum(1)


# --- the model's side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 0.25}),
        ("gpt2", {}),
        ("phi", {}),  # its head has a bias
    ],
)
def test_statistics_are_those_of_the_models_own_logits(model_type: str, fields: dict[str, Any]) -> None:
    model = tiny_model(model_type, **fields).eval()
    batch = batch_of()
    expected = stats_from_logits(model, batch)
    install_stats_forward(model)
    stats = sequence_stats(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    torch.testing.assert_close(stats.logps.double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    again = stats_from_logits(model, batch)  # without a completion_mask the model answers as before
    assert torch.equal(again[0], expected[0])
    assert model.generate(batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


class _NoWholeLogits(TorchDispatchMode):
    """Fails on any tensor with a vocabulary-sized last dimension and more rows than one position has."""

    def __init__(self, vocab_size: int, limit: int) -> None:
        super().__init__()
        self.vocab_size, self.limit = vocab_size, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() > 1 and result.shape[-1] == self.vocab_size:
            assert result.numel() < self.limit * self.vocab_size, f"{func} made logits {tuple(result.shape)}"
        return result


def test_a_head_that_raises_still_trains_and_no_logits_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "MAX_COLS", 64)  # the tiny vocabulary in several slices
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("lm_head was called"))
    before = model.lm_head.weight.detach().clone()
    trainer = trainer_for(tmp_path, model, gradient_checkpointing=True, eval_dataset=tiny_pairs(4, seed=2))
    with _NoWholeLogits(model.config.vocab_size, limit=32):
        trainer.train()
        trainer.evaluate()
    assert not torch.equal(model.lm_head.weight, before)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_full_logits(tmp_path: Path) -> None:
    model, reference = tiny_model().eval(), tiny_model(seed=3).eval()
    batch = batch_of()
    policy, _ = stats_from_logits(model, batch)
    ref, _ = stats_from_logits(reference, batch)
    h = (policy - ref)[:4] - (policy - ref)[4:]
    trainer = trainer_for(tmp_path, model, ref_model=reference, beta=0.3)
    output = trainer.loss_output(model, batch)
    torch.testing.assert_close(output.losses.double(), -torch.nn.functional.logsigmoid(0.3 * h), rtol=1e-4, atol=1e-5)
    assert output.metrics["rewards/accuracies"] == (h > 0).double().mean()


def moved_by(path: Path, **fields: Any) -> dict[str, Tensor]:
    """What one SGD step of rate 1 moves the parameters by: the step's gradient."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {
        "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 1.0, "sft_weight": 0.5,
        "sft_reduction": "token", "length_normalization": True, "beta": 1.0, "ref_model": tiny_model(seed=7),
    }  # fmt: skip
    trainer_for(path, model, **{**options, **fields}).train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert sum(g.abs().sum() for g in a.values()) > 0
    for name, grad in a.items():
        # Differences of weights of about 1 are exact to a unit in their last place.
        bound = 1e-5 * grad.norm().item() + 2**-23 * grad.numel() ** 0.5
        assert (grad - b[name]).norm() <= bound, name


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path, stage: str) -> None:
    large = moved_by(tmp_path, stage=stage, per_device_train_batch_size=8)
    small = moved_by(tmp_path, stage=stage, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    uneven = moved_by(tmp_path, stage=stage, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert_same_gradients(large, small)
    assert_same_gradients(large, uneven)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path: Path) -> None:
    rows = tokenize_dataset(tiny_pairs(8), tiny_tokenizer(), stage="dpo", max_length=64, source="pairs").to_list()
    for row in rows:
        row["context_scale"] = float("nan") if row["index"] == 5 else 1.0
    trainer = PreferenceTrainer(
        tiny_model(), args=tiny_args(tmp_path, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 0: dataset rows \[5\], losses \[nan\]"):
        trainer.train()


# --- the reference ----------------------------------------------------------------------------------------------------


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def test_without_a_reference_model_the_model_as_it_was_is_the_reference(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    weight = trainer.ref_model.lm_head.weight.detach().clone()
    first = trainer.loss_output(trainer.model, batch_of())
    assert torch.equal(first.margins, torch.zeros(4))
    trainer.train()
    assert torch.equal(trainer.ref_model.lm_head.weight, weight) and not trainer.ref_model.lm_head.weight.requires_grad
    assert trainer.loss_output(trainer.model, batch_of()).margins.abs().min() > 0


def test_with_lora_the_reference_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    base = tiny_model()
    expected, _ = stats_from_logits(base.eval(), batch_of())
    trainer = trainer_for(tmp_path, base, peft_config=lora(), gradient_checkpointing=True, learning_rate=5e-2)
    assert trainer.ref_model is None
    trainer.train()
    batch = batch_of()
    with as_reference(causal_lm(trainer.model)):
        stats = model_stats(trainer.model, batch)
    torch.testing.assert_close(stats.logps.double(), expected, rtol=1e-5, atol=1e-4)
    assert trainer.loss_output(trainer.model, batch).margins.abs().min() > 0
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved")).eval()
    trained, _ = stats_from_logits(trainer.model.eval(), batch)
    assert torch.equal(stats_from_logits(loaded, batch)[0], trained)


@pytest.mark.parametrize("fields", [{"reference_free": True}, {"reference_mix": 0.0}, {"stage": "sft"}])
def test_no_reference_is_kept_where_none_is_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    trainer = trainer_for(tmp_path, **fields)
    assert trainer.ref_model is None
    trainer.train()
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


# --- running ----------------------------------------------------------------------------------------------------------


def test_metric_names_evaluation_and_metrics_file(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, eval_dataset=tiny_pairs(6, seed=2), callbacks=[MetricsFile(str(tmp_path))],
        contextual_scaling="mallows", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0].keys() >= TRAINING_KEYS | {"phi/mean"}
    evaluation = trainer.evaluate()
    assert {f"eval_{name}" for name in ("loss", "rewards/accuracies", "logps/chosen", "phi/mean")} <= set(evaluation)
    assert evaluation["eval_rewards/accuracies"] == next(r for r in rows if "eval_loss" in r)["eval_rewards/accuracies"]


def test_compute_metrics_gets_rewards(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"own": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    trainer = PreferenceTrainer(
        tiny_model(), tiny_model(seed=3), tiny_args(tmp_path), eval_dataset=tiny_pairs(6),
        processing_class=tiny_tokenizer(), compute_metrics=accuracy,
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_own"] == pytest.approx(found["eval_rewards/accuracies"])
    other = trainer.evaluate(tiny_pairs(5, seed=9))  # raw rows, given late
    assert other["eval_own"] == pytest.approx(other["eval_rewards/accuracies"])


def test_resuming_continues_the_same_curve(tmp_path: Path) -> None:
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = trainer_for(tmp_path / "whole", **fields)
    whole.train()
    first = trainer_for(tmp_path / "parts", callbacks=[MetricsFile(str(tmp_path / "parts"))], **fields)
    first.train()
    # As if killed after step 5: later logs are there, the checkpoint of step 6 is not.
    resumed = trainer_for(tmp_path / "parts", callbacks=[MetricsFile(str(tmp_path / "parts"))], **fields)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    written = [
        (row["step"], row["loss"]) for row in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in row
    ]
    assert [step for step, _ in written] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([loss for _, loss in written], losses, rtol=1e-6)
    assert output.training_loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_bf16_autocast_trains_and_keeps_fp32_statistics(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, bf16=True)
    trainer.train()
    with trainer.compute_loss_context_manager(), torch.no_grad():
        assert trainer.loss_output(trainer.model, batch_of()).losses.dtype == torch.float32


def test_the_saved_model_is_a_plain_transformers_model(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    batch = batch_of()
    assert torch.equal(stats_from_logits(loaded.eval(), batch)[0], stats_from_logits(trainer.model.eval(), batch)[0])
    assert "fastpo" not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": {"use_dora": True}}, "peft_config must put plain LoRA without lora_bias"),
        ({"train_dataset": [1]}, "train_dataset must be a datasets.Dataset, got list"),
        ({"args": {"contextual_scaling": "mallows", "reference_free": True}}, "needs a context_scale column"),
        ({"same": True}, "ref_model must be another object than model"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    model, options = tiny_model(), arguments.get("head")
    head = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", **options) if options else None
    with pytest.raises((ValueError, TypeError), match=message):
        PreferenceTrainer(
            model, model if arguments.get("same") else None, tiny_args(tmp_path, **arguments.get("args", {})),
            train_dataset=arguments.get("train_dataset", tiny_pairs(4)), processing_class=tiny_tokenizer(),
            peft_config=head,
        )  # fmt: skip
