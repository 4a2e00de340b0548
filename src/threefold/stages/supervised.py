"""The loop that steps 1 and 2 share: epochs of shuffled batches, evaluation, best checkpoint kept. The loss is passed
in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from threefold.config.recipe import SupervisedSection
from threefold.data.collate import epoch_order
from threefold.engine.train import MicroBatching, TrainEngine
from threefold.errors import TrainingError
from threefold.metrics import RunLog

Item = TypeVar("Item")


class SupervisedTask(Generic[Item]):
    """What distinguishes one supervised step from another.

    Attributes:
        name: prefix of its metrics.
        loss_sum: loss of a micro-batch, summed over whatever `count` counts.
        count: how many terms the loss of these items has (tokens, pairs).
        evaluate: held-out metrics; those named NAME/eval_loss select the best checkpoint (lower is better).
        save: writes the present weights to the stage's directory.
        passes: how a batch is cut into forward passes.
        length_of: tokens that an item fills in one.
    """

    def __init__(
        self,
        name: str,
        loss_sum: Callable[[Sequence[Item]], Tensor],
        count: Callable[[Sequence[Item]], int],
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[], None],
        passes: MicroBatching,
        length_of: Callable[[Item], int],
    ) -> None:
        self.name, self.loss_sum, self.count, self.evaluate, self.save = name, loss_sum, count, evaluate, save
        self.passes, self.length_of = passes, length_of


def num_optimizer_steps(num_items: int, settings: SupervisedSection) -> int:
    """Optimizer steps of a supervised stage; an epoch's last, smaller batch is a step too."""
    steps = settings.epochs * math.ceil(num_items / settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def _backward(engine: TrainEngine, task: SupervisedTask[Item], micro: Sequence[Item], count: int) -> None:
    """One micro-batch's share of the loss, which has `count` terms in the whole batch."""
    engine.backward(lambda: task.loss_sum(micro) / count)


def train_supervised(
    task: SupervisedTask[Item],
    engine: TrainEngine,
    items: Sequence[Item],
    settings: SupervisedSection,
    seed: int,
    log: RunLog,
    log_every: int,
) -> dict[str, float]:
    """Train for the recipe's epochs, keeping the checkpoint with the lowest held-out loss of those evaluated.

    Returns:
        the best evaluation's metrics, those of the first under "initial/...", and "best_step".
    """
    total = num_optimizer_steps(len(items), settings)
    steps_per_epoch = math.ceil(len(items) / settings.batch_size)
    eval_every = settings.eval_every or steps_per_epoch
    log.note_long_warmup(f"{task.name}.warmup_steps", settings.warmup_steps, total)
    initial = task.evaluate()
    log.log(0, initial)
    best, best_step = dict[str, float](), 0
    with log.progress(f"{task.name:<6}", total) as bar:
        for step in range(1, total + 1):
            epoch, within = divmod(step - 1, steps_per_epoch)
            if within == 0:
                order = epoch_order(len(items), seed, epoch)
            batch = [items[index] for index in order[within * settings.batch_size : (within + 1) * settings.batch_size]]
            count = task.count(batch)
            for micro in task.passes.of(batch, task.length_of):
                _backward(engine, task, micro, count)
            result = engine.step()
            bar.advance(loss=result.loss)
            if step % log_every == 0 or step == total:
                log.log(
                    step,
                    {
                        f"{task.name}/loss": result.loss,
                        f"{task.name}/grad_norm": result.grad_norm,
                        f"{task.name}/learning_rate": result.learning_rate,
                    },
                )
            if step % eval_every == 0 or step == total:
                metrics = task.evaluate()
                log.log(step, metrics)
                if not math.isfinite(metrics[f"{task.name}/eval_loss"]):
                    raise TrainingError(
                        f"{task.name}, optimizer step {step}: the held-out loss is not finite; "
                        f"lower {task.name}.learning_rate ({settings.learning_rate:g})"
                    )
                if not best or metrics[f"{task.name}/eval_loss"] < best[f"{task.name}/eval_loss"]:
                    best, best_step = metrics, step
                    task.save()
    return {
        **best,
        **{f"initial/{name}": value for name, value in initial.items()},
        "best_step": best_step,
        "num_steps": total,
    }
