"""What is measured: the shapes, the data and the float64 truth of one point of the comparison."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
BETA = 0.1  # of the DPO step
WORKS = ("forward", "frozen", "trainable", "dpo_frozen", "dpo_trainable")
# Matrix products of N x D x V that the result needs: projection, dh, dW; a DPO step projects the reference as well.
USEFUL_UNITS = {"forward": 1, "frozen": 2, "trainable": 3, "dpo_frozen": 3, "dpo_trainable": 4}
# What a method multiplies that keeps no logits: a trainable head's are projected a second time.
BARE_UNITS = {"forward": 1, "frozen": 2, "trainable": 4, "dpo_frozen": 3, "dpo_trainable": 5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

CANDIDATES = 8
TOP_LOGIT = 20.0
ZIPF_SHIFT = 64


@dataclass(frozen=True)
class Spec:
    """One point: a work at a shape. `tokens` counts every position, `completion_fraction` how many have a label."""

    work: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    completion_fraction: float = 1.0
    main: bool = False  # shown in docs/benchmarks.md
    contenders: tuple[str, ...] = ()  # only these; all when empty

    def __post_init__(self) -> None:
        if self.work not in WORKS:
            raise ValueError(f"work must be one of {', '.join(WORKS)}, got {self.work!r}")

    @property
    def is_dpo(self) -> bool:
        return self.work.startswith("dpo")

    @property
    def trains_head(self) -> bool:
        return self.work.endswith("trainable")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def spec_from_json(fields: dict[str, Any]) -> Spec:
    return Spec(**fields | {"contenders": tuple(fields.get("contenders", ()))})


class Problem(NamedTuple):
    """Tensors of one point; S sequences of L positions, S * L = N; the first half are chosen, the rest rejected."""

    spec: Spec
    hidden: Tensor  # (S, L, D)
    reference: Tensor  # (S, L, D) the reference model's hidden states; empty unless the work is a DPO step
    weight: Tensor  # (V, D)
    labels: Tensor  # (S, L) int64, IGNORE on prompts

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The completion's positions of `hidden` and their labels: (K, D), (K,)."""
        hidden, labels = hidden.flatten(0, 1), self.labels.flatten()
        if self.spec.completion_fraction == 1:
            return hidden, labels
        keep = labels != IGNORE
        return hidden[keep], labels[keep]

    def sequence_of_row(self) -> Tensor:
        """(K,) index of the sequence that each row of `rows` belongs to."""
        return (self.labels != IGNORE).nonzero()[:, 0]

    @property
    def required_bytes(self) -> int:
        """What the gradients that were asked for take."""
        grads = (self.hidden.grad, self.weight.grad)
        return sum(g.numel() * g.element_size() for g in grads if g is not None)


