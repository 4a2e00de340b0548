"""How much arithmetic one PPO iteration needs, counted per matrix and per pair of tokens that attend.

What is counted is what the algorithm needs, whoever computes it: each real token once per pass (no padding, and not an
answer's last token where nothing follows from it), causal attention over the positions that a token may see (half of a
full square), the output head only where a log-prob is wanted, a prompt's prefill once for all its answers, a backward
pass at twice its forward. Not counted: recomputation
by checkpointing or by attention kernels, element-wise work, softmax, optimizer. So a rate made from these counts is a
lower bound of what the hardware did.

A product of [m, k] and [k, n] is 2 m k n FLOP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

FORWARD_AND_BACKWARD = 3
"""y = x W, then the gradients of x and of W: three products of one size."""
FORWARD_AND_INPUT_GRADIENT = 2
"""The same where W is frozen."""


@dataclass(frozen=True)
class ModelCost:
    """What a forward pass costs.

    Attributes:
        trained: weights of the matrices that every token passes and that learn.
        frozen: the same, of those that do not learn.
        head: weights of the head, which only some positions need: a language model's output head, a scalar model's
            score.
        head_learns: whether these learn.
        attention_width: layers * heads * head width: a token and one key that it sees cost 4 FLOP times this (2 for
            the score, 2 for adding the value), forward.
    """

    trained: int
    frozen: int
    head: int
    head_learns: bool
    attention_width: int

    def forward(self, tokens: int, pairs: int, head_positions: int) -> int:
        """FLOP of a forward pass over `tokens` tokens, `pairs` (token, visible key) pairs, and the head at
        `head_positions`."""
        matrices = 2 * (self.trained + self.frozen) * tokens
        return matrices + 2 * self.head * head_positions + 4 * self.attention_width * pairs

    def forward_and_backward(self, tokens: int, pairs: int, head_positions: int) -> int:
        """FLOP of a training pass; attention has no weights, so its backward is always twice its forward."""
        head_factor = FORWARD_AND_BACKWARD if self.head_learns else FORWARD_AND_INPUT_GRADIENT
        return (
            2 * (FORWARD_AND_BACKWARD * self.trained + FORWARD_AND_INPUT_GRADIENT * self.frozen) * tokens
            + 2 * head_factor * self.head * head_positions
            + 4 * FORWARD_AND_BACKWARD * self.attention_width * pairs
        )


@dataclass(frozen=True)
class IterationFlop:
    """FLOP of one iteration by phase."""

    generate: int
    score: int
    update: int


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Count a model's matrices (it may live on the meta device): every linear layer once, adapters as they are."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    assert isinstance(head, nn.Linear)
    trained = frozen = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            if module.weight.requires_grad:
                trained += module.weight.numel()
            else:
                frozen += module.weight.numel()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelCost(
        trained=trained,
        frozen=frozen,
        head=head.weight.numel(),
        head_learns=head.weight.requires_grad,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def causal_pairs(length: int, start: int = 0) -> int:
    """(token, visible key) pairs of the tokens start … length - 1 of a causal sequence: token t sees t + 1 keys."""
    return length * (length + 1) // 2 - start * (start + 1) // 2


Lengths = Sequence[tuple[int, Sequence[int]]]
"""Of each prompt: its tokens, and those of each of its answers."""


def iteration_flop(
    lengths: Lengths, actor: ModelCost, reference: ModelCost, critic: ModelCost, one_critic_pass: bool = False
) -> IterationFlop:
    """FLOP of generating `lengths`, of scoring them (reference, critic, and a reward model of the critic's shape) and
    of one training pass over actor and critic.

    Log-probs and values of an answer's tokens follow from the tokens before them, so the last is not read for them; the
    reward follows from all.

    Args:
        one_critic_pass: the critic's training pass happens while scoring and gives the values, too (CriticPass in
            stages/ppo_update.py), so its forward counts once.
    """
    whole = [(prompt, answer) for prompt, answers in lengths for answer in answers]
    tokens = sum(prompt + answer for prompt, answer in whole)
    pairs = sum(causal_pairs(prompt + answer) for prompt, answer in whole)
    answer_tokens = sum(answer for _, answer in whole)
    work = (tokens - len(whole), pairs - tokens, answer_tokens)  # the last token of T sees T keys
    score = reference.forward(*work) + critic.forward(tokens, pairs, len(whole))
    update = actor.forward_and_backward(*work)
    if one_critic_pass:
        score += critic.forward_and_backward(*work)
    else:
        score += critic.forward(*work)
        update += critic.forward_and_backward(*work)
    return IterationFlop(generate=_generation_flop(lengths, actor), score=score, update=update)


def _generation_flop(lengths: Lengths, actor: ModelCost) -> int:
    """The prompt once, with one position of the head; then each answer's tokens but the last, which nobody reads."""
    flop = 0
    for prompt, answers in lengths:
        flop += actor.forward(prompt, causal_pairs(prompt), 1)
        for answer in answers:
            flop += actor.forward(answer - 1, causal_pairs(prompt + answer - 1, start=prompt), answer - 1)
    return flop


def decode_reads(
    answers: Iterable[tuple[int, int]], weight_bytes: int, key_value_bytes_per_token: int
) -> tuple[int, int]:
    """Bytes that the decode steps of one batch must read: (weights, keys and values).

    The batch decodes together, so the weights are read once a step; step s (from 1) of an answer reads the keys and
    values of its prompt and of the s tokens before. The first token of an answer comes from the prefill.

    Args:
        answers: (prompt length, answer length) of each row.
    """
    rows = list(answers)
    num_steps = max((answer for _, answer in rows), default=1) - 1
    visible = sum(causal_pairs(prompt + answer - 1, start=prompt) for prompt, answer in rows)
    return num_steps * weight_bytes, visible * key_value_bytes_per_token
