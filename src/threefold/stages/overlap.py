"""Scoring that goes on while answers are still being decoded, on a second stream of a GPU.

A decode step reads much and computes little, the forward pass of a scorer the other way round, so the two fit together.
A finished answer waits until the ones that wait with it fill a pass; what is left at the end is scored as ever. The
passes are cut otherwise than those of `judge`, so results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from threefold.data.collate import collate_rollouts
from threefold.engine.device import precision
from threefold.stages.rollout import Judgement, Scorers, judge
from threefold.types import PreparedPrompt, Rollout


@dataclass(frozen=True)
class _Pass:
    """Rollouts that were passed together, by number: their log-probs, flat [M], and scores [B], on the device."""

    numbers: list[int]
    ref_logprobs: Tensor
    scores: Tensor


class ScoringBeside:
    """Scores one batch of rollouts, answers to `prompts`, as they finish.

    At most one pass is under way: what a model's forward asks of the device at its beginning is then answered at once,
    instead of making the host, and so the decoding, wait for the pass before.

    Args:
        stream: of the scorers' device, not the one that decodes; None scores at once (on a CPU).
    """

    def __init__(
        self,
        scorers: Scorers,
        prompts: Sequence[PreparedPrompt],
        temperature: float,
        stream: torch.cuda.Stream | None,
    ) -> None:
        assert not scorers.reference.is_actor, "the reference is the model that decodes: its adapters are in use"
        self._scorers, self._prompts, self._temperature, self._stream = scorers, prompts, temperature, stream
        self._waiting: dict[int, Rollout] = {}
        self._passes: list[_Pass] = []

    def add(self, number: int, rollout: Rollout) -> None:
        """Take a finished answer to the prompt of that number."""
        self._waiting[number] = rollout
        if self._stream is not None and not self._stream.query():
            return
        parts = self._scorers.passes.cut([len(rollout) for rollout in self._waiting.values()])
        if len(parts) > 1:
            numbers = list(self._waiting)
            self._launch([numbers[index] for index in parts[0]])

    @torch.no_grad()
    def _launch(self, numbers: list[int]) -> None:
        """Nothing here waits for the device: batches come from page-locked memory, results stay where they are."""
        scorers, part = self._scorers, [self._waiting.pop(number) for number in numbers]
        on_host = collate_rollouts(part, scorers.pad_id)
        sequences = scorers.reward.sequences([self._prompts[number].prompt.messages for number in numbers], part)
        with self._beside(), precision(scorers.device, scorers.dtype):
            batch = replace(on_host.to(scorers.device), target_mask=on_host.target_mask)
            ref_logprobs = scorers.reference.logprobs(batch, self._temperature)
            self._passes.append(_Pass(numbers, ref_logprobs, scorers.reward.one_pass(sequences)))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._scorers.device))
        with torch.cuda.stream(self._stream):
            yield

    def finish(self, rollouts: Sequence[Rollout]) -> Judgement:
        """Score what is left; the judgement of all rollouts, in their order."""
        if self._stream is not None:
            torch.cuda.current_stream(self._scorers.device).wait_stream(self._stream)
        left = sorted(set(range(len(rollouts))).difference(*(done.numbers for done in self._passes)))
        late = judge([self._prompts[n] for n in left], [rollouts[n] for n in left], self._scorers, self._temperature)
        ref_logprobs, scores = dict(zip(left, late.ref_logprobs, strict=True)), torch.empty(len(rollouts))
        scores[left] = late.scores
        for done in self._passes:
            # .cpu() waits, so the memory, the second stream's own, is not written again before it is read
            lengths = [len(rollouts[number].response_ids) for number in done.numbers]
            ref_logprobs |= dict(zip(done.numbers, done.ref_logprobs.cpu().split(lengths), strict=True))
            scores[done.numbers] = done.scores.cpu()
        return Judgement([ref_logprobs[number] for number in range(len(rollouts))], scores)
