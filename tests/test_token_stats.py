"""A forward's statistics of single tokens, and the value head: against plain logits, and in a model's life."""

import copy
import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from tolerance import assert_grads_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fastpo import PreferenceConfig, lm_head
from fastpo.adapters import add_reference_adapter, check_adapter
from fastpo.architecture import add_heads, add_value_head, heads_of, load_heads
from fastpo.backbone import StatsOutput, Wanted, install_stats_forward, model_stats
from fastpo.heads import ValueHead

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    ("cohere", {"logit_scale": 0.3}),
    ("phi", {}),  # its head has a bias
]


def padded_batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Rows of 12 tokens, right-padded: the second row's completion is one token, the third row's is empty."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, 12), generator=rng)
    starts, ends = torch.tensor([3, 5, 4, 2] * (rows // 4)), torch.tensor([12, 6, 4, 9] * (rows // 4))
    place = torch.arange(12)
    completion = ((place >= starts[:, None]) & (place < ends[:, None])).long()
    return {
        "input_ids": ids, "attention_mask": (place < ends[:, None]).long(), "completion_mask": completion,
    }  # fmt: skip


def ready(model: Any) -> Any:
    """With statistics, in evaluation mode, and a head sharper than a new model's, whose entropy is log V."""
    install_stats_forward(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.eval()


def oracle(model: Any, batch: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(R, T) log-probs and entropies from the model's own logits, in float64."""
    kept = batch["completion_mask"].bool()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double() / temperature
    log_probs = logits.log_softmax(-1)[:, :-1]
    logps = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return tuple(torch.where(kept, torch.nn.functional.pad(x, (1, 0)), 0) for x in (logps, entropy))


def weighted(logps: Tensor, entropy: Tensor) -> Tensor:
    """A loss in which every token has a weight of its own."""
    weight = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64).view_as(logps)
    return (weight * logps.double() + weight.flip(0) * entropy.double()).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("model_type", "fields"), MODELS)
def test_tokens_are_those_of_full_logits(model_type: str, fields: dict[str, Any], temperature: float) -> None:
    model, batch = ready(tiny_model(model_type, **fields)), padded_batch()
    wide = copy.deepcopy(model).double()
    truth = oracle(wide, batch, temperature)
    weighted(*truth).backward()
    found = model_stats(model, batch, Wanted(tokens=True, temperature=temperature))
    for value, true in zip((found.token_logps, found.token_entropy), truth, strict=True):
        assert value.dtype == torch.float32 and value.shape == (4, 12)
        torch.testing.assert_close(value.double(), true.detach(), rtol=1e-5, atol=2e-5)
        assert (value[batch["completion_mask"] == 0] == 0).all()
    weighted(found.token_logps, found.token_entropy).backward()
    for (name, parameter), true in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert_grads_close(name, parameter.grad, true.grad, scale=1e-2, rtol=5e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sequences_are_the_sums_of_their_tokens(temperature: float) -> None:
    model, batch = ready(tiny_model()), padded_batch()
    tokens = model_stats(model, batch, Wanted(tokens=True, temperature=temperature))
    plain = model_stats(model, batch, Wanted(temperature=temperature))
    torch.testing.assert_close(tokens.token_logps.sum(dim=1), plain.logps)
    for name in ("logps", "lengths", "entropy"):
        torch.testing.assert_close(tokens[name], plain[name])
    assert tokens.lengths.tolist() == [9, 1, 0, 7] and tokens.logps[2] == tokens.entropy[2] == 0
    assert set(plain) == {"logps", "lengths", "entropy"}  # who wants no tokens gets none


def lora_model(targets: Any, **fields: Any) -> Any:
    """With an adapter that no longer is zero, on an untied head."""
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(tiny_model(tie_word_embeddings=False, **fields), config)
    install_stats_forward(model)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_policy_with_an_adapter_answers_for_its_reference_too(targets: list[str], temperature: float) -> None:
    model, batch = lora_model(targets), padded_batch()
    wide = copy.deepcopy(model).double()
    truth = oracle(wide, batch, temperature)
    with wide.disable_adapter(), torch.no_grad():
        of_reference = oracle(wide, batch, temperature)
    weighted(*truth).backward()
    found = model_stats(model, batch, Wanted(tokens=True, reference=True, temperature=temperature))
    torch.testing.assert_close(found.token_logps.double(), truth[0].detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.ref_token_logps.double(), of_reference[0], rtol=1e-5, atol=2e-5)
    assert not found.ref_token_logps.requires_grad
    torch.testing.assert_close(found.ref_logps, found.ref_token_logps.sum(dim=1))
    mean = of_reference[1].sum(dim=1) / found.lengths.clamp(min=1)
    torch.testing.assert_close(found.ref_entropy.double(), mean, rtol=1e-5, atol=2e-5)
    assert (found.ref_token_logps - found.token_logps)[batch["completion_mask"] == 1].abs().min() > 1e-5
    weighted(found.token_logps, found.token_entropy).backward()
    for (name, parameter), true in zip(model.named_parameters(), wide.parameters(), strict=True):
        if parameter.requires_grad:
            assert_grads_close(name, parameter.grad, true.grad, scale=1e-2, rtol=5e-4)


@pytest.mark.parametrize(("target", "passes"), [("q_proj", ["joint"]), ("lm_head", ["single", "single"])])
def test_policy_and_reference_share_one_pass_where_they_share_the_head(
    target: str, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name, function in (("joint", "joint_linear_logps"), ("single", "linear_logps")):
        plain = getattr(lm_head, function)

        def spying(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            seen.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(lm_head, function, spying)
    model_stats(lora_model([target]), padded_batch(), Wanted(tokens=True, reference=True))
    assert seen == passes


def test_the_reference_may_be_an_adapter_of_its_own() -> None:
    model, batch = lora_model(["q_proj", "v_proj"]), padded_batch()
    add_reference_adapter(model)
    before = model_stats(model, batch, Wanted(tokens=True)).token_logps.detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(2)
    found = model_stats(model, batch, Wanted(tokens=True, reference=True))
    torch.testing.assert_close(found.ref_token_logps, before)
    assert (found.token_logps - before).abs().max() > 1e-3


def test_bf16_autocast_stays_near_fp32() -> None:
    model, batch = ready(tiny_model()), padded_batch()
    exact = model_stats(model, batch, Wanted(tokens=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model_stats(model, batch, Wanted(tokens=True))
    assert found.token_logps.dtype == found.token_entropy.dtype == torch.float32
    for name in ("token_logps", "token_entropy"):
        error = (found[name] - exact[name]).abs().max()
        assert 0 < error < 0.05, f"{name}: {error:.2e}"


def test_what_was_masked_is_never_read() -> None:
    """Padding after a completion, and what follows it, reach nothing."""
    model, batch = ready(tiny_model()), padded_batch()
    add_value_head(model, None)
    torch.nn.init.normal_(model.value_head.linear.weight)
    wanted = Wanted(tokens=True, values=True)
    first = model_stats(model, batch, wanted)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    second = model_stats(model, other, wanted)
    for name in ("token_logps", "token_entropy", "token_values"):
        torch.testing.assert_close(first[name], second[name])


class _NoWholeLogits(TorchDispatchMode):
    """Fails where a tensor has as many rows as the batch has completion tokens, and the vocabulary's columns."""

    def __init__(self, tokens: int, vocab_size: int) -> None:
        super().__init__()
        self.limit = tokens * vocab_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(found, Tensor):
                assert found.numel() < self.limit, f"{func} made {tuple(found.shape)}"
        return result


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_never_made(adapted: bool) -> None:
    """A vocabulary so large that no other tensor of the model comes near the logits' size."""
    vocab_size = 1 << 17
    model = lora_model(["q_proj"], vocab_size=vocab_size) if adapted else tiny_model(vocab_size=vocab_size)
    install_stats_forward(model)
    add_value_head(model, None)
    batch = padded_batch(rows=40)
    tokens = int(batch["completion_mask"].sum())
    assert tokens > 160
    wanted = Wanted(tokens=True, values=True, reference=adapted)
    with _NoWholeLogits(tokens, vocab_size):
        found = model_stats(model, batch, wanted)
        (found.token_logps.sum() + found.token_entropy.sum() + found.token_values.sum()).backward()
    with pytest.raises(AssertionError, match="made"), _NoWholeLogits(tokens, vocab_size):
        model(input_ids=batch["input_ids"])


def test_an_output_stays_a_dictionary() -> None:
    """DDP and others walk through it by keys(), values() and items()."""
    assert not {field.name for field in dataclasses.fields(StatsOutput)} & set(dir(OrderedDict))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_logps": True}, "shared_logps must be False with tokens=True"),
        ({"one_side_at_a_time": True}, "one_side_at_a_time must be False with tokens=True"),
        ({"top1": True}, "top1 must be False with tokens=True"),
    ],
)
def test_what_tokens_do_not_go_with(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wanted(tokens=True, **fields)


@pytest.mark.parametrize("wanted", [Wanted(tokens=True), Wanted(values=True)])
def test_tokens_want_padded_rows(wanted: Wanted) -> None:
    model = tiny_model()
    install_stats_forward(model)
    batch = {"input_ids": torch.arange(3, 9)[None], "paths": torch.tensor([[0, 2, 2, 4], [0, 2, 4, 6]])}
    with pytest.raises(ValueError, match=r"padded batch .* got one with paths"):
        model_stats(model, batch, wanted)


def test_a_temperature_out_of_range() -> None:
    model = tiny_model()
    install_stats_forward(model)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        model_stats(model, padded_batch(), Wanted(tokens=True, temperature=0.0))


# --- the value head ---------------------------------------------------------------------------------------------------


def values_of(model: Any, batch: dict[str, Tensor]) -> StatsOutput:
    return model_stats(model, batch, Wanted(tokens=True, values=True))


def test_values_are_of_the_state_before_each_token() -> None:
    model, batch = ready(tiny_model()), padded_batch()
    add_value_head(model, None)
    assert not values_of(model, batch).token_values.any()  # they start at 0
    torch.nn.init.normal_(model.value_head.linear.weight)
    torch.nn.init.normal_(model.value_head.linear.bias)
    found = values_of(model, batch).token_values
    wide = copy.deepcopy(model).double()
    hidden = wide.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    want = (hidden @ wide.value_head.linear.weight[0] + wide.value_head.linear.bias).roll(1, dims=1)
    want = torch.where(batch["completion_mask"] == 1, want, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want.detach(), rtol=1e-4, atol=1e-5)
    # The gradient flows on into the backbone.
    weight = torch.linspace(-1, 2, found.numel()).view_as(found)
    (weight * found).sum().backward()
    (weight.double() * want).sum().backward()
    for (name, parameter), true in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert (parameter.grad is None) == (true.grad is None), name
        if true.grad is not None:
            assert_grads_close(name, parameter.grad, true.grad, scale=1e-2, rtol=5e-4)


def test_values_stay_fp32_in_a_16_bit_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    install_stats_forward(model)
    add_value_head(model, None)
    assert model.value_head.linear.weight.dtype == torch.float32
    assert values_of(model, padded_batch()).token_values.dtype == torch.float32


@pytest.mark.parametrize("adapted", [False, True])
def test_the_value_head_is_saved_beside_the_model(tmp_path: Path, adapted: bool) -> None:
    model = lora_model(["q_proj"]) if adapted else tiny_model()
    install_stats_forward(model)
    add_value_head(model, None)
    torch.nn.init.normal_(model.value_head.linear.weight)
    model.save_pretrained(tmp_path)
    assert {"value_head.safetensors", "value_head_config.json"} <= {path.name for path in tmp_path.iterdir()}
    fresh = lora_model(["q_proj"]) if adapted else AutoModelForCausalLM.from_pretrained(tmp_path)
    add_value_head(fresh, str(tmp_path))
    again = heads_of(fresh)["value_head"]
    assert torch.equal(again.linear.weight, model.value_head.linear.weight) and again.linear.weight.requires_grad
    attached = lora_model(["q_proj"]) if adapted else tiny_model()
    assert set(load_heads(attached, tmp_path)) == {"value_head"}


def test_stages_without_a_value_head_neither_make_nor_read_nor_train_one(tmp_path: Path) -> None:
    config = PreferenceConfig(add_disco_head=True, pref_loss_type="disco")
    model = tiny_model()
    add_heads(model, None, config, None)
    assert set(heads_of(model)) == {"disco_head"}
    add_value_head(model, None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    add_heads(loaded, None, config, str(tmp_path))
    assert set(heads_of(loaded)) == {"disco_head"}
    add_heads(model, None, config, None)
    wants = {name: next(head.parameters()).requires_grad for name, head in heads_of(model).items()}
    assert wants == {"disco_head": True, "value_head": False}
    add_value_head(model, None)
    assert next(model.value_head.parameters()).requires_grad


def test_a_value_head_is_no_part_of_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    model = lora_model(["q_proj"])
    add_value_head(model, None)
    check_adapter(model, is_reference=True, always=True)
    assert not caplog.records
    batch = padded_batch()
    before = model_stats(model, batch, Wanted(tokens=True, reference=True)).ref_token_logps
    torch.nn.init.normal_(model.value_head.linear.weight)
    assert torch.equal(model_stats(model, batch, Wanted(tokens=True, reference=True)).ref_token_logps, before)


def test_a_value_head_that_does_not_fit() -> None:
    model = tiny_model()
    model.value_head = ValueHead(16)
    with pytest.raises(ValueError, match="value_head must take hidden states of size 32, got one for size 16"):
        add_value_head(model, None)
    with pytest.raises(ValueError, match=r"hidden must be a tensor of shape \(R, 16\), got \(2, 3, 16\)"):
        model.value_head(torch.zeros(2, 3, 16))
