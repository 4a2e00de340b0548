"""AdamW with its parameter groups and schedule."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from threefold.config.recipe import OptimizerSection


def build_optimizer(model: nn.Module, settings: OptimizerSection, total_steps: int) -> tuple[AdamW, LRScheduler]:
    """AdamW over the trainable parameters, weight decay on matrices only, and the schedule over `total_steps`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # one pass over weights, gradients and state instead of one for each operation
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
    optimizer = AdamW(
        [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, eps=1e-8, fused=fused
    )
    scheduler = get_scheduler(
        settings.scheduler,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, total_steps),
        num_training_steps=total_steps,
    )
    return optimizer, scheduler
