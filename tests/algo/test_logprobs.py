"""algo/logprobs.py against torch's log_softmax, hand-worked softmaxes and analytic gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import distributions
from tests.oracles.batches import oracle_settings
from threefold.algo.logprobs import chunked_logprobs, token_entropy, token_logprobs

FLOAT32 = 2e-6  # absolute, at logits of size 10


def test_hand_worked_softmax() -> None:
    # softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8; at temperature 1/2 the weights are squared: 1, 4, 25 of 30.
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(3, 1)
    ids = torch.tensor([0, 1, 2])
    for temperature, probabilities in ((1.0, [1 / 8, 2 / 8, 5 / 8]), (0.5, [1 / 30, 4 / 30, 25 / 30])):
        expected = torch.tensor([math.log(p) for p in probabilities])
        torch.testing.assert_close(token_logprobs(logits, ids, temperature), expected, atol=FLOAT32, rtol=0)
        by_hand = -sum(p * math.log(p) for p in probabilities)
        assert token_entropy(logits, temperature).tolist() == pytest.approx([by_hand] * 3, abs=FLOAT32)


def test_entropy_of_equal_logits_is_log_v_and_of_a_sure_thing_0() -> None:
    assert token_entropy(torch.full((5, 7), 3.0)).tolist() == pytest.approx([math.log(7)] * 5, abs=FLOAT32)
    assert token_entropy(torch.tensor([0.0, 200.0, 0.0])).item() == pytest.approx(0, abs=2e-5)  # logits of size 200


@oracle_settings
@given(
    logits=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    token=st.integers(0, 11),
    temperature=st.floats(0.3, 3),
)
def test_one_distribution_against_the_loop(logits: list[float], token: int, temperature: float) -> None:
    token %= len(logits)
    probabilities = distributions.softmax(logits, temperature)
    # 2e-5: a temperature of 0.3 makes logits of size 33, whose float32 spacing is 4e-6.
    found = token_logprobs(torch.tensor(logits), torch.tensor(token), temperature).item()
    assert found <= 0.0
    assert found == pytest.approx(math.log(probabilities[token]), abs=2e-5)
    entropy = token_entropy(torch.tensor(logits), temperature).item()
    assert entropy == pytest.approx(distributions.entropy(probabilities), abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_against_torch_log_softmax_with_any_leading_shape(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(3, 4, 50, generator=generator)
    ids = torch.randint(50, (3, 4), generator=generator)
    every = F.log_softmax(logits.double() / temperature, dim=-1)
    expected = every.gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, ids, temperature).double(), expected, atol=1e-5, rtol=0)
    expected_entropy = -(every.exp() * every).sum(-1)
    torch.testing.assert_close(token_entropy(logits, temperature).double(), expected_entropy, atol=1e-5, rtol=0)


def test_probabilities_of_all_tokens_sum_to_1() -> None:
    logits = 4 * torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    every = token_logprobs(logits.expand(40, 40), torch.arange(40), 0.8)
    assert every.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_gradient_is_onehot_minus_softmax_over_temperature() -> None:
    for temperature in (1.0, 0.6):
        values = [0.5, -1.0, 2.0, 0.1]
        logits = torch.tensor(values, requires_grad=True)
        token_logprobs(logits, torch.tensor(2), temperature).backward()
        assert logits.grad is not None
        by_hand = distributions.logprob_gradient(values, 2, temperature)
        assert logits.grad.tolist() == pytest.approx(by_hand, abs=FLOAT32)


def test_entropy_gradient() -> None:
    # dH/dx_i = -p_i (log p_i + H).
    values = [0.5, -1.0, 2.0, 0.1]
    logits = torch.tensor(values, requires_grad=True)
    token_entropy(logits).backward()
    p = distributions.softmax(values)
    h = distributions.entropy(p)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-q * (math.log(q) + h) for q in p], abs=FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_worked_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (6 * torch.randn(64, 300, generator=generator)).to(dtype)
    ids = torch.randint(300, (64,), generator=generator)
    exact = F.log_softmax(logits.double() / 0.9, dim=-1)
    expected = exact.gather(-1, ids[:, None])[:, 0]
    found, entropy = token_logprobs(logits, ids, 0.9), token_entropy(logits, 0.9)
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=2e-5, rtol=0)
    # The test can tell: the same in half precision is off by a hundred times the tolerance.
    in_half = F.log_softmax(logits / 0.9, dim=-1).gather(-1, ids[:, None])[:, 0]
    assert (in_half.double() - expected).abs().max() > 2e-3


class Head(nn.Module):
    """A linear head that notes how many rows it was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(11, 6, generator=generator).to(dtype))
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden @ self.weight.T


