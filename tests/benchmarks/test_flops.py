"""The benchmark's FLOP count against numbers worked by hand and against the count of `threefold bench`."""

import pytest

from benchmarks.flops import OPTShape, scoring_flop, update_flop
from threefold.bench.flops import ModelCost, causal_pairs, iteration_flop

TINY = OPTShape(hidden_size=2, num_layers=1, ffn_dim=3, vocab_size=5)


def test_numbers_worked_by_hand():
    assert TINY.layers(3) == 168 + 48
    assert TINY.layers(4) == 224 + 80
    assert TINY.head(2) == 40
    assert scoring_flop(TINY, TINY, [(2, 2)]) == 564
    assert update_flop(TINY, TINY, [(2, 2)]) == 1440


def test_sequences_and_layers_add_up():
    two_layers = OPTShape(hidden_size=2, num_layers=2, ffn_dim=3, vocab_size=5)
    assert two_layers.layers(7) == 2 * TINY.layers(7)
    assert update_flop(TINY, TINY, [(2, 2), (3, 1)]) == update_flop(TINY, TINY, [(2, 2)]) + update_flop(
        TINY, TINY, [(3, 1)]
    )


def test_agrees_with_threefold_bench():
    """An independent count, which charges the last token as well (1 of 512), no score head, and the critic's forward
    pass both to scoring and to the update."""
    actor, scorer = OPTShape(512, 8, 2048, 8000), OPTShape(384, 6, 1536, 8000)
    critic = ModelCost(6 * 12 * 384**2, 0, 0, False, 6 * 384)
    theirs = iteration_flop(
        [(256, [256])] * 8,
        *[ModelCost(8 * 12 * 512**2, 0, 512 * 8000, True, 8 * 512)] * 2,
        critic,
    )
    values = critic.forward(8 * 512, 8 * causal_pairs(512), 0)
    assert scoring_flop(actor, scorer, [(256, 256)] * 8) == pytest.approx(theirs.score - values, rel=5e-3)
    assert update_flop(actor, scorer, [(256, 256)] * 8) == pytest.approx(theirs.update, rel=5e-3)
