"""lm_loss_sum with chunked_logprobs against the loss that transformers itself computes, on tiny random models.

Ragged batches padded on the right, labels -100 outside the trained tokens, the pad id equal to the stop id. Loss to
1e-5, gradients of every parameter to 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from threefold.algo.logprobs import chunked_logprobs
from threefold.algo.losses import lm_loss_sum

STOP = PAD = 2
VOCAB = 32
LENGTHS = [9, 2, 6, 5]
PROMPTS = [4, 1, 5, 0]  # tokens at the start of each row that are not trained


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.5,
            pad_token_id=PAD,
            eos_token_id=STOP,
        )
    )


def tiny_opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            word_embed_proj_dim=16,
            init_std=0.5,
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=STOP,
            eos_token_id=STOP,
        )
    )


def ragged_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and trained flags, all [4, 9]; each answer ends with the stop token, trained too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (4, 9), generator=generator)
    positions = torch.arange(9)
    lengths, prompts = torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    ids[positions == lengths - 1] = STOP
    real = positions < lengths
    ids[~real] = PAD
    return ids, real, real & (positions >= prompts)


def our_loss_sum(model: PreTrainedModel, rows: slice, chunk_tokens: int) -> tuple[Tensor, int]:
    """Sum over the trained targets of some rows, and their number; the hidden state before a token predicts it."""
    ids, real, trained = (tensor[rows] for tensor in ragged_batch())
    hidden = model.base_model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    targets = trained[:, 1:]
    logprobs, _ = chunked_logprobs(
        hidden[:, :-1][targets], ids[:, 1:][targets], model.get_output_embeddings(), chunk_tokens=chunk_tokens
    )
    return lm_loss_sum(logprobs, torch.ones_like(logprobs, dtype=torch.bool)), int(targets.sum())


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_opt])
def test_loss_and_gradients_equal_those_of_transformers(make_model: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make_model()
    ids, real, trained = ragged_batch()
    theirs = model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~trained, -100)).loss
    theirs.backward()
    expected = gradients(model)
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01  # there is something to compare

    # All at once, and in chunks over micro-batches of unequal size: the count is that of the whole batch.
    _, count = our_loss_sum(model, slice(None), 2048)
    assert count == sum(LENGTHS) - sum(PROMPTS) - 1  # the first token of the last row has nothing before it
    for cuts, chunk_tokens in (([0, 4], 2048), ([0, 4], 5), ([0, 1, 2, 4], 3)):
        model.zero_grad()
        total = 0.0
        for start, end in itertools.pairwise(cuts):
            loss = our_loss_sum(model, slice(start, end), chunk_tokens)[0] / count
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(theirs.item(), abs=1e-5)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, slope in expected.items():
            torch.testing.assert_close(found[name], slope, atol=1e-6, rtol=1e-5, msg=name)
