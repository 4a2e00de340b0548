"""Forward passes by role: log-probabilities of a causal model, scores and values of a scalar model.

All sequences are right-padded and attention is causal: no real token sees the padding behind it, so the passes carry no
attention mask (and no [B, T, T] tensor is made of one), and positions count from 0 in every family. The language-model
head is applied only where a token is a target (or at the last position, when decoding).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.logprobs import Entropy, chunked_logprobs
from threefold.models.loading import score_statistics

T = TypeVar("T")


class Runner(Protocol):
    """Runs a closure that calls a model, with whatever that needs (the gathering of sharded weights)."""

    def __call__(self, closure: Callable[[], T], /) -> T: ...


def directly(closure: Callable[[], T]) -> T:
    """The runner of a model that is whole."""
    return closure()


class CausalForward:
    """A causal model seen as hidden states plus an output head.

    Args:
        model: whole, when this is made; `run_by` says how it runs once it is sharded.

    Most families are `lm_head(base_model(x))`; some scale or cap their logits after the head. A probe of three tokens
    decides whether the head may be applied alone; otherwise the model's own full forward gives the logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._run: Runner = directly
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self._head_is_plain = self._probe_head()

    def run_by(self, run: Runner) -> CausalForward:
        """From now on every forward pass is run by `run`."""
        self._run = run
        return self

    def _probe_head(self) -> bool:
        """Whether the head's input is the base model's output, and its output the logits.

        For the probe the head's output is replaced by large numbers: a cap (Gemma 2) bends the small logits of a fresh
        model too little to be seen, and would be missed.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        seen: list[tuple[Tensor, Tensor]] = []

        def replace_output(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            large = torch.linspace(-100, 100, output.numel(), dtype=output.dtype, device=output.device)
            seen.append((inputs[0], large.view_as(output)))
            return seen[-1][1]

        probe = torch.arange(3, device=self.model.device).unsqueeze(0)
        hook = head.register_forward_hook(replace_output)
        try:
            with torch.no_grad():
                logits = self.model(input_ids=probe).logits
                hidden = self.model.base_model(input_ids=probe).last_hidden_state
        finally:
            hook.remove()
        if len(seen) != 1:
            return False
        head_input, head_output = seen[0]
        same_input = head_input.shape == hidden.shape and torch.allclose(head_input, hidden, rtol=1e-4, atol=1e-6)
        return bool(same_input and torch.equal(logits, head_output.to(logits.dtype)))

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Hidden states [B, T, D], or, where the head cannot be applied alone, logits [B, T, V]."""
        arguments: dict[str, Any] = {"input_ids": input_ids}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.long()
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        else:
            arguments["use_cache"] = False
        if position_ids is not None and self._takes_positions:
            arguments["position_ids"] = position_ids
        if self._head_is_plain:
            states: Tensor = self.model.base_model(**arguments).last_hidden_state
        else:
            states = self.model(**arguments).logits
        return states

    def _head(self, states: Tensor) -> Tensor:
        if not self._head_is_plain:
            return states
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits

    def target_logprobs(
        self, input_ids: Tensor, target_mask: Tensor, temperature: float = 1.0, entropy: Entropy = "measured"
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every target token and entropy of its distribution.

        Args:
            input_ids: [B, T], right-padded.
            target_mask: [B, T] bool; True where the token itself is a target. Position 0 has no predecessor and
                cannot be one. If it is on the CPU, the host need not wait for a GPU to know how many there are.
            temperature: of the softmax.
            entropy: "trained" with a gradient, "measured" without, "none" gives zeros.

        Returns:
            two [M] float32 tensors, nats, row by row in the order of target_mask.nonzero().
        """
        if bool(target_mask[:, 0].any()):
            raise ValueError("the first token of a sequence is predicted from nothing and cannot be a target")
        rows, columns = (_index_on(input_ids.device, i) for i in target_mask[:, 1:].nonzero(as_tuple=True))
        targets = input_ids[rows, columns + 1]

        def logprobs() -> tuple[Tensor, Tensor]:
            states = self._states(input_ids)
            return chunked_logprobs(states[rows, columns], targets, self._head, temperature, entropy=entropy)

        return self._run(logprobs)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] (float32) of the token that follows the last column; `cache` holds what came before and is
        extended.

        Args:
            input_ids: [B, t] new tokens (the whole left-padded prompt at first, then one token per row).
            attention_mask: [B, cached + t] bool.
            position_ids: [B, t], each row counting its own real tokens from 0.
        """
        return self._run(
            lambda: self._head(self._states(input_ids, attention_mask, position_ids, cache)[:, -1]).float()
        )


def _index_on(device: torch.device, index: Tensor) -> Tensor:
    """An index on the device; the host does not wait for a GPU."""
    if device.type == "cuda" and index.device.type == "cpu":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def scalars_per_token(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The score head at every position of a scalar model: [B, T] float32, the model's own units."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    scores: Tensor = model.score(hidden).squeeze(-1).float()
    return scores


def answer_scores(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Score of each sequence at its last real token: [B] float32, the model's own units.

    Args:
        input_ids: [B, T], right-padded.
        lengths: [B], real tokens of each row; the last one is at lengths - 1.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    scores: Tensor = model.score(last).squeeze(-1).float()
    return scores


def target_values(model: PreTrainedModel, input_ids: Tensor, target_mask: Tensor) -> Tensor:
    """The critic's value *before* each target token: [M] float32, in the order of target_mask.nonzero().

    The head's output is shifted and scaled by the statistics saved with the reward model that the critic came from,
    so values live in the normalised reward units of PPO from the first step.
    """
    mean, scale = score_statistics(model)
    values = (scalars_per_token(model, input_ids) - mean) / scale
    return values[:, :-1][target_mask[:, 1:]]
