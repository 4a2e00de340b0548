"""The moving average of shards, and in host memory: the plain formula's, to 1e-6, and the model's own weights back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.families_under_test import tiny_causal_lm, tiny_scalar_model
from tests.ranks import run_on_ranks
from threefold.config.recipe import LoRASection
from threefold.engine.distributed import World
from threefold.engine.ema import ExponentialMovingAverage
from threefold.engine.parallel import ParallelModel, local
from threefold.models.adapters import add_lora

CPU, DECAY = torch.device("cpu"), 0.9
CASES = [
    (family, rank, stage, on_host)
    for family, rank in (("opt", 0), ("scalar", 0), ("llama", 2))
    for stage, on_host in ((3, False), (2, True), (0, True))
]


def follow(world: World, family: str, rank: int, stage: int, on_host: bool) -> list[str]:
    """What is wrong with an average over some changes of the weights, if anything. "scalar" has a head of one row, of
    which one process holds nothing."""
    make = tiny_scalar_model if family == "scalar" else tiny_causal_lm
    plain, model = make("llama" if family == "scalar" else family), make("llama" if family == "scalar" else family)
    for one in (plain, model):
        add_lora(one, LoRASection(rank=rank), 0, "a test")
    parallel = ParallelModel(model, world, CPU, stage)
    average = ExponentialMovingAverage(model, DECAY, on_host)
    naive = {name: p.detach().double() for name, p in plain.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                change = 0.1 * torch.randn(parameter.shape, generator=generator)
                if name not in naive:
                    continue
                parameter.add_(change)
                held = model.get_parameter(name)
                if isinstance(held, DTensor):
                    change = (list(change.chunk(world.size)) + [change[:0]] * world.size)[world.rank]
                local(held).add_(change)
                naive[name] = DECAY * naive[name] + (1 - DECAY) * parameter.double()
        average.update(model)

    wrong = []
    tensors = average.tensors(model)
    if tensors.keys() != {f"ema.{name}" for name in naive}:
        wrong.append("names")
    for name, expected in naive.items():
        tensor = tensors[f"ema.{name}"]
        if isinstance(tensor, DTensor) != parallel.sharded or tensor.requires_grad:
            wrong.append(f"{name} is not spread like its weight")
        if not near(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, expected):
            wrong.append(f"the average of {name}")
    own = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    with average.applied_to(model):
        state = parallel.full_state()
        wrong += [f"{name}, applied" for name in naive if world.is_first and not near(state[name], naive[name])]
    wrong += [f"{name} is not back" for name, p in model.named_parameters() if not torch.equal(local(p), own[name])]
    held = sum(weight.numel() for weight in average._weights.values())
    share = held / sum(weight.numel() for weight in naive.values())
    if not (0.4 < share < 0.6 if parallel.sharded else share == 1):
        wrong.append(f"holds {share:.2f} of the average")
    return wrong


def near(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-6, rtol=0)


def follow_all(world: World) -> list[list[str]]:
    return [follow(world, *case) for case in CASES]


def test_each_process_averages_its_shards() -> None:
    assert run_on_ranks(follow_all, 2) == [[[]] * len(CASES)] * 2
