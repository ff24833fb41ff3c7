"""The constants that `extras` asks for: what metrics are made of."""

from typing import Any

import pytest
import torch
from cases import IMPLEMENTATIONS, TILED, Case, place, small_tiles
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor

from fastpo import joint_linear_sequence_stats, linear_logps, linear_sequence_stats, ops
from fastpo.attention import use_path_attention
from fastpo.backbone import Wanted, install_stats_forward, model_stats
from fastpo.collation import PreferenceCollator
from fastpo.kernels import autograd
from fastpo.kernels import mean_logits as module
from fastpo.op_checks import EXTRAS

METRICS = ("is_top1", "mean_logits")


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Any:
    with small_tiles():
        yield


def logits_of(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Tensor | None = None) -> Tensor:
    """float64, written out."""
    x = hidden.double() @ weight.double().T
    x = x if adapter is None else x + adapter.double()
    x = case.logit_scale * (x if bias is None else x + bias.double())
    return (x if case.softcap is None else case.softcap * torch.tanh(x / case.softcap)) / case.temperature


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """A case in which about half of the labels are the likeliest token, NaN where none counts; and its logits."""
    hidden, weight, bias, labels = case.tensors()
    logits = logits_of(case, hidden, weight, bias)
    half = (labels != -100) & (torch.arange(case.n) % 2 == 0)
    labels = torch.where(half, logits.argmax(1), labels)
    hidden[labels == -100] = torch.nan
    return hidden, weight, bias, labels, logits


