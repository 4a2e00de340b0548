"""One recipe on 1, 2 and 4 processes, under every ZeRO stage: the curves of one process, and the same files.

What the stage alone changes is, on two processes, not one bit, where a process makes one forward and backward pass for
an optimizer step: a sum of two numbers has one value, and AdamW works on each number for itself. It is otherwise

- with several passes: stages 0 and 1 add up a process's own passes, and then the processes; 2 and 3 add up the
  processes at each pass (FSDP2 holds no whole gradient), and then the passes. So it is where mixture text is trained.
- with four processes: gloo's all-reduce (0, 1) and reduce-scatter (2, 3) add four numbers in different orders.
- in what is sampled: stages 0 and 1 decode from the parameters themselves, 2 and 3 from an arena in which query, key
  and value are one matrix and so are gate and up, and adapters are merged. The kernels add up products of those shapes
  in other orders; here that shows with Llama, and with adapters.

Between 0 and 1, and between 2 and 3, nothing of that differs. From one process to several, sums over a batch are taken
in another order, and the passes are of other shapes: there curves are held to 1e-5.
"""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.invariants.many_processes import (
    BOUND,
    CPU,
    SMALL,
    Runs,
    beyond_bounds,
    identical,
    outcome,
    spread,
    write_models,
)
from tests.models.families_under_test import tiny_causal_lm, tiny_tokenizer
from tests.ranks import run_on_ranks
from tests.tiny import tiny_recipe
from threefold.config.recipe import LoRASection
from threefold.data.chat import BUILT_IN_TEMPLATES, ensure_pad_token
from threefold.engine.distributed import ALONE, World
from threefold.engine.parallel import ParallelModel
from threefold.metrics import RunLog
from threefold.models.adapters import add_lora
from threefold.models.loading import (
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    use_fast_kernels,
)
from threefold.stages import evaluate
from threefold.stages.context import StageContext

FAMILIES, STEPS, STAGES = ("opt", "llama"), ("sft", "reward", "ppo"), (0, 1, 2, 3)
EVERY_DAY = {
    *(("opt", step, 2, stage) for step in STEPS for stage in STAGES),
    *(("llama", step, 2, 3) for step in STEPS),
    ("llama", "ppo", 2, 2),
    ("llama", "sft", 4, 3),
    ("opt", "reward", 4, 2),
    ("opt", "ppo", 4, 0),
}
"""A selection that covers; all the others are slow together."""
LOSSES = {"sft": "sft/eval_loss", "reward": "reward/loss", "ppo": "loss/value_avg"}


def every_day(*case: object) -> list[pytest.MarkDecorator]:
    return [] if case in EVERY_DAY else [pytest.mark.slow]


MATRIX = [
    pytest.param(*case, marks=every_day(*case), id="{}-{}-{} processes-stage {}".format(*case))
    for case in ((f, step, size, stage) for f in FAMILIES for step in STEPS for size in (2, 4) for stage in STAGES)
]


@pytest.mark.parametrize(("family", "step", "size", "stage"), MATRIX)
def test_the_curves_of_one_process(runs: Runs, family: str, step: str, size: int, stage: int) -> None:
    """Ten optimizer steps, or ten iterations of step 3: losses, log-probabilities, rewards, held-out metrics."""
    alone, spread_out = runs(family, step), runs(family, step, size, spread(stage))
    assert beyond_bounds(alone, spread_out) == {}
    curve = spread_out.curve(LOSSES[step])
    assert max(curve) - min(curve) > 1e-2, "a curve that stands still is like any other"


@pytest.mark.parametrize("step", STEPS)
def test_a_small_mistake_is_beyond_the_bounds(runs: Runs, step: str) -> None:
    """A learning rate that is off by 1 % shows: the bounds are not wide at these learning rates."""
    rates = {"sft": ("sft.", 1e-3), "reward": ("reward.", 1e-4), "ppo": ("ppo.critic_", 3e-4)}
    name, rate = rates[step]
    beyond = beyond_bounds(runs("opt", step), runs("opt", step, 1, (f"--{name}learning_rate={rate * 1.01}",)))
    assert LOSSES[step] in beyond


@pytest.mark.parametrize("step", STEPS)
def test_one_process_is_the_same_in_stage_3(runs: Runs, step: str) -> None:
    """It has nobody to share with."""
    assert identical(runs("opt", step), runs("opt", step, 1, spread(3)))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_the_stage_changes_no_bit_on_two_processes(runs: Runs, step: str, stage: int) -> None:
    """Neither in the metrics nor in the files."""
    assert identical(runs("opt", step, 2, spread(0)), runs("opt", step, 2, spread(stage)))


SAME_BITS_OF_LLAMA = [(step, *stages) for step in STEPS for stages in ((0, 1), (2, 3))]
SAME_BITS_OF_LLAMA += [("sft", 0, 3), ("reward", 0, 3)]  # and not "ppo": what is sampled differs


