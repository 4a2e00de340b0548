"""How far step 3 has come, and its checkpoints: between iterations, and inside one with the experience that is
pending."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from threefold.checkpoint.training import Saved, TrainingState
from threefold.config.recipe import PPOSection
from threefold.stages.pending import pack_batch, pack_rollouts, unpack_batch, unpack_rollouts
from threefold.stages.ppo_setup import Setup
from threefold.stages.ppo_update import UpdateProgress, UpdateStatistics
from threefold.stages.rollout import ScoredBatch
from threefold.types import Rollout


def points_per_iteration(settings: PPOSection) -> int:
    """Moments of an iteration from which the stage can go on: after sampling, after scoring, after each optimizer
    step."""
    return 2 + settings.ppo_epochs * settings.minibatches


@dataclass
class Progress:
    """Where the stage is.

    Attributes:
        iteration: that is under way, from 0.
        before, after: the first evaluation's metrics and the last one's.
        rollouts, batch: of this iteration, as far as it has come; a batch has its rollouts in it.
        update: of this iteration.
    """

    kl_coef: float
    iteration: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    rollouts: list[Rollout] | None = None
    batch: ScoredBatch | None = None
    update: UpdateProgress = field(default_factory=UpdateProgress)

    def next_iteration(self) -> None:
        """This iteration is complete."""
        self.iteration += 1
        self.rollouts, self.batch, self.update = None, None, UpdateProgress()

    def point(self, settings: PPOSection) -> int:
        """The number of this moment."""
        passed = 0
        if self.batch is not None:
            passed = 2 + self.update.done
        elif self.rollouts is not None:
            passed = 1
        return self.iteration * points_per_iteration(settings) + passed

    def state(self, setup: Setup) -> TrainingState:
        """Everything that the stage needs to go on from here."""
        learners, pending = setup.learners, {}
        if self.batch is not None:
            pending = pack_batch(self.batch)
        elif self.rollouts is not None:
            pending = pack_rollouts(self.rollouts)
        tensors = {f"actor.{name}": tensor for name, tensor in learners.actor.state_tensors().items()}
        tensors |= {f"critic.{name}": tensor for name, tensor in learners.critic.state_tensors().items()}
        values = {
            "iteration": self.iteration,
            "pending": "none" if not pending else "rollouts" if self.batch is None else "batch",
            "kl_coef": self.kl_coef,
            "before": self.before,
            "after": self.after,
            "update": {"done": self.update.done, "statistics": self.update.statistics.state()},
            "actor": learners.actor.state_values(),
            "critic": learners.critic.state_values(),
            "text_batches": 0 if setup.text is None else setup.text.num_batches,
        }
        return TrainingState(tensors, values, pending | {"sampler": setup.sampler.get_state()})

    @classmethod
    def read(cls, setup: Setup, saved: Saved) -> Progress:
        """Where a checkpoint was; the models and everything else of `setup` are put there too."""
        learners, values, records = setup.learners, saved.values, saved.records
        engines = {"actor": learners.actor, "critic": learners.critic}
        room = dict[str, Tensor]()
        for which, engine in engines.items():
            present = {name.removeprefix(f"{which}.") for name in saved.names if name.startswith(f"{which}.")}
            room |= {f"{which}.{name}": tensor for name, tensor in engine.empty_state(present).items()}
        saved.read_into(room)
        for which, engine in engines.items():
            engine.resume(values[which])
        setup.sampler.set_state(records["sampler"])
        if setup.text is not None:
            setup.text.num_batches = values["text_batches"]
        pending = values["pending"]
        batch = unpack_batch(records) if pending == "batch" else None
        rollouts = unpack_rollouts(records) if pending == "rollouts" else None
        if batch is not None:
            rollouts = [experience.rollout for experience in batch.experiences]
        saved.restore_random_state()
        statistics = UpdateStatistics.of(values["update"]["statistics"])
        update = UpdateProgress(values["update"]["done"], statistics)
        return cls(values["kl_coef"], values["iteration"], values["before"], values["after"], rollouts, batch, update)
