"""The hybrid engine: one set of weights that trains and generates, and the switch between the two.

On one process the decoder reads the very tensors that train, so an answer is always drawn from the weights of the last
update. Going back to training is only letting go of the cache and of the packed weights: their memory is the next
phase's, from the same allocator. Where decode steps are recorded as CUDA graphs, the packed weights stay, for the
graphs read them, and are rewritten in place for the next rollout. (Yao et al. 2023, "DeepSpeed-Chat", section 4,
describe the idea.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from threefold.config.recipe import GenerationSection, SamplingSection
from threefold.engine.device import precision
from threefold.engine.train import TrainEngine
from threefold.inference.cuda_graphs import GraphedDecoder, recorder_for
from threefold.inference.decoder import Decoder
from threefold.inference.generate import GenerationLimits, decoder_for, finished_answers
from threefold.inference.scheduler import TokenDecoder
from threefold.models.forward import CausalForward
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
    ) -> None:
        self.forward = forward
        self._settings, self._device, self._dtype, self._offloaded = settings, device, dtype, tuple(offloaded)
        self.decoder: TokenDecoder = decoder_for(forward.model, note, None if device.type == "cpu" else dtype)
        self._packable = self.decoder if isinstance(self.decoder, Decoder) else None
        self._graphed: GraphedDecoder | None = None
        if self._packable is not None and settings.cuda_graphs == "auto":
            recorder = recorder_for(device)
            if recorder is not None:
                self.decoder = self._graphed = GraphedDecoder(self._packable, recorder)
        self._max_rows = settings.max_rows or AUTO_ROWS.get(device.type, 0)

    @contextmanager
    def generating(self, rows: int) -> Iterator[None]:
        """The switch: ready to decode `rows` answers at once inside the block, ready to train after it."""
        with ExitStack() as stack:
            for engine in self._offloaded:
                stack.enter_context(engine.optimizer_in_host_memory())
            # on a CPU the packed products are float32, so with another type they would not be those that train
            packs = self._settings.packed_weights == "auto" and (
                self._device.type != "cpu" or self._dtype == torch.float32
            )
            if self._packable is not None and packs:
                self._packable.pack(rows)
                if self._graphed is None:
                    stack.callback(self._packable.unpack)
            if self._graphed is not None:
                stack.callback(self._graphed.release)
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSection,
        stop_ids: frozenset[int],
        generator: torch.Generator,
        policy_version: int = 0,
        answers_per_prompt: int = 1,
        on_finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Sample answers from the weights as they are now; the arguments are those of `inference.generate.generate`.

        Args:
            on_finished: told of each answer as soon as it is finished: its place in the list that is returned, and the
                answer.
        """
        answers: dict[int, Rollout] = {}
        rows = len(prompts) * answers_per_prompt
        with torch.no_grad(), self.generating(min(rows, self._max_rows or rows)):
            limits = GenerationLimits(
                max_rows=self._max_rows,
                kv_bytes=math.ceil(self._settings.kv_memory_gib * GIB),
            )
            with precision(self._device, self._dtype):
                for number, rollout in finished_answers(
                    self.decoder,
                    prompts,
                    sampling,
                    stop_ids,
                    generator,
                    policy_version=policy_version,
                    answers_per_prompt=answers_per_prompt,
                    limits=limits,
                ):
                    answers[number] = rollout
                    if on_finished is not None:
                        on_finished(number, rollout)
        return [answers[number] for number in range(rows)]