def make_problem(spec: Spec, device: torch.device, seed: int = 0) -> Problem:
    """Data with a trained model's spread of logits, the same for every contender.

    A row of the head has norm 1. A hidden state points to 8 candidate tokens, with logits about 20 - 1.5 ln(rank), over
    a background of standard deviation 1 to 2. Candidates follow Zipf's law in the token id, as frequent tokens have low
    ids; labels are drawn as the candidates are likely, 2 % of them from the whole vocabulary.
    """
    generator = torch.Generator(device).manual_seed(seed)
    length = min(512, spec.tokens // 2)
    sequences = spec.tokens // length
    tokens, dtype = sequences * length, DTYPES[spec.dtype]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(spec.vocab, spec.hidden).mul_(spec.hidden**-0.5).to(dtype)
    boosts = TOP_LOGIT - 1.5 * torch.arange(1, CANDIDATES + 1, device=device).log()
    span = 1 + spec.vocab / ZIPF_SHIFT
    candidates = (ZIPF_SHIFT * (span ** uniform(tokens, CANDIDATES) - 1)).long().clamp_(max=spec.vocab - 1)
    hidden = normal(tokens, spec.hidden)
    for column in range(CANDIDATES):
        hidden.add_(weight[candidates[:, column]].float(), alpha=float(boosts[column]))
    logits = torch.stack([(hidden * weight[ids].float()).sum(-1) for ids in candidates.unbind(1)], dim=1)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    labels = candidates.gather(1, drawn)[:, 0]
    anything = (uniform(tokens) * spec.vocab).long().clamp_(max=spec.vocab - 1)
    labels = torch.where(uniform(tokens) < 0.02, anything, labels).view(sequences, length)
    labels = labels.masked_fill(~_completion_mask(spec, uniform(sequences, 1), length), IGNORE)
    reference = (hidden + 0.1 * normal(tokens, spec.hidden)).to(dtype) if spec.is_dpo else hidden[:0].to(dtype)
    problem = Problem(
        spec,
        hidden.to(dtype).view(sequences, length, -1),
        reference.view(-1, length, spec.hidden),
        weight,
        labels,
    )
    problem.hidden.requires_grad_(spec.work != "forward")
    weight.requires_grad_(spec.trains_head)
    return problem


def _completion_mask(spec: Spec, draw: Tensor, length: int) -> Tensor:
    """(S, L): prompts of differing length first; the completions together are the fraction asked for."""
    prompt = 1 - spec.completion_fraction
    spread = min(prompt, spec.completion_fraction) / 2
    start = ((prompt + spread * (2 * draw - 1)) * length).round().clamp(0, length - 1)
    return torch.arange(length, device=draw.device) >= start


class Truth(NamedTuple):
    """Float64 statistics of K rows; `grad` is that of -logps.sum()."""

    logps: Tensor  # (K,)
    entropy: Tensor  # (K,)
    grad: Tensor  # (K, D); empty if it was not asked for


def truth_of_rows(hidden: Tensor, weight: Tensor, labels: Tensor, *, grad: bool, step: int = 4096) -> Truth:
    """Exact statistics by vocabulary slices, so that float64 at the full vocabulary fits in memory."""
    rows = hidden.detach().double()

    def slices() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, weight.shape[0], step):
            w = weight[first : first + step].detach().double()
            yield w, rows @ w.t()

    lse = torch.full((rows.shape[0],), -torch.inf, dtype=torch.float64, device=rows.device)
    for _, z in slices():
        lse = torch.logaddexp(lse, z.logsumexp(-1))
    mean_logit = torch.zeros_like(lse)
    expected = torch.zeros_like(rows)
    for w, z in slices():
        p = (z - lse[:, None]).exp_()
        mean_logit += (p * z).sum(-1)
        if grad:
            expected.addmm_(p, w)
    of_label = weight[labels].detach().double()
    logps = (rows * of_label).sum(-1) - lse
    return Truth(logps, lse - mean_logit, expected.sub_(of_label) if grad else rows[:0])


class Exact(NamedTuple):
    """Float64 results of a whole (small) problem, by autograd over full logits."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None


def exact(problem: Problem) -> Exact:
    hidden = problem.hidden.detach().double().requires_grad_(problem.hidden.requires_grad)
    weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)

    def log_probs(states: Tensor) -> tuple[Tensor, Tensor]:
        rows, labels = problem.rows(states)
        every = F.log_softmax(rows @ weight.t(), -1)
        return every.gather(-1, labels[:, None])[:, 0], -(every.exp() * every).sum(-1)

    logps, entropy = log_probs(hidden)
    if problem.spec.is_dpo:
        with torch.no_grad():
            reference, _ = log_probs(problem.reference.double())
        loss = dpo_loss(sequence_sums(logps, problem), sequence_sums(reference, problem))
    else:
        loss = -logps.sum()
    if loss.requires_grad:
        loss.backward()
    return Exact(loss.detach(), logps.detach(), entropy.detach(), hidden.grad, weight.grad)


def sequence_sums(logps: Tensor, problem: Problem) -> Tensor:
    """(S,) sums over the rows of each sequence; fp32 at least."""
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    return logps.new_zeros(problem.labels.shape[0]).index_add(0, problem.sequence_of_row(), logps)


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """DPO's mean loss from (S,) sequence log-probs, the chosen half first (arXiv:2305.18290)."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
