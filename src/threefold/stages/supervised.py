"""The loop that steps 1 and 2 share: epochs of shuffled batches, evaluation, best weights kept. The loss is passed
in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from threefold.checkpoint.training import Saved, TrainingState
from threefold.config.recipe import SupervisedSection
from threefold.data.items import StepItems
from threefold.engine.parallel import like, local
from threefold.engine.sharing import MicroBatching
from threefold.engine.train import StepResult, TrainEngine
from threefold.errors import TrainingError
from threefold.stages.context import StageContext

Item = TypeVar("Item")


class SupervisedTask(Generic[Item]):
    """What distinguishes one supervised step from another.

    Attributes:
        name: prefix of its metrics.
        loss_sum: loss of a micro-batch, summed over whatever `count` counts.
        count: how many terms the loss of these items has (tokens, pairs).
        evaluate: held-out metrics, the same on every process; those named NAME/eval_loss select the best weights (lower
            is better).
        save: writes the present weights, which have these held-out metrics, to the stage's directory.
        passes: how a batch is cut into forward passes.
        length_of: tokens that an item fills in one.
    """

    def __init__(
        self,
        name: str,
        loss_sum: Callable[[Sequence[Item]], Tensor],
        count: Callable[[Sequence[Item]], int],
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[Mapping[str, float]], None],
        passes: MicroBatching,
        length_of: Callable[[Item], int],
    ) -> None:
        self.name, self.loss_sum, self.count, self.evaluate, self.save = name, loss_sum, count, evaluate, save
        self.passes, self.length_of = passes, length_of


class _Progress:
    """How far a stage has come: all that a checkpoint holds beside the engine's own state.

    Attributes:
        step: optimizer steps that are done, with what follows each.
        best_weights: those of the lowest held-out loss, on the host; empty while none has been evaluated.
    """

    def __init__(self, engine: TrainEngine) -> None:
        self._engine = engine
        self.step, self.best_step = 0, 0
        self.initial: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Remember the present weights as the best so far."""
        self.best, self.best_step = metrics, self.step
        for name, parameter in self._engine.parallel.trained.items():
            held = local(parameter.detach())
            if name in self.best_weights:
                self.best_weights[name].copy_(held)
            else:
                self.best_weights[name] = held.to("cpu", copy=True)

    def restore_best(self) -> None:
        """Write the best weights into the model."""
        for name, parameter in self._engine.parallel.trained.items():
            local(parameter.detach()).copy_(self.best_weights[name])

    def state(self) -> TrainingState:
        """Everything, for a checkpoint."""
        values = {"engine": self._engine.state_values(), "step": self.step, "best_step": self.best_step}
        return TrainingState(
            self._engine.state_tensors() | self._best_tensors(),
            values | {"initial": self.initial, "best": self.best},
            {},
        )

    def _best_tensors(self) -> dict[str, Tensor]:
        trained = self._engine.parallel.trained
        return {f"best.{name}": like(trained[name], held) for name, held in self.best_weights.items()}

    def read(self, saved: Saved) -> None:
        """Go on from a checkpoint."""
        values = saved.values
        self.step, self.best_step = values["step"], values["best_step"]
        self.initial, self.best = values["initial"], values["best"]
        if self.best:
            self.keep_best(self.best)
            self.best_step = values["best_step"]
        saved.read_into(self._engine.empty_state(saved.names) | self._best_tensors())
        self._engine.resume(values["engine"])
        saved.restore_random_state()


def num_optimizer_steps(num_items: int, settings: SupervisedSection) -> int:
    """Optimizer steps of a supervised stage, from the items of one epoch; its last, smaller batch is a step too."""
    steps = settings.epochs * math.ceil(num_items / settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def _optimizer_step(engine: TrainEngine, task: SupervisedTask[Item], batch: Sequence[Item]) -> StepResult:
    """One optimizer step on a batch, this process's share of which passes here."""
    count = task.count(batch)
    for part in task.passes.of(batch, task.length_of):

        def loss(items: Sequence[Item] = part.items) -> Tensor:
            return task.loss_sum(items) / count

        engine.backward(loss, part.counts)
    return engine.step()


def train_supervised(
    task: SupervisedTask[Item],
    engine: TrainEngine,
    items: StepItems[Item],
    settings: SupervisedSection,
    context: StageContext,
) -> dict[str, float]:
    """Train for the recipe's epochs, each a pass over the blend of the sources, and save the weights with the lowest
    held-out loss of those evaluated.

    Returns:
        the best evaluation's metrics, those of the first under "initial/...", and "best_step".
    """
    log, run = context.log, context.recipe.run
    total = num_optimizer_steps(len(items.blend), settings)
    steps_per_epoch = math.ceil(len(items.blend) / settings.batch_size)
    order: list[int] = []
    order_epoch = -1
    eval_every = settings.eval_every or steps_per_epoch
    progress = _Progress(engine)
    if context.saved is not None:
        progress.read(context.saved)
    else:
        log.note_long_warmup(f"{task.name}.warmup_steps", settings.warmup_steps, total)
        progress.initial = task.evaluate()
        log.log(0, progress.initial)
    engine.model.train()
    with log.progress(f"{task.name:<6}", total, progress.step) as bar:
        for step in range(progress.step + 1, total + 1):
            epoch, within = divmod(step - 1, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = items.blend.order(epoch), epoch
            chosen = order[within * settings.batch_size : (within + 1) * settings.batch_size]
            result = _optimizer_step(engine, task, [items.train[index] for index in chosen])
            progress.step = step
            bar.advance(loss=result.loss)
            if step % run.log_every == 0 or step == total:
                log.log(step, _step_metrics(task.name, result))
            if step % eval_every == 0 or step == total:
                metrics = task.evaluate()
                log.log(step, metrics)
                _refuse_broken(task.name, step, metrics, settings)
                if not progress.best or metrics[f"{task.name}/eval_loss"] < progress.best[f"{task.name}/eval_loss"]:
                    progress.keep_best(metrics)
            if step < total:
                context.safe_point(step, progress.state)
    if progress.best_step != progress.step:
        progress.restore_best()
    task.save(progress.best)
    return {
        **progress.best,
        **{f"initial/{name}": value for name, value in progress.initial.items()},
        "best_step": progress.best_step,
        "num_steps": total,
    }


def _step_metrics(name: str, result: StepResult) -> dict[str, float]:
    return {
        f"{name}/loss": result.loss,
        f"{name}/grad_norm": result.grad_norm,
        f"{name}/learning_rate": result.learning_rate,
    }


def _refuse_broken(name: str, step: int, metrics: Mapping[str, float], settings: SupervisedSection) -> None:
    if not math.isfinite(metrics[f"{name}/eval_loss"]):
        raise TrainingError(
            f"{name}, optimizer step {step}: the held-out loss is not finite; "
            f"lower {name}.learning_rate ({settings.learning_rate:g})"
        )
