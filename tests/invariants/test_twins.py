"""What changes where, or in how many pieces, something is computed, and not what: each like its plain twin.

Offload, the sharding of frozen models and recomputation change no bit on a CPU, where host memory is the device's own.
Sums in other pieces (micro-batches, processes) stay within the bounds of `many_processes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.invariants.many_processes import Runs, beyond_bounds, identical, spread

STEPS, FAMILIES = ("sft", "reward", "ppo"), ("opt", "llama")
TRAINED = {"sft": ("actor",), "reward": ("reward",), "ppo": ("actor", "critic")}
LORA = {
    "sft": ("--sft.lora.rank=4",),
    "reward": ("--reward.lora.rank=4",),
    "ppo": ("--ppo.actor_lora.rank=4", "--ppo.critic_lora.rank=4"),
}
SHORT = ("--ppo.iterations=4",)
"""Of step 3, for twins; eight optimizer steps of each model."""
MIXTURE = (
    *SHORT,
    "--ppo.mixture.chunk_length=16",
    "--ppo.mixture.batch_size=3",
    "--ppo.mixture.eval_documents=4",
)


def offload(step: str, what: str) -> tuple[str, ...]:
    return tuple(f"--parallel.{model}.offload={what}" for model in TRAINED[step])


def frozen(stage: int, offloaded: bool) -> tuple[str, ...]:
    """How the two models of step 3 that only judge are held."""
    fields = {"zero_stage": str(stage), "offload": str(offloaded).lower()}
    return tuple(f"--parallel.{m}.{name}={value}" for m in ("reference", "scorer") for name, value in fields.items())


def cases(every_day: Sequence[tuple[object, ...]], rest: Sequence[tuple[object, ...]]) -> list[object]:
    """Some for every day, and some that are slow together."""
    slow = [case for case in rest if case not in every_day]
    return [pytest.param(*case) for case in every_day] + [pytest.param(*case, marks=pytest.mark.slow) for case in slow]


OFFLOADS = [
    (family, step, size, stage, "optimizer")
    for family in FAMILIES
    for step in STEPS
    for size in (1, 2)
    for stage in ((0,) if size == 1 else (0, 1, 2, 3))
]
OFFLOADS += [(family, step, size, 3, "all") for family in FAMILIES for step in STEPS for size in (1, 2)]
OFFLOADS_OF_EVERY_DAY = [
    ("opt", "ppo", 2, 1, "optimizer"),
    ("opt", "reward", 2, 3, "optimizer"),
    ("opt", "reward", 1, 3, "all"),
    ("opt", "ppo", 2, 3, "all"),
]


@pytest.mark.parametrize(("family", "step", "size", "stage", "what"), cases(OFFLOADS_OF_EVERY_DAY, OFFLOADS))
def test_offload(runs: Runs, family: str, step: str, size: int, stage: int, what: str) -> None:
    """Of the optimizer, and of everything, which one process decodes from an arena: see test_many_processes."""
    overrides = (*spread(stage), *SHORT)
    plain, offloaded = (runs(family, step, size, (*overrides, *more)) for more in ((), offload(step, what)))
    assert beyond_bounds(plain, offloaded) == {}
    if not (step == "ppo" and what == "all" and size == 1):
        assert identical(plain, offloaded)


JUDGES = [
    (family, size, stage, off) for family in FAMILIES for size in (1, 2) for stage, off in ((0, 1), (3, 0), (3, 1))
]


@pytest.mark.parametrize(("family", "size", "stage", "offloaded"), cases([("opt", 2, 3, 1)], JUDGES))
def test_reference_and_scorer(runs: Runs, family: str, size: int, stage: int, offloaded: int) -> None:
    """Sharded, waiting in host memory, and both."""
    judges = frozen(stage, bool(offloaded))
    assert identical(runs(family, "ppo", size, SHORT), runs(family, "ppo", size, (*SHORT, *judges)))


ELSEWHERE = [
    (family, size, stage, flag)
    for family in FAMILIES
    for size, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3))
    for flag in (
        "--sft.gradient_checkpointing=true",
        "--reward.gradient_checkpointing=true",
        "--ppo.gradient_checkpointing=true",
        "--ppo.ema.offload=true",
        "--ppo.offload_optimizer=true",
    )
]
ELSEWHERE_OF_EVERY_DAY = [
    ("opt", 2, 3, "--ppo.gradient_checkpointing=true"),
    ("opt", 1, 0, "--sft.gradient_checkpointing=true"),
    ("opt", 2, 2, "--reward.gradient_checkpointing=true"),
    ("opt", 2, 1, "--ppo.offload_optimizer=true"),
]


@pytest.mark.parametrize(("family", "size", "stage", "flag"), cases(ELSEWHERE_OF_EVERY_DAY, ELSEWHERE))
def test_recomputed_or_kept_elsewhere(runs: Runs, family: str, size: int, stage: int, flag: str) -> None:
    """Activations computed twice; the average, or the optimizer's state while answers are sampled, in host memory."""
    step, plain = flag.split(".")[0].removeprefix("--"), (*spread(stage), *SHORT)
    assert identical(runs(family, step, size, plain), runs(family, step, size, (*plain, flag)))


ACCUMULATIONS = [
    (family, step, size, stage)
    for family in FAMILIES
    for step in STEPS
    for size, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3))
]
ACCUMULATIONS_OF_EVERY_DAY = [("opt", "reward", 2, 2), ("opt", "ppo", 2, 3)]


@pytest.mark.parametrize(("family", "step", "size", "stage"), cases(ACCUMULATIONS_OF_EVERY_DAY, ACCUMULATIONS))
def test_accumulation(runs: Runs, family: str, step: str, size: int, stage: int) -> None:
    """One sequence (or pair) after the other, and all of a process's share together."""
    plain = (*spread(stage), *SHORT)
    one_by_one = runs(family, step, size, (*plain, f"--{step}.micro_batch_size=1"))
    assert beyond_bounds(runs(family, step, size, plain), one_by_one) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 3)])
