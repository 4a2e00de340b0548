"""Every family's gradients from gathered weights, with its activations kept and computed again, as from whole weights.

What a family's own code does between its blocks (views, in-place sums, inputs of several blocks) must not come between
FSDP and the backward pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.families_under_test import CONFIGS, VARIANTS, ragged_ids, tiny_causal_lm
from tests.ranks import run_on_ranks
from threefold.engine.distributed import ALONE, World
from threefold.engine.parallel import ParallelModel
from threefold.models.forward import CausalForward
from threefold.models.loading import set_dropout, use_fast_kernels

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def gradients(world: World, family: str, stage: int, recomputed: bool) -> Gradients:
    """Of four sequences' mean log-probability, in two passes; each process has its half of them."""
    model = use_fast_kernels(tiny_causal_lm(family))
    set_dropout(model, 0.0)
    forward = CausalForward(model)
    parallel = ParallelModel(model, world, CPU, stage)
    forward.run_by(parallel.run)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids = torch.tensor(ragged_ids(1, [12, 12, 12, 12])).tensor_split(world.size)[world.rank]
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    for _ in range(2):
        (forward.target_logprobs(ids, targets, entropy="none")[0].sum() / 88).backward()
    parallel.sum_gradients()
    found = {name: parameter.grad for name, parameter in parallel.trained.items() if parameter.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


def of_families(world: World, families: list[str]) -> dict[tuple[str, int, bool], Gradients]:
    return {
        (family, stage, recomputed): gradients(world, family, stage, recomputed)
        for family in families
        for stage, recomputed in ((2, False), (3, True))
    }


@pytest.mark.parametrize("families", [list(CONFIGS), pytest.param(list(VARIANTS), marks=pytest.mark.slow)])
def test_gradients_of_gathered_weights(families: list[str]) -> None:
    whole = {family: gradients(ALONE, family, 0, False) for family in families}
    for found in run_on_ranks(of_families, 2, families):
        for (family, _, _), ours in found.items():
            assert ours.keys() == whole[family].keys()
            for name, gradient in whole[family].items():
                torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
