"""The hybrid engine: one set of weights that trains and generates, and the switch between the two.

On one process the decoder reads the very tensors that train, so an answer is always drawn from the weights of the last
update. Going back to training is only letting go of the cache and of the packed weights: their memory is the next
phase's, from the same allocator. Where decode steps are recorded as CUDA graphs, the packed weights stay, for the
graphs read them, and are rewritten in place for the next rollout. (Yao et al. 2023, "DeepSpeed-Chat", section 4,
describe the idea.)

Where the weights are sharded over the processes, or several processes decode with a part of each matrix, they are
gathered once per rollout into an arena of this process's own (inference.arena), which is let go again after it. From
then on a process waits for no other, but for those of its tensor-parallel group: who has fewer or shorter answers to
give is done sooner, and holds up nobody. Matrices that are packed in 4 bits are put together in an arena, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from threefold.config.recipe import GenerationSection, SamplingSection
from threefold.engine.device import precision
from threefold.engine.train import TrainEngine
from threefold.inference.arena import Arena, ModelCopy, WeightSource
from threefold.inference.cuda_graphs import GraphedDecoder, recorder_for
from threefold.inference.decoder import Decoder
from threefold.inference.families import NotCoveredError, architecture_of
from threefold.inference.generate import GenerationLimits, Part, decoder_for, finished_answers
from threefold.inference.scheduler import TokenDecoder
from threefold.inference.tensor_parallel import TensorGroup, check_divides, not_cut
from threefold.machine.memory import free_bytes, return_freed_memory
from threefold.models.forward import CausalForward
from threefold.models.quantised import has_packed
from threefold.types import Rollout

GIB = 2**30
AUTO_ROWS = {"cpu": 64}
"""Beyond this a CPU's matrix kernels are busy, and more rows only take memory; elsewhere the memory decides."""


class HybridEngine:
    """Generates from a model that other code trains.

    Args:
        forward: the model.
        settings: how to decode.
        dtype: of matrix products; on a GPU also of keys, values and packed weights. (Where the model's family has no
            decoder of its own, autocast alone sees to it.)
        note: told, once, if the model's family has no decoder of its own.
        offloaded: training engines whose optimizer state leaves the device while generating.
        source: of the whole weights, where the model's parameters are shards: then `generating` is collective. None
            where the parameters are whole, and are read without a copy.
        tp_group, tp_rank, tp_size: the processes that decode the same answers together, this one's number among them,
            and how many they are. All of them give the same prompts to `generate` and get the same answers. They record
            no CUDA graphs.

    Raises:
        ConfigError: tp_size does not divide what it must.

    Attributes:
        decoder: what answers are decoded with.
    """

    def __init__(
        self,
        forward: CausalForward,
        settings: GenerationSection,
        device: torch.device,
        dtype: torch.dtype,
        note: Callable[[str], None],
        offloaded: Sequence[TrainEngine] = (),
        source: WeightSource | None = None,
        tp_group: Any = None,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        self.forward = forward
        self._settings, self._device, self._dtype, self._offloaded = settings, device, dtype, tuple(offloaded)
        self._source = source
        self._group = TensorGroup(tp_rank, tp_size, tp_group) if tp_size > 1 else None
        self._arena: Arena | ModelCopy | None = None
        self.decoder: TokenDecoder = self._decoder(note, None if device.type == "cpu" else dtype)
        self._packable = self.decoder if isinstance(self.decoder, Decoder) else None
        self._graphed: GraphedDecoder | None = None
        if self._packable is not None and self._group is None and settings.cuda_graphs == "auto":
            recorder = recorder_for(device)
            if recorder is not None:
                self.decoder = self._graphed = GraphedDecoder(self._packable, recorder)
        self._max_rows = settings.max_rows or AUTO_ROWS.get(device.type, 0)

    def _decoder(self, note: Callable[[str], None], dtype: torch.dtype | None) -> TokenDecoder:
        model = self.forward.model
        if self._source is None and self._group is None and not has_packed(model):
            return decoder_for(model, note, dtype)
        if self._group is not None:
            check_divides(model, self._group.size)
        try:
            # matrices in the type that autocast would turn them into at every step
            self._arena = Arena(model, architecture_of(model), self._dtype, self._device, self._group)
        except NotCoveredError as error:
            if self._group is not None:
                raise not_cut(model.config, self._group.size, error) from error
            self._arena = ModelCopy(model, self._device)
            decoder = decoder_for(self._arena.model, note, dtype)
            self._arena.release()
            return decoder
        return Decoder(model, self._arena.architecture, dtype, self._arena)

    @contextmanager
    def generating(self, rows: int) -> Iterator[None]:
        """The switch: ready to decode `rows` answers at once inside the block, ready to train after it."""
        with ExitStack() as stack:
            for engine in self._offloaded:
                stack.enter_context(engine.optimizer_in_host_memory())
            if self._arena is not None:
                stack.callback(self._release)
                self._arena.fill(self._source)
            # on a CPU the packed products are float32, so with another type they would not be those that train
            packs = self._settings.packed_weights == "auto" and (
                self._device.type != "cpu" or self._dtype == torch.float32
            )
            if self._packable is not None and packs:
                self._packable.pack(max(rows, 1))
                if self._graphed is None:
                    stack.callback(self._packable.unpack)
            if self._graphed is not None:
                stack.callback(self._graphed.release)
            yield

    def _release(self) -> None:
        if isinstance(self._arena, Arena):
            assert self._packable is not None
            self._packable.release()
        elif self._arena is not None:
            self._arena.release()

    def _limits(self) -> GenerationLimits:
        """The processes of a group have to work on the same answers at once: what the fullest of them has room for."""
        limits = GenerationLimits(max_rows=self._max_rows, kv_bytes=math.ceil(self._settings.kv_memory_gib * GIB))
        if self._group is None:
            return limits
        return_freed_memory(self._device)
        return replace(limits, free_bytes=self._group.least(free_bytes(self._device)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSection,
        stop_ids: frozenset[int],
        generator: torch.Generator,
        policy_version: int = 0,
        answers_per_prompt: int = 1,
        on_finished: Callable[[int, Rollout], None] | None = None,
        prompt_numbers: Sequence[int] | None = None,
        total_prompts: int = 0,
    ) -> list[Rollout]:
        """Sample answers from the weights as they are now; the arguments are those of `inference.generate.generate`.

        Args:
            prompt_numbers, total_prompts: which of a larger batch's prompts these are, from 0, and how many it has: the
                answers are those that the whole batch would have had, and the generator goes on as after it. There may
                be none. Not given: they are the batch.
            on_finished: told of each answer as soon as it is finished: its place in the list that is returned, and the
                answer.
        """
        answers: dict[int, Rollout] = {}
        part = None if prompt_numbers is None else Part(prompt_numbers, total_prompts)
        rows = len(prompts) * answers_per_prompt
        generating = self.generating(min(rows, self._max_rows or rows))
        with torch.no_grad(), generating, precision(self._device, self._dtype):
            for number, rollout in finished_answers(
                self.decoder,
                prompts,
                sampling,
                stop_ids,
                generator,
                policy_version=policy_version,
                answers_per_prompt=answers_per_prompt,
                limits=self._limits(),
                part=part,
                agree=None if self._group is None else self._group.agree,
            ):
                answers[number] = rollout
                if on_finished is not None:
                    on_finished(number, rollout)
        return [answers[number] for number in range(rows)]
