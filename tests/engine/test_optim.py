"""Parameter groups, learning-rate schedules against their formulas worked out by hand, and AdamW in host memory, whose
steps are bit for bit those of AdamW. (tests/engine/test_train_sharded.py has both over processes.)"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tests.models.families_under_test import CONFIGS, tiny_causal_lm
from threefold.config.recipe import OptimizerSection
from threefold.engine.distributed import ALONE
from threefold.engine.optim import HostAdamW, after_loading, build_optimizer, make_state, state_of, state_tensors
from threefold.engine.parallel import ParallelModel
from threefold.engine.train import TrainEngine

CPU = torch.device("cpu")


def build(model: Any, settings: OptimizerSection, total_steps: int) -> tuple[Optimizer, LRScheduler]:
    """Of a model that one process holds whole."""
    return build_optimizer(ParallelModel(model, ALONE, CPU), settings, total_steps)


def rates(settings: OptimizerSection, total_steps: int) -> list[float]:
    """The learning rate of each step, and the one that would be next."""
    optimizer, scheduler = build(torch.nn.Linear(2, 2), settings, total_steps)
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
    optimizer, _ = build(model, OptimizerSection(weight_decay=0.1), 10)
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
    optimizer, _ = build(model, OptimizerSection(learning_rate=0.5, weight_decay=0.1, scheduler="constant"), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.5 * 0.1), atol=1e-7, rtol=0)
    assert torch.equal(model.bias.detach(), torch.ones(2))


def test_a_model_without_vectors_or_without_matrices() -> None:
    for model in (torch.nn.Linear(2, 2, bias=False), torch.nn.LayerNorm(3)):
        optimizer, _ = build(model, OptimizerSection(weight_decay=0.1), 10)
        assert len(optimizer.param_groups) == 1


def test_betas_are_those_of_the_recipe() -> None:
    optimizer, _ = build(torch.nn.Linear(2, 2), OptimizerSection(betas=(0.8, 0.85)), 10)
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


# -------------------------------------------------------------------------------------------- a state in host memory


def steps_of(offload: str, clip: float, scheduler: str) -> tuple[list[Any], dict[str, Tensor]]:
    """Five steps of a small model with a frozen weight, and one that has a gradient in some steps only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    settings = OptimizerSection(
        learning_rate=0.1, weight_decay=0.2, grad_clip=clip, scheduler=scheduler, warmup_steps=2
    )
    engine = TrainEngine(model, settings, 6, CPU, torch.float32, "a test", offload=offload)
    results = []
    for step in range(5):
        inputs = torch.linspace(-1, 2, 10 + 5 * step).view(-1, 5)
        layers = model if step % 2 else model[:3]
        engine.backward(lambda inputs=inputs, layers=layers: layers(inputs).square().sum())  # type: ignore[misc]
        with engine.optimizer_in_host_memory():
            pass
        results.append(engine.step())
    return results, {name: tensor.clone() for name, tensor in engine.state_tensors().items()}


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_adamw_in_host_memory_takes_the_steps_of_adamw(clip: float, scheduler: str) -> None:
    """Bit for bit: weights, moments, counts of steps; also of what has a gradient now and then."""
    expected, found = steps_of("none", clip, scheduler), steps_of("optimizer", clip, scheduler)
    assert found[0] == expected[0]
    assert max(step.grad_norm for step in found[0]) > 0.5
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name
    counts = {name: int(tensor) for name, tensor in found[1].items() if name.endswith(".step")}
    assert counts["optimizer.0.weight.step"] == 5
    assert counts["optimizer.3.weight.step"] == 2
    assert "optimizer.0.bias.step" not in counts


def test_adamw_in_host_memory_keeps_nothing_of_the_gradients() -> None:
    model = nn.Linear(3, 2)
    optimizer = HostAdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all(copy.grad is None for copy in optimizer._copies.values())
    assert all(copy.device == CPU for copy in optimizer._copies.values())
    assert all(copy.data_ptr() != parameter.data_ptr() for parameter, copy in optimizer._copies.items())
    assert [part.shape for part in optimizer.state_of(model.weight).values()] == [(), (2, 3), (2, 3)]


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_weights_that_are_written_to_are_what_the_next_step_starts_from(offload: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    settings = OptimizerSection(learning_rate=0.5, weight_decay=0.0, scheduler="constant")
    optimizer, _ = build_optimizer(ParallelModel(cast(Any, model), ALONE, CPU), settings, 10, offload)
    with torch.no_grad():
        model.weight.fill_(7.0)
    after_loading(optimizer)
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), 6.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_room_is_made_for_the_state_that_is_there(offload: str) -> None:
    """Zeros, of what a checkpoint has; a weight that had no step yet has no state either."""
    model = nn.Linear(3, 2)
    optimizer, _ = build_optimizer(ParallelModel(cast(Any, model), ALONE, CPU), OptimizerSection(), 10, offload)
    names = {model.weight: "weight", model.bias: "bias"}
    assert state_tensors(optimizer, names) == {}
    make_state(optimizer, names, ["optimizer.weight.exp_avg", "optimizer.weight.step", "something.else"])
    room = state_tensors(optimizer, names)
    assert {name: tuple(tensor.shape) for name, tensor in room.items()} == {
        "optimizer.weight.step": (),
        "optimizer.weight.exp_avg": (2, 3),
        "optimizer.weight.exp_avg_sq": (2, 3),
    }
    assert not any(bool(tensor.any()) for tensor in room.values())
    room["optimizer.weight.exp_avg"].fill_(3.0)
    assert bool((state_of(optimizer, model.weight)["exp_avg"] == 3.0).all()), "it is the state itself"
