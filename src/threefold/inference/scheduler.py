"""Continuous batching: answers of different lengths share one decode batch, and a slot is never left idle.

Every decode step gives one token to each live row. A row whose answer ends leaves; a waiting prompt takes its slot or,
when none waits, the last row moves into it, so the live rows are always the first ones of the cache. All answers to one
prompt share its prefill.

The order of work changes no answer: each answer has its own random numbers (sampling.draw_uniforms) and its own place
in the tables of results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from threefold.config.recipe import SamplingSection
from threefold.data.collate import pad_ragged
from threefold.errors import NonFiniteError
from threefold.inference.sampling import draw_tokens

SIMILAR_TOKENS = 16
"""Prompts that differ by less than this, or by a quarter, are prefilled together: padding them costs less than another
call."""


Drawn = tuple[Tensor, Tensor, Tensor]
"""Tokens, and their two log-probabilities, as `draw_tokens` returns them."""
Agree = Callable[[Drawn], Drawn]
"""From what each process of a group has drawn to what all of them go on with."""


class RowCache(Protocol):
    """What past tokens left behind, a row per sequence; rows 0..num_rows-1 are live."""

    num_rows: int
    lengths: list[int]

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy row `source` over each of `targets`."""

    def set_length(self, row: int, length: int) -> None:
        """Forget what row `row` holds beyond its first `length` tokens."""


class TokenDecoder(Protocol):
    """One transformer that goes on with sequences; `Decoder` and `FallbackDecoder` are two."""

    @property
    def device(self) -> torch.device: ...

    @property
    def context_length(self) -> int | None: ...

    def bytes_per_row(self, capacity: int) -> int:
        """Memory of one sequence of up to `capacity` tokens in the cache."""

    def new_cache(self, max_rows: int, capacity: int) -> Any:
        """A cache for `max_rows` sequences of up to `capacity` tokens."""

    def prefill(self, ids: Tensor, lengths: list[int], cache: Any, first_row: int) -> Tensor:
        """Read right-padded prompts [b, t] into the rows from first_row on; float32 logits [b, V] of what follows."""

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """Append one token to each live row; float32 logits [num_rows, V] of what follows."""


class NonFiniteLogits(NonFiniteError):  # noqa: N818 - what was found, not what was done wrong
    """A model gave logits from which nothing can be drawn: NaN or +inf among them.

    Attributes:
        step: number of the token that was to be drawn, from 1.
        prompts: prompts of the batch that it happened to, from 0.
    """

    def __init__(self, step: int, prompts: Sequence[int]) -> None:
        named = ", ".join(str(prompt + 1) for prompt in prompts[:4]) + (", ..." if len(prompts) > 4 else "")
        super().__init__(
            f"the model's logits are not finite at token {step} of an answer (prompt {named} of the batch): "
            "its weights are damaged"
        )
        self.step = step
        self.prompts = tuple(prompts)


@dataclass(frozen=True)
class Finished:
    """One answer: which, and its tokens with their log-probabilities as in `Rollout`, on the CPU."""

    answer: int
    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    stopped: bool


@dataclass(slots=True)
class _Row:
    """A live row: the answer that it holds, tokens of it so far, the last one."""

    answer: int
    generated: int = 0
    token: int = -1


@dataclass(frozen=True)
class _Shared:
    """A prefilled prompt of which answers wait for a slot; row `holder` begins with the prompt.

    The holder is live or has just finished: while answers wait, every free slot goes to one of them, this one too.
    """

    holder: int
    length: int
    logits: Tensor
    answers: deque[int]


