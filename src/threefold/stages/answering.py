"""Answers from groups of processes: each group answers its share of the prompts, and every process gets all answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from threefold.config.recipe import SamplingSection
from threefold.engine.distributed import World, inference_groups
from threefold.engine.hybrid import HybridEngine
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import balanced_shares
from threefold.engine.train import TrainEngine
from threefold.errors import ConfigError, NonFiniteError
from threefold.models.forward import CausalForward
from threefold.stages.context import StageContext
from threefold.types import PreparedPrompt, Rollout


def check_group_size(world: World, size: int) -> None:
    """Refuse tensor-parallel groups that do not use every process."""
    if world.size % size:
        raise ConfigError(
            f"generation.inference_tp_size = {size} does not divide the run's processes, of which there are "
            f"{world.size}; set a divisor of that, or start another number (launch.processes_per_node)"
        )


class Answering:
    """A model that generates, on all processes of the run. Made collectively, and called so.

    Args:
        offloaded: training engines whose optimizer state leaves the device meanwhile.
        note: told of what the user should know about how it generates.
    """

    def __init__(
        self,
        context: StageContext,
        model: ParallelModel,
        forward: CausalForward,
        offloaded: Sequence[TrainEngine] = (),
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._world: World = context.world
        settings = context.recipe.generation
        size = settings.inference_tp_size
        check_group_size(self._world, size)
        self._group, process_group = inference_groups(self._world, size)
        self._num_groups = self._world.size // size
        self.engine = HybridEngine(
            forward,
            settings,
            context.device,
            context.dtype,
            note,
            offloaded,
            source=model if model.sharded else None,
            tp_group=process_group,
            tp_rank=self._world.rank % size,
            tp_size=size,
        )

    def __call__(
        self,
        prompts: Sequence[PreparedPrompt],
        sampling: SamplingSection,
        stop_ids: frozenset[int],
        generator: torch.Generator,
        answers_per_prompt: int = 1,
        policy_version: int = 0,
        on_finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """One answer to each prompt, from the weights as they are now; `prompts` has each one answers_per_prompt times.

        Args:
            on_finished: told of each answer, with its place, as soon as it is finished; with one process only.

        Raises:
            NonFiniteError: on every process, if one met it.
        """
        different = prompts[::answers_per_prompt]
        share = balanced_shares([len(prompt.ids) for prompt in different], self._num_groups)[self._group]
        rollouts, broken = list[Rollout](), None
        try:
            rollouts = self.engine.generate(
                [different[number].ids for number in share],
                sampling,
                stop_ids,
                generator,
                policy_version=policy_version,
                answers_per_prompt=answers_per_prompt,
                on_finished=on_finished,
                prompt_numbers=share,
                total_prompts=len(different),
            )
        except NonFiniteError as error:
            broken = error
        for found in self._world.gather(None if broken is None else str(broken)):
            if found is not None:  # on every process, so that what is left can be saved by all of them
                raise broken or NonFiniteError(found)
        numbers = [number * answers_per_prompt + answer for number in share for answer in range(answers_per_prompt)]
        return self._world.assemble(dict(zip(numbers, rollouts, strict=True)), len(prompts))
