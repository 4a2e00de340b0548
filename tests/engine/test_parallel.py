"""A model over the processes: whole and in shards the same weights, the same gradients, the same norm.

Each launch of two processes works through several cases. Gradients against one process: 1e-5 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests.models.families_under_test import CONFIGS, ragged_ids, right_padded, tiny_causal_lm, tiny_scalar_model
from tests.ranks import run_on_ranks
from threefold.config.recipe import LoRASection
from threefold.engine import parallel as parallel_module
from threefold.engine.distributed import ALONE, World
from threefold.engine.parallel import ParallelModel, blocks_of, like, local, state_names
from threefold.errors import ConfigError
from threefold.models.adapters import add_lora

CPU = torch.device("cpu")
IDS, _ = right_padded(ragged_ids(3, [5, 9]))
FAMILIES = ("opt", "llama", "gpt2", "opt-350m", "bloom")


def model_of(family: str, rank: int = 0) -> PreTrainedModel:
    """41 words do not divide by two: one process holds a row more than the other. "scalar" has a head of one row, of
    which one process holds nothing."""
    model = tiny_scalar_model("llama") if family == "scalar" else tiny_causal_lm(family, vocab_size=41)
    add_lora(model, LoRASection(rank=rank), 0, "a test")
    return model


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loss_of(model: PreTrainedModel) -> Tensor:
    output: Tensor = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    head = model.get_output_embeddings() or model.score
    return head(output).square().mean()  # type: ignore[no-any-return]


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- whole weights


def own_parameters(unit: nn.Module, blocks: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Of a block everything, of the model what is in no block."""
    inner = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {n: p for n, p in unit.named_parameters() if unit in blocks or id(p) not in inner}


def visit_units(world: World, stage: int, families: tuple[str, ...]) -> list[str]:
    """What is wrong with `units`, if anything."""
    wrong = []
    for family in families:
        plain, model = model_of(family), model_of(family)
        parallel = ParallelModel(model, world, CPU, stage)
        blocks, names = blocks_of(model), {id(module): name for name, module in model.named_modules()}
        before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
        if stage >= 2 and not all(isinstance(p, DTensor) for p in model.parameters()):
            wrong.append(f"{family}: not sharded")
        seen = []
        for unit in parallel.units():
            prefix = names[id(unit)]
            for name, parameter in own_parameters(unit, blocks).items():
                full_name = f"{prefix}.{name}" if prefix else name
                seen.append(full_name)
                expected = plain.get_parameter(full_name)
                if isinstance(parameter, DTensor) or not torch.equal(parameter, expected):
                    wrong.append(f"{family}: {full_name} is not whole")
        if sorted(seen) != sorted(before):
            wrong.append(f"{family}: {set(before) ^ set(seen)} of no unit or of two")
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) != parallel.sharded or not torch.equal(local(parameter), before[name]):
                wrong.append(f"{family}: {name} is not what it was")
        if seen and family == families[0]:
            iterator = parallel.units()
            next(iterator)
            iterator.close()  # whoever asked has failed
            if any(isinstance(parameter, DTensor) != parallel.sharded for parameter in model.parameters()):
                wrong.append(f"{family}: a unit that was left early stays whole")
    return wrong


def visit_units_of_stages(world: World) -> list[list[str]]:
    return [visit_units(world, stage, (*FAMILIES, "scalar")) for stage in (1, 2, 3)]


def test_units_are_whole_while_they_are_visited_and_shards_again() -> None:
    assert run_on_ranks(visit_units_of_stages, 2) == [[[], [], []]] * 2


def test_units_of_one_process() -> None:
    assert visit_units(ALONE, 0, (*CONFIGS, "scalar")) == []


@pytest.mark.parametrize("family", [*CONFIGS, "scalar"])
def test_blocks(family: str) -> None:
    assert len(blocks_of(model_of(family))) == 2