@pytest.mark.slow
@pytest.mark.parametrize(("step", "first", "second"), SAME_BITS_OF_LLAMA)
def test_the_stage_changes_no_bit_of_llama(runs: Runs, step: str, first: int, second: int) -> None:
    """But by what is sampled."""
    assert identical(runs("llama", step, 2, spread(first)), runs("llama", step, 2, spread(second)))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", STEPS)
def test_stages_of_a_kind_are_the_same_on_four_processes(
    runs: Runs, family: str, step: str, first: int, second: int
) -> None:
    assert identical(runs(family, step, 4, spread(first)), runs(family, step, 4, spread(second)))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("step", STEPS)
def test_the_curves_of_a_real_model(shared: Path, runs: Runs, step: str) -> None:
    """A pretrained Llama with grouped queries on people's dialogues, on two processes, all sharded."""
    models = runs.directory / "real"
    if not models.is_dir():
        tokenizer = load_tokenizer(str(shared / "models/stories260K"))
        tokenizer.chat_template = BUILT_IN_TEMPLATES["dialogue"]
        ensure_pad_token(tokenizer, "", "tokenizer", "stories260K")
        write_models(load_causal_lm(str(shared / "models/stories260K")), tokenizer, models)
        with gzip.open(shared / "data/hh_rlhf/harmless_1600.jsonl.gz", "rt", encoding="utf-8") as file:
            (models / "rows.jsonl").write_text("".join(islice(file, 200)), encoding="utf-8")
    data = (f"--data.sources={models / 'rows.jsonl'}", "--data.max_length=320", "--data.bad_rows=drop")
    data += ("--ppo.actor_learning_rate=3e-5", "--ppo.critic_learning_rate=3e-5", "--ppo.sampling.top_k=4")
    alone = outcome(1, step, data, models, models / f"{step}-1")
    spread_out = outcome(2, step, (*data, *spread(3)), models, models / f"{step}-2")
    assert beyond_bounds(alone, spread_out) == {}


def comparison(world: World, models: Path, overrides: tuple[str, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the last step, which compares models' answers, finds."""
    recipe = tiny_recipe(*SMALL, *overrides)
    inputs = {name: models / name for name in ("sft", "reward", "ppo")}
    log = RunLog(models.parent / f"{world.size}-{world.rank}", Console(quiet=True))
    result, samples = evaluate.run(StageContext(recipe, models, inputs, log, CPU, torch.float32, world))
    log.close()
    return result, samples


@pytest.mark.parametrize(("size", "stage", "tp_size"), [(2, 0, 1), (2, 3, 2)])
def test_the_comparison_of_one_process(runs: Runs, size: int, stage: int, tp_size: int) -> None:
    models = runs.models("llama")
    result, samples = comparison(ALONE, models, ())
    overrides = (*spread(stage), f"--generation.inference_tp_size={tp_size}")
    for found, found_samples in run_on_ranks(comparison, size, models, overrides):
        for name, described in result["models"].items():
            for metric, value in described.items():
                assert found["models"][name][metric] == pytest.approx(value, abs=BOUND, rel=BOUND), (name, metric)
        assert found["reward_clean_accuracy"] == result["reward_clean_accuracy"]
        for ours, theirs in zip(found_samples, samples, strict=True):
            assert [ours[m]["answer"] for m in ("sft", "ppo")] == [theirs[m]["answer"] for m in ("sft", "ppo")]


KINDS = ("opt", "opt-350m", "llama", "reward", "adapters", "adapters-sharded")


def export(world: World, directory: Path, stages: tuple[int, ...]) -> None:
    """The same weights, held in several ways, written below `directory`."""
    for stage in stages:
        for kind in KINDS:
            family = kind if kind.startswith("opt") else "llama"
            model = use_fast_kernels(tiny_causal_lm(family))
            if kind == "reward":
                model = load_scalar_model(str(directory.parent / "causal"), new_head_seed=3)
            if kind.startswith("adapters"):
                add_lora(model, LoRASection(rank=3), 1, "lora")
            base = "sharded" if kind.endswith("sharded") else "replicated"
            parallel = ParallelModel(model, world, CPU, stage, frozen_base=base)
            state = parallel.full_state()
            if world.is_first:
                save_model(model, tiny_tokenizer(), directory / kind / str(stage), frozenset({3}), 1, state)


def test_files_are_the_same_whatever_holds_the_weights(tmp_path: Path) -> None:
    """Byte for byte: weights, config, tokenizer, adapters; of tied and untied models. Three processes divide none of
    the sizes."""
    save_model(tiny_causal_lm("llama"), tiny_tokenizer(), tmp_path / "causal")
    spread_out = ((2, STAGES), (3, (2, 3)))
    export(ALONE, tmp_path / "1", (0,))
    for size, stages in spread_out:
        run_on_ranks(export, size, tmp_path / str(size), stages)
    for kind in KINDS:
        plain = files_of(tmp_path / "1" / kind / "0")
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= plain.keys()
        for size, stages in spread_out:
            for stage in stages:
                assert files_of(tmp_path / str(size) / kind / str(stage)) == plain, (kind, size, stage)


def files_of(directory: Path) -> dict[str, bytes]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}
