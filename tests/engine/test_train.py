"""One optimizer step: the same whatever the micro-batches, and refused as a whole when a number in it is not finite.

Gradients of micro-batches against one batch: 1e-12 in float64, 1e-6 in float32; weights after three steps: 1e-10 and
1e-5 (AdamW divides by the gradient's own size, which magnifies rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.families_under_test import ragged_ids, right_padded, tiny_causal_lm
from threefold.config.recipe import OptimizerSection
from threefold.engine.sharing import MicroBatching
from threefold.engine.train import TrainEngine
from threefold.errors import TrainingError

CPU = torch.device("cpu")
SETTINGS = OptimizerSection(learning_rate=0.01, weight_decay=0.1, grad_clip=1.0, scheduler="linear")
SEQUENCES = ragged_ids(6, [9, 4, 7, 2, 11, 3, 5])
NUM_TARGETS = sum(len(sequence) - 1 for sequence in SEQUENCES)


def make_engine(model: nn.Module, settings: OptimizerSection = SETTINGS, **arguments: Any) -> TrainEngine:
    return TrainEngine(model, settings, 10, CPU, torch.float32, "step 1, test", **arguments)


def lm_loss(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Sum over all targets of some sequences, divided by the count of the whole batch."""
    ids, mask = right_padded(sequences)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / NUM_TARGETS


def backward_in_pieces(engine: TrainEngine, micro_batch_size: int) -> None:
    for part in MicroBatching(max_sequences=micro_batch_size).of(SEQUENCES, len):
        engine.backward(lambda part=part: lm_loss(engine.model, part.items), part.counts)  # type: ignore[misc]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def backward_of(engine: TrainEngine, loss: Callable[[Tensor], Tensor]) -> None:
    (weight,) = engine.model.parameters()
    engine.backward(lambda: loss(weight))


def line(value: float = 1.0) -> nn.Module:
    """One weight, and nothing else."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize(
    ("dtype", "gradient_tolerance", "weight_tolerance"), [(torch.float64, 1e-12, 1e-10), (torch.float32, 1e-6, 1e-5)]
)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_do_not_change_the_step(
    micro_batch_size: int, dtype: torch.dtype, gradient_tolerance: float, weight_tolerance: float
) -> None:
    whole, pieces = (make_engine(tiny_causal_lm("llama").to(dtype)) for _ in range(2))
    before = weights(whole.model)
    for step in range(3):
        backward_in_pieces(whole, 0)
        backward_in_pieces(pieces, micro_batch_size)
        if step == 0:
            gradients = {name: p.grad for name, p in whole.model.named_parameters()}
            assert max(float(g.abs().max()) for g in gradients.values() if g is not None) > 0.01
            for name, parameter in pieces.model.named_parameters():
                torch.testing.assert_close(parameter.grad, gradients[name], atol=gradient_tolerance, rtol=0)
        expected, found = whole.step(), pieces.step()
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert found.learning_rate == expected.learning_rate
    for name, parameter in pieces.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), atol=weight_tolerance, rtol=0)
        assert not torch.equal(parameter, before[name])


def test_a_step_is_that_of_plain_pytorch() -> None:
    engine, plain = make_engine(tiny_causal_lm("llama")), tiny_causal_lm("llama")
    settings = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(settings, lr=0.01, betas=(0.9, 0.95))
    for step in range(4):
        backward_in_pieces(engine, 0)
        result = engine.step()
        optimizer.zero_grad()
        loss = lm_loss(plain, SEQUENCES)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None))
        assert norm > 1.0  # so clipping is at work
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 10)
        optimizer.step()
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        assert result.learning_rate == pytest.approx(0.01 * (1 - step / 10))
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), atol=1e-5, rtol=0)


def test_gradients_do_not_pile_up_over_steps() -> None:
    engine = make_engine(line(), OptimizerSection(grad_clip=0))
    for _ in range(3):
        backward_of(engine, lambda weight: 3 * weight.sum())
        assert engine.step().grad_norm == 3.0


def test_without_clipping_the_gradient_is_left_alone() -> None:
    """AdamW's second step shows the first gradient's size relative to the second's: with clipping both would be 1."""
    results = {}
    for clip in (0.0, 1.0):
        model = line()
        engine = make_engine(model, OptimizerSection(learning_rate=0.1, grad_clip=clip, scheduler="constant"))
        for slope in (100.0, 2.0):
            backward_of(engine, lambda weight, slope=slope: slope * weight.sum())  # type: ignore[misc]
            assert engine.step().grad_norm == slope  # before clipping, in both cases
        results[clip] = float(next(model.parameters()).detach())
    assert results[1.0] == pytest.approx(0.8, abs=1e-5)
    assert results[0.0] > 0.81


