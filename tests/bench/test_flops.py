"""Counted FLOP: by hand, against a naive loop, and against PyTorch's own counter on a model that runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from threefold.bench.flops import (
    IterationFlop,
    ModelCost,
    causal_pairs,
    decode_reads,
    iteration_flop,
    model_cost,
)
from threefold.bench.random_models import random_causal_lm, random_scalar_model
from threefold.config.recipe import LoRASection
from threefold.machine import linear
from threefold.models.adapters import add_lora
from threefold.models.shapes import find_shape

CPU = torch.device("cpu")
META = torch.device("meta")
OPT = "opt:hidden=8,layers=3,heads=2,ffn=16,vocab=11"
LLAMA = "llama:hidden=8,layers=2,heads=4,kv_heads=2,head_dim=4,ffn=12,vocab=11,tied=0"


def causal_lm(text: str, device: torch.device = META) -> PreTrainedModel:
    return random_causal_lm(find_shape(text, "--actor"), device, seed=1)


def test_matrices_of_opt_by_hand() -> None:
    """A layer: four 8 x 8 and two 8 x 16 matrices; the head 11 x 8; 3 layers of 2 heads 4 wide."""
    cost = model_cost(causal_lm(OPT))
    assert cost == ModelCost(trained=3 * 512, frozen=0, head=88, head_learns=True, attention_width=24)


def test_matrices_of_a_llama_with_grouped_queries_by_hand() -> None:
    """A layer: q 8 x 16, k and v 8 x 8, o 16 x 8, three of 8 x 12; 2 layers of 4 heads 4 wide."""
    cost = model_cost(causal_lm(LLAMA))
    assert cost == ModelCost(2 * (128 + 64 + 64 + 128 + 288), 0, 88, True, 32)


def test_projected_embeddings_are_matrices_too() -> None:
    cost = model_cost(causal_lm(f"{OPT},embedding=4,post_norm=1"))
    assert cost.trained == 3 * 512 + 2 * 4 * 8
    assert cost.head == 11 * 4


def test_the_head_of_a_scalar_model_is_its_score() -> None:
    model = random_scalar_model(find_shape(OPT, "--critic"), META, seed=1)
    assert model_cost(model) == ModelCost(3 * 512, 0, 8, True, 24)


def test_adapters_learn_and_the_rest_is_frozen() -> None:
    """Rank 2: 2 x (8 + 8) for each of the four square matrices, 2 x (8 + 16) for each of the two others."""
    model = causal_lm(OPT, CPU)
    add_lora(model, LoRASection(rank=2), seed=1, field="ppo.actor_lora")
    assert model_cost(model) == ModelCost(3 * (4 * 32 + 2 * 48), 3 * 512, 88, False, 24)


def test_causal_pairs_is_the_sum_of_what_each_token_sees() -> None:
    assert causal_pairs(1) == 1
    assert causal_pairs(4) == 1 + 2 + 3 + 4
    assert causal_pairs(7, start=3) == 4 + 5 + 6 + 7
    assert causal_pairs(3, start=3) == 0


def test_forward_and_training_pass_by_hand() -> None:
    """10 tokens, 55 pairs, 4 positions of the head. Forward: 2 * 150 * 10 + 2 * 30 * 4 + 4 * 6 * 55 = 4,560. Training:
    trained thrice, frozen twice, a frozen head twice, attention thrice."""
    cost = ModelCost(trained=100, frozen=50, head=30, head_learns=False, attention_width=6)
    assert cost.forward(10, 55, 4) == 4560
    assert cost.forward_and_backward(10, 55, 4) == 2 * 10 * (300 + 100) + 2 * 2 * 30 * 4 + 3 * 4 * 6 * 55


def naive_iteration(
    lengths: list[tuple[int, list[int]]], actor: ModelCost, reference: ModelCost, critic: ModelCost
) -> IterationFlop:
    """Token by token."""

    def token(cost: ModelCost, sees: int, head: bool) -> int:
        return 2 * (cost.trained + cost.frozen) + 4 * cost.attention_width * sees + (2 * cost.head if head else 0)

    generate = score = update = 0
    for prompt, answers in lengths:
        generate += sum(token(actor, position + 1, position == prompt - 1) for position in range(prompt))
        for answer in answers:
            generate += sum(token(actor, position + 1, True) for position in range(prompt, prompt + answer - 1))
            for position in range(prompt + answer):
                predicts = position >= prompt - 1
                is_last = position == prompt + answer - 1
                score += token(critic, position + 1, is_last)
                if not is_last:
                    score += token(reference, position + 1, predicts) + token(critic, position + 1, predicts)
                    update += 3 * token(actor, position + 1, predicts) + 3 * token(critic, position + 1, predicts)
    return IterationFlop(generate, score, update)


def test_iteration_against_a_loop_over_tokens() -> None:
    actor = ModelCost(100, 0, 30, True, 6)
    critic = ModelCost(40, 0, 5, True, 4)
    lengths = [(5, [3, 1]), (1, [1]), (4, [6])]
    assert iteration_flop(lengths, actor, actor, critic) == naive_iteration(lengths, actor, actor, critic)


def test_one_layer_by_hand() -> None:
    """Width 2, one head, feed-forward 3, vocabulary 5; a prompt of 2 tokens with an answer of 2. The layer has
    4 * 4 + 2 * 6 = 28 weights. Reference: 3 tokens 168, 1 + 2 + 3 pairs 48, 2 positions of the head 40. Critic 168, 48,
    and 2 scores 8. Reward model: 4 tokens 224, 10 pairs 80, one score 4. Prefill 2 * 56 + 3 * 8 + 20, then one token
    that sees three: 56 + 24 + 20."""
    actor, critic = ModelCost(28, 0, 10, True, 2), ModelCost(28, 0, 2, True, 2)
    flop = iteration_flop([(2, [2])], actor, actor, critic)
    assert flop == IterationFlop(generate=156 + 100, score=256 + 224 + 308, update=3 * 256 + 3 * 224)
    together = iteration_flop([(2, [2])], actor, actor, critic, one_critic_pass=True)
    assert together == IterationFlop(generate=156 + 100, score=256 + 308 + 3 * 224, update=3 * 256)


def test_shared_prompts_are_read_once() -> None:
    actor, critic = ModelCost(100, 0, 30, True, 6), ModelCost(40, 0, 5, True, 4)
    shared = iteration_flop([(5, [1, 1, 1])], actor, actor, critic)
    alone = iteration_flop([(5, [1])], actor, actor, critic)
    assert shared.generate == alone.generate
    assert shared.score == 3 * alone.score


@pytest.mark.parametrize("text", [OPT, LLAMA, f"{OPT},embedding=4,post_norm=1"])
def test_counts_are_those_of_pytorchs_counter(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts the products that really run: eager attention computes the full square of 2 x 6^2 pairs, and the
    head runs at every position. It does not know oneDNN's products, so they are left out here."""
    monkeypatch.setattr(linear, "HAS_ONEDNN_LINEAR", False)
    model = causal_lm(text, CPU)
    model.set_attn_implementation("eager")
    ids = torch.arange(12).view(2, 6) % 11
    cost = model_cost(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids, use_cache=False)
    assert forward.get_total_flops() == cost.forward(12, 2 * 36, 12)
    with FlopCounterMode(display=False) as both:
        model(ids, use_cache=False).logits.square().mean().backward()
    assert both.get_total_flops() == cost.forward_and_backward(12, 2 * 36, 12)


def test_decode_reads_by_hand() -> None:
    """Two answers, 3 + 2 and 1 + 4 tokens, weights of 100 bytes, 10 bytes a token. Three steps after the prefill. The
    first row reads 4 tokens in one step, the second 2, 3 and 4 in three."""
    assert decode_reads([(3, 2), (1, 4)], 100, 10) == (300, 10 * (4 + 2 + 3 + 4))
    assert decode_reads([(3, 1)], 100, 10) == (0, 0)
