"""Rewards from Python: those of training, whatever the batch, the padding and the way the model was saved."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_reward_trainer import DISCO, causal, lora, trainer_for
from tiny import tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastpo.data import BadRowError, Pair
from fastpo.planted import planted_preferences
from fastpo.reward_loading import load_reward_model
from fastpo.scoring import RewardModel
from fastpo.tokenization import tokenize_pair

__all__ = ["causal"]  # a fixture
ROWS = planted_preferences(8, seed=1)  # those of `tiny_pairs`
PROMPTS = [row["prompt"] for row in ROWS] * 2
COMPLETIONS = [row[side] for side in ("chosen", "rejected") for row in ROWS]
CASES: dict[str, dict[str, Any]] = {
    "scalar": {}, "disco": DISCO, "adapter": {"peft_config": True}, "disco adapter": {**DISCO, "peft_config": True},
}  # fmt: skip


def saved(folder: Path, model: str, **fields: Any) -> tuple[Tensor, Tensor | None]:
    """Train and save; rewards and variances that the trainer's own forward gives the pairs it was trained on."""
    if "peft_config" in fields:
        fields["peft_config"] = lora()
    trainer = trainer_for(folder, model, tiny_pairs(), max_steps=3, max_length=128, **fields)
    trainer.train()
    trainer.save_model()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        answer = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return answer["logits"][:, 0], answer.get("variance")


@pytest.mark.parametrize("case", CASES)
def test_rewards_are_those_of_training(tmp_path: Path, causal: str, case: str) -> None:
    mean, variance = saved(tmp_path / "run", causal, **CASES[case])
    assert mean.std() > 0.01
    for batch_size in (1, 5, 16):
        model = RewardModel(tmp_path / "run", batch_size=batch_size, max_length=None)
        found = model.score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)
        assert model.gaussian == (variance is not None) == (found.variance is not None)
        if found.variance is not None:
            torch.testing.assert_close(found.variance, variance, rtol=1e-4, atol=1e-5)
    assert not model.model.training and found.mean.dtype == torch.float32


def test_text_is_scored_as_it_is_trained_on(tmp_path: Path, causal: str) -> None:
    saved(tmp_path / "run", causal)
    model = RewardModel(tmp_path / "run")
    prompts, completions = ["What is tea?", "And rice?"], [" A drink.", " A grain, boiled for a while."]
    ids = [tiny_tokenizer()(p + c)["input_ids"] + [tiny_tokenizer().eos_token_id] for p, c in zip(prompts, completions)]  # noqa: B905
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        expected = [plain(torch.tensor([row])).logits.item() for row in ids]
    assert model.score(prompts, completions).mean.tolist() == pytest.approx(expected, abs=1e-5)
    empty = model.score(["What is tea?"], [""]).mean
    assert torch.isfinite(empty).all() and empty.item() != pytest.approx(expected[0])
    assert model.score([], []).mean.shape == (0,)


def test_of_a_prompt_too_long_the_end_is_read(tmp_path: Path, causal: str) -> None:
    saved(tmp_path / "run", causal)
    whole, cut = RewardModel(tmp_path / "run"), RewardModel(tmp_path / "run", max_length=24)
    completion = " A drink."
    room = 24 - len(whole.encode("x", completion)) + len(tiny_tokenizer()("x")["input_ids"])
    words = "word " * 40 + "?"
    kept = tiny_tokenizer().decode(tiny_tokenizer()(words)["input_ids"][-room:])
    torch.testing.assert_close(cut.score([words], [completion]).mean, whole.score([kept], [completion]).mean)
    assert not torch.allclose(cut.score([words], [completion]).mean, whole.score([words], [completion]).mean)
    # As in training, of a pair whose responses are equally long.
    for said in (completion, " A drink" * 20):
        tokens = tokenize_pair(Pair(words, said, said), tiny_tokenizer(), 24)
        assert cut.encode(words, said) == tokens["prompt_ids"] + tokens["chosen_ids"]


def test_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    config = tiny_model("gpt2", num_labels=1).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    said = ["word " * 200], [" A drink."]
    with pytest.raises(
        BadRowError, match=r"must fit into the reward model's 128 positions: lower max_length, got 1024"
    ):
        RewardModel(tmp_path).score(*said)
    assert RewardModel(tmp_path, max_length=128).score(*said).mean.isfinite().all()