def chunked_run(chunk_tokens: int, num_tokens: int = 10) -> tuple[list[Tensor], list[int]]:
    """Log-probabilities, entropies, gradients of hidden and head weight for an uneven weighting of both outputs."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(num_tokens, 6, generator=generator, requires_grad=True)
    ids = torch.randint(11, (num_tokens,), generator=generator)
    weights = torch.randn(2, num_tokens, generator=generator)
    head = Head()
    logprobs, entropies = chunked_logprobs(hidden, ids, head, 0.8, chunk_tokens, entropy="trained")
    (weights[0] * logprobs + weights[1] * entropies).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return [logprobs.detach(), entropies.detach(), hidden.grad, head.weight.grad], head.rows


def unchunked_gradients() -> list[Tensor]:
    """What `chunked_run` should give, from torch's log_softmax over everything at once, in float64."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(10, 6, generator=generator).double().requires_grad_()
    ids = torch.randint(11, (10,), generator=generator)
    weights = torch.randn(2, 10, generator=generator).double()
    weight = Head().weight.detach().double().requires_grad_()
    every = F.log_softmax(hidden @ weight.T / 0.8, dim=-1)
    logprobs, entropies = every[range(10), ids], -(every.exp() * every).sum(-1)
    (weights[0] * logprobs + weights[1] * entropies).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprobs.detach(), entropies.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 9, 10, 11, 2048])
def test_chunked_values_and_gradients_equal_the_whole(chunk_tokens: int) -> None:
    for found, expected in zip(chunked_run(chunk_tokens)[0], unchunked_gradients(), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-6)


def test_the_head_never_sees_more_than_one_chunk_and_is_recomputed_only_when_that_saves_memory() -> None:
    assert chunked_run(4)[1][:3] == [4, 4, 2]
    assert sorted(chunked_run(4)[1]) == [2, 2, 4, 4, 4, 4]  # forward, and once more in the backward pass
    assert chunked_run(10)[1] == [10]
    head = Head()
    with torch.no_grad():
        chunked_logprobs(torch.zeros(10, 6), torch.zeros(10, dtype=torch.int64), head, chunk_tokens=4)
    assert head.rows == [4, 4, 2]


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[-1] if tensor.ndim else 0)
        return tensor

    hidden = torch.zeros(10, 6, requires_grad=True)
    ids = torch.zeros(10, dtype=torch.int64)
    for chunk_tokens, keeps_logits in ((10, True), (4, False)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunked_logprobs(hidden, ids, Head(), chunk_tokens=chunk_tokens)
        assert (11 in kept) == keeps_logits  # 11 is V


def test_chunked_trains_a_head_on_frozen_hidden_states() -> None:
    hidden, ids = torch.randn(7, 6, generator=torch.Generator().manual_seed(6)), torch.arange(7)
    gradients = []
    for chunk_tokens in (2, 7):
        head = Head()
        chunked_logprobs(hidden, ids, head, chunk_tokens=chunk_tokens)[0].sum().backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad)
        assert len(head.rows) == (1 if chunk_tokens == 7 else 2 * 4)  # recomputed although no gradient goes into hidden
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=0)


def test_chunked_with_a_bfloat16_model_returns_float32_of_its_logits() -> None:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(9, 6, generator=generator).bfloat16()
    ids = torch.randint(11, (9,), generator=generator)
    head = Head(torch.bfloat16)
    logprobs, entropies = chunked_logprobs(hidden, ids, head, chunk_tokens=4)
    assert logprobs.dtype == entropies.dtype == torch.float32
    logits = torch.cat([head(hidden[start : start + 4]) for start in (0, 4, 8)]).double()
    expected = F.log_softmax(logits, dim=-1)[range(9), ids]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


def test_no_tokens_at_all() -> None:
    logprobs, entropies = chunked_logprobs(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), Head())
    assert logprobs.shape == entropies.shape == (0,)
