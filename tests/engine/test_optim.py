"""Parameter groups, and learning-rate schedules against their formulas worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.models.families_under_test import CONFIGS, tiny_causal_lm
from threefold.config.recipe import OptimizerSection
from threefold.engine.optim import build_optimizer


def rates(settings: OptimizerSection, total_steps: int) -> list[float]:
    """The learning rate of each step, and the one that would be next."""
    optimizer, scheduler = build_optimizer(torch.nn.Linear(2, 2), settings, total_steps)
    found = []
    for _ in range(total_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*found, scheduler.get_last_lr()[0]]


@pytest.mark.parametrize("family", CONFIGS)
def test_only_matrices_decay(family: str) -> None:
    model = tiny_causal_lm(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    optimizer, _ = build_optimizer(model, OptimizerSection(weight_decay=0.1), 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        [
            names[id(p)]
            for group in optimizer.param_groups
            if bool(group["weight_decay"]) == decays
            for p in group["params"]
        ]
        for decays in (True, False)
    )
    # Every trainable weight once, a tied one too.
    assert sorted(decayed + others) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    is_vector = {name: "norm" in name or "ln_" in name or name.endswith("bias") for name in names.values()}
    assert not any(is_vector[name] for name in decayed)
    assert all(is_vector[name] for name in others)


def test_decay_takes_its_share_of_a_matrix_and_nothing_of_a_bias() -> None:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.bias)
    weight = model.weight.detach().clone()
    optimizer, _ = build_optimizer(
        model, OptimizerSection(learning_rate=0.5, weight_decay=0.1, scheduler="constant"), 10
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.5 * 0.1), atol=1e-7, rtol=0)
    assert torch.equal(model.bias.detach(), torch.ones(2))


def test_a_model_without_vectors_or_without_matrices() -> None:
    for model in (torch.nn.Linear(2, 2, bias=False), torch.nn.LayerNorm(3)):
        optimizer, _ = build_optimizer(model, OptimizerSection(weight_decay=0.1), 10)
        assert len(optimizer.param_groups) == 1


def test_betas_are_those_of_the_recipe() -> None:
    optimizer, _ = build_optimizer(torch.nn.Linear(2, 2), OptimizerSection(betas=(0.8, 0.85)), 10)
    assert all(group["betas"] == (0.8, 0.85) for group in optimizer.param_groups)


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_schedule_from_end_to_end(scheduler: str, warmup_steps: int) -> None:
    settings = OptimizerSection(learning_rate=2.0, scheduler=scheduler, warmup_steps=warmup_steps)
    shapes = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "constant_with_warmup": lambda done: 1.0,
    }
    expected = [
        2.0
        * (
            step / warmup_steps
            if step < warmup_steps
            else shapes[scheduler]((step - warmup_steps) / (20 - warmup_steps))
        )
        for step in range(21)
    ]
    assert rates(settings, 20) == pytest.approx(expected, abs=1e-12)
    assert max(expected) == 2.0


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_decaying_schedule_goes_from_the_peak_to_zero(scheduler: str) -> None:
    found = rates(OptimizerSection(learning_rate=0.1, scheduler=scheduler), 15)
    assert found[0] == 0.1
    assert 0 < found[14] < 0.02  # the last step still learns
    assert found[15] == pytest.approx(0.0, abs=1e-6)
    assert all(one >= next_one for one, next_one in itertools.pairwise(found))


def test_constant_has_no_warmup() -> None:
    assert rates(OptimizerSection(learning_rate=0.1, scheduler="constant", warmup_steps=3), 5) == [0.1] * 6


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_warmup_longer_than_the_stage_is_cut_to_it(scheduler: str) -> None:
    found = rates(OptimizerSection(learning_rate=1.0, scheduler=scheduler, warmup_steps=100), 4)
    assert found[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])
