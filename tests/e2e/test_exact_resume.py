"""A run that is killed goes on as if it had not been: the same weights and metrics, bit for bit."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.tiny import MODELS, TINY, pair_rows, same_weights, train, without_times, write_recipe, write_rows
from threefold.checkpoint.files import LOCK_FILE

RECIPE = (
    "--checkpoint.every_steps=1",
    "--sft.max_steps=12",
    "--sft.epochs=4",
    "--sft.dropout=0.1",
    "--sft.scheduler=cosine",
    "--reward.max_steps=12",
    "--reward.epochs=4",
    "--ppo.iterations=6",
    "--ppo.eval_every=3",
    "--ppo.kl_controller=adaptive",
)
"""A checkpoint after every step; what a resume could get wrong is on: dropout, best weights in the middle, the adaptive
controller, several optimizer steps an iteration, the average."""
AT_EVERY_POINT = ("--checkpoint.every_minutes=0.00001",)
"""Due at every moment from which a stage can go on: in step 3 also with rollouts or experience pending."""
TWO_PROCESSES = (
    "--launch.deployment=single_node",
    "--launch.processes_per_node=2",
    "--parallel.actor.zero_stage=3",
    "--parallel.reward.zero_stage=2",
    "--parallel.critic.zero_stage=1",
)


BLENDED = ("--data.weights=1,3", "--sft.max_steps=16")
"""Of two sources the smaller one gives three draws of four, so that its rows come round several times in an epoch."""
KILLS = {"sft": 11, "reward": 3, "ppo": 1}
"""After which checkpoint of each stage the run over them is killed."""


def _train(recipe_file: Path, output: Path, arguments: tuple[str, ...]) -> None:
    os._exit(train(recipe_file, output, *arguments))


def start(recipe_file: Path, output: Path, *arguments: str) -> Any:
    """`threefold train` in a process of its own, from a fork server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["threefold.cli"])
    process = context.Process(target=_train, args=(recipe_file, output, arguments))
    process.start()
    return process


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as its readers take it: of each stage what follows its last start. Without times."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines()):
        if line.get("event") == "start":
            kept[line["stage"]] = []
        elif "event" not in line:
            kept[line["stage"]].append(line)
    return without_times([line for lines in kept.values() for line in lines])


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    assert records(run) == records(uninterrupted)
    for name in MODELS:
        assert same_weights(run / name, uninterrupted / name), name
    for name in ("sft", "reward", "ppo"):
        ours, theirs = (json.loads((path / name / "stage.json").read_text("utf-8")) for path in (run, uninterrupted))
        assert ours["summary"] == theirs["summary"]
    assert not list((run / "checkpoints").glob("*")), "a finished stage removes its checkpoints"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml", *RECIPE)


