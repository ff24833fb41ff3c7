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

    In stage ``dpo`` R = 2B: the B chosen rows, then the B rejected rows in the same order. In stage ``sft``
    R = B: the chosen rows alone.
    """

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64, 0 on padding
    completion_mask: Tensor  # (R, T) int64, 1 on the tokens of the response
    index: Tensor  # (B,) int64, row number in the dataset
    context_scale: NotRequired[Tensor]  # (B,) the caller's own phi(x)


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
