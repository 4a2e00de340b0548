"""Memory of one process, measured, beside the formulas of threefold.plan: weights, gradients, optimizer state, moving
average, decode weights, keys and values, of a model of 30 M weights at every ZeRO stage.

    .venv/bin/python -m benchmarks.memory_per_rank                      2 processes, stages 0 to 3, LoRA, offload
    .venv/bin/python -m benchmarks.memory_per_rank --processes 4

Measured is what the kernel says the process has resident (VmRSS) after what has been freed was given back: each part is
the difference that one real act makes (building and sharding the model, a forward and backward pass, an optimizer step,
filling the arena, allocating a cache). Before the first of them a model of one block goes through all acts once, so
that code, kernels' scratch memory and communication buffers are there already. Each configuration has processes of its
own; reported is the fullest of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import threefold  # noqa: F401  before torch: it sets how OpenMP waits

# isort: split
import torch

from benchmarks.processes import on_processes
from threefold.bench.random_models import random_causal_lm
from threefold.config.recipe import GenerationSection, LoRASection, OptimizerSection
from threefold.config.scale import TrainedModelSection
from threefold.engine.distributed import World
from threefold.engine.ema import ExponentialMovingAverage
from threefold.engine.hybrid import HybridEngine
from threefold.engine.parallel import ParallelModel
from threefold.engine.train import TrainEngine
from threefold.machine.memory import resident_bytes, return_freed_memory
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.shapes import Shape, find_shape
from threefold.plan.memory import decode_bytes, key_value_bytes, shards_weights, trained_model_memory
from threefold.plan.sizes import ModelSizes, model_sizes

CPU = torch.device("cpu")
MODEL = "opt:hidden=512,layers=8,heads=8,ffn=2048,vocab=8000"
"""30 M weights."""
ROWS, POSITIONS, TOKENS = 16, 256, 64
BAR = 0.15
PARTS = ("weights", "gradients", "optimizer", "moving average", "decode weights", "keys and values")


@dataclass(frozen=True)
class Case:
    """One configuration."""

    zero_stage: int
    offload: str = "none"
    lora_rank: int = 0
    frozen_base: str = "auto"

    @property
    def name(self) -> str:
        """For the table."""
        offload = "" if self.offload == "none" else f", offload {self.offload}"
        lora = f", LoRA {self.lora_rank}, base {self.frozen_base}" if self.lora_rank else ""
        return f"{self.zero_stage}{offload}{lora}"


CASES = (
    *(Case(stage) for stage in range(4)),
    Case(0, offload="optimizer"),
    Case(3, offload="all"),
    Case(3, lora_rank=128, frozen_base="replicated"),
    Case(3, lora_rank=128, frozen_base="sharded"),
)


class Ledger:
    """Resident memory of this process, act by act."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._before = self._resident()

    @staticmethod
    def _resident() -> int:
        gc.collect()
        return_freed_memory(CPU)
        return resident_bytes(CPU)

    def note(self, part: str) -> None:
        """All that has come since the last note is that part's."""
        now = self._resident()
        self.parts[part] = self.parts.get(part, 0) + now - self._before
        self._before = now


def measure(world: World, case: Case, model: str = MODEL) -> dict[str, dict[str, int]]:
    """Bytes of each part on this process, measured and by the formula. Collective."""
    shape = find_shape(model, "model")
    _all_acts(world, case, replace(shape, num_layers=1))
    measured, sizes = _all_acts(world, case, shape)
    return {"measured": measured, "formula": formula(sizes, case, world.size)}


def formula(sizes: ModelSizes, case: Case, ranks: int) -> dict[str, int]:
    """What threefold.plan says of the fullest rank."""
    section = TrainedModelSection(zero_stage=case.zero_stage, offload=case.offload)  # type: ignore[arg-type]
    memory = trained_model_memory(sizes, section, ranks, case.frozen_base == "replicated", average=True)
    sharded = shards_weights(section, ranks)
    return {
        "weights": memory.weights.total,
        # of those of an offloaded optimizer there is a second copy, during the step alone
        "gradients": memory.gradients.device or memory.gradients.host,
        "optimizer": memory.optimizer.total,
        "moving average": memory.average.total,
        "decode weights": decode_bytes(sizes, sharded, 1, torch.float32, on_gpu=False, packed=True),
        "keys and values": key_value_bytes(sizes, ROWS, POSITIONS, 1, torch.float32),
    }


