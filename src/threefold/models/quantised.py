"""Frozen matrices in 4 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023, section 3).

A matrix is cut into blocks of 64 numbers as they lie in memory. Each block keeps its largest absolute value, and of
each number which of 16 levels, quantiles of a normal distribution, is nearest to the number divided by that value
(NF4). The absolute values of 256 blocks together are kept in 8 bits in the same manner, less their mean ("double
quantisation"): 4 + 8 / 64 + 32 / (64 * 256) bits a number in all. For a product, forward or backward, the matrix is put
together again and let go afterwards (equation 5).

Of bitsandbytes only the two conversions are used, not its layers: those round biases in place, lay their weights out
anew on some processors, and would be other layers to peft. A matrix is given to it as one row: on a CPU (0.50.2) it
gets some shapes wrong whose rows are no whole number of blocks, [32, 48] for one.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from threefold.errors import ConfigError
from threefold.machine.linear import linear

BLOCK_SIZE, SCALES_BLOCK_SIZE = 64, 256


@functools.cache
def _bitsandbytes() -> Any:
    """Its functions; it is an extra."""
    return importlib.import_module("bitsandbytes.functional")


def check_quantisation(field: str) -> None:
    """Raise ConfigError where bitsandbytes is missing. `field`: the LoRA section's dotted path in the recipe."""
    try:
        _bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f'{field}.quantise_base = "nf4" needs bitsandbytes, which is not installed ({error}); '
            'run: pip install "threefold[qlora]", or set it to "none"'
        ) from error


class QuantisedLinear(nn.Linear):
    """torch.nn.Linear whose `weight` is packed: uint8 [in * out / 2, 1], two numbers a byte; `quantise` makes it."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(input, self))


class QuantisedConv1D(Conv1D):
    """GPT-2's linear layer, [in, out], likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self))


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, QuantisedLinear | QuantisedConv1D)


def has_packed(model: nn.Module) -> bool:
    """Whether a matrix of the model is packed."""
    return any(is_quantised(module) for module in model.modules())


@torch.no_grad()
def quantise(layer: nn.Module) -> None:
    """Pack a linear layer's weight, in place and for good; it can be trained no more.

    Its blocks' largest values become buffers: they go to another device, and into a state dict, with the weight.
    """
    assert isinstance(layer, nn.Linear | Conv1D)
    assert not is_quantised(layer), "the weight is packed already"
    weight = cast(Tensor, layer.weight)
    packed, state = _bitsandbytes().quantize_4bit(
        weight.float().reshape(1, -1), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    layer.register_buffer("scales", state.absmax)
    layer.register_buffer("scales_of_scales", state.state2.absmax)
    layer.register_buffer("levels_of_scales", state.state2.code)
    layer.register_buffer("mean_scale", state.offset)
    cast(Any, layer).full_shape = tuple(weight.shape)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.__class__ = QuantisedConv1D if isinstance(layer, Conv1D) else QuantisedLinear


@torch.no_grad()
def dequantised(layer: Any, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """The matrix that a packed weight stands for, a new tensor laid out as the layer's own was.

    Args:
        packed: the whole packed weight, where the layer has a shard of it.
    """
    library = _bitsandbytes()
    scales = library.QuantState(
        absmax=layer.scales_of_scales,
        code=layer.levels_of_scales,
        blocksize=SCALES_BLOCK_SIZE,
        dtype=torch.float32,
    )
    state = library.QuantState(
        absmax=layer.scales,
        shape=torch.Size((1, math.prod(layer.full_shape))),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        offset=layer.mean_scale,
        state2=scales,
    )
    row: Tensor = library.dequantize_4bit(layer.weight.detach() if packed is None else packed, state)
    return row.view(layer.full_shape)


class _Product(torch.autograd.Function):
    """x W^T + b, differentiable once and by x alone. Between forward and backward nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return linear(x.to(dtype), _by_outputs(layer, dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return linear(grad, _by_outputs(ctx.layer, grad.dtype).t()).to(ctx.dtype), None


def _by_outputs(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix as [out, in]."""
    matrix = dequantised(layer, dtype)
    return matrix.t() if isinstance(layer, Conv1D) else matrix
