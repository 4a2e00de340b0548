"""The arithmetic that scoring and updating one batch of answers needs, counted from OPT shapes.

Counted is what PPO with one optimizer step a batch needs, once each: only real tokens, and of those only positions
with an output that is used (the last token of an answer predicts nothing, so actor, reference and critic need P + R -
1 positions, and the reward model all P + R); causal attention over what a position sees, which is half of the full
square; the output head at the R positions that predict an answer's tokens. A backward pass is two forwards. The
critic's forward pass of the update gives the values that scoring needs, too, so it counts once, in the update. Not
counted, though somebody must do it: softmax, norms, element-wise work, the loss, AdamW, and anything computed twice.
A product of [m, k] and [k, n] is 2 m k n FLOP.

By hand, one layer of width 2 with 1 head, ffn 3, vocabulary 5, P = 2, R = 2 (tests/benchmarks/test_flops.py):
    weights of a layer  4 * 2*2 + 2 * 2*3          = 28
    reference           3 positions: 3 * 2*28      = 168
                        attention, 1+2+3 pairs: 6 * 4*2 = 48
                        head at 2 positions: 2 * 2*2*5  = 40     256
    critic              168 + 48, score at 2: 2 * 2*2   = 8      224
    reward              4 positions: 4 * 2*28 = 224, 10 pairs: 80, score at 1: 4      308
    scoring             256 + 308                                564
    update              3 * 256 + 3 * 224                        1440
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OPTShape:
    """What of an OPT model costs arithmetic."""

    hidden_size: int
    num_layers: int
    ffn_dim: int
    vocab_size: int

    def layers(self, positions: int) -> int:
        """FLOP of a forward pass of all layers over the first `positions` tokens of one sequence."""
        weights = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_dim
        pairs = positions * (positions + 1) // 2
        return self.num_layers * (positions * 2 * weights + pairs * 4 * self.hidden_size)

    def head(self, positions: int) -> int:
        """FLOP of the output head."""
        return positions * 2 * self.hidden_size * self.vocab_size

    def score(self, positions: int) -> int:
        """FLOP of a score head."""
        return positions * 2 * self.hidden_size


def scoring_flop(actor: OPTShape, scorer: OPTShape, lengths: Iterable[tuple[int, int]]) -> int:
    """FLOP of reference log-probs and scores of sequences with (prompt, answer) lengths (P, R)."""
    return sum(
        actor.layers(prompt + answer - 1) + actor.head(answer) + scorer.layers(prompt + answer) + scorer.score(1)
        for prompt, answer in lengths
    )


def update_flop(actor: OPTShape, scorer: OPTShape, lengths: Iterable[tuple[int, int]]) -> int:
    """FLOP of one training pass (forward and backward) of actor and critic over the same sequences."""
    return sum(
        3 * (actor.layers(prompt + answer - 1) + actor.head(answer))
        + 3 * (scorer.layers(prompt + answer - 1) + scorer.score(answer))
        for prompt, answer in lengths
    )
