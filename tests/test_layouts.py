"""Ways to hold a step's batch and activations: packed, prefix-shared, one side at a time, checkpointed, cached.

Each gives the losses and gradients of the padded step with a live reference.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_args, tiny_model, tiny_tokenizer
from torch import Tensor

from fastpo import PreferenceTrainer
from fastpo.attention import CHECKED, SDPA_PATHS, use_path_attention
from fastpo.backbone import install_stats_forward, model_stats
from fastpo.collation import PreferenceCollator
from fastpo.layout import positions
from fastpo.tokenization import tokenize_dataset

WAYS: dict[str, dict[str, Any]] = {
    "packed": {"padding_free": True, "prefix_sharing": False},
    "prefix-shared": {"prefix_sharing": True},
    "one side at a time": {"split_responses": True},
    "one side at a time, packed": {"split_responses": True, "padding_free": True},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed by reentry, prefix-shared": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "prefix_sharing": True,
    },
    "checkpointed every second layer": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": False},
    },
    "checkpointed, one side at a time, packed": {
        "gradient_checkpointing": True, "split_responses": True, "padding_free": True,
    },
    "cached": {"precompute_ref_log_probs": True},
    "cached, prefix-shared, checkpointed": {
        "precompute_ref_log_probs": True, "prefix_sharing": True, "gradient_checkpointing": True,
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rainbow": {"length_normalization": True, "contextual_scaling": "mallows", "sft_weight": 0.5, "reference_mix": 0.5},
    "ledpo": DYNAMIC
    | {
        "beta_head_config": {"kind": "mlp", "features": ["hidden", "perplexity", "entropy"]},
        "regularizers": {"pointwise": 0.1, "entropy": 0.1},
    },
    "disco": {"add_disco_head": True, "pref_loss_type": "disco"},
    "ld-dpo": {"ld_alpha": 0.4},
    "wpo": {"use_weighting": True},
    "reference-free ledpo": DYNAMIC | {"reference_free": True},
}
TEXT = "the cat sat on a mat and looked at the moon for a while before it went back to the house"


def ragged(rows: int = 4) -> Dataset:
    words = TEXT.split()
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(words[: 3 + 2 * i]),
                "chosen": " " + " ".join(words[i : i + 2 + 3 * (i % 3)]),
                "rejected": " " + " ".join(words[2 * i : 2 * i + 7 - i]),
            }
            for i in range(rows)
        ]
    )


def step(path: Path, model: Any, lora: Any = None, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the pairs and the gradient of their mean, on weights that are away from where they start."""
    torch.manual_seed(3)
    reference = None if lora is not None else type(model)(model.config)
    defaults = {"prefix_sharing": False}
    trainer = PreferenceTrainer(
        model, reference, tiny_args(path, **{**defaults, **fields}), train_dataset=ragged(),
        processing_class=tiny_tokenizer(), peft_config=lora,
    )  # fmt: skip
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    # transformers switches checkpointing on when training starts.
    if trainer.args.gradient_checkpointing:
        options = dict(trainer.args.gradient_checkpointing_kwargs or {})
        every = options.pop("every_n_layers", 1)
        trainer.model.gradient_checkpointing_enable(options or None, every_n_layers=every)
        assert [
            m.gradient_checkpointing for m in trainer.model.modules() if type(m).__name__ == "Qwen3DecoderLayer"
        ] in (
            [True, every == 1],
            [],
        )
    trainer.model.train()
    output = trainer.loss_output(trainer.model, next(iter(trainer.get_train_dataloader())))
    output.loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return output.losses.detach(), grads


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 0
    whole = sum(grad.square().sum() for grad in expected[1].values()) ** 0.5
    assert whole > 1e-3
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6 * whole, name


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **fields}
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_way_gives_the_padded_step(tmp_path: Path, objective: str, tuning: str) -> None:
    fields = OBJECTIVES[objective] | {"train_sampling_strategy": "sequential"}

    def run(**way: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return step(tmp_path, tiny_model(), adapter() if tuning == "lora" else None, **fields, **way)

    expected = run()
    for name, way in WAYS.items():
        print(name)
        assert_same(run(**way), expected)


@pytest.mark.parametrize("model_type", sorted(set(CHECKED) - {"qwen3"}))
def test_other_architectures_attend_along_paths(tmp_path: Path, model_type: str) -> None:
    fields = {"sliding_window": None} if model_type in ("mistral", "phi3") else {}
    expected = step(tmp_path, tiny_model(model_type, **fields))
    for name in ("packed", "prefix-shared"):
        assert_same(step(tmp_path, tiny_model(model_type, **fields), **WAYS[name]), expected)


@pytest.mark.parametrize("chosen", [0, 3, 30])
@pytest.mark.parametrize("rejected", [0, 2, 20])
def test_responses_of_any_length_share_a_prompt(chosen: int, rejected: int) -> None:
    """Shorter and longer than the prompt, and empty."""
    torch.manual_seed(0)
    model = tiny_model().double().eval()
    install_stats_forward(model)
    rows = [
        {"prompt_ids": list(range(5, 5 + n)), "chosen_ids": [7] * chosen, "rejected_ids": [9] * rejected, "index": 0}
        for n in (1, 10)
    ]
    expected = model_stats(model, PreferenceCollator(0)(rows))
    use_path_attention([model], shared=True)
    for shared in (False, True):
        found = model_stats(model, PreferenceCollator(0, padding_free=True, prefix_sharing=shared)(rows))
        torch.testing.assert_close(found["logps"], expected["logps"], rtol=1e-9, atol=1e-9)
        assert torch.equal(found["lengths"], expected["lengths"])


def test_in_stage_sft_packed_is_padded(tmp_path: Path) -> None:
    expected = step(tmp_path, tiny_model(), stage="sft")
    assert_same(step(tmp_path, tiny_model(), stage="sft", padding_free=True), expected)


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return list(tokenize_dataset(dataset, tiny_tokenizer(), stage="dpo", max_length=64, source="data"))


def test_a_shared_batch_holds_each_prompt_once() -> None:
    rows = rows_of(ragged(3))
    batch = PreferenceCollator(0, prefix_sharing=True)(rows)
    ids, paths = batch["input_ids"][0].tolist(), batch["paths"].tolist()
    assert ids == [t for row in rows for t in row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]]
    for path, row, side in zip(paths, rows * 2, ["chosen"] * 3 + ["rejected"] * 3, strict=True):
        assert ids[path[0] : path[1]] == row["prompt_ids"] and ids[path[2] : path[3]] == row[f"{side}_ids"]
        at = positions(batch)[0]
        assert at[path[0] : path[1]].tolist() + at[path[2] : path[3]].tolist() == list(
            range(len(row["prompt_ids"] + row[f"{side}_ids"]))
        )


