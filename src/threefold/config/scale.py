"""Sections that say over how many processes a run is spread, how, and what it writes in order to go on after a crash.

None of them changes what is computed but in the last bits (and, with dropout, in which masks are drawn), so no step's
key depends on them: a run may go on with other values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from threefold.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class TrainedModelSection(Section):
    """How a model that is trained is spread over the processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage (Rajbhandari et al. 2020): 0 every process holds everything; 1 each holds its part of the optimizer's
    state; 2 of the gradients too; 3 of the weights too. With one process all are alike."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer keeps the optimizer's state, and a copy of the weights that it steps, in host memory and steps there;
    all, with zero_stage 3, keeps weights and gradients there too, and fetches them block by block."""

    @model_validator(mode="after")
    def _all_is_sharded(self) -> TrainedModelSection:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f'offload "all" fetches weights block by block, as zero_stage 3 does, and zero_stage is '
                f'{self.zero_stage}: set it to 3, or offload to "optimizer"'
            )
        return self


class FrozenModelSection(Section):
    """How a model that is only read is spread over the processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """0: every process holds all weights; 3: each holds its part, and blocks are gathered as they are used. (1 and 2
    concern optimizer and gradients, of which a frozen model has none.)"""
    offload: bool = False
    """Keep the weights in host memory between uses."""

    @model_validator(mode="after")
    def _all_or_nothing(self) -> FrozenModelSection:
        if self.zero_stage in (1, 2):
            raise ValueError(
                f"zero_stage {self.zero_stage} shards gradients and optimizer state, of which a frozen model has none: "
                "set 0 or 3"
            )
        return self


class ParallelSection(Section):
    """ZeRO stage and offload of each model. Sharded or not, the result is the same but for the last bits."""

    actor: TrainedModelSection = TrainedModelSection()
    reward: TrainedModelSection = TrainedModelSection()
    critic: TrainedModelSection = TrainedModelSection()
    reference: FrozenModelSection = FrozenModelSection()
    scorer: FrozenModelSection = FrozenModelSection()
    frozen_base: Literal["auto", "replicated", "sharded"] = "auto"
    """Under LoRA, with zero_stage 3: whether every process holds the frozen weights whole. auto: if they take at most
    half of the memory that is free."""


class LaunchSection(Section):
    """Processes: threefold starts them with torchrun, unless torchrun (or srun) has started it."""

    deployment: Literal["single_gpu", "single_node", "multi_node"] = "single_gpu"
    """single_gpu is one process; single_node as many as launch.processes_per_node says; multi_node the same on each of
    launch.nodes machines."""
    processes_per_node: NonNegativeInt = 0
    """Processes on this machine; 0 means one for each GPU, and without GPUs one."""
    nodes: PositiveInt = 1
    """Machines of a multi_node run."""
    node_rank: NonNegativeInt = 0
    """Number of this machine, from 0."""
    rdzv_endpoint: str = ""
    """Where the machines of a multi_node run meet: HOST:PORT of the first."""
    hostfile: str = ""
    """File with a line "HOST slots=N" for each machine, started from the first of them through launch.remote_shell;
    instead of nodes, node_rank and rdzv_endpoint."""
    remote_shell: str = "ssh"
    """Command that runs another on a machine of the hostfile: REMOTE_SHELL HOST COMMAND."""
    rdzv_timeout_seconds: PositiveFloat = 300.0
    """How long machines wait for each other at the start."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """How long a process waits for another inside a collective operation before the run is given up: what a process
    that hangs costs. The others wait so, too, while the first writes a finished model."""
    shutdown_seconds: PositiveFloat = 300.0
    """How long processes that were asked to stop (SIGTERM) have for their checkpoint before they are killed."""


class CheckpointSection(Section):
    """What is written inside a stage, for a run that dies to go on from. A finished stage removes it."""

    every_steps: NonNegativeInt = 0
    """Optimizer steps (iterations in step 3) between checkpoints; 0 is off."""
    every_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints; 0 is off. Whichever of the two comes first counts."""
    keep_last: PositiveInt = 2
    """Checkpoints of a stage that stay on disk."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory, of which it needs room for one."""
