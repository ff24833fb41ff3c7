"""Certified skipping: which blocks of the logits plane a backward may leave out.

The gradient with respect to logit v of a row is g (1[v = y] - p_v) - g_H p_v (log p_v + H): but for
the label, all of it is in proportion to p_v. So a block of columns in which a row has softmax mass m adds at most
|g| m max_v |W_v| to |d hidden|, and leaving out blocks of total mass tau moves

    |d hidden_t|            by at most  gain |g_t| tau max_v |W_v|
    sum_v |d weight_v|      by at most  gain tau sum_t |g_t| |h_t|

with gain = logit_scale / temperature (a softcap's slope is at most 1). Where the entropy carries a gradient g_H, |g_t|
is replaced by |g_t| + |g_H,t| (log(V / tau) + H_t): x log(n / x) grows with x below n / e. The forward has measured
the masses, so the bound holds for this very batch and not only on average.
"""

import torch
from torch import Tensor

# The masses are sums of fp32 numbers; their rounding must not carry a row over the bound.
MARGIN = 1 - 1e-4
# Rows whose masses are sorted at once: sorting takes 16 bytes an element.
SORTED_AT_ONCE = 8192


def kept_blocks(block_mass: Tensor, labels: Tensor, skip_mass: float, block: int, rows_per_group: int = 1) -> Tensor:
    """Blocks to compute: the rest have a total mass of at most `skip_mass` in each row.

    Args:
        block_mass: (V / block, N) softmax mass of each row in each block of columns.
        labels: (N,) int64 columns; a label's own block is always kept.
        skip_mass: tau in (0, 1).
        block: columns in a block.
        rows_per_group: consecutive rows that share their choice (a kernel's tile).

    Returns:
        (V / block, N / rows_per_group) bool.
    """
    blocks, n = block_mass.shape
    groups = -(-n // rows_per_group)
    # One block more, for rows whose label lies nowhere.
    keep = torch.empty((blocks + 1, groups), dtype=torch.bool, device=block_mass.device)
    for first in range(0, groups, SORTED_AT_ONCE):
        last = min(first + SORTED_AT_ONCE, groups)
        mass = block_mass[:, first * rows_per_group : last * rows_per_group]
        # A group's largest mass in each block bounds every row's.
        mass = torch.nn.functional.pad(mass, (0, (last - first) * rows_per_group - mass.shape[1]))
        mass, rank = mass.view(blocks, last - first, rows_per_group).amax(2).sort(0)
        # A NaN is kept: whatever is compared with it is false.
        keep[:blocks, first:last].scatter_(0, rank, ~(mass.double().cumsum(0) <= skip_mass * MARGIN))
    own = torch.where((labels >= 0) & (labels < blocks * block), labels // block, blocks)
    keep[own, torch.arange(n, device=labels.device) // rows_per_group] = True
    return keep[:blocks]
