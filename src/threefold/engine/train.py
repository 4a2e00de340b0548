"""One model in training: forward and backward of micro-batches under the chosen precision, then one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.config.recipe import OptimizerSection
from threefold.engine.device import precision
from threefold.engine.distributed import ALONE
from threefold.engine.ema import ExponentialMovingAverage
from threefold.engine.optim import (
    HostAdamW,
    after_loading,
    build_optimizer,
    inner_optimizer,
    make_state,
    owned,
    state_of,
    state_tensors,
)
from threefold.engine.parallel import ParallelModel, like, local
from threefold.errors import ConfigError, NonFiniteError


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did: the loss it descended, the gradient's norm before clipping, the learning rate
    used."""

    loss: float
    grad_norm: float
    learning_rate: float


def check_checkpointing(model: PreTrainedModel) -> None:
    """Refuse a model whose activations transformers cannot compute again."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} cannot do without its activations in transformers; "
            "set it to false"
        )


class TrainEngine:
    """A model, its optimizer and schedule, and, where asked for, its moving average.

    `backward` is called for each micro-batch with a closure that returns its share of the loss, already divided by
    the *global* count of the optimizer step; `step` then adds up what the processes have, clips, checks and steps.
    Nothing here knows which loss it is.

    Args:
        model: spread over the processes, or a plain one, for a single process.
        offload: of the optimizer, as in the recipe.
    """

    def __init__(
        self,
        model: PreTrainedModel | ParallelModel,
        settings: OptimizerSection,
        total_steps: int,
        device: torch.device,
        dtype: torch.dtype,
        what: str,
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
        offload: str = "none",
        ema_on_host: bool = False,
    ) -> None:
        self.parallel = model if isinstance(model, ParallelModel) else ParallelModel(model, ALONE, device)
        self.model = self.parallel.model
        self.num_steps = 0
        self.ema = ExponentialMovingAverage(self.model, ema_decay, ema_on_host) if ema_decay is not None else None
        self._device, self._dtype, self._what = device, dtype, what
        self._grad_clip = settings.grad_clip
        self._optimizer, self._scheduler = build_optimizer(self.parallel, settings, max(total_steps, 1), offload)
        self._loss = 0.0
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            check_checkpointing(self.model)
            # the name changed within transformers 5
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def backward(self, loss_of: Callable[[], Tensor], counts: bool = True) -> float:
        """Run the closure under the engine's precision and accumulate its gradient; return the closure's loss.

        Args:
            counts: False runs it only to keep other processes company: the gradient is zero, and so is the loss.
        """
        training = self.model.training
        # transformers checkpoints blocks in training mode only; with dropout at 0 the mode makes no other difference
        self.model.train(training or self._checkpointing)
        with precision(self._device, self._dtype):
            loss = loss_of() if counts else loss_of() * 0.0
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
        self._move_optimizer_state(to_host=True)
        try:
            yield
        finally:
            self._move_optimizer_state(to_host=False)

    def _move_optimizer_state(self, to_host: bool) -> None:
        if isinstance(inner_optimizer(self._optimizer), HostAdamW):
            return  # it never leaves
        for parameter in owned(self._optimizer):
            state = state_of(self._optimizer, parameter)
            # back to the parameter, which may be in host memory itself
            device = torch.device("cpu") if to_host else local(parameter).device
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # the count of steps stays where the optimizer put it
                    state[name] = like(parameter, _moved(local(value), device))

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
        self.parallel.sum_gradients()
        grad_norm = self.parallel.clip_gradients(self._grad_clip if self._grad_clip > 0 else math.inf)
        [loss], self._loss = self.parallel.world.sum([self._loss]), 0.0
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

    # ------------------------------------------------------------------------------------------------ exact resume

    def state_tensors(self) -> dict[str, Tensor]:
        """All that training changes, live, under names that do not depend on how it is spread: the trained weights, the
        optimizer's state (of what this process steps), the average."""
        names = {parameter: name for name, parameter in self.parallel.trained.items()}
        weights = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
        average = {} if self.ema is None else self.ema.tensors(self.model)
        return weights | state_tensors(self._optimizer, names) | average

    def state_values(self) -> dict[str, Any]:
        """The rest of the state, the same on every process."""
        schedule = {key: value for key, value in self._scheduler.state_dict().items() if key != "lr_lambdas"}
        return {"num_steps": self.num_steps, "schedule": schedule}

    def empty_state(self, present: Iterable[str]) -> dict[str, Tensor]:
        """`state_tensors` with room for whatever of the optimizer's state is `present` in a checkpoint; to be written
        to, and then followed by `resume`."""
        names = {parameter: name for name, parameter in self.parallel.trained.items()}
        make_state(self._optimizer, names, present)
        return self.state_tensors()

    def resume(self, values: Mapping[str, Any]) -> None:
        """Go on from tensors that have been written to and from what `state_values` gave."""
        self.num_steps = values["num_steps"]
        self._scheduler.load_state_dict({**self._scheduler.state_dict(), **values["schedule"]})
        for group, rate in zip(self._optimizer.param_groups, values["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        after_loading(self._optimizer)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device. On the host of a GPU it is in page-locked memory, with which copies are fast and in
    the order of the stream's other work: it is not to be read there before the stream has got so far."""
    if tensor.device.type == "cuda" and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=device.type == "cuda")
