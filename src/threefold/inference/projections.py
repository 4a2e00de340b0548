"""The decoder's matrices: references to the parameters that train, low-rank adapters too, or packed images of them.

A matrix is read from its module each time the decoder binds its weights, so nothing here outlives a change of the
modules. `Matrix` refers to the parameters; `pack_matrices` copies several of them, adapters merged, into one image that
a decode step reads faster. The parameters are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from threefold.inference.families import NotCoveredError
from threefold.machine.linear import PackedLinear, linear, linear_add, linear_relu
from threefold.models.quantised import dequantised, is_quantised

Map = Callable[[Tensor], Tensor]


class Projection(Protocol):
    """x W^T + b, alone or fused with what follows it."""

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""

    def relu(self, x: Tensor) -> Tensor:
        """relu of it."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus it."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank update scale * B A of a weight (Hu et al. 2021): down is A [r, in], up is B [out, r]."""

    down: Tensor
    up: Tensor
    up_bias: Tensor | None
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return linear(linear(x.to(self.down.dtype), self.down), self.up, self.up_bias) * self.scale


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] and bias of the model that trains, by reference, with the adapters that are on."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()

    def projection(self) -> Projection:
        """How to multiply with it."""
        return AdaptedProjection(self) if self.adapters else PlainProjection(self.weight, self.bias)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the adapters added: new tensors where there are any."""
        weight, bias = self.weight, self.bias
        for adapter in self.adapters:
            weight = torch.addmm(
                weight, adapter.up.to(weight.dtype), adapter.down.to(weight.dtype), alpha=adapter.scale
            )
            if adapter.up_bias is not None:
                scaled = adapter.up_bias * adapter.scale
                bias = scaled if bias is None else bias + scaled
        return weight, bias

    def tensors(self) -> list[Tensor]:
        """Every parameter that the product depends on."""
        pieces = [t for adapter in self.adapters for t in (adapter.down, adapter.up, adapter.up_bias)]
        return [t for t in (self.weight, self.bias, *pieces) if t is not None]


class PlainProjection:
    """A weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def relu(self, x: Tensor) -> Tensor:
        return linear_relu(x, self._weight, self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return linear_add(x, self._weight, self._bias, residual)


class AdaptedProjection:
    """A weight and its adapters, unmerged."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self._matrix.weight, self._matrix.bias)
        for adapter in self._matrix.adapters:
            y = y + adapter(x)
        return y

    def relu(self, x: Tensor) -> Tensor:
        return self(x).relu_()

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class PackedProjection:
    """An image in the layout of this CPU's kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        packed = PackedLinear(weight, bias, rows)
        self.relu, self.add = packed.relu, packed.add
        self._packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        return self._packed(x.float())  # what comes from outside the blocks may be of autocast's type


class DenseImage:
    """A copy of a weight, in the decoder's dtype, at an address that stays: `write` refreshes it in place, so that a
    recorded CUDA graph that reads it stays valid over optimizer steps."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self._weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self._bias = None if bias is None else torch.empty(bias.shape, dtype=dtype, device=weight.device)

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy new values into it."""
        self._weight.copy_(weight)
        if self._bias is not None:
            assert bias is not None
            self._bias.copy_(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias)

    def relu(self, x: Tensor) -> Tensor:
        return self(x).relu_()

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


def joined(matrices: Sequence[Matrix], order: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Adapters merged, stacked along the output features, these then taken in `order` (None: as they are)."""
    weights, biases = zip(*(matrix.merged() for matrix in matrices), strict=True)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if any(b is not None for b in biases):
        parts = [weights[i].new_zeros(len(weights[i])) if b is None else b for i, b in enumerate(biases)]
        bias = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return weight, bias


def read_matrix(module: nn.Module, name: str) -> Matrix:
    """A linear module's matrix, be it torch's, transformers' Conv1D (stored [in, out]) or one that peft wrapped.

    A wrapped module is known by its attributes: base_layer, lora_A, lora_B, scaling, active_adapters, disable_adapters,
    merged. A matrix that is packed in 4 bits is read as a new tensor, for who copies it on.

    Raises:
        NotCoveredError: another kind of module, a weight quantised in another way, or a variant of LoRA.
    """
    if hasattr(module, "base_layer"):
        base = read_matrix(module.base_layer, name)  # type: ignore[arg-type]
        return Matrix(base.weight, base.bias, base.adapters + _active_adapters(module, name))
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise NotCoveredError(f"{name} is a {type(module).__name__}")
    if is_quantised(module):
        weight = _put_together(module)
    if not weight.is_floating_point():
        raise NotCoveredError(f"{name} has a weight of {weight.dtype}")
    return Matrix(weight.t() if isinstance(module, Conv1D) else weight, bias)


def _put_together(module: Any) -> Tensor:
    """A packed matrix, of which a shard tells no more than the shape of the whole."""
    if isinstance(module.weight, DTensor):
        return torch.empty(module.full_shape, device="meta")
    return dequantised(module, torch.float32)


def _active_adapters(module: Any, name: str) -> tuple[Adapter, ...]:
    if not hasattr(module, "lora_A"):
        raise NotCoveredError(f"{name} is a {type(module).__name__}")
    if module.disable_adapters or module.merged:  # merged: the base weight holds the update already
        if module.disable_adapters and module.merged:
            raise NotCoveredError(f"{name} has its adapters disabled while they are merged")
        return ()
    adapters = []
    for key in module.active_adapters:
        if key not in module.lora_A:
            continue
        if getattr(module, "use_dora", {}).get(key) or key in getattr(module, "lora_variant", {}):
            raise NotCoveredError(f"{name} has an adapter of a variant of LoRA")
        up = module.lora_B[key]
        adapters.append(Adapter(module.lora_A[key].weight, up.weight, up.bias, float(module.scaling[key])))
    return tuple(adapters)


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension: torch's LayerNorm, or transformers' RMSNorm (which has no bias).

    Attributes:
        weight, bias: [D], by reference; a LayerNorm may have none.
    """

    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    is_rms: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_rms:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        assert self.weight is not None
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.shape, None, self.eps).to(x.dtype)

    def tensors(self) -> list[Tensor]:
        """Its parameters."""
        return [t for t in (self.weight, self.bias) if t is not None]


def read_norm(module: nn.Module, name: str) -> Norm:
    """A module's norm, by reference.

    Raises:
        NotCoveredError: another kind of module.
    """
    if isinstance(module, nn.LayerNorm):
        return Norm(tuple(module.normalized_shape), module.weight, module.bias, module.eps)
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return Norm((len(weight),), weight, None, cast(float, module.variance_epsilon), is_rms=True)
    raise NotCoveredError(f"{name} is a {type(module).__name__}")
