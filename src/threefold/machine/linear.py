"""Matrix products by the fastest float32 kernel of this machine, with torch.nn.functional.linear's meaning.

On x86 processors PyTorch sends a float32 linear layer to MKL, which is slow on processors that are not Intel's, and at
the few rows of a decode step everywhere. oneDNN, which PyTorch ships as well, computes the same float32 product
(benchmarks/matrix_kernels.py measures both). The choice follows from the machine, never from a timing: two runs of a
recipe use the same kernel.
"""

from __future__ import annotations

import platform
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HAS_ONEDNN_LINEAR = bool(
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
SMALLEST_OUTPUT = 16
"""Narrower products (a score head) stay with PyTorch's own choice: there is nothing to win."""


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b with both of its gradients by the same kernel, which takes transposed operands as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = _onednn(grad_rows, weight.t()).view_as(x) if needs_x else None
        grad_weight = _onednn(rows.t(), grad_rows.t()).t() if needs_weight else None
        grad_bias = grad_rows.sum(dim=0) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN_LINEAR
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.shape[0] >= SMALLEST_OUTPUT
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, differentiable once.

    Args:
        x: [..., in], weight: [out, in] (any strides), bias: [out].
    """
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    trained = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if trained and torch.is_grad_enabled():
        return cast(Tensor, _OneDNNLinear.apply(x, weight, bias))
    return _onednn(x, weight, bias)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x W^T + b), without gradients. Not by the kernel's fused form, which turns NaN into 0 and so hides it."""
    return linear(x, weight, bias).relu_()


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x W^T + b in one pass where the machine can; without gradients."""
    if not _suits_onednn(x, weight):
        return residual + F.linear(x, weight, bias)
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add"))


class PackedLinear:
    """A copy of a weight in the kernel's own layout, for many products with few rows each; without gradients.

    Reading it takes about 0.7 of the time that the plain weight takes at the rows of a decode step. It does not follow
    the weight: pack anew after every change.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether this machine has such a layout for the weight."""
        return (
            HAS_ONEDNN_LINEAR
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and weight.shape[0] >= SMALLEST_OUTPUT
        )

    def __call__(self, x: Tensor) -> Tensor:
        return _onednn(x, self._weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """relu(x W^T + b); NaN stays NaN."""
        return _onednn(x, self._weight, self.bias).relu_()

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T + b."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self.bias, "add"))


class RoutedLinear(nn.Linear):
    """torch.nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class RoutedConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is [in, out], by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)


def route_linears(model: nn.Module) -> None:
    """Let every plain linear layer of the model compute by `linear`; parameters, names and files stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoutedLinear
        elif type(module) is Conv1D:
            module.__class__ = RoutedConv1D