def test_without_a_pad_token(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = None
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    trainer = trainer_for(
        tmp_path / "run", str(tmp_path / "gpt2"), processing_class=tokenizer, max_length=128, max_steps=3
    )
    trainer.train()
    trainer.save_model()
    assert RewardModel(tmp_path / "run").tokenizer.pad_token is None
    one, all_ = (RewardModel(tmp_path / "run", batch_size=n, max_length=128) for n in (1, 16))
    a, b = (model.score(PROMPTS, COMPLETIONS).mean for model in (one, all_))
    assert a.std() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_another_library_s_model_is_read_where_it_reads_itself(tmp_path: Path) -> None:
    """Its padding token is the end-of-sequence token, so that the end of a response is not where it looks."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, tokenizer.eos_token_id
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("What? Nothing.")["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.item()
    found = RewardModel(tmp_path).score(["What?", "Who was it then?"], [" Nothing.", " Someone whom we know."]).mean
    assert found[0].item() == pytest.approx(expected, abs=1e-6)


def test_half_precision_does_not_make_ties(tmp_path: Path, causal: str) -> None:
    saved(tmp_path / "run", causal)
    found = RewardModel(tmp_path / "run", dtype="bfloat16").score(PROMPTS, COMPLETIONS).mean
    assert not torch.equal(found, found.bfloat16().float())


def test_a_head_that_was_never_trained_says_nothing(tmp_path: Path, causal: str) -> None:
    mean, _ = saved(tmp_path / "run", causal, add_disco_head=True)
    assert (tmp_path / "run" / "disco_head.safetensors").is_file()
    found = RewardModel(tmp_path / "run", max_length=None).score(PROMPTS, COMPLETIONS)
    assert found.variance is None
    torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)


def test_an_adapter_s_score_comes_with_it(tmp_path: Path, causal: str) -> None:
    """transformers' own loading of an adapter's folder leaves it behind (5.17)."""
    saved(tmp_path / "run", causal, peft_config=True)
    model = load_reward_model(tmp_path / "run")
    assert model.score.modules_to_save["default"].weight.any()
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in load_reward_model(tmp_path / "run", trainable=True).parameters())


def test_what_is_no_reward_model(tmp_path: Path, causal: str) -> None:
    with pytest.raises(ValueError, match="must hold a reward model, got Qwen3ForCausalLM"):
        RewardModel(causal)
    with pytest.raises(ValueError, match="must hold a saved model, got no such folder"):
        RewardModel(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold a saved model, got a folder without a config.json"):
        RewardModel(tmp_path / "empty")
    AutoModelForSequenceClassification.from_config(tiny_model().config).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="a reward model must have num_labels=1, got 2 in"):
        RewardModel(tmp_path / "two")
    model = tiny_model()
    model.config._name_or_path = causal
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="must have task_type SEQ_CLS, got CAUSAL_LM"):
        RewardModel(tmp_path / "sft")
    saved(tmp_path / "run", causal, peft_config=True)
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(config.read_text().replace('"score"', '"embed_tokens"'))
    with pytest.raises(ValueError, match="must hold a score among its modules_to_save"):
        RewardModel(tmp_path / "run")


def test_weights_that_are_missing_are_named(tmp_path: Path, causal: str) -> None:
    saved(tmp_path / "run", causal)
    shutil.copy(Path(causal) / "model.safetensors", tmp_path / "run")  # a causal LM's: without a score
    with pytest.raises(ValueError, match=r"must hold all weights of its model, got none for score.weight"):
        RewardModel(tmp_path / "run")


def test_bad_arguments_are_named(tmp_path: Path, causal: str) -> None:
    saved(tmp_path / "run", causal)
    for fields in ({"batch_size": 0}, {"max_length": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
            RewardModel(tmp_path / "run", **fields)
    model = RewardModel(tmp_path / "run")
    with pytest.raises(ValueError, match=r"completions must be one of each prompt \(2\), got 1"):
        model.score(["a", "b"], ["c"])
    with pytest.raises(BadRowError, match="must all be text or all be messages"):
        model.score(["a"], COMPLETIONS[:1])
    with pytest.raises(BadRowError, match="'prompt' must not be empty"):
        model.score([""], ["a"])
