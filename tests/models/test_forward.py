"""Forward passes by role, against transformers' own full forward: log-probs, scores and gradients to 1e-5."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families_under_test import (
    CONFIGS,
    NOT_PLAIN,
    PAD,
    ragged_ids,
    right_padded,
    tiny_causal_lm,
    tiny_scalar_model,
)
from threefold.models.forward import CausalForward, answer_scores, scalars_per_token, target_values
from threefold.models.loading import set_score_statistics

LENGTHS = [9, 2, 14, 5]
SCALAR_FAMILIES = [family for family in CONFIGS if family != "cohere"]  # transformers has no classifier for it


def batch_with_targets() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets [4, 14]: about half of the real tokens, each row's last among them, never a first one."""
    ids, mask = right_padded(ragged_ids(3, LENGTHS))
    targets = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    targets[torch.arange(4), torch.tensor(LENGTHS) - 1] = True
    targets[:, 0] = False
    return ids, mask, targets


def ids_and_targets() -> tuple[Tensor, Tensor]:
    ids, _, targets = batch_with_targets()
    return ids, targets


def plain_logprobs(model: PreTrainedModel, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the targets, one row at a time from the model's whole logits, nothing padded."""
    ids, _, targets = batch_with_targets()
    logprobs, entropies = [], []
    for row, length in enumerate(LENGTHS):
        logits = model(input_ids=ids[row : row + 1, :length]).logits[0]
        distribution = (logits / temperature).log_softmax(dim=-1)
        for position in targets[row].nonzero()[:, 0].tolist():
            before = distribution[position - 1]
            logprobs.append(before[ids[row, position]])
            entropies.append(-(before.exp() * before).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("family", CONFIGS)
def test_target_logprobs_are_log_softmax_of_the_whole_logits(family: str) -> None:
    model = tiny_causal_lm(family)
    for temperature in (1.0, 0.6):
        found, entropies = CausalForward(model).target_logprobs(*ids_and_targets(), temperature)
        expected, expected_entropies = plain_logprobs(model, temperature)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_whole_logits(family: str) -> None:
    model = tiny_causal_lm(family)

    def gradients(logprobs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(logprobs.mean(), list(model.parameters()), allow_unused=True))

    found = gradients(CausalForward(model).target_logprobs(*ids_and_targets())[0])
    expected = gradients(plain_logprobs(model, 1.0)[0])
    assert any(gradient is not None and float(gradient.abs().max()) > 0.01 for gradient in expected)
    names = [name for name, _ in model.named_parameters()]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_is_applied_alone_only_where_that_is_the_whole_story(family: str) -> None:
    calls = []
    model = tiny_causal_lm(family)
    forward = CausalForward(model)
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    ids, _mask, targets = batch_with_targets()
    forward.target_logprobs(ids, targets)
    whole = family in NOT_PLAIN
    assert calls == [torch.Size([*ids.shape, 32]) if whole else torch.Size([int(targets.sum()), calls[0][-1]])]


@pytest.mark.parametrize("family", sorted(NOT_PLAIN))
def test_a_cap_that_a_fresh_model_hardly_feels_is_noticed(family: str) -> None:
    """A small model's first logits are so small that a cap changes them by less than rounding; trained, it matters."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    if family == "gemma2":
        config.final_logit_softcapping = 30.0
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        assert float(logits.abs().max()) < 1e-2
    forward = CausalForward(model)
    model.load_state_dict(tiny_causal_lm(family).state_dict())
    with torch.no_grad():
        next(iter(model.get_output_embeddings().parameters())).mul_(30)
    found, _ = forward.target_logprobs(*ids_and_targets())
    torch.testing.assert_close(found, plain_logprobs(model, 1.0)[0], atol=1e-4, rtol=1e-5)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_causal_lm("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    CausalForward(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model.get_output_embeddings()._forward_hooks


def test_the_first_token_of_a_sequence_cannot_be_a_target() -> None:
    ids, _mask, targets = batch_with_targets()
    targets[2, 0] = True
    with pytest.raises(ValueError, match="first token"):
        CausalForward(tiny_causal_lm("opt")).target_logprobs(ids, targets)


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_what_fills_a_batch_does_not_matter(family: str) -> None:
    model, scalar = tiny_causal_lm(family), tiny_scalar_model(family)
    ids, mask, targets = batch_with_targets()
    other = ids.masked_fill(~mask, 11)
    forward = CausalForward(model)
    torch.testing.assert_close(
        forward.target_logprobs(other, targets)[0],
        forward.target_logprobs(ids, targets)[0],
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(
        scalars_per_token(scalar, other)[mask], scalars_per_token(scalar, ids)[mask], atol=1e-6, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("family", SCALAR_FAMILIES)
def test_answer_scores_are_the_logits_of_the_classifier(family: str) -> None:
    model = tiny_scalar_model(family)
    sequences = [[token if token != PAD else 7 for token in row] for row in ragged_ids(8, LENGTHS)]
    ids, mask = right_padded(sequences)
    scores = answer_scores(model, ids, torch.tensor(LENGTHS))
    theirs = model(input_ids=ids, attention_mask=mask.long()).logits
    assert theirs.shape == (4, 1)
    assert float(theirs.std()) > 0.05
    torch.testing.assert_close(scores, theirs[:, 0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_last_token_that_is_the_pad_id_is_scored_all_the_same(family: str) -> None:
    """transformers looks for the last id that is not the pad id, and so takes an earlier token; we take the last."""
    model = tiny_scalar_model(family)
    sequences = [[5, 6, 7, PAD], [8, PAD, PAD], [9, 10, 11, 12, 13, 14]]
    ids, mask = right_padded(sequences)
    scores = answer_scores(model, ids, mask.sum(dim=1))
    for score, sequence in zip(scores, sequences, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        torch.testing.assert_close(score, model.score(hidden)[0], atol=1e-5, rtol=0)
    theirs = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    assert torch.allclose(scores[2], theirs[2], atol=1e-5)
    assert not torch.allclose(scores[:2], theirs[:2], atol=1e-3)


@torch.no_grad()
def test_scalars_are_the_head_at_every_position() -> None:
    model = tiny_scalar_model("opt-350m")
    sequences = ragged_ids(8, LENGTHS)
    ids, _mask = right_padded(sequences)
    scalars = scalars_per_token(model, ids)
    assert scalars.shape == ids.shape
    assert scalars.dtype == torch.float32
    for row, sequence in enumerate(sequences):
        for length in range(1, len(sequence) + 1):  # a causal model's scalar is the score of the text so far
            (alone,) = answer_scores(
                model,
                torch.tensor([sequence[:length]]),
                torch.tensor([length]),
            )
            assert float(scalars[row, length - 1]) == pytest.approx(float(alone), abs=1e-5)


@torch.no_grad()
def test_values_are_of_the_state_before_each_target_in_normalised_units() -> None:
    model = tiny_scalar_model("llama")
    ids, _mask, targets = batch_with_targets()
    scalars = scalars_per_token(model, ids)
    places = [(row, position) for row in range(4) for position in range(14) if targets[row, position]]
    raw = [float(scalars[row, position - 1]) for row, position in places]
    assert target_values(model, ids, targets).tolist() == pytest.approx(raw, abs=1e-6)
    set_score_statistics(model, -1.5, 0.25)
    expected = [(value + 1.5) * 4 for value in raw]
    assert target_values(model, ids, targets).tolist() == pytest.approx(expected, abs=1e-5)


def test_half_precision_gives_float32_results() -> None:
    model, scalar = tiny_causal_lm("llama"), tiny_scalar_model("llama")
    ids, _mask, targets = batch_with_targets()
    exact, _ = CausalForward(model).target_logprobs(ids, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, entropies = CausalForward(model).target_logprobs(ids, targets)
        scores = scalars_per_token(scalar, ids)
    assert rough.dtype == entropies.dtype == scores.dtype == torch.float32
    assert 0 < float((rough - exact).detach().abs().max()) < 0.5
    assert math.isfinite(float(scores.detach().sum()))
