"""LoRA as the trainer sees it: the reference below the adapter, the adapter on the LM head, saving."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo import PreferenceTrainer, lm_head
from fastpo.adapters import add_reference_adapter, as_reference, without_reference_adapter
from fastpo.from_recipe import build_model, build_peft_config
from fastpo.recipe import RecipeArguments

# PEFT warns of adapters on tied or output embeddings: merging and saving them is what is tested.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`"
)

LAYERS = ["q_proj", "v_proj", "down_proj"]
HEADED: dict[str, dict[str, Any]] = {
    "head alone": {"target_modules": ["lm_head"]},
    "head and layers": {"target_modules": [*LAYERS, "lm_head"]},
    "head by rank-stabilised scale": {"target_modules": ["lm_head"], "use_rslora": True, "r": 3},
    "head trained whole": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    "layers alone": {"target_modules": LAYERS},
}


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **fields})


def trainer_for(path: Path, reference: Any = None, tied: bool = False, config: Any = None, **fields: Any) -> Any:
    trainer = PreferenceTrainer(
        tiny_model(tie_word_embeddings=tied), reference, tiny_args(path, beta=0.5, **fields),
        train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer(), peft_config=config,
    )  # fmt: skip
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def loss_and_grads(trainer: Any, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def eager_dpo(trainer: Any, batch: dict[str, Tensor], reference: Any = None) -> Tensor:
    """DPO from the logits of PEFT's own forward, in double precision from there on."""

    def sums(model: Any) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logps = F.log_softmax(model(**inputs).logits[:, :-1].double(), -1)
        picked = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(1)

    policy = sums(trainer.model)
    with torch.no_grad(), trainer.model.disable_adapter():
        below = sums(trainer.model)
    chosen, rejected = (policy - below).chunk(2)
    return -F.logsigmoid(0.5 * (chosen - rejected)).mean()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", HEADED)
def test_lora_gives_the_loss_and_gradients_of_its_logits(tmp_path: Path, kind: str, tied: bool) -> None:
    if tied and kind == "head trained whole":
        pytest.skip("PEFT trains a tied embedding with it")
    trainer = trainer_for(tmp_path, tied=tied, config=lora(**HEADED[kind]), prefix_sharing=False)
    batch = batch_of(trainer)
    trainer.model.train()
    expected, wanted = loss_and_grads(trainer, eager_dpo(trainer, batch))
    loss, grads = loss_and_grads(trainer, trainer.loss_output(trainer.model, batch).loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted.keys() and ("head" not in kind or any("lm_head" in name for name in grads))
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("kind", HEADED)
def test_the_model_below_the_adapter_is_as_good_a_reference_as_a_copy(tmp_path: Path, kind: str) -> None:
    found = []
    for reference in (None, tiny_model()):
        trainer = trainer_for(tmp_path, reference, config=lora(**HEADED[kind]), contextual_scaling="mallows")
        found.append(loss_and_grads(trainer, trainer.loss_output(trainer.model.train(), batch_of(trainer)).loss))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, grad in found[1][1].items():
        assert (found[0][1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("kind", HEADED)
def test_merged_and_unmerged_models_answer_alike(tmp_path: Path, kind: str) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED[kind]))
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = trainer.loss_output(trainer.model.eval(), batch)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    merged = copy.deepcopy(loaded).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for model in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        again = PreferenceTrainer(
            model, tiny_model(), tiny_args(tmp_path, beta=0.5), train_dataset=tiny_pairs(4),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        with torch.no_grad():
            found = again.loss_output(again.model.eval(), batch)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-5)


def test_disabling_adapters_leaves_everything_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED["head and layers"], modules_to_save=["norm"]))
    lm = trainer.model.get_base_model()

    def state() -> Any:
        wants = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        return wants, [m.training for m in trainer.model.modules()], trainer.model.get_model_status().enabled

    trainer.model.train()
    before = state()
    with pytest.raises(KeyError), as_reference(lm):
        assert not lm.training and not torch.is_grad_enabled() and not trainer.model.get_model_status().enabled
        raise KeyError
    assert state() == before


def test_what_a_user_froze_or_disabled_stays_so(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED["head and layers"]))
    frozen = [p for name, p in trainer.model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    trainer.loss_output(trainer.model.train(), batch_of(trainer)).loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    with trainer.model.disable_adapter(), torch.no_grad():
        assert not trainer.loss_output(trainer.model, batch_of(trainer)).margins.any()
        assert not trainer.model.get_model_status().enabled


def test_below_a_merged_adapter_is_the_base_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED["head and layers"]))
    with torch.no_grad():
        expected = trainer.loss_output(trainer.model.eval(), batch_of(trainer)).losses
        trainer.model.merge_adapter()
        torch.testing.assert_close(trainer.loss_output(trainer.model, batch_of(trainer)).losses, expected)