class ContinuousBatch:
    """The answers to some prompts, worked on in the slots of one cache.

    Answer a belongs to prompt a // answers_per_prompt; it is finished by a stop id or after R = uniforms.shape[1]
    tokens.

    Args:
        cache: empty; `max_rows` of its rows are used.
        uniforms: [answers, R], from `draw_uniforms`.
        prefill_tokens: most tokens of prompts, padding included, in one prefill; a longer prompt is read alone.
        agree: applied to what is drawn, where several processes decode the same answers together: all of them have to
            see the same answers end.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        cache: RowCache,
        max_rows: int,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSection,
        stop_ids: frozenset[int],
        uniforms: Tensor,
        answers_per_prompt: int,
        prefill_tokens: int,
        agree: Agree | None = None,
    ) -> None:
        assert len(uniforms) == len(prompts) * answers_per_prompt
        self._decoder, self._cache, self._max_rows = decoder, cache, max_rows
        self._prompts, self._per_prompt, self._prefill_tokens = prompts, answers_per_prompt, prefill_tokens
        self._sampling, self._stop_ids, self._agree = sampling, stop_ids, agree
        device = decoder.device
        self._stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self._longest = uniforms.shape[1]
        self._uniforms = uniforms.to(device).flatten()
        # results, a place for every token that may come: answer * R + its number in the answer
        self._tokens = torch.zeros(len(self._uniforms), dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(len(self._uniforms), device=device)
        restricted = sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1 or sampling.min_new_tokens
        self._sampled = torch.zeros_like(self._logprobs) if restricted else self._logprobs
        # longest first: the last prompts to be admitted are those that are soonest read
        self._queue = deque(sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt])))
        self._shared: _Shared | None = None
        self._rows: list[_Row | None] = []  # None is a hole: its answer is finished
        self._num_live = 0
        # of the live rows, on the device: the last token, and the place of the next
        self._ids = self._places = torch.empty(0, dtype=torch.int64, device=device)

    def run(self) -> Iterator[Finished]:
        """Work until every answer is finished; each is handed out as soon as it is."""
        yield from self._admit()
        while self._rows:
            logits = self._decoder.step(self._ids, self._cache)
            yield from self._draw(logits, range(len(self._rows)), self._places)
            if self._num_live < len(self._rows):
                yield from self._admit()

    def _can_admit(self) -> bool:
        return self._num_live < self._max_rows and bool(self._queue or self._shared)

    def _admit(self) -> Iterator[Finished]:
        """Give slots to waiting answers, and their first tokens, until no slot is free or none waits; close the holes
        that remain."""
        while self._can_admit():
            rows, logits = self._start_siblings(self._shared) if self._shared else self._prefill()
            yield from self._draw(logits, rows, self._places_of(rows))
        self._compact()
        live = [row for row in self._rows if row is not None]
        self._ids = torch.tensor([row.token for row in live], dtype=torch.int64, device=self._decoder.device)
        self._places = self._places_of(range(len(live)))

    def _places_of(self, rows: Sequence[int]) -> Tensor:
        states = [self._rows[row] for row in rows]
        places = [state.answer * self._longest + state.generated for state in states if state is not None]
        return torch.tensor(places, dtype=torch.int64, device=self._decoder.device)

    def _start_siblings(self, shared: _Shared) -> tuple[list[int], Tensor]:
        """Start answers to a prompt that was read before: from the row of an answer to it, the first tokens of which
        are the prompt."""
        rows = self._free_rows(len(shared.answers))
        copies = [row for row in rows if row != shared.holder]
        if copies:
            self._cache.copy(shared.holder, copies)
        for row in rows:
            self._occupy(row, shared.answers.popleft())
            self._cache.set_length(row, shared.length)
        self._cache.num_rows = len(self._rows)
        if not shared.answers:
            self._shared = None
        return rows, shared.logits.expand(len(rows), -1)

    def _prefill(self) -> tuple[list[int], Tensor]:
        """Read the next prompts of the queue, and start as many of their answers as there are slots."""
        group = self._next_group()
        if len(group) > 1:
            self._compact()  # rows that are read together lie side by side: behind the live ones
        first = self._free_rows(1)[0]
        lengths = [len(self._prompts[prompt]) for prompt in group]
        ids, _ = pad_ragged([torch.tensor(self._prompts[prompt], dtype=torch.int64) for prompt in group])
        logits = self._decoder.prefill(ids.to(self._decoder.device), lengths, self._cache, first)
        rows, logits_of_rows = [], []
        for index, prompt in enumerate(group):
            self._occupy(first + index, prompt * self._per_prompt)
            rows.append(first + index)
            logits_of_rows.append(index)
        for index, prompt in enumerate(group):
            answers = deque(range(prompt * self._per_prompt + 1, (prompt + 1) * self._per_prompt))
            targets = self._free_rows(len(answers))
            if targets:
                self._cache.copy(first + index, targets)
            for row in targets:
                self._occupy(row, answers.popleft())
                rows.append(row)
                logits_of_rows.append(index)
            if answers:
                self._shared = _Shared(first + index, lengths[index], logits[index : index + 1], answers)
        self._cache.num_rows = len(self._rows)
        if self._per_prompt > 1:
            logits = logits[torch.tensor(logits_of_rows, device=logits.device)]
        return rows, logits

    def _next_group(self) -> list[int]:
        """Prompts of similar length that fit the free slots and the prefill; of all but the last, every answer fits."""
        free = self._max_rows - self._num_live
        most = (free - 1) // self._per_prompt + 1
        group = [self._queue.popleft()]
        longest = len(self._prompts[group[0]])
        while self._queue and len(group) < most and (len(group) + 1) * longest <= self._prefill_tokens:
            if longest - len(self._prompts[self._queue[0]]) > max(SIMILAR_TOKENS, longest // 4):
                break
            group.append(self._queue.popleft())
        return group

    def _free_rows(self, count: int) -> list[int]:
        """Up to `count` slots without a live row, holes before those behind."""
        holes = [row for row, state in enumerate(self._rows) if state is None]
        return (holes + list(range(len(self._rows), self._max_rows)))[:count]

    def _occupy(self, row: int, answer: int) -> None:
        if row == len(self._rows):
            self._rows.append(None)
        assert self._rows[row] is None
        self._rows[row] = _Row(answer)
        self._num_live += 1

    def _compact(self) -> None:
        """Move the last rows into the holes; a row that is moved costs the copy of what it holds."""
        while self._num_live < len(self._rows):
            last = self._rows.pop()
            if last is not None:
                hole = self._rows.index(None)
                self._cache.move(len(self._rows), hole)
                self._rows[hole] = last
        self._cache.num_rows = len(self._rows)

    def _draw(self, logits: Tensor, rows: Sequence[int], places: Tensor) -> list[Finished]:
        """Draw the next token of these rows; those whose answers end become holes."""
        banned = None
        if self._sampling.min_new_tokens:
            banned = places % self._longest < self._sampling.min_new_tokens
        uniforms = self._uniforms.index_select(0, places)
        drawn_here = draw_tokens(logits, self._sampling, uniforms, self._stops, banned)
        tokens, logprobs, sampled = drawn_here if self._agree is None else self._agree(drawn_here)
        self._tokens[places] = tokens
        self._logprobs[places] = logprobs
        finite = logprobs.isfinite()
        if self._sampled is not self._logprobs:
            self._sampled[places] = sampled
            finite &= sampled.isfinite()
        # The one place where the host waits for the device, once a step. A GPU could go on without knowing who has
        # stopped, and read the tokens of several steps at once.
        drawn: list[int] = tokens.where(finite, -1).tolist()
        finished = []
        for row, token in zip(rows, drawn, strict=True):
            state = self._rows[row]
            assert state is not None
            if token < 0:
                self._refuse(rows, drawn)
            state.token = token
            state.generated += 1
            if token in self._stop_ids or state.generated == self._longest:
                finished.append(row)
        self._ids = tokens
        self._places = places.add_(1)
        return [self._finish(row) for row in finished]

    def _refuse(self, rows: Sequence[int], drawn: Sequence[int]) -> None:
        states = [self._rows[row] for row, token in zip(rows, drawn, strict=True) if token < 0]
        damaged = [state for state in states if state is not None]
        raise NonFiniteLogits(damaged[0].generated + 1, sorted({s.answer // self._per_prompt for s in damaged}))

    def _finish(self, row: int) -> Finished:
        state = self._rows[row]
        assert state is not None
        self._rows[row] = None
        self._num_live -= 1
        start = state.answer * self._longest
        part = slice(start, start + state.generated)
        logprobs = self._logprobs[part].to("cpu", copy=True)
        sampled = logprobs if self._sampled is self._logprobs else self._sampled[part].to("cpu", copy=True)
        tokens = self._tokens[part].to("cpu", copy=True)
        return Finished(state.answer, tokens, logprobs, sampled, state.token in self._stop_ids)
