"""Log-probabilities that decoding records equal those of the training forward, and both equal the plain definition.

Three ways to the same number, in every family, fp32, to 1e-5 nats: the decode loop (left-padded, cached, rows taken out
of the batch), `CausalForward.target_logprobs` on the right-padded whole, and log_softmax of transformers' logits for
each row alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.families_under_test import (
    CONFIGS,
    CONTEXT,
    VARIANTS,
    VOCAB,
    ragged_ids,
    right_padded,
    tiny_causal_lm,
)
from threefold.config.recipe import SamplingSection
from threefold.inference.generate import decoder_for, generate
from threefold.models.forward import CausalForward
from threefold.models.loading import load_causal_lm, load_tokenizer
from threefold.types import Rollout

TOLERANCE_NATS = 1e-5
PROMPT_LENGTHS = [3, 17, 1, 9, 12, 5, 2, 20]
STOPS = frozenset(range(3, 13))


def sampled(
    model: PreTrainedModel, sampling: SamplingSection, stops: frozenset[int], lengths: list[int] = PROMPT_LENGTHS
) -> list[Rollout]:
    prompts = ragged_ids(1, lengths)
    decoder = decoder_for(model, lambda _: None)
    return generate(decoder, prompts, sampling, stops, torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_parity(
    model: PreTrainedModel, rollouts: list[Rollout], temperature: float, tolerance: float = TOLERANCE_NATS
) -> None:
    whole = [rollout.prompt_ids.tolist() + rollout.response_ids.tolist() for rollout in rollouts]
    ids, mask = right_padded(whole)
    targets = mask.clone()
    for row, rollout in enumerate(rollouts):
        targets[row, : len(rollout.prompt_ids)] = False
    trained, _ = CausalForward(model).target_logprobs(ids, targets, temperature)
    pieces = trained.split([len(rollout.response_ids) for rollout in rollouts])
    for sequence, rollout, piece in zip(whole, rollouts, pieces, strict=True):
        logits = model(input_ids=torch.tensor([sequence])).logits[0, len(rollout.prompt_ids) - 1 : -1]
        plain = (logits.float() / temperature).log_softmax(-1).gather(1, rollout.response_ids[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, plain, atol=tolerance, rtol=0)
        torch.testing.assert_close(piece, plain, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_decoding_equals_training_with_rows_leaving_the_batch(family: str) -> None:
    model = tiny_causal_lm(family)
    rollouts = sampled(model, SamplingSection(temperature=1.4, max_new_tokens=24), STOPS)
    lengths = sorted(len(rollout.response_ids) for rollout in rollouts)
    # The batch was really compacted, and rows went on afterwards, left padding and all.
    assert lengths[len(lengths) // 2 - 1] < lengths[-1]
    assert_parity(model, rollouts, 1.4)


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_one_token_answers_that_all_stop_at_once_and_a_batch_of_one(family: str) -> None:
    model = tiny_causal_lm(family)
    at_once = sampled(model, SamplingSection(temperature=1.6, max_new_tokens=8), frozenset(range(VOCAB)))
    assert [len(rollout.response_ids) for rollout in at_once] == [1] * len(PROMPT_LENGTHS)
    assert_parity(model, at_once, 1.6)
    alone = sampled(model, SamplingSection(temperature=1.6, max_new_tokens=8), frozenset(), [4])
    assert len(alone[0].response_ids) == 8
    assert_parity(model, alone, 1.6)


@pytest.mark.parametrize("family", ["opt", "gpt2", "mistral", "gemma2"])
def test_parity_is_of_the_full_distribution_when_sampling_is_restricted(family: str) -> None:
    model = tiny_causal_lm(family)
    sampling = SamplingSection(temperature=1.3, top_k=8, top_p=0.8, min_new_tokens=3, max_new_tokens=12)
    rollouts = sampled(model, sampling, STOPS)
    assert any(bool((rollout.sampled_logprobs - rollout.logprobs > 0.01).any()) for rollout in rollouts)
    assert_parity(model, rollouts, 1.3)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "bloom", "mistral"])
def test_parity_up_to_the_last_position_of_the_context(family: str) -> None:
    model = tiny_causal_lm(family)
    rollouts = sampled(model, SamplingSection(max_new_tokens=24), frozenset(), [CONTEXT - 24, 2])
    assert len(rollouts[0].prompt_ids) + len(rollouts[0].response_ids) == CONTEXT
    assert_parity(model, rollouts, 1.0)


@pytest.mark.real
@pytest.mark.parametrize(("name", "stops"), [("stories260K", {1, 2}), ("babyllama-char-1M", {1, 2})])
def test_parity_of_real_checkpoints(shared: Path, name: str, stops: set[int]) -> None:
    source = str(shared / "models" / name)
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    texts = ["Once upon a time", "Lily", "The dog was very sad.\nHe said:\nno", "One day, Tom and his mom went to the"]
    prompts = [tokenizer(text).input_ids for text in texts]
    sampling = SamplingSection(temperature=0.8, max_new_tokens=40)
    rollouts = generate(
        decoder_for(model, lambda _: None),
        prompts,
        sampling,
        frozenset(stops | {prompts[1][-1]}),
        torch.Generator().manual_seed(0),
    )
    assert {len(rollout.response_ids) for rollout in rollouts} != {40}
    assert prompts[0][0] == 1  # BOS, which is a stop id as well
    # transformers' own float32 is up to 2.5e-5 away from its float64 on these
    assert_parity(model, rollouts, 0.8, tolerance=3e-5)
