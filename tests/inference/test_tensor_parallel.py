"""Tensor-parallel decoding, and decoding of sharded weights, against transformers' forward of the whole model.

One launch of processes works through all families; each has a test of its own that looks at what came of it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.inference.sharded import ShardedWeights
from tests.inference.test_decoder import COVERED, GreedyRows, tiny_model
from tests.models.families_under_test import CONFIGS, VARIANTS, ragged_ids, tiny_causal_lm
from tests.ranks import run_on_ranks
from threefold.engine.distributed import World
from threefold.errors import ConfigError
from threefold.inference.arena import Arena
from threefold.inference.decoder import Decoder
from threefold.inference.families import alibi_slopes, architecture_of
from threefold.inference.tensor_parallel import (
    TensorGroup,
    check_tensor_parallel,
    part_of_architecture,
    part_of_vocabulary,
)

CPU = torch.device("cpu")
CASES = {
    "whole, 2 parts, packed": (False, 2, True),
    "sharded, 1 part": (True, 1, False),
    "sharded, 1 part, packed": (True, 1, True),
    "sharded, 2 parts": (True, 2, False),
}
LENGTHS = [3, 17, 1, 9]
Outcome = dict[str, Any]


def decode(world: World, model: PreTrainedModel, sharded: bool, tp_size: int, packed: bool) -> list[list[int]]:
    """Decode greedily, check every row with the model's own forward, and return the tokens."""
    group = TensorGroup(world.rank % tp_size, tp_size) if tp_size > 1 else None
    trained = copy.deepcopy(model)
    source = ShardedWeights(trained, world) if sharded else None
    arena = Arena(trained, architecture_of(trained), None, CPU, group)
    decoder = Decoder(trained, arena.architecture, None, arena)
    arena.fill(source)
    if packed:
        decoder.pack(len(LENGTHS))
    rows = GreedyRows(decoder)
    prompts = ragged_ids(1, LENGTHS, model.config.vocab_size)
    if group is None:  # each process has its own, and its own number of steps: none waits for the other
        rows.prefill(prompts[world.rank :: 2], 0)
        rows.step(4 + 9 * world.rank)
    else:
        rows.prefill(prompts, 0)
        rows.step(12)
    rows.check(model)
    decoder.release()
    return [row.tokens for row in rows.rows]


def decode_families(world: World, families: list[str], cases: dict[str, tuple[bool, int, bool]]) -> Outcome:
    outcome: Outcome = {}
    with torch.no_grad():
        for family in families:
            model = tiny_model(family)
            for name, (sharded, tp_size, packed) in cases.items():
                outcome[family, name] = decode(world, model, sharded, tp_size, packed)
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_on_ranks(decode_families, 2, COVERED, CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", COVERED)
def test_parts_and_shards_decode_as_transformers_does(outcomes: list[Outcome], family: str, case: str) -> None:
    """That the logits are right each process has found (1e-5); here that a group's processes agree."""
    first, second = (outcome[family, case] for outcome in outcomes)
    if "2 parts" in case:
        assert first == second
        assert len({tuple(tokens[-12:]) for tokens in first}) > 1
    else:
        assert [len(tokens) for tokens in first] == [3 + 5, 1 + 5]
        assert [len(tokens) for tokens in second] == [17 + 14, 9 + 14]


def test_four_processes() -> None:
    cases = {"whole": (False, 4, True), "sharded": (True, 4, False)}
    families = ["llama-biases", "codegen", "bloom", "gpt2"]  # vocabulary 40; 8 heads, 4 heads
    outcomes = run_on_ranks(decode_families, 4, families, cases)
    assert all(outcome == outcomes[0] for outcome in outcomes[1:])


def odd_vocabulary(world: World) -> list[list[int]]:
    with torch.no_grad():
        return decode(world, tiny_causal_lm("llama", vocab_size=37), False, 2, True)


def test_a_vocabulary_that_does_not_divide() -> None:
    first, second = run_on_ranks(odd_vocabulary, 2)
    assert first == second


def draw_apart(world: World) -> tuple[list[int], list[float], int]:
    group = TensorGroup(world.rank, world.size)
    tokens, logprobs = torch.tensor([7, 200_001]) + world.rank, torch.tensor([-0.1, -1.7]) / (1 + world.rank)
    agreed = group.agree((tokens, logprobs, logprobs))
    return agreed[0].tolist(), agreed[1].tolist(), group.least(5 - world.rank)


def test_a_group_goes_on_with_what_its_first_process_has_drawn() -> None:
    first, second = run_on_ranks(draw_apart, 2)
    assert first == second
    assert first[0] == [7, 200_001]
    assert first[1] == torch.tensor([-0.1, -1.7]).tolist()
    assert first[2] == 4


# ------------------------------------------------------------------------------------------------- what is refused


def message(family: str, size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        check_tensor_parallel({**CONFIGS, **VARIANTS}[family](), size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_size_that_does_not_divide_is_one_line() -> None:
    assert message("opt", 3) == (
        "generation.inference_tp_size = 3 does not divide the actor's 4 attention heads and 4 key-value heads; "
        "choose from 1, 2, 4"
    )
    assert "= 4 does not divide the actor's 2 key-value heads; choose from 1, 2" in message("llama", 4)
    assert "64 features of the feed-forward" not in message("opt", 3)


def test_a_family_without_a_decoder_is_one_line() -> None:
    line = message("gemma2", 2)
    assert line.startswith("generation.inference_tp_size = 2: gemma2 generates on the forward of transformers (")
    assert line.endswith("set it to 1")


def test_what_fits_is_not_refused() -> None:
    for family in COVERED:
        check_tensor_parallel({**CONFIGS, **VARIANTS}[family](), 2)
    check_tensor_parallel(CONFIGS["gemma2"](), 1)


# --------------------------------------------------------------------------------------------------------- parts


def test_parts_of_the_vocabulary_are_all_of_it() -> None:
    for vocab_size, size in ((40, 2), (37, 2), (5, 4), (50272, 8)):
        parts = [part_of_vocabulary(vocab_size, rank, size) for rank in range(size)]
        tokens = [token for part in parts for token in range(vocab_size)[part]]
        assert tokens == list(range(vocab_size))
        assert all(part.stop - part.start <= parts[0].stop for part in parts)


@pytest.mark.parametrize(("family", "size"), [("bloom", 2), ("bloom", 4), ("bloom-6-heads", 2), ("bloom-6-heads", 3)])
def test_slopes_go_with_their_heads(family: str, size: int) -> None:
    whole = architecture_of(tiny_causal_lm(family))
    parts = [part_of_architecture(whole, rank, size).slopes for rank in range(size)]
    assert torch.equal(torch.cat(parts), alibi_slopes(whole.num_heads))
