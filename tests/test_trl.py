"""The losses that TRL's DPOTrainer has too: its own code on the same numbers.

TRL's `_compute_loss` is run as it is, on a model that answers with drawn per-token statistics; ours gets their sums.
"""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from fastpo import ExtendedSequenceStats, PreferenceConfig, PreferenceTrainer, preference_loss

PAIRS, TOKENS = 5, 14
TRL_NAMES = {"ipo_norm": "ipo"}  # its ipo is per token
OF_Z = ("sigmoid", "hinge", "ipo_norm", "exo_pair", "robust", "discopop", "sigmoid_norm")  # TRL lets these diverge
TORN = ("aot", "aot_unpaired")  # and these have no weights
ALL = (*OF_Z, *TORN, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")
USE_EPS = ("exo_pair", "robust", *TORN)  # of the others TRL ignores label_smoothing, and ours does not
Fields = dict[str, Any]


def trl_trainer(path: Path) -> DPOTrainer:
    args = DPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, report_to="none", max_length=64, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=4, use_weighting=True,
    )  # fmt: skip
    # TRL sets the tokenizer's padding token and, where it finds one lacking, its template.
    return DPOTrainer(
        model=tiny_model(), ref_model=tiny_model(seed=1), args=args, train_dataset=tiny_pairs(),
        processing_class=copy.deepcopy(tiny_tokenizer()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    return trl_trainer(tmp_path_factory.mktemp("trl"))


def configure(trainer: DPOTrainer, fields: Fields) -> None:
    """Our options as TRL's constructor would leave them."""
    names = fields["pref_loss_type"]
    weights = {names: 1.0} if isinstance(names, str) else names
    weights = {TRL_NAMES.get(name, name): weight for name, weight in weights.items()}
    trainer.loss_types, trainer.loss_weights = list(weights), list(weights.values())
    trainer.beta, trainer.label_smoothing = fields.get("beta", 0.1), fields.get("label_smoothing", 0.0)
    trainer.f_divergence_type = fields.get("f_divergence_type", "reverse_kl")
    trainer.f_alpha_divergence_coef = fields.get("f_alpha_divergence_coef", 0.5)
    trainer.ld_alpha, trainer.use_weighting = fields.get("ld_alpha"), fields.get("use_weighting", False)
    trainer.args.discopop_tau = fields.get("discopop_tau", 0.05)


class Answers:
    """Stands for a model: the statistics of every token as drawn leaves, 0 where nothing is predicted."""

    training = True

    def __init__(self, mask: Tensor, seed: int, dtype: torch.dtype, near: Answers | None = None):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda: torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        # Log-ratios of a nat or two a response keep every divergence within reach.
        logps = -3 * draw() if near is None else near.log_probs.detach() + 0.4 * (draw() - 0.5)
        self.log_probs = (logps * mask).requires_grad_()
        self.log_sum_sq_probs = -2 * draw() * mask
        self.entropy, self.mean_logits, self.is_top1 = draw() * mask, draw() * mask, (draw() > 0.5) & mask.bool()

    def __call__(self, **inputs: Any) -> Answers:
        return self

    def stats(self, mask: Tensor) -> tuple[ExtendedSequenceStats, ExtendedSequenceStats]:
        """Sums of chosen and of rejected."""
        lengths = mask.sum(1)
        within = (mask.cumsum(1) <= torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]) & mask.bool()
        entropy = (self.entropy * mask).sum(1) / lengths.clamp(min=1)
        shared, concentration = torch.where(within, self.log_probs, 0).sum(1), (self.log_sum_sq_probs * mask).sum(1)
        return ExtendedSequenceStats(self.log_probs.sum(1), lengths, entropy, concentration, shared).split()


def completion_masks() -> Tensor:
    """(2B, T): prompts of three tokens, responses of 1 to 9; pair 0 is empty, pair 1 on the rejected side."""
    lengths = torch.tensor([0, 4, 9, 2, 7, 0, 0, 5, 6, 7])
    at = torch.arange(TOKENS)
    return ((at >= 3) & (at < 3 + lengths[:, None])).long()


def both(trl: DPOTrainer, fields: Fields, dtype: torch.dtype) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Loss and gradient in the log-probs of the policy's predicted tokens: TRL's, ours."""
    mask = completion_masks()
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    policy = Answers(mask[:, 1:], 0, dtype)
    reference = Answers(mask[:, 1:], 1, dtype, near=policy)
    configure(trl, fields)
    default, own_reference = torch.get_default_dtype(), trl.ref_model
    torch.set_default_dtype(dtype)  # in which TRL takes the logarithm of exo_pair's eps
    trl.ref_model = reference
    try:
        theirs = trl._compute_loss(policy, inputs, False)
    finally:
        trl.ref_model = own_reference
        torch.set_default_dtype(default)

    (chosen, rejected), (ref_chosen, ref_rejected) = policy.stats(mask[:, 1:]), reference.stats(mask[:, 1:])
    given = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    ours = preference_loss(chosen, rejected, PreferenceConfig(**fields), **given).loss
    # TRL weighs hinge in place, which its own backward does not survive.
    backward = "hinge" not in fields["pref_loss_type"] or not trl.use_weighting

    def gradient(loss: Tensor) -> Tensor | None:
        return torch.autograd.grad(loss, policy.log_probs)[0] * mask[:, 1:] if backward else None

    return tuple(SimpleNamespace(loss=loss.detach(), grad=gradient(loss)) for loss in (theirs, ours))


def assert_agree(trl: DPOTrainer, loss_type: str | dict[str, float], dtype: Any = torch.float64, **fields: Any) -> None:
    fields |= {"pref_loss_type": loss_type}
    theirs, ours = both(trl, fields, dtype)
    rtol, atol = (1e-10, 1e-8) if dtype == torch.float64 else (2e-6, 2e-6)
    assert theirs.loss.isfinite() and theirs.loss.dtype == dtype
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=0, msg=lambda text: f"{fields}: {text}")
    if theirs.grad is not None:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=atol, msg=lambda text: f"{fields}: {text}")
        assert ours.grad.abs().max() > 1e-4


def smoothing(loss_type: str) -> list[float]:
    return [0.001, 0.1, 0.3] if loss_type == "exo_pair" else [0.0, 0.1, 0.3] if loss_type in USE_EPS else [0.0]


@pytest.mark.parametrize("loss_type", ALL)
def test_losses(trl: DPOTrainer, loss_type: str) -> None:
    for beta, eps in product([0.05, 0.7] if loss_type != "sft" else [0.1], smoothing(loss_type)):
        assert_agree(trl, loss_type, beta=beta, label_smoothing=eps)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", OF_Z)
def test_divergences(trl: DPOTrainer, loss_type: str, divergence: str) -> None:
    # TRL's alpha-divergence knows no float64.
    coefs, dtype = ([0.5, -0.5, 1.0, 1.7], torch.float32) if divergence.startswith("alpha") else ([0.5], torch.float64)
    for coef, ld_alpha in product(coefs, [None, 0.3]):
        assert_agree(
            trl, loss_type, dtype, f_divergence_type=divergence, f_alpha_divergence_coef=coef, ld_alpha=ld_alpha,
            label_smoothing=smoothing(loss_type)[-1], beta=0.3,
        )  # fmt: skip


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loss_type", [name for name in ALL if name != "sft"])
def test_ld_alpha(trl: DPOTrainer, loss_type: str, ld_alpha: float) -> None:
    assert_agree(trl, loss_type, ld_alpha=ld_alpha, label_smoothing=smoothing(loss_type)[-1])


# TRL would weigh sft too, but writes into an expanded tensor there and stops.
@pytest.mark.parametrize("loss_type", [name for name in ALL if name not in (*TORN, "sft")])
def test_wpo_weights(trl: DPOTrainer, loss_type: str) -> None:
    for ld_alpha in (None, 0.4):
        fields = {"ld_alpha": ld_alpha, "label_smoothing": smoothing(loss_type)[-1]}
        assert_agree(trl, loss_type, use_weighting=True, **fields)


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.5, 3.0])
def test_discopop_tau(trl: DPOTrainer, tau: float) -> None:
    assert_agree(trl, "discopop", discopop_tau=tau, beta=0.3)


SUMS: list[tuple[dict[str, float], Fields]] = [
    ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {}),  # MPO
    ({"sigmoid": 1.0, "sft": 0.5}, {"ld_alpha": 0.4}),
    ({"sigmoid": 1.0, "sigmoid_norm": 3.0}, {"f_divergence_type": "js_divergence"}),
    ({"sigmoid_norm": 0.5, "sft": 0.1}, {}),
    ({"hinge": 0.3, "discopop": 2.0}, {"use_weighting": True}),
    ({"exo_pair": 0.3, "robust": 0.7, "aot": 0.2}, {"label_smoothing": 0.2}),
    ({"nca_pair": 0.3, "sppo_hard": 1e-3, "apo_zero": 0.7, "apo_down": 0.1}, {"beta": 0.4}),
    ({"aot_unpaired": 1.0, "sft": 0.2}, {}),
    ({"ipo_norm": 0.4, "sft": 0.2, "sigmoid": 1.0, "nca_pair": 0.1}, {}),
]


@pytest.mark.parametrize(("weights", "fields"), SUMS, ids=str)
def test_weighted_sums(trl: DPOTrainer, weights: dict[str, float], fields: Fields) -> None:
    assert_agree(trl, weights, **fields)


WHOLE: dict[str, Fields] = {
    "sigmoid": {"pref_loss_type": "sigmoid"},
    "ipo": {"pref_loss_type": "ipo_norm"},
    "sum": {"pref_loss_type": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
    "ld_dpo": {"pref_loss_type": "sigmoid", "ld_alpha": 0.3, "beta": 0.5},
    "wpo": {"pref_loss_type": "sigmoid", "use_weighting": True, "ld_alpha": None},
}


@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
def test_both_trainers_give_one_loss_and_gradient(trl: DPOTrainer, fields: Fields, tmp_path: Path) -> None:
    batch = next(iter(trl.get_train_dataloader()))
    configure(trl, fields)
    trl.model.zero_grad()
    theirs = trl._compute_loss(trl.model, batch, False)
    theirs.backward()
    trainer = PreferenceTrainer(
        model=tiny_model(), ref_model=tiny_model(seed=1), args=tiny_args(tmp_path, **fields),
        train_dataset=tiny_pairs(), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    ours = trainer.loss_output(trainer.model, dict(batch) | {"index": torch.arange(4)}).loss
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    got, want = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (trainer.model, trl.model))
    assert (got - want).norm() < 1e-5 * want.norm()