@pytest.mark.parametrize("prompt", [1, 40])
@pytest.mark.parametrize("padding_free", [False, True])
def test_prompts_are_shared_where_that_pays(prompt: int, padding_free: bool) -> None:
    rows = [{"prompt_ids": [1] * prompt, "chosen_ids": [2] * 20, "rejected_ids": [3] * 20, "index": 0}] * 2
    batch = PreferenceCollator(0, padding_free=padding_free, prefix_sharing=None)(rows)
    shared = "paths" in batch and len(batch["paths"][:, 0].unique()) == 2
    assert shared == (prompt == 40) and ("paths" in batch) == (padding_free or shared)


def test_the_default_shares_prompts_and_saves_no_trace_of_it(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(tiny_model(), None, tiny_args(tmp_path), train_dataset=ragged(),
                                processing_class=tiny_tokenizer())  # fmt: skip
    assert trainer.data_collator.prefix_sharing is None
    assert trainer.model.config._attn_implementation == trainer.ref_model.config._attn_implementation == SDPA_PATHS
    trainer.train()
    trainer.save_model()
    assert SDPA_PATHS not in (tmp_path / "config.json").read_text()
    # And the model still does what others ask of it.
    plain = tiny_model()
    plain.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        own, theirs = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (trainer.model, plain))
    assert torch.equal(own, theirs)
    own, theirs = (m.generate(ids[:1], max_new_tokens=5, do_sample=False) for m in (trainer.model, plain))
    assert torch.equal(own, theirs)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({"attn_implementation": "eager"}, {"padding_free": True}, "padding_free must be False: .*'eager', not 'sdpa'"),
        ({"attn_implementation": "eager"}, {"prefix_sharing": True}, "prefix_sharing must be False: .* 'eager'"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, {"prefix_sharing": True},
         "layers other than full attention"),
        ({"model_type": "olmo"}, {"padding_free": True}, "OlmoForCausalLM is none of the models for which that has"),
        ({}, {"prefix_sharing": True, "split_responses": True}, "split_responses must be False"),
        ({}, {"stage": "sft", "split_responses": True}, "split_responses belongs to stage dpo, got stage='sft'"),
        ({}, {"precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, model: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(
            tiny_model(**model), None, tiny_args(tmp_path, **fields), train_dataset=ragged(),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_where_prompts_cannot_be_shared_the_default_pads(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(tiny_model(attn_implementation="eager"), None, tiny_args(tmp_path),
                                train_dataset=ragged(), processing_class=tiny_tokenizer())  # fmt: skip
    assert trainer.data_collator.prefix_sharing is False
    assert "completion_mask" in next(iter(trainer.get_train_dataloader()))
