"""One model in training: forward and backward of micro-batches under the chosen precision, then one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.config.recipe import OptimizerSection
from threefold.engine.device import precision
from threefold.engine.ema import ExponentialMovingAverage
from threefold.engine.optim import build_optimizer
from threefold.errors import ConfigError, NonFiniteError

Item = TypeVar("Item")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did: the loss it descended, the gradient's norm before clipping, the learning rate
    used."""

    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class MicroBatching:
    """How a batch is cut into forward passes: sequences of like length together, so that little of a pass is padding.

    Attributes:
        max_sequences: in one pass; 0 is no limit.
        max_tokens: in one pass, padding included; 0 is no limit. A longer sequence passes alone.
    """

    max_sequences: int = 0
    max_tokens: int = 0

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of each pass, longest sequences first; every index once. Equal lengths keep their order."""
        passes: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[passes[-1][0]] if passes else 0
            size = len(passes[-1]) + 1 if passes else 0
            full = (self.max_sequences and size > self.max_sequences) or (
                self.max_tokens and size * longest > self.max_tokens
            )
            if not passes or full:
                passes.append([])
            passes[-1].append(index)
        return passes

    def of(self, items: Sequence[Item], length_of: Callable[[Item], int]) -> list[list[Item]]:
        """The items of each pass."""
        return [[items[index] for index in part] for part in self.cut([length_of(item) for item in items])]


AUTO_MICRO_BATCH_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""On a CPU the activations of a pass should stay in the cache; a GPU needs long passes to be busy."""


def micro_batching(max_sequences: int, max_tokens: int, device: torch.device) -> MicroBatching:
    """The recipe's micro_batch_size and micro_batch_tokens, 0 tokens standing for what suits the device."""
    return MicroBatching(max_sequences, max_tokens or AUTO_MICRO_BATCH_TOKENS.get(device.type, 4096))


def check_checkpointing(model: PreTrainedModel) -> None:
    """Refuse a model whose activations transformers cannot compute again."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"ppo.gradient_checkpointing: {type(model).__name__} cannot do without its activations in transformers; "
            "set it to false"
        )


class TrainEngine:
    """A model, its optimizer and schedule, and, where asked for, its moving average.

    `backward` is called for each micro-batch with a closure that returns its share of the loss, already divided by
    the *global* count of the optimizer step; `step` then clips, checks and steps. Nothing here knows which loss it
    is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OptimizerSection,
        total_steps: int,
        device: torch.device,
        dtype: torch.dtype,
        what: str,
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.num_steps = 0
        self.ema = ExponentialMovingAverage(model, ema_decay) if ema_decay is not None else None
        self._device, self._dtype, self._what = device, dtype, what
        self._grad_clip = settings.grad_clip
        self._optimizer, self._scheduler = build_optimizer(model, settings, max(total_steps, 1))
        self._loss = 0.0
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            check_checkpointing(model)
            # the name changed within transformers 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def backward(self, loss_of: Callable[[], Tensor]) -> float:
        """Run the closure under the engine's precision and accumulate its gradient; return the closure's loss."""
        training = self.model.training
        # transformers checkpoints blocks in training mode only; with dropout at 0 the mode makes no other difference
        self.model.train(training or self._checkpointing)
        with precision(self._device, self._dtype):
            loss = loss_of()
        loss.backward()
        self.model.train(training)
        value = float(loss.detach())
        self._loss += value
        return value

    def measure(self, loss_of: Callable[[], Tensor]) -> None:
        """Run the closure for its side effects (statistics), without a gradient."""
        with torch.no_grad(), precision(self._device, self._dtype):
            loss_of()

    @contextmanager
    def optimizer_in_host_memory(self) -> Iterator[None]:
        """For the time of the block, which must not step, the optimizer's state is in host memory."""
        self._move_optimizer_state(torch.device("cpu"))
        try:
            yield
        finally:
            self._move_optimizer_state(self._device)

    def _move_optimizer_state(self, device: torch.device) -> None:
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # the count of steps stays where the optimizer put it
                    state[name] = _moved(value, device)

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._loss = 0.0

    def step(self) -> StepResult:
        """Clip the gradient, take one optimizer step, advance the schedule, update the average.

        Raises:
            NonFiniteError: if the loss or the gradient's norm is not finite; the weights are then still those of the
                step before.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        max_norm = self._grad_clip if self._grad_clip > 0 else math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        loss, self._loss = self._loss, 0.0
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(
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


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device. On the host of a GPU it is in page-locked memory, with which copies are fast and in
    the order of the stream's other work: it is not to be read there before the stream has got so far."""
    if tensor.device.type == "cuda" and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=device.type == "cuda")
