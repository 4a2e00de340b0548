"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from threefold.engine.parallel import like, local


class ExponentialMovingAverage:
    """ema <- decay * ema + (1 - decay) * weight, in float32, once per optimizer step.

    Float32 whatever the model's type: in half precision the update is smaller than a rounding step and the average
    stands still. Weights that are tied in the model are kept once. Only what is trainable when the average is made is
    averaged: the average of a frozen weight is that weight. Of a sharded model each process averages its shards.

    Args:
        on_host: keep the average in host memory.
    """

    def __init__(self, model: nn.Module, decay: float, on_host: bool = False) -> None:
        self.decay = decay
        self._weights: dict[str, Tensor] = {
            name: local(parameter.detach()).to("cpu" if on_host else local(parameter).device, torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        for name, parameter in self._averaged(model):
            average = self._weights[name]
            average.lerp_(local(parameter.detach()).to(average.device, torch.float32), 1.0 - self.decay)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The average, sharded like the model, by parameter; live."""
        return {f"ema.{name}": like(parameter, self._weights[name]) for name, parameter in self._averaged(model)}

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model for the time of the block; afterwards the model's own weights are back, bit
        for bit."""
        own = {name: local(parameter.detach()).clone() for name, parameter in self._averaged(model)}
        try:
            self._write(model, self._weights)
            yield
        finally:
            self._write(model, own)

    def _averaged(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in model.named_parameters() if name in self._weights]

    @torch.no_grad()
    def _write(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._averaged(model):
            local(parameter.detach()).copy_(weights[name])
