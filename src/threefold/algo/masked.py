"""Sums, means and whitening over the real entries of padded tensors.

A mask is boolean, True where the entry is real, and has the shape of the values. What stands in the other entries,
NaN included, never matters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the entries of `values` where `mask` is True; shape [], 0 for an empty mask."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries of `values` where `mask` is True; shape [].

    Raises:
        ValueError: if no entry is real, since no number would be right.
    """
    count = int(mask.sum())
    if count == 0:
        raise ValueError("masked_mean of no real entry")
    return masked_sum(values, mask) / count


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by the count) of the entries where `mask` is True; shape []."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Scale the real entries to variance 1 and, if `shift_mean`, move their mean to 0; padded entries become 0.

    With `shift_mean=False` the original mean is kept. A single real entry has no variance: it becomes 0 (or stays,
    unshifted).

    Args:
        values: any shape.
        mask: the same shape, boolean.
        epsilon: added to the variance under the root.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
