"""AdamW with its parameter groups and schedule, its state replicated, sharded or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from threefold.config.recipe import OptimizerSection
from threefold.engine.parallel import ParallelModel, like, local

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(Optimizer):
    """AdamW whose state lives in host memory and steps there, on a copy of the parameters.

    Gradients go to the host and stepped weights come back; on the device nothing stays but the parameters and their
    gradients (Ren et al. 2021, "ZeRO-Offload", section 4).
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)
        self._copies = {
            parameter: nn.Parameter(self._to_host(local(parameter.detach())).clone(), requires_grad=True)
            for group in self.param_groups
            for parameter in group["params"]
        }
        groups = [{**group, "params": [self._copies[p] for p in group["params"]]} for group in self.param_groups]
        self._adam = AdamW(groups, **settings)

    @staticmethod
    def _to_host(tensor: Tensor) -> Tensor:
        return tensor.to("cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that the parameters have."""
        assert closure is None
        for group, inner in zip(self.param_groups, self._adam.param_groups, strict=True):
            inner["lr"] = group["lr"]
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else self._to_host(local(parameter.grad))
        self._adam.step()
        for parameter, copy in self._copies.items():
            if copy.grad is not None:
                local(parameter.detach()).copy_(copy)
                copy.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """AdamW's state of a parameter, in host memory."""
        return cast(dict[str, Any], self._adam.state[self._copies[parameter]])

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take the parameters as they are now, after somebody else has written to them."""
        for parameter, copy in self._copies.items():
            copy.copy_(local(parameter.detach()))


def build_optimizer(
    parallel: ParallelModel, settings: OptimizerSection, total_steps: int, offload: str = "none"
) -> tuple[Optimizer, LRScheduler]:
    """AdamW over the trainable parameters, weight decay on matrices only, and the schedule over `total_steps`.

    Args:
        offload: of the model's section; "all" needs nothing here, for its parameters are in host memory already.
    """
    trainable = list(parallel.trained.values())
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # one pass over weights, gradients and state instead of one for each operation
    fused = all(local(parameter).device.type in ("cpu", "cuda") for parameter in trainable)
    adam: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": 1e-8, "fused": fused}
    kind: type[Optimizer] = HostAdamW if offload == "optimizer" else AdamW
    filled = [group for group in groups if group["params"]]
    if parallel.zero_stage == 1 and parallel.world.size > 1:
        optimizer: Optimizer = ZeroRedundancyOptimizer(cast(Any, filled), optimizer_class=kind, **adam)
    else:
        optimizer = kind(cast(Any, filled), **adam)
    scheduler = get_scheduler(
        settings.scheduler,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, total_steps),
        num_training_steps=total_steps,
    )
    return optimizer, scheduler


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """What steps this process's parameters."""
    return cast(Optimizer, optimizer.optim) if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def owned(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that this process steps."""
    return [parameter for group in inner_optimizer(optimizer).param_groups for parameter in group["params"]]


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """AdamW's state of a parameter that this process steps; empty before its first step."""
    inner = inner_optimizer(optimizer)
    return inner.state_of(parameter) if isinstance(inner, HostAdamW) else cast(dict[str, Any], inner.state[parameter])


def state_tensors(optimizer: Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """AdamW's state of what this process steps, under names that do not depend on how it is spread; live."""
    tensors: dict[str, Tensor] = {}
    for parameter in owned(optimizer):
        for part, value in state_of(optimizer, parameter).items():
            sharded = part in MOMENTS
            named = like(parameter, local(value)) if sharded else value
            tensors[f"optimizer.{names[parameter]}.{part}"] = named
    return tensors


@torch.no_grad()
def make_state(optimizer: Optimizer, names: dict[nn.Parameter, str], present: Iterable[str]) -> None:
    """Give the parameters whose state is `present` in a checkpoint a state of zeros to read it into."""
    there = set(present)
    for parameter in owned(optimizer):
        if f"optimizer.{names[parameter]}.{MOMENTS[0]}" not in there:
            continue
        on_host = isinstance(inner_optimizer(optimizer), HostAdamW)
        like_parameter = local(parameter.detach()).cpu() if on_host else parameter.detach()
        state = state_of(optimizer, parameter)
        state["step"] = torch.zeros((), dtype=torch.float32, device=local(like_parameter).device)
        for part in MOMENTS:
            state[part] = torch.zeros_like(like_parameter)


def after_loading(optimizer: Optimizer) -> None:
    """Follow parameters that were written to from outside."""
    inner = inner_optimizer(optimizer)
    if isinstance(inner, HostAdamW):
        inner.read_parameters()