def expected_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    counts = labels != -100
    top1 = (logits.argmax(1) == labels) & counts
    assert 0 < top1.sum() < counts.sum() < len(labels)
    return top1, torch.where(counts, logits.mean(1), 0)


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled, biased": {"bias": True, "logit_scale": 1.3, "temperature": 0.7},
    "softcap": {"bias": True, "softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7},
    "any strides": {"contiguous": False, "softcap": 4.0},
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["no_grad", "frozen", "lean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(impl: str, mode: str, shape: str) -> None:
    if impl == "reference" and mode != "no_grad":
        pytest.skip("knows no mode")
    case = Case(seed=7, n=24, d=9, v=130, frozen=True, **SHAPES[shape])
    hidden, weight, bias, labels, logits = problem(case)
    top1, mean = expected_of(logits, labels)
    hidden, weight, bias, labels = place(impl, hidden, weight, bias, labels)
    hidden.requires_grad_(mode != "no_grad")
    options: Any = {**case.options, "impl": impl, "mode": mode, "extras": METRICS}
    tokens: Any = linear_logps(hidden, weight, labels, bias, **options)
    padded: Any = linear_sequence_stats(hidden.view(4, 6, 9), weight, labels.view(4, 6), bias, **options)
    assert tokens.log_sum_sq_probs is None and padded.log_sum_sq_probs is None
    assert tokens.logps.requires_grad is (mode != "no_grad")
    assert not tokens.is_top1.requires_grad and not tokens.mean_logits.requires_grad
    assert tokens.is_top1.dtype == torch.bool and tokens.is_top1.cpu().tolist() == top1.tolist()
    assert tokens.mean_logits.dtype == torch.float32
    torch.testing.assert_close(tokens.mean_logits.double().cpu(), mean, atol=1e-6, rtol=1e-5)
    assert padded.top1.dtype == torch.int64 and padded.top1.tolist() == top1.view(4, 6).sum(1).tolist()
    torch.testing.assert_close(padded.mean_logits.double().cpu(), mean.view(4, 6).sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tie_counts(impl: str) -> None:
    """Tokens 3, 40 and 129 have one row of the head, in three tiles, and every other token less."""
    hidden = torch.randint(1, 9, (4, 8)).float()  # whole numbers, so that no order of a sum breaks the tie
    weight = -torch.randint(1, 9, (130, 8)).float()
    weight[[3, 40, 129]] = torch.arange(8.0)
    hidden, weight, labels = place(impl, hidden, weight, torch.tensor([3, 40, 129, 41]))
    found: Any = linear_logps(hidden, weight, labels, impl=impl, extras=["is_top1"])
    assert found.is_top1.tolist() == [True, True, True, False]
    assert found.mean_logits is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_with_an_adapter_of_the_head(impl: str) -> None:
    for softcap in (None, 4.0):
        case = Case(seed=8, n=20, d=9, v=130, bias=True, softcap=softcap)
        hidden, weight, bias, labels = case.tensors()
        projected, lora_b = torch.randn(20, 3), torch.randn(130, 3)
        logits = logits_of(case, hidden, weight, bias, projected.double() @ lora_b.double().T)
        labels = torch.where((labels != -100) & (torch.arange(20) % 2 == 0), logits.argmax(1), labels)
        top1, mean = expected_of(logits, labels)
        x = place(impl, hidden, weight, labels, bias)
        lora = tuple(y.requires_grad_() for y in place(impl, projected, lora_b))
        found: Any = linear_logps(*x, lora=lora, impl=impl, extras=METRICS, **case.options)
        assert found.is_top1.cpu().tolist() == top1.tolist() and not found.mean_logits.requires_grad
        torch.testing.assert_close(found.mean_logits.double().cpu(), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_16_bit_operands_are_summed_in_fp32(impl: str, softcap: float | None) -> None:
    """Given as such or by autocast; the mean over a large vocabulary is far smaller than its terms."""
    case = Case(seed=9, n=20, d=16, v=3000, softcap=softcap)
    hidden, weight, _, labels, _ = problem(case)
    logits = logits_of(case, hidden.bfloat16(), weight.bfloat16(), None)
    labels = torch.where(labels == -100, -100, torch.where(torch.arange(20) % 2 == 0, logits.argmax(1), labels))
    top1, mean = expected_of(logits, labels)
    hidden, weight, labels = place(impl, hidden, weight, labels)
    options: Any = {**case.options, "impl": impl, "extras": METRICS}
    given: Any = linear_logps(hidden.bfloat16(), weight.bfloat16(), labels, **options)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        cast: Any = linear_logps(hidden, weight, labels, **options)
    for found in (given, cast):
        assert found.is_top1.cpu().tolist() == top1.tolist() and found.mean_logits.dtype == torch.float32
        torch.testing.assert_close(found.mean_logits.double().cpu(), mean, atol=1e-6, rtol=1e-5)


def test_float64_stays_float64() -> None:
    case = Case(seed=2, n=20, d=9, v=300, bias=True, softcap=4.0, temperature=0.7, dtype=torch.float64)
    hidden, weight, bias, labels, _ = problem(case)
    for softcap in (4.0, None):
        case.softcap = softcap
        want = expected_of(logits_of(case, *case.tensors()[:3]), labels)[1]
        found: Any = linear_logps(hidden, weight, labels, bias, impl="chunked", extras=METRICS, **case.options)
        torch.testing.assert_close(found.mean_logits, want, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_labelled(impl: str) -> None:
    hidden, weight = place(impl, torch.randn(2, 3, 4), torch.randn(9, 4))
    labels = torch.full((2, 3), -100, device=hidden.device)
    tokens: Any = linear_logps(hidden, weight, labels, impl=impl, softcap=3.0, extras=METRICS)
    assert not tokens.is_top1.any() and tokens.mean_logits.tolist() == [[0] * 3] * 2
    sequences: Any = linear_sequence_stats(hidden, weight, labels, impl=impl, extras=METRICS)
    assert sequences.top1.tolist() == [0, 0] and sequences.mean_logits.tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kl", [False, True])
def test_of_the_policy_beside_its_reference(impl: str, kl: bool) -> None:
    hidden, weight, bias, labels, _ = problem(Case(seed=9, n=24, d=16, v=150, bias=True))
    x = place(impl, hidden, weight, labels, bias)
    options: Any = {"cu_seqlens": torch.tensor([0, 7, 7, 24]), "impl": impl, "extras": EXTRAS}
    alone: Any = linear_sequence_stats(*x, **options)
    joint = joint_linear_sequence_stats(x[0], x[0].flip(0).nan_to_num(), *x[1:], kl=kl, **options)
    for name in ("log_sum_sq_probs", "top1", "mean_logits"):
        torch.testing.assert_close(getattr(joint.policy, name), getattr(alone, name))
    assert len(joint.reference) == 3


@pytest.mark.parametrize("impl", TILED)
def test_the_metrics_make_no_second_pass(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = ops.linear_statistics
    monkeypatch.setattr(ops, "linear_statistics", lambda *a: (calls.append(a), plain(*a))[1])
    x = place(impl, torch.randn(3, 4), torch.randn(90, 4), torch.tensor([1, 2, 3]))
    linear_logps(*x, impl=impl, extras=METRICS)
    assert len(calls) == 1
    linear_logps(*x, impl=impl, extras=EXTRAS)
    assert len(calls) == 3


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_in_one_graph_and_under_capture(impl: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed=31, n=24, d=16, v=150, softcap=softcap)
    x = place(impl, *case.tensors())
    x[0].requires_grad_()
    options: Any = {"impl": impl, "softcap": softcap, "extras": EXTRAS}

    def stats(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(linear_logps(hidden, weight, labels, **options))

    expected = stats(x[0], x[1], x[3])
    compiled = torch.compile(stats, fullgraph=True, backend="aot_eager")(x[0], x[1], x[3])
    for where in (autograd, module):
        monkeypatch.setattr(where, "capturing", lambda: True)
    monkeypatch.setattr(Tensor, "nonzero", lambda *_: pytest.fail("the rows were compacted"))
    captured = stats(x[0], x[1], x[3])
    for found in (compiled, captured):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["padded", "packed", "prefix-shared", "one side at a time"])
def test_a_model_answers_inside_of_its_forward(way: str) -> None:
    """Against its own logits."""
    model = tiny_model(vocab_size=12, pad_token_id=0, eos_token_id=1).double().eval()
    rng = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=rng)
    draw = lambda n: torch.randint(2, 12, (n,), generator=rng).tolist()  # noqa: E731
    lengths = [(3, 9, 14), (6, 20, 5), (1, 0, 12)]
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(draw, row), strict=True)) for row in lengths]
    rows = [{**row, "index": i} for i, row in enumerate(rows)]
    padded = PreferenceCollator(0)(rows)
    with torch.no_grad():
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, :-1]
    mask, labels = padded["completion_mask"][:, 1:].bool(), padded["input_ids"][:, 1:]
    top1 = ((logits.argmax(-1) == labels) & mask).sum(1)
    mean = (logits.mean(-1) * mask).sum(1)
    assert 0 < top1.sum() < mask.sum()

    install_stats_forward(model)
    if way in ("packed", "prefix-shared"):
        use_path_attention([model], shared=way == "prefix-shared")
    batch = PreferenceCollator(0, padding_free=way == "packed", prefix_sharing=way == "prefix-shared")(rows)
    for shared in (False, True):
        wanted = Wanted(top1=True, mean_logits=True, shared_logps=shared, one_side_at_a_time=way.startswith("one"))
        found: Any = model_stats(model, batch, wanted).sequence_stats()
        assert found.top1.tolist() == top1.tolist() and not found.mean_logits.requires_grad
        torch.testing.assert_close(found.mean_logits, mean, atol=1e-9, rtol=1e-9)
        chosen, rejected = found.split()
        assert torch.equal(torch.cat((chosen.top1, rejected.top1)), top1)
    plain: Any = model_stats(model, batch).sequence_stats()
    assert plain.top1 is None and plain.mean_logits is None


def test_beside_a_reference_inside_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a policy with an adapter: its own, and the reference's log-probs as without them, in one pass."""
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    install_stats_forward(model)
    batch = PreferenceCollator(0)([{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [4], "index": 0}])
    plain = model_stats(model, batch, Wanted(reference=True))
    calls, once = [], ops.linear_statistics
    monkeypatch.setattr(ops, "linear_statistics", lambda *a: (calls.append(a), once(*a))[1])
    found = model_stats(model, batch, Wanted(reference=True, top1=True, mean_logits=True))
    assert len(calls) == 1
    alone = model_stats(model, batch, Wanted(top1=True, mean_logits=True))
    for name in ("logps", "ref_logps", "ref_entropy"):
        torch.testing.assert_close(found[name], plain[name])
    for name in ("top1", "mean_logits"):
        torch.testing.assert_close(found[name], alone[name])
