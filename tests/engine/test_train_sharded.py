"""Training over processes: however weights, gradients and optimizer are spread, the same steps; and going on from a
checkpoint in another layout.

Where only ZeRO stage or offload differs, and the number of processes does not, weights have the same bits: stages 0 and
1, and 2 and 3. Otherwise gradients are added in another order: weights within 1e-4 after four steps, losses within 1e-5
(a bias of keys, whose gradient is nothing but rounding, is left out, since AdamW divides it by its own size).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests.models.families_under_test import ragged_ids, right_padded, tiny_causal_lm, tiny_scalar_model
from tests.ranks import run_on_ranks
from threefold.checkpoint.training import Checkpointer, TrainingState
from threefold.config.recipe import LoRASection, OptimizerSection
from threefold.config.scale import CheckpointSection
from threefold.engine.distributed import ALONE, World
from threefold.engine.optim import inner_optimizer, owned
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import MicroBatching, Pass
from threefold.engine.train import TrainEngine
from threefold.errors import CheckpointError, NonFiniteError
from threefold.models.adapters import add_lora
from threefold.models.loading import set_dropout

CPU = torch.device("cpu")
SETTINGS = OptimizerSection(learning_rate=0.01, weight_decay=0.1, grad_clip=1.0, scheduler="cosine", warmup_steps=2)
SEQUENCES = ragged_ids(6, [9, 4, 7, 2, 11, 3, 5])
TOTAL_STEPS = 6
State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a model is spread.

    Attributes:
        offload: of the recipe: "none", "optimizer", "all".
    """

    size: int = 1
    stage: int = 0
    offload: str = "none"
    ema_on_host: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Case:
    """What is trained. "scalar" has a score head of one row, of which one of two processes holds nothing; adapters on
    it leave the base frozen."""

    family: str = "llama"
    rank: int = 0
    dtype: torch.dtype = torch.float32


def model_of(case: Case) -> PreTrainedModel:
    """41 words, which do not divide by two."""
    scalar = case.family == "scalar"
    model = tiny_scalar_model("llama") if scalar else tiny_causal_lm(case.family, vocab_size=41)
    set_dropout(model, 0.0)
    add_lora(model, LoRASection(rank=case.rank), 0, "a test")
    return model.eval()


def engine_of(world: World, case: Case, layout: Layout) -> TrainEngine:
    all_on_host = layout.offload == "all"
    parallel = ParallelModel(model_of(case), world, CPU, layout.stage, all_on_host, frozen_base="sharded")
    return TrainEngine(
        parallel, SETTINGS, TOTAL_STEPS, CPU, case.dtype, "a test", 0.9, layout.checkpointing,
        offload=layout.offload, ema_on_host=layout.ema_on_host,
    )  # fmt: skip


def train(engine: TrainEngine, steps: int) -> list[dict[str, float]]:
    """Steps on one batch, of which each process takes its share; what each step tells."""
    parallel = engine.parallel
    passes = MicroBatching(2, 0, parallel.world, parallel.sharded)
    results = []
    for _ in range(steps):
        for part in passes.of(SEQUENCES, len):

            def loss(part: Pass[list[int]] = part) -> Tensor:
                ids, mask = right_padded(part.items)
                model = parallel.model

                def squares() -> Tensor:
                    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                    output: Tensor = (model.get_output_embeddings() or model.score)(hidden)
                    return output[mask].float().square().sum()

                return parallel.run(squares) / (100 * len(SEQUENCES))

            engine.backward(loss, part.counts)
        results.append(asdict(engine.step()))
    return results


def whole(world: World, tensors: dict[str, Tensor]) -> State:
    """Tensors as one process would have them, on every process; what only some have, too."""
    own = {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}
    found: State = {}
    for part in world.gather(own):
        for name, tensor in part.items():
            assert name not in found or torch.equal(tensor, found[name]), f"{name} is not the same everywhere"
            found[name] = tensor
    return found


def trained(world: World, case: Case, layout: Layout, steps: int = 4) -> tuple[list[dict[str, float]], State]:
    engine = engine_of(world, case, layout)
    results = train(engine, steps)
    return results, whole(world, engine.state_tensors())


