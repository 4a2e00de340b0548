"""One model in training: forward and backward of micro-batches under the chosen precision, then one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from threefold.config.recipe import OptimizerSection
from threefold.engine.device import precision
from threefold.engine.ema import ExponentialMovingAverage
from threefold.engine.optim import build_optimizer
from threefold.errors import TrainingError

Item = TypeVar("Item")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did: the loss it descended, the gradient's norm before clipping, the learning rate
    used."""

    loss: float
    grad_norm: float
    learning_rate: float


def micro_batches(items: Sequence[Item], micro_batch_size: int) -> list[Sequence[Item]]:
    """Cut a batch into micro-batches of at most this many items; 0 means one piece."""
    size = micro_batch_size or max(len(items), 1)
    return [items[start : start + size] for start in range(0, len(items), size)]


class TrainEngine:
    """A model, its optimizer and schedule, and, where asked for, its moving average.

    `backward` is called for each micro-batch with a closure that returns its share of the loss, already divided by
    the *global* count of the optimizer step; `step` then clips, checks and steps. Nothing here knows which loss it
    is.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSection,
        total_steps: int,
        device: torch.device,
        dtype: torch.dtype,
        what: str,
        ema_decay: float | None = None,
    ) -> None:
        self.model = model
        self.num_steps = 0
        self.ema = ExponentialMovingAverage(model, ema_decay) if ema_decay is not None else None
        self._device, self._dtype, self._what = device, dtype, what
        self._grad_clip = settings.grad_clip
        self._optimizer, self._scheduler = build_optimizer(model, settings, max(total_steps, 1))
        self._loss = 0.0

    def backward(self, loss_of: Callable[[], Tensor]) -> float:
        """Run the closure under the engine's precision and accumulate its gradient; return the closure's loss."""
        with precision(self._device, self._dtype):
            loss = loss_of()
        loss.backward()
        value = float(loss.detach())
        self._loss += value
        return value

    def measure(self, loss_of: Callable[[], Tensor]) -> None:
        """Run the closure for its side effects (statistics), without a gradient."""
        with torch.no_grad(), precision(self._device, self._dtype):
            loss_of()

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._loss = 0.0

    def step(self) -> StepResult:
        """Clip the gradient, take one optimizer step, advance the schedule, update the average.

        Raises:
            TrainingError: if the loss or the gradient's norm is not finite; the weights are then still those of the
                step before.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        max_norm = self._grad_clip if self._grad_clip > 0 else math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        loss, self._loss = self._loss, 0.0
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"{self._what}, optimizer step {self.num_steps + 1}: loss {loss:g}, gradient norm {grad_norm:g}; "
                "stopped before the step. Lower the learning rate, or look for damaged rows in the data"
            )
        learning_rate = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        self.num_steps += 1
        if self.ema is not None:
            self.ema.update(self.model)
        return StepResult(loss, grad_norm, learning_rate)