@pytest.mark.parametrize("kind", HEADED)
def test_a_reference_adapter_is_a_copy_of_the_adapter_as_it_was(tmp_path: Path, kind: str) -> None:
    fields = {"modules_to_save": ["norm"]} | HEADED[kind]
    start = trainer_for(tmp_path, config=lora(**fields)).model
    found = []
    for copied in (True, False):
        model, reference = copy.deepcopy(start), None if copied else copy.deepcopy(start)
        if copied:
            add_reference_adapter(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        trainer = PreferenceTrainer(
            model, reference, tiny_args(tmp_path, beta=0.5), train_dataset=tiny_pairs(4),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        before = {name: p.requires_grad for name, p in model.named_parameters()}, model.active_adapters
        output = trainer.loss_output(trainer.model.train(), batch_of(trainer))
        found.append(loss_and_grads(trainer, output.loss))
        assert output.margins.abs().max() > 1e-2
        assert before == ({name: p.requires_grad for name, p in model.named_parameters()}, model.active_adapters)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[1][1].items():
        assert (found[0][1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


def test_a_cached_reference_is_known_by_its_adapter(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED["layers alone"]))
    add_reference_adapter(trainer.model)
    keys = set()
    for scale in (1.0, 2.0):
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:
                parameter.data *= scale
        trainer.precompute_reference(trainer.train_dataset)
        keys |= {path.name for path in (tmp_path / "reference").iterdir()}
    assert len(keys) == 2


def test_a_reference_adapter_is_not_saved(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, config=lora(**HEADED["layers alone"]))
    add_reference_adapter(trainer.model)
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "ref").exists() and "ref" in trainer.model.peft_config
    with pytest.raises(KeyError), without_reference_adapter(trainer.model):
        raise KeyError
    assert "ref" in trainer.model.peft_config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "peft_config must adapt layers, got PREFIX_TUN",
        ),
        (
            lora(target_modules=LAYERS, init_lora_weights="pissa"),
            "ref_model must be given with init_lora_weights='pissa'",
        ),
        (
            lora(target_modules=LAYERS, init_lora_weights="olora"),
            "ref_model must be given with init_lora_weights='olora'",
        ),
    ],
)
def test_adapters_that_are_no_reference_without_them_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    for fields in ({}, {"precompute_ref_log_probs": True}):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, config=config, **fields)
    if config.peft_type == "LORA":
        trainer_for(tmp_path, tiny_model(seed=7), config=config)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_a_reference_that_would_move_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "fastpo"):
        trainer_for(tmp_path, config=lora(target_modules=LAYERS))
        trainer_for(tmp_path, config=lora(target_modules=LAYERS, modules_to_save=["lm_head"]), add_disco_head=True)
        assert not caplog.records
        model = get_peft_model(tiny_model(), lora(target_modules=LAYERS))
        model.get_base_model().model.norm.weight.requires_grad_()
        PreferenceTrainer(
            model, None, tiny_args(tmp_path), train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer()
        )
    assert "trained parameters are in no adapter (base_model.model.model.norm.weight" in caplog.text


def test_layers_alone_share_one_pass_over_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("linear_sequence_stats", "joint_linear_sequence_stats"):
        op = getattr(lm_head, name)
        monkeypatch.setattr(lm_head, name, lambda *a, op=op, name=name, **k: (calls.append(name), op(*a, **k))[1])
    for kind in ("layers alone", "head alone"):
        trainer = trainer_for(tmp_path, config=lora(**HEADED[kind]))
        trainer.loss_output(trainer.model.train(), batch_of(trainer)).loss.backward()
    assert calls == ["joint_linear_sequence_stats", "linear_sequence_stats", "linear_sequence_stats"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_peft": False, "model_name_or_path": "x"}, "load_in_4bit needs use_peft and model_name_or_path"),
        (
            {"use_peft": True, "model_config": {"model_type": "qwen3"}, "tokenizer_vocab_size": 300},
            "load_in_4bit needs",
        ),
    ],
)
def test_four_bits_are_for_frozen_weights(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecipeArguments(dataset="data.json", load_in_4bit=True, **fields)


@pytest.mark.filterwarnings("default")
def test_an_adapter_trains_on_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "base")
    recipe = RecipeArguments(
        model_name_or_path=str(tmp_path / "base"),
        dataset="data.json",
        use_peft=True,
        load_in_4bit=True,
        dtype="float32",
    )
    args = tiny_args(tmp_path, max_steps=8, precompute_ref_log_probs=True, gradient_checkpointing=True)
    trainer = PreferenceTrainer(
        build_model(recipe, args, tiny_tokenizer()), None, args, train_dataset=tiny_pairs(8),
        processing_class=tiny_tokenizer(), peft_config=build_peft_config(recipe),
    )  # fmt: skip
    assert any("4bit" in type(module).__name__ for module in trainer.model.modules())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("default")
def test_optimisers_of_eight_bits_train(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = PreferenceTrainer(
        tiny_model(hidden_size=64), None, tiny_args(tmp_path, optim=optim, max_steps=6), train_dataset=tiny_pairs(8),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.4


def test_a_model_loaded_from_an_adapters_folder_is_no_base_of_another(tmp_path: Path) -> None:
    """transformers puts a saved adapter into the layers, frozen: PEFT would overwrite it, and nothing trains."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora(target_modules=LAYERS)).save_pretrained(tmp_path / "adapter")
    given = {
        "args": tiny_args(tmp_path / "out"), "train_dataset": tiny_pairs(4), "processing_class": tiny_tokenizer()
    }  # fmt: skip
    with pytest.raises(ValueError, match="peft_config must be None for a model that already has an adapter, whose"):
        PreferenceTrainer(str(tmp_path / "adapter"), **given, peft_config=lora(target_modules=LAYERS))
    with pytest.raises(ValueError, match="model must have parameters that train, got none"):
        PreferenceTrainer(str(tmp_path / "adapter"), **given).train()
