"""The machine's matrix kernel against torch's own layer in double precision, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from threefold.machine.linear import (
    HAS_ONEDNN_LINEAR,
    PackedLinear,
    linear,
    linear_add,
    linear_relu,
    route_linears,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def operands(shape: tuple[int, ...], width: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    weight = torch.randn(width, shape[-1], generator=generator) / shape[-1] ** 0.5
    return x, weight, torch.randn(width, generator=generator) if bias else None


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (2, 1, 24), (0, 24)])
@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_double_precision_layer(
    shape: tuple[int, ...], width: int, bias: bool
) -> None:
    inputs = operands(shape, width, bias)
    single = [None if t is None else t.clone().requires_grad_() for t in inputs]
    double = [None if t is None else t.double().requires_grad_() for t in inputs]
    ours, exact = linear(*single), F.linear(*double)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(upstream)
    exact.backward(upstream.double())
    torch.testing.assert_close(ours, exact.float(), **TOLERANCE)
    for mine, reference in zip(single, double, strict=True):
        if mine is not None and reference is not None:
            torch.testing.assert_close(mine.grad, reference.grad.float(), **TOLERANCE)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    tensors = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate(operands((6, 32), 24, True))]
    linear(*tensors).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [index == frozen for index in range(3)]


def test_fused_and_packed_forms_equal_the_plain_one() -> None:
    for rows in (1, 4, 8, 33):
        x, weight, bias = operands((rows, 48), 64, True)
        residual = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))
        exact = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(linear_relu(x, weight, bias), exact.relu().float(), **TOLERANCE)
        torch.testing.assert_close(linear_add(x, weight, bias, residual), (exact + residual).float(), **TOLERANCE)
        if PackedLinear.suits(weight):
            packed = PackedLinear(weight, bias, 8)
            torch.testing.assert_close(packed(x), exact.float(), **TOLERANCE)
            torch.testing.assert_close(packed.relu(x), exact.relu().float(), **TOLERANCE)
            torch.testing.assert_close(packed.add(x, residual), (exact + residual).float(), **TOLERANCE)


def test_what_is_not_a_number_is_not_hidden() -> None:
    x, weight, bias = operands((4, 32), 32, True)
    weight[3, 5] = torch.nan
    results = [linear(x, weight, bias), linear_relu(x, weight, bias), linear_add(x, weight, bias, torch.zeros(4, 32))]
    if PackedLinear.suits(weight):
        packed = PackedLinear(weight, bias, 4)
        results += [packed(x), packed.relu(x), packed.add(x, torch.zeros(4, 32))]
    for result in results:
        assert bool(result[:, 3].isnan().all())
        assert bool(result[:, :3].isfinite().all())


@pytest.mark.skipif(not HAS_ONEDNN_LINEAR, reason="this machine has no packed layout")
def test_a_packed_weight_is_a_copy() -> None:
    x, weight, _ = operands((3, 32), 32, False)
    packed = PackedLinear(weight, None, 3)
    before = packed(x).clone()
    weight.zero_()
    assert torch.equal(packed(x), before)


def test_routing_keeps_names_and_values_and_saves_the_same() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), Conv1D(20, 32), nn.Linear(20, 1))
    routed = copy.deepcopy(plain)
    route_linears(routed)
    x = torch.randn(5, 24)
    torch.testing.assert_close(routed(x), plain(x), **TOLERANCE)
    assert [name for name, _ in routed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(routed[0], nn.Linear)
    assert isinstance(routed[2], Conv1D)
    for module in (plain, routed):
        module(x).sum().backward()
    for mine, reference in zip(routed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, **TOLERANCE)


def test_other_types_keep_their_type() -> None:
    x, weight, bias = operands((4, 32), 24, True)
    assert linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
