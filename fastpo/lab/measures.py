"""What a trained model is measured by, from plain tensors: preferences, samples, s(x), text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from fastpo.calibration import expected_calibration_error
from fastpo.lab.kinds import Kind
from fastpo.ops import joint_linear_sequence_stats

Parts = Sequence[tuple[Tensor, Tensor]]


def preference_measures(margins: Tensor, log_p: Tensor, log_q: Tensor, agrees: Tensor) -> dict[str, float]:
    """accuracy and margin against clean labels, nll and ece against raters' labels.

    Args:
        margins: (N,) implicit reward of the better response minus that of the other; a tie is not accurate.
        log_p, log_q: (N,) log-probability that the better, or the other response is preferred, in nats.
        agrees: (N,) bool, whether a rater prefers the better one.
    """
    probability = torch.where(agrees, log_p, log_q).exp()
    return {
        "accuracy": (margins > 0).double().mean().item(),
        "margin": margins.double().mean().item(),
        "nll": -torch.where(agrees, log_p, log_q).double().mean().item(),
        "ece": expected_calibration_error(probability),
    }


def scale_measures(s: Tensor, kinds: Sequence[Kind] | None) -> dict[str, float]:
    """s/mean, s/std, s/min, s/max of s(x) (N,), and its rank correlations with the kinds of its prompts.

    s/reliability and s/hard are Spearman's, ties at their mean rank; there are none where s, or the kinds, are all the
    same.
    """
    found = {
        "s/mean": s.mean().item(), "s/std": s.std(correction=0).item(), "s/min": s.min().item(), "s/max": s.max().item()
    }  # fmt: skip
    if kinds is not None:
        for name, of_kind in (
            ("reliability", [k.reliability for k in kinds]),
            ("hard", [float(k.hard) for k in kinds]),
        ):
            if len(set(of_kind)) > 1 and len(s.unique()) > 1:
                found[f"s/{name}"] = float(spearmanr(s.double().numpy(), of_kind).statistic)
    return found


def kind_measures(
    kinds: Mapping[str, Kind], names: Sequence[str], margins: Tensor, s: Tensor | None
) -> dict[str, dict[str, Any]]:
    """Of each kind: reliability, hard, pairs, accuracy, and s(x) of its prompts where s (N,) is learned.

    Args:
        kinds: by name.
        names: of the kind of each of N pairs.
        margins: (N,) as in `preference_measures`.
    """
    found = {}
    for name, kind in kinds.items():
        rows = torch.tensor([i for i, own in enumerate(names) if own == name])
        if not len(rows):
            continue
        found[name] = {
            "reliability": kind.reliability, "hard": kind.hard, "pairs": len(rows),
            "accuracy": (margins[rows] > 0).double().mean().item(),
            **({} if s is None else {"s": [round(x, 5) for x in s[rows].tolist()]}),
        }  # fmt: skip
    return found


def win_rate(rewards: Sequence[float], others: Sequence[float]) -> float:
    """Share of rewards that are above the others' of the same prompts; a tie counts half."""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, others, strict=True))
    return wins / len(rewards)


def two_head_kl(own: Parts, other: Parts, labels: Tensor, **options: Any) -> Tensor:
    """(B,) KL(own || other) of what comes next, summed over each sequence, in nats; exact, and without logits.

    The joint op knows one head. Both models' lie side by side in it, and each one's hidden states are 0 where the
    other's weights are.

    Args:
        own, other: hidden states (..., d) and weights (V, d) of a model, whose products add up to its logits: of the LM
            head, of its bias (hidden states of 1), of LoRA on it.
        labels, options: as in `joint_linear_sequence_stats`.
    """
    hidden = torch.cat([*(h for h, _ in own), *(torch.zeros_like(h) for h, _ in other)], dim=-1)
    beside = torch.cat([*(torch.zeros_like(h) for h, _ in own), *(h for h, _ in other)], dim=-1)
    weight = torch.cat([w for _, w in (*own, *other)], dim=1)
    found = joint_linear_sequence_stats(hidden, beside, weight, labels, kl=True, **options)
    assert found.kl is not None
    return found.kl


def text_quality(said: Sequence[str], wanted: Sequence[str], language: str) -> dict[str, float]:
    """bleu, chrf and rouge_l, in [0, 100], of texts against one wanted text each.

    Args:
        language: a two-letter code; Chinese and Japanese are compared by the character.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    by_character = language in ("zh", "ja")
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer(by_character))
    rouge = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted, strict=True)]
    bleu = sacrebleu.corpus_bleu(said, [wanted], tokenize="char" if by_character else "13a")
    return {
        "bleu": bleu.score,
        "chrf": sacrebleu.corpus_chrf(said, [wanted]).score,
        "rouge_l": 100 * math.fsum(rouge) / max(len(rouge), 1),
    }


class _Tokenizer:
    """Of `RougeScorer`, whose own one drops all letters but a to z."""

    def __init__(self, by_character: bool) -> None:
        self.by_character = by_character

    def tokenize(self, text: str) -> list[str]:
        text = text.lower()
        return [c for c in text if not c.isspace()] if self.by_character else text.split()