@pytest.mark.parametrize("family", [*CONFIGS, "scalar"])
@pytest.mark.parametrize("rank", [0, 2])
def test_names_are_those_of_the_state_dict(family: str, rank: int) -> None:
    model = model_of(family, rank)
    model.register_buffer("of_the_test", torch.ones(2))
    named, expected = state_names(model), model.state_dict()
    assert named.keys() == expected.keys()
    assert all(named[name].data_ptr() == tensor.data_ptr() for name, tensor in expected.items())


WHOLE_CASES = [(s, f, 0) for s in (0, 2, 3) for f in (*FAMILIES, "scalar")] + [(3, "opt", 2), (2, "llama", 2)]


def gather_full_states(world: World) -> list[tuple[bool, bool, int, bool]]:
    """Bits and names those of the plain model's state dict, tied ones in one place; how many; and shards afterwards."""
    found = []
    for stage, family, rank in WHOLE_CASES:
        expected, model = copies(model_of(family, rank)), model_of(family, rank)
        parallel = ParallelModel(model, world, CPU, stage, frozen_base="sharded")
        state = parallel.full_state()
        tied = [name for name in ("lm_head.weight", "transformer.wte.weight") if name in state]
        pointers = {state[name].data_ptr() for name in state if state[name].numel()}
        is_tied = getattr(model.config, "tie_word_embeddings", False) and family != "scalar"
        apart = len(pointers) == len(state) - (1 if is_tied and tied else 0)
        plain = all(not isinstance(t, DTensor) and not t.requires_grad for t in state.values())
        still = any(isinstance(p, DTensor) for p in model.parameters()) == parallel.sharded
        found.append((identical(state, expected) or not state, apart and plain, len(state), still))
    return found


def test_the_full_state_is_the_plain_models_on_the_first_process() -> None:
    first, second = run_on_ranks(gather_full_states, 2)
    assert all(same and apart and count > 0 and still for same, apart, count, still in first)
    assert all(count == 0 and still for _, _, count, still in second)


def test_like_and_local() -> None:
    plain = torch.ones(3)
    assert local(plain) is plain
    assert like(plain, torch.zeros(3)).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------- forward


def forward_and_backward(world: World, family: str, stage: int, rank: int) -> list[dict[str, Tensor]]:
    """Whole gradients of two steps, between which the weights move and a pass without a gradient is made."""
    model = model_of(family, rank)
    parallel = ParallelModel(model, world, CPU, stage, frozen_base="sharded")
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        with torch.no_grad():
            value = parallel.run(lambda: loss_of(model))
        assert not value.requires_grad
        for _ in range(2):  # they accumulate
            (parallel.run(lambda: loss_of(model)) / (2 * world.size)).backward()
        parallel.sum_gradients()
        gradients = {n: p.grad for n, p in parallel.trained.items() if p.grad is not None}
        found.append({n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in gradients.items()})
        found[-1]["loss"] = value
        with torch.no_grad():
            for parameter in parallel.trained.values():
                if parameter.grad is not None:
                    local(parameter).sub_(0.1 * local(parameter.grad))
                    parameter.grad = None
    return found


GRADIENT_CASES = [(f, stage, rank) for f, rank in (("opt", 0), ("scalar", 0), ("llama", 2)) for stage in (0, 2, 3)]


def forward_and_backward_of_all(world: World) -> list[list[dict[str, Tensor]]]:
    return [forward_and_backward(world, *case) for case in GRADIENT_CASES]


def test_gradients_are_those_of_one_process() -> None:
    """Also after the weights have moved: what was gathered before is not used again."""
    for outcome in run_on_ranks(forward_and_backward_of_all, 2):
        for (family, _, rank), found in zip(GRADIENT_CASES, outcome, strict=True):
            expected = forward_and_backward(ALONE, family, 0, rank)
            assert not torch.equal(expected[0]["loss"], expected[1]["loss"])
            for one, other in zip(found, expected, strict=True):
                assert one.keys() == other.keys()
                for name, gradient in other.items():
                    torch.testing.assert_close(one[name], gradient, atol=1e-5, rtol=1e-5)