def moved_about(world: World) -> list[bool]:
    """Whether the optimizer's state has left for the host between steps and come back the same, in its layout."""
    found = []
    for layout in (WHOLE, Layout(2, 1), SHARDS, HOST_3):
        plain, moved = (engine_of(world, Case("scalar"), layout) for _ in range(2))
        for engine in (plain, moved):
            train(engine, 2)
        before = moved.state_tensors()
        kinds = {name: (type(t), t.shape) for name, t in before.items()}
        with moved.optimizer_in_host_memory():
            away = moved.state_tensors()
            found.append({name: (type(t), t.shape) for name, t in away.items()} == kinds)
        for engine in (plain, moved):
            train(engine, 2)
        found.append({name: (type(t), t.shape) for name, t in moved.state_tensors().items()} == kinds)
        found.append(identical(whole(world, moved.state_tensors()), whole(world, plain.state_tensors())))
    return found


def test_the_state_of_shards_goes_to_the_host_and_comes_back() -> None:
    assert run_on_ranks(moved_about, 2) == [[True] * 12] * 2


def all_trained(world: World, cases: list[tuple[Case, Layout]]) -> list[tuple[list[dict[str, float]], State]]:
    return [trained(world, case, layout) for case, layout in cases]


def identical(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def assert_near(found: State, expected: State, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------------------------------- the same steps


WHOLE, SHARDS = Layout(2, 0), Layout(2, 3)
HOST_1, HOST_3 = Layout(2, 1, "optimizer", ema_on_host=True), Layout(2, 3, "all", ema_on_host=True)
MOST = (Layout(2, 1), HOST_1, Layout(2, 2), Layout(2, 3, "optimizer"), HOST_3, Layout(2, 3, checkpointing=True))
LAYOUTS: dict[Case, tuple[Layout, ...]] = {
    Case("opt"): (WHOLE, SHARDS, Layout(2, 0, "optimizer"), *MOST),
    Case("scalar"): (WHOLE, SHARDS, *MOST),
    Case("scalar", rank=2): (WHOLE, SHARDS, HOST_1, Layout(2, 2)),
    Case("llama", dtype=torch.bfloat16): (WHOLE, SHARDS, HOST_1, HOST_3, Layout(2, 3, checkpointing=True)),
}
MANY = [(case, layout) for case, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def on_two() -> list[list[tuple[list[dict[str, float]], State]]]:
    return run_on_ranks(all_trained, 2, MANY)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: f"{case.family}-{case.rank}-{case.dtype}")
def test_however_it_is_spread_the_steps_are_the_same(
    on_two: list[list[tuple[list[dict[str, float]], State]]], case: Case
) -> None:
    """Weights, moments and average; the steps' losses, gradient norms and learning rates."""
    results, state = trained(ALONE, case, Layout())
    assert any(name.startswith("ema.") for name in state)
    assert any(name.endswith(".exp_avg_sq") for name in state)
    rough = case.dtype == torch.bfloat16
    for outcome in on_two:
        by_layout = {layout: one for (of, layout), one in zip(MANY, outcome, strict=True) if of == case}
        for layout, (found, tensors) in by_layout.items():
            reference = by_layout[SHARDS if layout.stage >= 2 else WHOLE]
            if not (layout.checkpointing and rough):  # autocast rounds otherwise where it computes again
                assert found == reference[0], layout
                assert identical(tensors, reference[1]), layout
            for one, other in zip(found, results, strict=True):
                assert one == pytest.approx(other, abs=2e-3 if rough else 1e-5, rel=2e-2 if rough else 1e-5)
            if not rough:
                assert_near(tensors, state)
    assert results[0]["loss"] != results[-1]["loss"]


def lone_on_host(world: World) -> list[tuple[list[dict[str, float]], State]]:
    layouts = (Layout(), Layout(1, 3, "all"), Layout(1, 0, "optimizer", ema_on_host=True), Layout(1, 3), Layout(1, 1))
    return [trained(world, Case("opt"), layout) for layout in layouts]


def test_a_lone_process_with_all_in_host_memory_has_the_plain_ones_bits() -> None:
    ((plain, *others),) = run_on_ranks(lone_on_host, 1)
    for results, state in others:
        assert results == plain[0]
        assert identical(state, plain[1])


# ---------------------------------------------------------------------------------------------------------- the parts


def held_parts(world: World) -> list[tuple[str, int, int, int]]:
    """Kind of optimizer, numbers that this process's moments have, and its average, and how many weights it steps."""
    found = []
    for layout in (Layout(2, 0), Layout(2, 1), Layout(2, 1, "optimizer"), Layout(2, 3), Layout(2, 3, "optimizer")):
        engine = engine_of(world, Case("llama"), layout)
        train(engine, 1)
        tensors = engine.state_tensors()
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        moments = sum(t.numel() for name, t in local.items() if ".exp_avg" in name)
        average = sum(t.numel() for name, t in local.items() if name.startswith("ema."))
        kind = type(engine._optimizer).__name__ + "/" + type(inner_optimizer(engine._optimizer)).__name__
        found.append((kind, moments, average, len(owned(engine._optimizer))))
    return found


def test_each_process_holds_its_part_of_the_optimizer_and_no_more() -> None:
    count = sum(parameter.numel() for parameter in model_of(Case("llama")).parameters())
    one, other = run_on_ranks(held_parts, 2)
    kinds = ["AdamW/AdamW", "ZeroRedundancyOptimizer/AdamW", "ZeroRedundancyOptimizer/HostAdamW"]
    assert [kind for kind, *_ in one] == [*kinds, "AdamW/AdamW", "HostAdamW/HostAdamW"]
    for number, ((_, mine, my_average, my_owned), (_, yours, your_average, your_owned)) in enumerate(
        zip(one, other, strict=True)
    ):
        whole_moments = number == 0
        assert mine + yours == 2 * count * (2 if whole_moments else 1)
        assert max(mine, yours) <= 2 * count * (1 if whole_moments else 0.6)
        assert my_average + your_average == count * (2 if number < 3 else 1), "stages 0 and 1 hold weights whole"
        if number in (1, 2):
            assert my_owned + your_owned == len(list(model_of(Case("llama")).parameters()))


def broken(world: World, stage: int) -> tuple[str, bool]:
    """One process meets a loss that is not finite."""
    engine = engine_of(world, Case("llama"), Layout(2, stage))
    train(engine, 1)
    before = {name: t.clone() for name, t in engine.state_tensors().items()}
    poison = float("inf") if world.rank == 1 else 1.0
    ids, _ = right_padded(SEQUENCES[:1])
    engine.backward(lambda: engine.parallel.run(lambda: engine.model(ids).logits.sum()) * poison)
    try:
        engine.step()
    except NonFiniteError as error:
        after = engine.state_tensors()
        local = (t.to_local() if isinstance(t, DTensor) else t for t in (*before.values(), *after.values()))
        flat = list(local)
        half = len(flat) // 2
        return str(error), all(torch.equal(a, b) for a, b in zip(flat[:half], flat[half:], strict=True))
    return "no error", False


@pytest.mark.parametrize("stage", [1, 3])
def test_what_one_process_meets_stops_all_before_the_step(stage: int) -> None:
    for message, unchanged in run_on_ranks(broken, 2, stage):
        assert "a test, optimizer step 2: loss" in message
        assert unchanged


def zero_1_steps(world: World) -> list[int]:
    """Bits after steps in which some parameters of the owner have no gradient at all."""
    engine = engine_of(world, Case("llama"), Layout(2, 1))
    assert isinstance(engine._optimizer, ZeroRedundancyOptimizer)
    names = sorted(engine.parallel.trained)
    for _ in range(2):
        if world.rank == 0:  # the other process has nothing to do
            engine.backward(lambda: engine.model.get_input_embeddings().weight.square().sum())
        engine.step()
    assert whole(world, engine.state_tensors())
    stepped = {name for name in whole(world, engine.state_tensors()) if name.endswith(".exp_avg")}
    return [names.index(name.removeprefix("optimizer.").removesuffix(".exp_avg")) for name in sorted(stepped)]


def test_a_step_in_which_most_weights_have_no_gradient() -> None:
    """They have no state either, and the processes agree."""
    one, other = run_on_ranks(zero_1_steps, 2)
    assert one == other
    assert len(one) == 1


# ---------------------------------------------------------------------------------------------------------- checkpoints


def checkpointer(directory: Path, world: World) -> Checkpointer:
    return Checkpointer(directory, "key", CheckpointSection(every_steps=1, asynchronous=False), world, lambda _: None)


def save_at(world: World, directory: Path, case: Case, layout: Layout, steps: int) -> tuple[Any, State, Any, State]:
    """Train, save, and train on: what it was when it was saved, and at the end."""
    engine = engine_of(world, case, layout)
    train(engine, steps)
    tensors, values = engine.state_tensors(), engine.state_values()
    checkpointer(directory, world).save(steps, TrainingState(tensors, values, {}))
    saved = whole(world, tensors)
    return values, saved, train(engine, TOTAL_STEPS - steps), whole(world, engine.state_tensors())


def resume_at(world: World, directory: Path, case: Case, layout: Layout) -> tuple[Any, State, Any, State]:
    """What was read from a checkpoint, and what comes of it."""
    saved = checkpointer(directory, world).load()
    assert saved is not None
    engine = engine_of(world, case, layout)
    room = engine.empty_state(saved.names)
    assert set(whole(world, room)) == saved.names
    saved.read_into(room)
    engine.resume(saved.values)
    tensors = whole(world, engine.state_tensors())
    results = train(engine, TOTAL_STEPS - engine.num_steps)
    return engine_values(engine, saved.values), tensors, results, whole(world, engine.state_tensors())


def engine_values(engine: TrainEngine, values: Any) -> Any:
    """Those that were read, if the engine has gone on from them to the end."""
    assert engine.num_steps == TOTAL_STEPS
    return values


def save_all(world: World, directory: Path, jobs: list[tuple[str, Case, Layout, int]]) -> list[Any]:
    return [save_at(world, directory / name, case, layout, steps) for name, case, layout, steps in jobs]


def resume_all(world: World, directory: Path, jobs: list[tuple[str, Case, Layout]]) -> list[Any]:
    return [resume_at(world, directory / name, case, layout) for name, case, layout in jobs]


SCALAR, ADAPTERS, TIED = Case("scalar"), Case("scalar", rank=2), Case("opt")
SAVED = {
    "plain": (TIED, Layout(1), 3),
    "zero-1": (SCALAR, Layout(2, 1), 2),
    "zero-3": (TIED, Layout(2, 3), 3),
    "sharded adapters": (ADAPTERS, Layout(2, 3, "optimizer", ema_on_host=True), 2),
    "host": (SCALAR, Layout(2, 1, "optimizer"), 4),
    "before the first step": (SCALAR, Layout(2, 2), 0),
}
RESUMED = [
    ("plain", Layout(1, 0, "optimizer")),
    ("plain", Layout(1, 3, "all")),
    ("plain", Layout(2, 3)),
    ("plain", Layout(3, 1)),
    ("zero-1", Layout(2, 1)),
    ("zero-1", Layout(1)),
    ("zero-1", Layout(2, 3)),
    ("zero-3", Layout(2, 3)),
    ("zero-3", Layout(2, 0)),
    ("zero-3", Layout(1, 0, "optimizer", ema_on_host=True)),
    ("zero-3", Layout(3, 2)),
    ("sharded adapters", Layout(2, 3, "all", ema_on_host=True)),
    ("sharded adapters", Layout(2, 1, "optimizer")),
    ("sharded adapters", Layout(1)),
    ("host", Layout(2, 0)),
    ("before the first step", Layout(2, 1)),
]


def test_training_goes_on_from_a_checkpoint_in_whatever_layout(tmp_path: Path) -> None:
    """What is read has the bits of what was written. In the same layout, or one that computes alike, so has all that
    follows; in another, losses are within 1e-5 and weights within 1e-4."""
    written: dict[str, Any] = {}
    for size in (1, 2):
        jobs = [(name, *job) for name, job in SAVED.items() if job[1].size == size]
        outcomes = run_on_ranks(save_all, size, tmp_path, jobs)[0]
        written |= {name: outcome for (name, *_), outcome in zip(jobs, outcomes, strict=True)}
    for size in (1, 2, 3):
        wanted = [(name, layout) for name, layout in RESUMED if layout.size == size]
        jobs = [(name, SAVED[name][0], layout) for name, layout in wanted]
        for outcomes in run_on_ranks(resume_all, size, tmp_path, jobs):
            for (name, layout), (values, state, results, end) in zip(wanted, outcomes, strict=True):
                _, before, _ = SAVED[name]
                assert values == written[name][0], (name, layout)
                assert identical(state, written[name][1]), (name, layout)
                alike = before.size == layout.size and (before.stage >= 2) == (layout.stage >= 2)
                if alike:
                    assert results == written[name][2], (name, layout)
                    assert identical(end, written[name][3]), (name, layout)
                for one, other in zip(results, written[name][2], strict=True):
                    assert one == pytest.approx(other, abs=1e-5, rel=1e-5)
                assert_near(end, written[name][3])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_at(ALONE, tmp_path, SCALAR, Layout(), 1)
    saved = checkpointer(tmp_path, ALONE).load()
    assert saved is not None
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        saved.read_into(engine_of(ALONE, TIED, Layout()).empty_state(saved.names))
