"""The records that pass between folders.

Shape legend, used in every docstring of the project:

    B  sequences in a batch        V  vocabulary
    P  prompt tokens               D  model width
    R  response tokens             N  answers to one prompt
    T  tokens in a sequence, P + R

Records are per sequence and ragged (1-D tensors of the sequence's own length); only `data.collate` pads them into
[B, T] batches. Every record is complete when it is made: no field is filled in later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """What the model is asked to answer: a conversation whose next turn is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Comparison:
    """Answers to one prompt, best first: two for a pair, K for a ranking."""

    prompt: Prompt
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One row of a source, before the split decides which step may see it.

    Attributes:
        prompt: the conversation up to the answer; without messages where the row is plain text.
        demonstration: the answer to imitate in step 1, or the plain text; "" where the row has none.
        answers: ranked answers, best first, for step 2; empty where the row has none. A single one cannot be compared
            (an answer that was only labelled good or bad).
        origin: file and row, for messages to the user ("pairs.jsonl row 3"; rows count from 1).
        ranks: of each of the answers, 0 the best; equal ones are ties. Empty where each answer is better than the next.
        reference: the final answer to compare with, where there is one that can be checked ("72"); else "".
        original: the prompt as its source has it, where the recipe has had it rewritten: what the split goes by.
            Without messages where it is `prompt`.
    """

    prompt: Prompt
    demonstration: str
    answers: tuple[str, ...]
    origin: str
    ranks: tuple[int, ...] = ()
    reference: str = ""
    original: Prompt = Prompt(())


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of a rendered conversation, and which of them are trained.

    Attributes:
        ids: T token ids.
        trained: T flags; True where the token is a target of the loss (an assistant's token, its stop token included).
        prompt_length: P, the number of leading tokens that belong to the prompt (all before the last answer).
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt of step 3, rendered.

    Attributes:
        prompt: its messages.
        ids: P token ids.
        origin: file and row.
        reference: the final answer that a right answer must give; "" where none is known.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    origin: str
    reference: str = ""


@dataclass(frozen=True)
class RankedAnswers:
    """All answers to one prompt, rendered, and how each row of the data ranks some of them.

    Attributes:
        sequences: prompt and answer, each different answer once.
        rankings: one per row: tiers of places in `sequences`, the best tier first; those in one tier are ties.
    """

    sequences: tuple[TokenSequence, ...]
    rankings: tuple[tuple[tuple[int, ...], ...], ...]

    def pairs(self) -> list[tuple[int, int]]:
        """Places (better, worse) of all pairs that a ranking tells apart."""
        return [
            (better, worse)
            for tiers in self.rankings
            for index, tier in enumerate(tiers)
            for lower in tiers[index + 1 :]
            for better in tier
            for worse in lower
        ]


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, as the sampler saw it.

    Attributes:
        prompt_ids: [P] int64.
        response_ids: [R] int64, R >= 1, the stop token included when finish_reason is "stop".
        logprobs: [R] float32, nats: log-probability of each response token under softmax(logits / temperature) over the
            whole vocabulary. This is PPO's "old" log-probability.
        sampled_logprobs: [R] float32, nats: the same under the distribution really drawn from, that is after top-k,
            top-p and the ban on stopping before min_new_tokens. Equal to `logprobs` where none of those is in force.
        finish_reason: "stop" (a stop token was drawn) or "length" (max_new_tokens reached).
        policy_version: number of optimizer steps that the sampling weights had seen.
    """

    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    logprobs: torch.Tensor
    sampled_logprobs: torch.Tensor
    finish_reason: FinishReason
    policy_version: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the PPO update needs.

    Attributes:
        rollout: the sampled answer.
        score: reward model's score of the whole answer, in the reward model's own units.
        ref_logprobs: [R] float32, nats, under the reference (the step-1 model).
        values: [R] float32, the critic's value before each response token, in normalised reward units.
        rewards: [R] float32, per-token reward: KL penalty, plus the normalised clipped score at the last token.
        advantages: [R] float32, GAE, whitened over the whole batch of experience where the recipe says so.
        returns: [R] float32, unwhitened advantages plus values: the critic's target.
    """

    rollout: Rollout
    score: float
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