def _all_acts(world: World, case: Case, shape: Shape) -> tuple[dict[str, int], ModelSizes]:
    ledger = Ledger()
    model = random_causal_lm(shape, CPU, seed=1)
    add_lora(model, LoRASection(rank=case.lora_rank), 1, "lora")
    sizes, forward = model_sizes(model), CausalForward(model)
    parallel = ParallelModel(model, world, CPU, case.zero_stage, case.offload == "all", case.frozen_base)
    ledger.note("weights")
    engine = TrainEngine(parallel, OptimizerSection(), 10, CPU, torch.float32, "benchmark", offload=case.offload)
    ledger.note("optimizer")
    ids = torch.arange(TOKENS).view(1, -1) % shape.vocab_size

    def loss() -> torch.Tensor:
        return parallel.run(lambda: model(input_ids=ids, use_cache=False).logits.float().square().mean())

    engine.backward(loss)
    ledger.note("gradients")
    engine.step()
    ledger.note("optimizer")
    ledger.parts["optimizer"] += ledger.parts["gradients"]  # which the step lets go of
    average = ExponentialMovingAverage(model, 0.9)
    ledger.note("moving average")
    _decode(forward, parallel, ledger)
    del average
    return ledger.parts, sizes


def _decode(forward: CausalForward, parallel: ParallelModel, ledger: Ledger) -> None:
    """Switch to generation, and make room for keys and values, which are written everywhere."""
    source = parallel if parallel.sharded else None
    hybrid = HybridEngine(forward, GenerationSection(), CPU, torch.float32, print, source=source)
    with torch.no_grad(), hybrid.generating(ROWS):
        ledger.note("decode weights")
        cache = hybrid.decoder.new_cache(ROWS, POSITIONS)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(1.0)
        ledger.note("keys and values")
        del cache, tensor
    ledger.note("after the rollout")


def run(cases: Sequence[Case], processes: int) -> list[dict[str, Any]]:
    """Every case on processes of its own: its name, and by part the fullest rank's measured bytes and the formula's."""
    results = []
    for case in cases:
        ranks = on_processes(processes, measure, case)
        parts = {
            part: {"measured": max(rank["measured"][part] for rank in ranks), "formula": ranks[0]["formula"][part]}
            for part in PARTS
            if part in ranks[0]["measured"]
        }
        results.append({"case": case.name, "parts": parts})
        print(row_of(results[-1]), flush=True)
    return results


def row_of(result: dict[str, Any]) -> str:
    """One line of the table: MiB measured / by the formula."""
    cells = []
    for part in PARTS:
        if part in result["parts"]:
            pair = result["parts"][part]
            error = pair["measured"] / pair["formula"] - 1
            cells.append(f"{pair['measured'] / 2**20:.1f} / {pair['formula'] / 2**20:.1f} ({error:+.1%})")
        else:
            cells.append("")
    return f"| {result['case']} | " + " | ".join(cells) + " |"


def largest_error(results: Sequence[dict[str, Any]]) -> float:
    """Of all parts of all cases, relative to the formula."""
    pairs = [pair for result in results for pair in result["parts"].values()]
    return max(abs(pair["measured"] / pair["formula"] - 1) for pair in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="file to write the results to")
    arguments = parser.parse_args()
    print(f"{arguments.processes} processes; MiB on the fullest of them, measured / by the formula (difference)\n")
    print("| ZeRO stage | " + " | ".join(PARTS) + " |\n" + "|---" * (len(PARTS) + 1) + "|")
    results = run(CASES, arguments.processes)
    error = largest_error(results)
    print(f"\nlargest difference {error:.1%}, bar {BAR:.0%}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"processes": arguments.processes, "results": results}, file, indent=1)
    return 0 if error <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