@pytest.fixture(scope="module")
def uninterrupted(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The run with these arguments that nobody kills."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(arguments: tuple[str, ...]) -> Path:
        if arguments not in runs:
            runs[arguments] = tmp_path_factory.mktemp("runs") / "whole"
            process = start(recipe_file, runs[arguments], *arguments)
            process.join()
            assert process.exitcode == 0
        return runs[arguments]

    return run


def kill_after(recipe_file: Path, output: Path, stage: str, step: int) -> int:
    """Start a run, and kill it once a stage has a checkpoint of that step or a later one; the last one it has then."""
    process = start(recipe_file, output)
    _wait_until(process, lambda: last_checkpoint(output, stage) >= step)
    assert process.is_alive(), f"the run was over before {stage} had a checkpoint of step {step}"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _wait_for_the_lock(output)
    return last_checkpoint(output, stage)


def last_checkpoint(run: Path, stage: str) -> int:
    return max((int(path.name.split("-")[1]) for path in run.glob(f"checkpoints/{stage}-*/step-*")), default=0)


def run_with_kills(
    recipe_file: Path, output: Path, chance: random.Random, most_kills: int, *arguments: str
) -> list[str]:
    """Start, kill at a random moment, and start again until a run comes to its end; what each kill hit.

    Every other kill waits for a checkpoint that is being written. After the last one the run is left alone.
    """
    hits: list[str] = []
    while True:
        process = start(recipe_file, output, *arguments)
        if len(hits) < most_kills:
            _wait_for_moment(process, output, chance, during_write=len(hits) % 2 == 1)
        else:
            process.join()
        if process.exitcode is not None:
            assert process.exitcode == 0
            return hits
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        _wait_for_the_lock(output)
        hits.append(_what_was_hit(output))


def _wait_for_moment(process: Any, output: Path, chance: random.Random, during_write: bool) -> None:
    """Some time after the run has entered a stage, or until it is over."""
    started = time.time()
    _wait_until(process, lambda: _changed(output / "metrics.jsonl", started))
    time.sleep(chance.uniform(0.0, 2.0))
    if during_write:
        _wait_until(process, lambda: any(_changed(path, started) for path in _unfinished(output)))
    process.join(timeout=0)


def _wait_until(process: Any, happened: Callable[[], bool]) -> None:
    while process.is_alive() and not happened():
        time.sleep(0.0005)


def _changed(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def _wait_for_the_lock(output: Path) -> None:
    """The processes of a launcher that was killed end by themselves, within a second or two."""
    if (output / LOCK_FILE).exists():
        with FileLock(output / LOCK_FILE, timeout=30):
            pass


def _unfinished(output: Path) -> list[Path]:
    return list(output.glob("checkpoints/*/.step-*"))


def _what_was_hit(output: Path) -> str:
    stages = sorted(output.glob("checkpoints/*"), key=lambda path: path.stat().st_mtime)
    where = stages[-1].name.split("-")[0] if stages else "before the first checkpoint"
    return f"{where}{', writing a checkpoint' if _unfinished(output) else ''}"


def case(seed: int, *arguments: str, slow: bool = True) -> Any:
    return pytest.param(seed, arguments, marks=[pytest.mark.slow] if slow else [], id=f"{seed}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seed", "arguments"),
    [
        case(0, slow=False),
        *(case(seed) for seed in range(1, 8)),
        *(case(seed, *AT_EVERY_POINT) for seed in range(8, 15)),
        *(case(seed, *AT_EVERY_POINT, *TWO_PROCESSES) for seed in range(15, 20)),
    ],
)
def test_killed_at_random_moments(
    recipe_file: Path,
    uninterrupted: Callable[[tuple[str, ...]], Path],
    tmp_path: Path,
    seed: int,
    arguments: tuple[str, ...],
) -> None:
    """Twenty runs in `make test-all`, the first of them in `make test`."""
    most_kills = 6 if TWO_PROCESSES[0] in arguments else 12
    hits = run_with_kills(recipe_file, tmp_path / "run", random.Random(seed), most_kills, *arguments)
    print(f"\nrun {seed}, {len(hits)} kills: {'; '.join(hits)}")
    assert hits
    assert_same_run(tmp_path / "run", uninterrupted(tuple(a for a in arguments if a not in AT_EVERY_POINT)))


def two_sources(directory: Path) -> str:
    """A large and a small one, for data.sources."""
    files = []
    for name, count in (("large", 600), ("small", 120)):
        rows = [{**row, "prompt": f"{name}: {row['prompt']}"} for row in pair_rows(count)]
        files.append(str(write_rows(directory / f"{name}.jsonl", rows)))
    return ",".join(files)


@pytest.mark.timeout(300)
def test_two_blended_sources_killed_in_mid_epoch(tmp_path: Path) -> None:
    """Once in each stage, in step 1 within the second pass: what comes after are the rows that would have come."""
    sources = f"--data.sources={two_sources(tmp_path)}"
    recipe_file = write_recipe(tmp_path / "blended.toml", *RECIPE, *BLENDED, sources)
    run, whole = tmp_path / "run", tmp_path / "whole"
    killed_at = {stage: kill_after(recipe_file, run, stage, step) for stage, step in KILLS.items()}
    for output in (run, whole):
        process = start(recipe_file, output)
        process.join()
        assert process.exitcode == 0
    for stage in ("sft", "reward"):
        large, small = json.loads((whole / stage / "data.json").read_text("utf-8"))["sources"].values()
        assert abs(small["draws_per_pass"] - 3 * large["draws_per_pass"]) <= 4
        assert small["draws_per_pass"] > 3 * small["items"]
        steps_per_epoch = math.ceil((large["draws_per_pass"] + small["draws_per_pass"]) / TINY[f"{stage}.batch_size"])
        assert killed_at[stage] % steps_per_epoch != 0, "in mid-epoch"
        assert stage != "sft" or killed_at[stage] > steps_per_epoch
    for file in ("data.json", *(f"{stage}/data.json" for stage in KILLS)):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert_same_run(run, whole)