def gathered_memory(world: World) -> list[list[bool]]:
    """Whether weights are shards: at first, after a pass without a gradient, after forward, after backward."""
    found = []
    for stage in (2, 3):
        model = model_of("llama")
        parallel = ParallelModel(model, world, CPU, stage)

        def sharded(model: nn.Module = model) -> bool:
            return all(isinstance(parameter, DTensor) for parameter in model.parameters())

        states = [sharded()]
        with torch.no_grad():
            parallel.run(lambda model=model: loss_of(model))
        states.append(sharded())
        loss = parallel.run(lambda model=model: loss_of(model))
        states.append(sharded())
        loss.backward()
        found.append([*states, sharded()])
    return found


def test_stage_2_keeps_what_it_has_gathered_until_the_backward_pass() -> None:
    """Stage 3 keeps no block (the root's own weights stay until its backward pass, in both)."""
    for stage_2, stage_3 in run_on_ranks(gathered_memory, 2):
        assert stage_2 == [True, True, False, True]
        assert stage_3[:2] == [True, True]
        assert stage_3[3]


def autocast_of_passes(world: World) -> list[tuple[bool, bool, bool, bool, bool]]:
    """Whether casts of weights are kept for reuse: within a pass, when it is computed again, and after either, also
    after one that failed."""
    found = []
    for stage in (0, 3):
        model = model_of("llama")
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name within transformers 5 has changed
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        parallel = ParallelModel(model.train(), world, CPU, stage)
        seen: list[bool] = []
        for block in blocks_of(model):
            block.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_autocast_cache_enabled()))

        def fail() -> Tensor:
            raise ValueError("of a test")

        with torch.autocast("cpu", torch.bfloat16):
            loss = parallel.run(lambda model=model: loss_of(model))
            after = torch.is_autocast_cache_enabled()
            with pytest.raises(ValueError, match="of a test"):
                parallel.run(fail)
            after_failure = torch.is_autocast_cache_enabled()
        first = list(seen)
        loss.backward()
        found.append((any(first), after, after_failure, any(seen[len(first) :]), len(seen) == 2 * len(first)))
    return found


def test_autocast_keeps_no_copies_of_gathered_weights() -> None:
    """Else a pass would hold every block in bfloat16 at its end, whatever is let go of."""
    plain, sharded = (True, True, True, True, True), (False, True, True, False, True)
    assert run_on_ranks(autocast_of_passes, 2) == [[plain, sharded]] * 2


# ---------------------------------------------------------------------------------------------------------- gradients


def draw_gradients(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def clip_in_shards(world: World, stage: int, max_norm: float, size: float) -> tuple[float, dict[str, Tensor]]:
    """The same gradients on all processes, whole or each one's part of them."""
    model, plain = model_of("scalar"), model_of("scalar")
    draw_gradients(plain, size)
    parallel = ParallelModel(model, world, CPU, stage)
    for name, parameter in parallel.trained.items():
        whole = plain.get_parameter(name).grad
        assert whole is not None
        if isinstance(parameter, DTensor):
            held = list(whole.chunk(world.size)) + [whole[:0]] * world.size
            parameter.grad = like(parameter, held[world.rank].clone())
        else:
            parameter.grad = whole.clone()
    norm = parallel.clip_gradients(max_norm)
    gradients = {name: parameter.grad for name, parameter in parallel.trained.items()}
    return norm, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items() if g is not None}


CLIP_CASES = [(stage, *case) for case in ((1.0, 0.3), (1.0, 1e-4), (1e30, 0.3)) for stage in (0, 3)]
"""ZeRO stage, largest norm, size of the gradients: clipped, not clipped, without clipping."""


def clip_all(world: World) -> list[tuple[float, dict[str, Tensor]]]:
    return [clip_in_shards(world, *case) for case in CLIP_CASES]


def test_clipping_is_that_of_torch() -> None:
    """Norm and gradients within 1e-6 relative; the norm has the same bits however they are spread."""
    outcomes = run_on_ranks(clip_all, 2)
    for number, (_, max_norm, size) in enumerate(CLIP_CASES):
        plain = model_of("scalar")
        draw_gradients(plain, size)
        expected = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm))
        alone = clip_in_shards(ALONE, 0, max_norm, size)
        for norm, gradients in (alone, *(outcome[number] for outcome in outcomes)):
            assert norm == alone[0]
            assert norm == pytest.approx(expected, rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, plain.get_parameter(name).grad, atol=0, rtol=2e-6)


