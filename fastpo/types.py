"""The tensors that travel between the layers. A leaf: it imports nothing of ours."""

from typing import Generic, NamedTuple, NotRequired, TypedDict, TypeVar

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics; both fields have the shape of the labels and are 0 where the label is ignored.

    Attributes:
        logps: log-probability of the label, in nats; fp32 (float64 for float64 inputs).
        entropy: entropy of the predicted distribution over the vocabulary, in nats; same dtype.
    """

    logps: Tensor
    entropy: Tensor


class ExtendedTokenStats(NamedTuple):
    """`TokenStats` with what `extras` asked for, as constants; None where it did not.

    Attributes:
        logps, entropy: as in `TokenStats`.
        log_sum_sq_probs: log sum_v p_v^2 of the predicted distribution.
        is_top1: bool, whether no token is more probable than the label; False where the label is ignored.
        mean_logits: mean over the vocabulary of the logits, as scale, softcap and temperature leave them.
    """

    logps: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None


class SequenceStats(NamedTuple):
    """Per-sequence statistics of B responses.

    Attributes:
        logps: (B,) summed log-probability of the labelled tokens, in nats.
        lengths: (B,) int64 number of labelled tokens.
        entropy: (B,) mean entropy per labelled token, in nats; 0 for an empty response.
    """

    logps: Tensor
    lengths: Tensor
    entropy: Tensor

    def split(self) -> tuple["SequenceStats", "SequenceStats"]:
        """The first and the second half of 2B rows: chosen and rejected of a `PreferenceBatch`.

        Raises:
            ValueError: the number of rows is odd.
        """
        first, second = zip(*(_halves(x) for x in self), strict=True)
        return SequenceStats(*first), SequenceStats(*second)


class ExtendedSequenceStats(NamedTuple):
    """`SequenceStats` with what some objectives read beside; None where it was not asked for.

    Attributes:
        logps, lengths, entropy: as in `SequenceStats`.
        log_sum_sq_probs: (B,) sum over the tokens of log sum_v p_v^2, a constant; for WPO's weights.
        shared_logps: (B,) as logps, of the tokens within the shorter response of the pair; for LD-DPO.
        top1: (B,) int64 number of tokens than which none is more probable; over lengths, the token accuracy.
        mean_logits: (B,) sum over the tokens of the mean over the vocabulary of the logits, a constant.
    """

    logps: Tensor
    lengths: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor | None = None
    shared_logps: Tensor | None = None
    top1: Tensor | None = None
    mean_logits: Tensor | None = None

    def split(self) -> tuple["ExtendedSequenceStats", "ExtendedSequenceStats"]:
        """As `SequenceStats.split`."""
        first, second = zip(*((None, None) if x is None else _halves(x) for x in self), strict=True)
        return ExtendedSequenceStats(*first), ExtendedSequenceStats(*second)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) % 2:
        raise ValueError(f"split must have an even number of rows, chosen and rejected, got {len(x)}")
    half = len(x) // 2
    return x[:half], x[half:]


AnySequenceStats = SequenceStats | ExtendedSequenceStats


class StepTotals(NamedTuple):
    """What one optimiser step averages over, as float tensors: all micro-batches, per process.

    With P processes whose gradients are averaged, the totals are those of all processes divided by P, so that
    micro-batches of any sizes on any number of processes give the gradient of the one large batch.
    """

    rows: Tensor
    tokens: Tensor


Stats = TypeVar("Stats", TokenStats, SequenceStats)


class JointStats(NamedTuple, Generic[Stats]):
    """Policy and reference from one pass over one LM head.

    Attributes:
        policy: the policy's statistics, differentiable.
        reference: the reference's, constants.
        kl: KL(policy || reference) over the vocabulary, in nats and differentiable, of each token (shaped as the
            labels) or summed over each sequence (B,); None where it was not asked for.
    """

    policy: Stats
    reference: Stats
    kl: Tensor | None


class PreferenceBatch(TypedDict):
    """A padded batch as `PreferenceCollator` makes it; R rows, right-padded to T tokens.

    In stages ``dpo`` and ``rm`` R = 2B: the B chosen rows, then the B rejected rows in the same order. In stage ``sft``
    R = B: the chosen rows alone.
    """

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64, 0 on padding
    completion_mask: Tensor  # (R, T) int64, 1 on the tokens of the response
    index: Tensor  # (B,) int64, row number in the dataset
    # (B,) columns of the dataset's own, as fastpo.data names them; prompt_hidden (B, D)
    context_scale: NotRequired[Tensor]
    pair_weight: NotRequired[Tensor]
    margin: NotRequired[Tensor]
    score_chosen: NotRequired[Tensor]
    score_rejected: NotRequired[Tensor]
    prompt_hidden: NotRequired[Tensor]
    prompt_perplexity: NotRequired[Tensor]
    prompt_entropy: NotRequired[Tensor]


class LossOutput(NamedTuple):
    """What every preference loss returns.

    Attributes:
        loss: () the reduced loss to call backward on.
        losses: (B,) loss of each pair.
        chosen_rewards: (B,) detached implicit reward of each chosen response.
        rejected_rewards: (B,) detached implicit reward of each rejected response.
        margins: (B,) chosen_rewards - rejected_rewards, detached.
        metrics: name -> detached () tensor, named as TRL names them.
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    metrics: dict[str, Tensor]