@pytest.mark.parametrize("step", STEPS)
def test_stages_of_a_kind_accumulate_alike(runs: Runs, step: str, first: int, second: int) -> None:
    """Bit for bit; stages 0 and 3 do not: see test_many_processes."""
    same = (*SHORT, f"--{step}.micro_batch_size=1")
    assert identical(runs("opt", step, 2, (*spread(first), *same)), runs("opt", step, 2, (*spread(second), *same)))


ADAPTERS = [
    (family, step, stage, base)
    for family in FAMILIES
    for step in STEPS
    for stage, base in ((0, "auto"), (1, "auto"), (2, "auto"), (2, "sharded"), (3, "replicated"), (3, "sharded"))
]
ADAPTERS_OF_EVERY_DAY = [
    ("opt", "sft", 3, "sharded"),
    ("opt", "reward", 2, "auto"),
    ("llama", "ppo", 3, "replicated"),
    ("llama", "ppo", 3, "sharded"),
]


@pytest.mark.parametrize(("family", "step", "stage", "base"), cases(ADAPTERS_OF_EVERY_DAY, ADAPTERS))
def test_adapters(runs: Runs, family: str, step: str, stage: int, base: str) -> None:
    """LoRA on two processes, its base whole on each or sharded, as on one; in step 3 the reference is the actor without
    them."""
    adapted = (*SHORT, *LORA[step])
    overrides = (*spread(stage), *adapted, f"--parallel.frozen_base={base}")
    alone, spread_out = runs(family, step, 1, adapted), runs(family, step, 2, overrides)
    assert beyond_bounds(alone, spread_out) == {}
    assert alone.digests().keys() == spread_out.digests().keys()
    assert any("adapter_model" in name for name in spread_out.digests())


def text(directory: Path) -> str:
    stories = (f"A story of {n} cats and {n * 7 % 13} dogs that met{' again' * (n % 5)}." for n in range(40))
    (directory / "text.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    return f"--ppo.mixture.source={directory / 'text.txt'}"


TOGETHER = (
    *LORA["ppo"],
    *offload("ppo", "all"),
    *frozen(3, True),
    "--ppo.gradient_checkpointing=true",
    "--ppo.micro_batch_size=2",
    "--ppo.ema.offload=true",
    "--ppo.offload_optimizer=true",
)


@pytest.mark.parametrize(
    ("family", "size", "stage", "more"),
    [
        pytest.param("opt", 2, 2, (), id="mixture"),
        pytest.param("llama", 2, 3, TOGETHER, id="all of it together"),
        *(
            pytest.param(family, size, stage, (), id=f"{family}-{size}-{stage}", marks=pytest.mark.slow)
            for family in FAMILIES
            for size in (2, 4)
            for stage in (0, 1, 2, 3)
        ),
    ],
)
def test_mixture_text(runs: Runs, family: str, size: int, stage: int, more: tuple[str, ...]) -> None:
    """Pretraining text in the actor's steps, whose batch of three no number of processes divides."""
    mixture = (text(runs.directory), *MIXTURE)
    plain = LORA["ppo"] if more else ()
    spread_out = runs(family, "ppo", size, (*spread(stage), *mixture, *more))
    assert beyond_bounds(runs(family, "ppo", 1, (*mixture, *plain)), spread_out) == {}


FEW = (
    "--sft.batch_size=3",
    "--sft.max_eval_examples=3",
    "--reward.batch_size=2",
    "--reward.max_eval_examples=2",
    "--ppo.prompts_per_iteration=3",
    "--ppo.answers_per_prompt=1",
    "--ppo.num_eval_prompts=3",
    *SHORT,
)
ONE_STEP = (
    "--ppo.minibatches=1",
    "--ppo.critic_warmup_iterations=1",
    "--ppo.kl_controller=adaptive",
    "--ppo.entropy_coef=0.01",
    *SHORT,
)
MANY_EPOCHS = ("--ppo.ppo_epochs=3", "--ppo.target_kl=0.02", "--ppo.critic_warmup_iterations=1", *SHORT)


@pytest.mark.parametrize(
    ("step", "size", "stage"),
    cases([("ppo", 4, 0), ("sft", 4, 3)], [(step, 4, stage) for step in STEPS for stage in (0, 1, 2, 3)]),
)
def test_fewer_items_than_processes(runs: Runs, step: str, size: int, stage: int) -> None:
    """Some have nothing to compute, and only keep the others company."""
    assert beyond_bounds(runs("opt", step, 1, FEW), runs("opt", step, size, (*spread(stage), *FEW))) == {}


@pytest.mark.parametrize(
    ("how", "stage"),
    cases([(ONE_STEP, 3), (MANY_EPOCHS, 0)], [(how, s) for how in (ONE_STEP, MANY_EPOCHS) for s in (0, 1, 2, 3)]),
    ids=lambda value: str(value) if isinstance(value, int) else "one step" if value is ONE_STEP else "many epochs",
)
def test_ways_through_an_iteration(runs: Runs, how: tuple[str, ...], stage: int) -> None:
    """One forward pass of the critic for values and gradient; updates that stop early; warm-up of the critic; a KL
    controller that adapts."""
    alone, spread_out = runs("llama", "ppo", 1, how), runs("llama", "ppo", 2, (*spread(stage), *how))
    assert beyond_bounds(alone, spread_out) == {}
    stopped = spread_out.curve("policy/stopped_early")
    assert any(stopped) == (how is MANY_EPOCHS)
    assert not all(stopped)
