"""Where in a batch's token rows the prompts and the responses lie.

A batch is padded (rows of prompt + response, with masks), or it is one row of tokens with paths: paths (S, 4) int64
hold, for each response, where its prompt starts and ends and where it itself starts and ends. Paths may share a prompt.
What follows knows neither: it takes rows of the flattened hidden states, and what they predict.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


class Rows(NamedTuple):
    """Those of a batch's flattened token rows that predict the tokens of S sequences.

    Attributes:
        take: (K,) int64 which; None: all of them.
        labels: (K,) int64 what each predicts; `IGNORED` where nothing that counts.
        ends: (S+1,) int64 boundaries of the sequences among the K rows.
        first: (S,) int64 which of the K rows predicts a sequence's first token.
        last: (S,) int64 flattened row of a sequence's last token.
        lengths: (S,) int64 tokens that count.
    """

    take: Tensor | None
    labels: Tensor
    ends: Tensor
    first: Tensor
    last: Tensor
    lengths: Tensor

    def of(self, hidden: Tensor) -> Tensor:
        """(R, T, D) or (R * T, D) -> (K, D)."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return rows if self.take is None else rows.index_select(0, self.take)

    def split_ends(self, head: Tensor) -> Tensor:
        """(2S+1,) boundaries of each sequence's first `head` (S,) tokens and of the rest."""
        split = self.first + head
        return torch.cat((torch.stack((self.ends[:-1], split), dim=1).flatten(), self.ends[-1:]))


def responses(batch: Mapping[str, Tensor]) -> Rows:
    """The rows that predict responses, S = R."""
    if "paths" not in batch:
        return _masked(batch["input_ids"], batch["completion_mask"])
    _, prompt_end, start, end = batch["paths"].unbind(1)
    return _spans(batch["input_ids"], prompt_end - 1, start, end)


def shared_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """(R,) tokens of the shorter response of each row's pair."""
    return torch.minimum(*responses(batch).lengths.chunk(2)).repeat(2)


def prompts(batch: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The flattened rows (K,) of the prompts' tokens of the first `count` responses, and their lengths (count,)."""
    if "paths" in batch:
        start, end = batch["paths"][:count, :2].unbind(1)
        return _within(start, end), end - start
    mask = batch["attention_mask"][:count] * (1 - batch["completion_mask"][:count])
    return mask.flatten().nonzero()[:, 0], mask.sum(dim=1)


def prompts_alone(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """A padded batch of the prompts of the first `count` responses, with no response."""
    if "paths" in batch:
        spans = batch["paths"][:count, :2].tolist()
        ids = pad_sequence([batch["input_ids"][0, start:end] for start, end in spans], batch_first=True)
        mask = pad_sequence([torch.ones_like(ids[0, : end - start]) for start, end in spans], batch_first=True)
    else:
        mask = batch["attention_mask"][:count] * (1 - batch["completion_mask"][:count])
        width = int(mask.sum(dim=1).max())
        ids, mask = batch["input_ids"][:count, :width], mask[:, :width]
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": torch.zeros_like(ids)}


def sides(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The chosen and the rejected responses of a batch, each a batch of its own.

    Raises:
        ValueError: a prompt is shared by both sides.
    """
    if "paths" not in batch:
        chosen, rejected = zip(*(x.chunk(2) for x in batch.values()), strict=True)
        return dict(zip(batch, chosen, strict=True)), dict(zip(batch, rejected, strict=True))
    chosen_paths, rejected_paths = batch["paths"].chunk(2)
    border = int(chosen_paths[:, 3].max())
    if int(rejected_paths[:, 0].min()) != border:
        raise ValueError("one side at a time needs all chosen responses before the rejected ones, prompts not shared")
    ids = batch["input_ids"]
    return (
        {"input_ids": ids[:, :border], "paths": chosen_paths},
        {"input_ids": ids[:, border:], "paths": rejected_paths - border},
    )


def positions(batch: Mapping[str, Tensor]) -> Tensor:
    """(1, N) int64 position of each token of a row with paths: every path counts from 0."""
    prompt_start, prompt_end, start, end = batch["paths"].unbind(1)
    row = torch.arange(batch["input_ids"].shape[1], device=start.device)
    # A token's position is its place in the row less what lies before its path.
    offset = torch.zeros_like(row)
    own = start - (prompt_end - prompt_start)
    for first, stop, shift in ((prompt_start, prompt_end, prompt_start), (start, end, own)):
        spans = _within(first, stop)
        offset[spans] = shift.repeat_interleave(stop - first)
    return (row - offset)[None]


def completion_tokens(batch: Mapping[str, Tensor], count: int) -> int:
    """Tokens of the first `count` responses."""
    if "paths" in batch:
        return int((batch["paths"][:count, 3] - batch["paths"][:count, 2]).sum())
    return int(batch["completion_mask"][:count].sum())


def _within(start: Tensor, end: Tensor) -> Tensor:
    """(K,) the numbers start[0] .. end[0] - 1, start[1] .. end[1] - 1, ..."""
    lengths = end - start
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=start.device) + (start - before).repeat_interleave(lengths)


def _spans(input_ids: Tensor, before: Tensor, start: Tensor, end: Tensor) -> Rows:
    """Tokens start .. end - 1 of the one row, the first of which is predicted from `before`."""
    target, lengths = _within(start, end), end - start
    ends = F.pad(lengths.cumsum(0), (1, 0))
    take = target - 1
    kept = lengths > 0
    take[ends[:-1][kept]] = before[kept]
    return Rows(take, input_ids[0, target], ends, ends[:-1], end - 1, lengths)


def _masked(input_ids: Tensor, mask: Tensor) -> Rows:
    """Tokens of (R, T) rows where `mask` is 1."""
    rows, width = mask.shape
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(mask[:, 1:].bool(), input_ids[:, 1:], IGNORED)
    starts = torch.arange(rows + 1, device=mask.device) * width
    last = (mask.bool() * torch.arange(width, device=mask.device)).amax(dim=1)
    lengths = (labels != IGNORED).sum(dim=1)
    first = starts[:-1] + (last - lengths).clamp(min=0)
    return Rows(None, labels.flatten(), starts, first, starts[:-1] + last, lengths)