@pytest.mark.parametrize("poison", ["loss is nan", "loss is inf", "gradient is nan", "gradient is inf"])
def test_a_number_that_is_not_finite_stops_before_the_step(poison: str) -> None:
    model = tiny_causal_lm("llama")
    engine = make_engine(model, ema_decay=0.5)
    backward_in_pieces(engine, 2)
    engine.step()
    before, optimizer_state = weights(model), str(engine._optimizer.state_dict())
    assert engine.ema is not None
    average = {name: weight.clone() for name, weight in engine.ema._weights.items()}

    def poisoned() -> Tensor:
        weight = next(model.parameters()).sum()
        if poison.startswith("gradient"):  # sqrt at 0: the value is 0, the slope infinite or undefined
            return (weight * 0).sqrt() if poison.endswith("nan") else (weight - weight.detach()).sqrt()
        return weight + float(poison.split()[-1])  # the gradient is finite

    backward_in_pieces(engine, 2)
    engine.backward(poisoned)
    with pytest.raises(
        TrainingError, match=r"step 1, test, optimizer step 2: loss .*, gradient norm .*stopped"
    ) as caught:
        engine.step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(weight, average[name]) for name, weight in engine.ema._weights.items())
    assert str(engine._optimizer.state_dict()) == optimizer_state
    assert engine.num_steps == 1

    # Who drops the batch goes on as if it had never been.
    engine.discard()
    other = make_engine(tiny_causal_lm("llama"), ema_decay=0.5)
    for _ in range(2):
        backward_in_pieces(other, 2)
        expected = other.step()
    backward_in_pieces(engine, 2)
    assert engine.step() == expected
    assert all(torch.equal(p, other.model.get_parameter(name)) for name, p in model.named_parameters())


def test_discard_forgets_gradients_and_loss() -> None:
    engine = make_engine(line(), OptimizerSection(grad_clip=0))
    backward_of(engine, lambda weight: 50 * weight.sum())
    engine.discard()
    backward_of(engine, lambda weight: 2 * weight.sum())
    result = engine.step()
    assert (result.loss, result.grad_norm) == (2.0, 2.0)


def test_measure_runs_the_closure_and_nothing_else() -> None:
    model = tiny_causal_lm("llama")
    engine = make_engine(model)
    seen: list[Tensor] = []

    def statistics() -> Tensor:
        seen.append(lm_loss(model, SEQUENCES))
        return seen[-1]

    engine.measure(statistics)
    assert len(seen) == 1
    assert not seen[0].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    backward_in_pieces(engine, 0)
    assert engine.step().loss == pytest.approx(float(seen[0]), abs=1e-6)  # not counted in the loss


def test_frozen_weights_stay() -> None:
    model = tiny_causal_lm("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    engine = make_engine(model)
    before = weights(model)
    backward_in_pieces(engine, 0)
    engine.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == before.keys() - {"model.embed_tokens.weight"}


def test_the_average_follows_each_step_once() -> None:
    model = line(1.0)
    engine = make_engine(model, OptimizerSection(learning_rate=0.1, scheduler="constant"), ema_decay=0.75)
    assert engine.ema is not None
    expected = 1.0
    for _ in range(3):
        for _ in range(2):  # micro-batches do not count
            backward_of(engine, lambda weight: weight.sum())
        engine.step()
        expected = 0.75 * expected + 0.25 * float(next(model.parameters()).detach())
    with engine.ema.applied_to(model):
        assert float(next(model.parameters()).detach()) == pytest.approx(expected, abs=1e-6)
    assert make_engine(line()).ema is None
    assert engine.num_steps == 3


def test_precision_of_the_forward_pass_is_the_engines() -> None:
    model = nn.Linear(2, 2)
    engine = TrainEngine(model, SETTINGS, 10, CPU, torch.bfloat16, "test")
    dtypes = []

    def loss() -> Tensor:
        output = model(torch.ones(1, 2))
        dtypes.append(output.dtype)
        return output.float().sum()  # type: ignore[no-any-return]

    engine.backward(loss)
    engine.measure(loss)
    engine.step()
    assert dtypes == [torch.bfloat16] * 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_stage_of_no_steps_can_be_built() -> None:
    TrainEngine(line(), SETTINGS, 0, CPU, torch.float32, "test")
