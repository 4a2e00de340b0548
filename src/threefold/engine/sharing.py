"""Which forward passes a process makes over a batch that every process knows.

Shares are balanced by length. Models whose weights are gathered for every forward pass (ZeRO 2 and 3) need every
process to make as many passes as the others; where one has fewer, it repeats the shortest sequence and drops what comes
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from threefold.engine.distributed import ALONE, World

Item = TypeVar("Item")

AUTO_MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""On a CPU the activations of a pass should stay in the cache; a GPU needs long passes to be busy."""


def balanced_shares(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices of each share, in order: longest first, each to the share with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, 0, number) for number in range(num_shares)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, number = min(loads)
        shares[number].append(index)
        loads[number] = (tokens + lengths[index], count + 1, number)
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class Pass(Generic[Item]):
    """One forward pass.

    Attributes:
        items: what passes.
        rows: their indices in the batch.
        counts: False if the pass is made only because other processes make one: what comes of it is to be dropped.
    """

    items: list[Item]
    rows: list[int]
    counts: bool = True


@dataclass(frozen=True)
class MicroBatching:
    """How a batch is cut into forward passes: sequences of like length together, so that little of a pass is padding.

    Attributes:
        max_sequences: in one pass; 0 is no limit.
        max_tokens: in one pass, padding included; 0 is no limit. A longer sequence passes alone.
        world: the processes that share a batch.
        together: every process makes as many passes as the one with the most.
    """

    max_sequences: int = 0
    max_tokens: int = 0
    world: World = ALONE
    together: bool = False

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of each pass, longest sequences first; every index once. Equal lengths keep their order."""
        passes: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[passes[-1][0]] if passes else 0
            size = len(passes[-1]) + 1 if passes else 0
            full = (self.max_sequences and size > self.max_sequences) or (
                self.max_tokens and size * longest > self.max_tokens
            )
            if not passes or full:
                passes.append([])
            passes[-1].append(index)
        return passes

    def of(self, items: Sequence[Item], length_of: Callable[[Item], int]) -> list[Pass[Item]]:
        """This process's passes over a batch, which is the same on every process."""
        lengths = [length_of(item) for item in items]
        cuts = [
            [[share[i] for i in rows] for rows in self.cut([lengths[index] for index in share])]
            for share in balanced_shares(lengths, self.world.size)
        ]
        passes = [Pass([items[row] for row in rows], rows) for rows in cuts[self.world.rank]]
        if self.together and items:
            shortest = min(range(len(lengths)), key=lambda i: (lengths[i], i))
            missing = max(map(len, cuts)) - len(passes)
            passes += [Pass([items[shortest]], [shortest], counts=False)] * missing
        return passes


def micro_batching(
    max_sequences: int, max_tokens: int, device: torch.device, world: World = ALONE, together: bool = False
) -> MicroBatching:
    """The recipe's micro_batch_size and micro_batch_tokens, 0 tokens standing for what suits the device."""
    return MicroBatching(max_sequences, max_tokens or AUTO_MICRO_BATCH_TOKENS.get(device.type, 4096), world, together)