def test_clipping_without_gradients_and_with_some_that_are_not_finite() -> None:
    parallel = ParallelModel(model_of("llama"), ALONE, CPU)
    assert parallel.clip_gradients(1.0) == 0.0
    draw_gradients(parallel.model, 1.0)
    parameter = next(iter(parallel.trained.values()))
    assert parameter.grad is not None
    parameter.grad[0, 0] = torch.inf
    assert parallel.clip_gradients(1.0) == float("inf")
    parameter.grad[0, 0] = torch.nan
    assert str(parallel.clip_gradients(1.0)) == "nan"


class Several(nn.Module):
    """Weights that not every process has a gradient of."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.zeros(7, 3))
        self.second_only = nn.Parameter(torch.zeros(5))
        self.none = nn.Parameter(torch.zeros(2))
        self.narrow = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.transposed = nn.Parameter(torch.zeros(3, 4))


def sum_some(world: World, bucket_elements: int) -> tuple[dict[str, Any], int]:
    parallel_module.BUCKET_ELEMENTS = bucket_elements  # this process's own
    model: Any = Several()
    parallel = ParallelModel(model, world, CPU, 0)
    rank = world.rank + 1.0
    model.all.grad = torch.arange(21.0).view(7, 3) * rank
    model.transposed.grad = (torch.arange(12.0).view(4, 3) * rank).T  # not contiguous
    model.narrow.grad = torch.full((4,), rank, dtype=torch.bfloat16)
    if world.rank == 1:
        model.second_only.grad = torch.arange(5.0)
    buckets = parallel_module._buckets([p.grad for p in model.parameters() if p.grad is not None])
    count = sum(1 for _ in buckets)
    parallel.sum_gradients()
    return {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}, count


@pytest.mark.parametrize(("bucket_elements", "num_buckets"), [(2**23, 3), (1, 4), (26, 3)])
def test_sums_of_gradients(bucket_elements: int, num_buckets: int) -> None:
    """1 + 2 = 3 times; where only one process has a gradient, all get it; where none has, none gets one."""
    expected = {
        "all": (torch.arange(21.0).view(7, 3) * 3).tolist(),
        "second_only": [0.0, 1.0, 2.0, 3.0, 4.0],
        "none": None,
        "narrow": [3.0] * 4,
        "frozen": None,
        "transposed": (torch.arange(12.0).view(4, 3) * 3).T.tolist(),
    }
    outcome = run_on_ranks(sum_some, 2, bucket_elements)
    assert [gradients for gradients, _ in outcome] == [expected] * 2
    assert outcome[1][1] == num_buckets


def test_one_process_has_nothing_to_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module, "BUCKET_ELEMENTS", 1)
    gradients, _ = sum_some(ALONE, 1)
    assert gradients["second_only"] is None
    assert gradients["narrow"] == [1.0] * 4


# ------------------------------------------------------------------------------------------------- what is held where


def spread(world: World, stage: int, frozen_base: str, free: tuple[int, int]) -> tuple[list[str], list[str]]:
    """Names of what is in shards and of what every process holds whole, of a model with adapters."""
    parallel_module.free_bytes = lambda _: free[world.rank]  # type: ignore[assignment]
    model = model_of("llama", 2)
    parallel = ParallelModel(model, world, CPU, stage, frozen_base=frozen_base)
    parallel.check_agreement()
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    return sharded, [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]


PLENTY, NOTHING = 2**40, 1
FROZEN_CASES = {
    (3, "auto", PLENTY): False,
    (3, "auto", NOTHING): True,
    (3, "replicated", NOTHING): False,
    (3, "sharded", PLENTY): True,
    (2, "auto", NOTHING): False,  # stage 2 keeps gathered weights anyway
}
"""ZeRO stage, setting, free memory: whether the base is sharded."""


def spread_all(world: World) -> list[tuple[list[str], list[str]]]:
    return [spread(world, stage, frozen_base, (free, free)) for stage, frozen_base, free in FROZEN_CASES]


def test_a_frozen_base() -> None:
    for outcome in run_on_ranks(spread_all, 2):
        for (sharded, whole), base_is_sharded in zip(outcome, FROZEN_CASES.values(), strict=True):
            assert all("lora_" in name for name in sharded) != base_is_sharded
            assert not any("lora_" in name for name in whole), "what is trained is in shards in any case"
            assert bool(whole) != base_is_sharded


def test_processes_that_do_not_agree_on_what_fits() -> None:
    with pytest.raises(AssertionError, match=r'ConfigError: parallel\.frozen_base = "auto": .*set it to'):
        run_on_ranks(spread, 2, 3, "auto", (PLENTY, NOTHING))


def spread_frozen(world: World) -> bool:
    """A model of which nothing is trained has no base that could be kept whole."""
    parallel = ParallelModel(model_of("llama").requires_grad_(False), world, CPU, 3, frozen_base="replicated")
    return all(isinstance(parameter, DTensor) for parameter in parallel.model.parameters())


def test_a_frozen_model_is_sharded_whatever_is_said_of_frozen_bases() -> None:
    assert run_on_ranks(spread_frozen, 2) == [True, True]


class Travelling(nn.Linear):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.journey: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.journey.append(str(args[0]))
        return self


def test_weights_in_host_memory_are_on_the_device_while_they_are_in_use() -> None:
    model: Any = Travelling()
    gpu = torch.device("cuda")
    parallel = ParallelModel(model, ALONE, gpu, offload=True)
    assert model.journey == ["cpu"]
    with parallel.in_use():
        assert model.journey == ["cpu", "cuda"]
    with pytest.raises(ConfigError), parallel.in_use():
        raise ConfigError("of a test")
    assert model.journey == ["cpu", "cuda", "cpu", "cuda", "cpu"]
    stays: Any = Travelling()
    with ParallelModel(stays, ALONE, gpu).in_use():
        pass
    assert stays.journey == ["cuda"]


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (3, False), (2, True)])
def test_one_process_does_not_shard(stage: int, offload: bool) -> None:
    parallel = ParallelModel(model_of("llama"), ALONE, CPU, stage, offload)
    assert not parallel.sharded
    assert not any(isinstance(parameter, DTensor) for parameter in parallel.model.parameters())
    parallel.check_agreement()


def lone_process_offloads_all(world: World) -> tuple[bool, list[bool]]:
    """Weights of a lone process that come to the device block by block: shards of one, and plain ones' numbers."""
    assert world.size == 1
    outcomes = []
    for offload in (False, True):
        model = model_of("opt", 0)
        parallel = ParallelModel(model, world, CPU, 3, offload)
        assert parallel.sharded == offload
        parallel.run(lambda model=model: loss_of(model)).backward()
        parallel.sum_gradients()
        norm = parallel.clip_gradients(0.1)
        gradients = {name: local(p.grad) for name, p in parallel.trained.items() if p.grad is not None}
        with torch.no_grad():
            value = parallel.run(lambda model=model: loss_of(model))
        outcomes.append((norm, gradients, parallel.full_state(), float(value)))
        wrong = visit_units_of(parallel)
    plain, offloaded = outcomes
    same = [
        plain[0] == offloaded[0],
        identical(plain[1], offloaded[1]),
        identical(plain[2], offloaded[2]),
        plain[3] == offloaded[3],
        not wrong,
    ]
    return all(isinstance(parameter, DTensor) for parameter in parallel.model.parameters()), same


def visit_units_of(parallel: ParallelModel) -> list[str]:
    blocks = blocks_of(parallel.model)
    visited: Iterator[nn.Module] = parallel.units()
    return [name for unit in visited for name, p in own_parameters(unit, blocks).items() if isinstance(p, DTensor)]


def test_a_lone_process_with_all_in_host_memory() -> None:
    """The bits of the plain model: gradients, norm, state, a pass without a gradient."""
    assert run_on_ranks(lone_process_offloads_all, 1) == [(True, [True] * 5)]
