"""Generation over sharded weights (ZeRO stage 3): gathered once per rollout, beside gathered for every token.

    .venv/bin/python -m benchmarks.gather_once                      30 M weights, 2 processes
    .venv/bin/python -m benchmarks.gather_once --model opt:hidden=128,layers=4,heads=4,ffn=512,vocab=512 --rows 8

The contestants take turns within the same processes; reported are medians over the rounds, of the slowest process.
Every process answers its own prompts, all answers equally long, for whoever gathers at every token needs all processes
to make as many steps:

- once, arena: threefold's hybrid engine; the time includes filling the arena and packing it.
- every token, same decoder: threefold's decoder, the weights gathered before each of its steps and let go after it.
- every token, transformers: FSDP2's own gathering block by block, in the forward of transformers with a cache.
- whole weights, ...: the same two decoders without shards, to tell what gathering costs from what the decoder saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import threefold  # noqa: F401  before torch: it sets how OpenMP waits

# isort: split
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from benchmarks.processes import on_processes
from threefold.bench.random_models import random_causal_lm
from threefold.config.recipe import GenerationSection, SamplingSection
from threefold.engine.distributed import World
from threefold.engine.hybrid import HybridEngine
from threefold.engine.parallel import ParallelModel
from threefold.inference.decoder import Decoder
from threefold.inference.fallback import FallbackDecoder
from threefold.inference.families import architecture_of
from threefold.inference.generate import generate
from threefold.inference.kv_cache import KVCache
from threefold.models.forward import CausalForward
from threefold.models.shapes import find_shape

CPU = torch.device("cpu")
MODEL = "opt:hidden=512,layers=8,heads=8,ffn=2048,vocab=8000"
ONCE = "once, arena"
BAR = 2.0
"""Gathering once has to be this many times as fast as the best of those that gather at every token."""


class GatheringDecoder(Decoder):
    """Gathers all weights before each step, and lets them go after it."""

    def __init__(self, model: PreTrainedModel, world: World) -> None:
        lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
        self._units = [*lists[0], model]
        super().__init__(model, architecture_of(model), None)
        for module in self._units:
            fully_shard(module, mesh=world.mesh)

    def _gathered(self, compute: Callable[[], Tensor]) -> Tensor:
        for unit in self._units:
            unit.unshard()  # type: ignore[operator]
        try:
            return compute()
        finally:
            for unit in self._units:
                unit.reshard()  # type: ignore[operator]

    def prefill(self, ids: Tensor, lengths: Sequence[int], cache: KVCache, first_row: int) -> Tensor:
        return self._gathered(lambda: Decoder.prefill(self, ids, lengths, cache, first_row))

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        return self._gathered(lambda: Decoder.step(self, ids, cache))


def contestants(world: World, model: PreTrainedModel) -> dict[str, Callable[..., Any]]:
    """Each generates with the arguments of `inference.generate.generate` behind its first."""
    settings = GenerationSection()

    def forward() -> CausalForward:
        return CausalForward(deepcopy(model))

    def engine(sharded: bool) -> HybridEngine:
        causal = forward()
        source = ParallelModel(causal.model, world, CPU, zero_stage=3) if sharded else None
        return HybridEngine(causal, settings, CPU, torch.float32, print, source=source)

    gathering = forward()
    gathering.run_by(ParallelModel(gathering.model, world, CPU, zero_stage=3).run)
    decoders = {
        "every token, same decoder": GatheringDecoder(deepcopy(model), world),
        "every token, transformers": FallbackDecoder(gathering),
        "whole weights, transformers": FallbackDecoder(forward()),
    }

    def by(decoder: Any) -> Callable[..., Any]:
        return lambda *arguments: generate(decoder, *arguments)

    return {
        ONCE: engine(sharded=True).generate,
        **{name: by(decoder) for name, decoder in decoders.items()},
        "whole weights, same decoder": engine(sharded=False).generate,
    }


def measure(world: World, shape: str, rows: int, prompt: int, answer: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each contestant on this process. Collective."""
    model = random_causal_lm(find_shape(shape, "--model"), CPU, seed=1)
    random = torch.Generator().manual_seed(world.rank)
    prompts = torch.randint(5, model.config.vocab_size, (rows, prompt), generator=random).tolist()
    sampling = SamplingSection(max_new_tokens=answer)
    entrants = contestants(world, model)
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    found: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        for name, run in entrants.items():
            world.barrier()
            started = time.perf_counter()
            rollouts = run(prompts, sampling, frozenset(), torch.Generator().manual_seed(7))
            if turn:
                seconds[name].append(time.perf_counter() - started)
            found[name] = [rollout.response_ids.tolist() for rollout in rollouts]
    assert all(tokens == found[ONCE] for tokens in found.values()), "all of them give the same answers"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="prompts of each process")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    arguments = (flags.model, flags.rows, flags.prompt, flags.answer, flags.rounds)
    ranks = on_processes(flags.processes, measure, *arguments)
    medians = {
        name: statistics.median(max(rank[name][turn] for rank in ranks) for turn in range(flags.rounds))
        for name in ranks[0]
    }
    ratios = {name: seconds / medians[ONCE] for name, seconds in medians.items()}
    if flags.json:
        print(json.dumps({"arguments": vars(flags), "seconds": medians, "times_as_long": ratios}))
    else:
        print(f"{flags.model}, {flags.processes} processes of one thread, {flags.rows} prompts each of {flags.prompt}")
        print(f"tokens, answers of {flags.answer} tokens; medians of {flags.rounds} rounds\n")
        print("| gathered | seconds | tokens/s of all processes | times as long |\n|---|---|---|---|")
        for name, seconds in medians.items():
            tokens = flags.processes * flags.rows * flags.answer / seconds
            print(f"| {name} | {seconds:.2f} | {tokens:.0f} | {ratios[name]:.2f} |")
    best = min(ratio for name, ratio in ratios.items() if name.startswith("every token"))
    raise SystemExit(0 if best >= BAR else f"gathering once is {best:.2f} times as fast, and {BAR:g} is the bar")


if __name__ == "__main__":
    main()
