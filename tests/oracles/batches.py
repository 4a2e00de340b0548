"""Random ragged batches for hypothesis: lists for the oracles, padded tensors (the padding full of NaN) for the code.

Kinds of mask: answers of different lengths padded on the right, answers of one token, answers that all stop at the same
place, answers padded on the left, and answers with gaps.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles.masks import Mask, Rows

oracle_settings = settings(max_examples=80, deadline=None, derandomize=True)

KINDS = ("ragged", "one token", "same stop", "left padded", "gaps", "full")


@dataclass(frozen=True)
class Batch:
    """Shape of a batch, and the source of its numbers.

    Attributes:
        mask: B rows of R flags, at least one True in each.
        source: seeded; rows() draws from it.
    """

    mask: Mask
    source: random.Random

    def rows(self, scale: float = 1.0) -> Rows:
        """B rows of R normal numbers; some are exactly 0, as rewards and fresh value heads are."""
        return [[self.source.choice((0.0, 1.0, 1.0, 1.0)) * self.source.gauss(0, scale) for _ in r] for r in self.mask]

    def logprobs(self) -> Rows:
        return [[-self.source.expovariate(0.7) - 1e-3 for _ in row] for row in self.mask]

    def near(self, rows: Rows, scale: float) -> Rows:
        """The same rows, each number moved a little, and some not at all."""
        return [
            [value + self.source.choice((0.0, 1.0, 1.0, 1.0)) * self.source.gauss(0, scale) for value in row]
            for row in rows
        ]

    def tensor(self, rows: Rows, dtype: torch.dtype = torch.float64, filling: float = math.nan) -> Tensor:
        """[B, R]; what the mask leaves out is `filling`."""
        return torch.tensor(
            [
                [value if flag else filling for value, flag in zip(row, flags, strict=True)]
                for row, flags in zip(rows, self.mask, strict=True)
            ],
            dtype=dtype,
        )

    @property
    def mask_tensor(self) -> Tensor:
        return torch.tensor(self.mask, dtype=torch.bool)


def make_mask(kind: str, num_rows: int, width: int, source: random.Random) -> Mask:
    common = source.randint(1, width)
    mask = []
    for _ in range(num_rows):
        length = source.randint(1, width)
        if kind == "ragged":
            row = [position < length for position in range(width)]
        elif kind == "one token":
            row = [position == 0 for position in range(width)]
        elif kind == "same stop":
            row = [position < common for position in range(width)]
        elif kind == "left padded":
            row = [position >= width - length for position in range(width)]
        elif kind == "gaps":
            row = [source.random() < 0.5 for _ in range(width)]
            row[source.randrange(width)] = True
        else:
            row = [True] * width
        mask.append(row)
    return mask


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    kind = draw(st.sampled_from(KINDS))
    num_rows = draw(st.integers(1, 5))
    width = draw(st.integers(1, 9))
    source = random.Random(draw(st.integers(0, 2**32 - 1)))
    return Batch(make_mask(kind, num_rows, width, source), source)
