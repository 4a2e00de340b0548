"""The three steps as a resumable graph: each step's key is a hash of all that it depends on.

A step whose directory carries its present key is finished and skipped; one whose key has changed runs again, and so
does
whatever depends on it. Nothing finished is removed before its replacement is complete.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from threefold import __version__
from threefold.checkpoint import (
    EVALUATION_FILE,
    LOCK_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    STAGE_FILE,
    building,
    content_hash,
    hash_of,
    locked,
    read_record,
    recover,
    stage_record,
    write_json,
    write_text,
)
from threefold.config.recipe import Recipe
from threefold.engine.device import make_repeatable, pick_device, pick_dtype
from threefold.errors import CheckpointError, ConfigError
from threefold.metrics import RunLog
from threefold.stages import evaluate, ppo, preflight, reward, sft
from threefold.stages.context import EMBEDDED, StageContext
from threefold.stages.summary import closing_table

FORMAT = 1
"""Raised when a step's meaning changes so that directories of an older version must not be taken for finished."""


@dataclass(frozen=True)
class Step:
    """One node of the graph: its number for --step, what it runs, which steps it starts from, which settings it
    reads."""

    number: int
    name: str
    run: Callable[[StageContext], Mapping[str, Any]]
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]


def graph(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe in order, each with exactly the settings that its result depends on."""
    data = recipe.data
    shared = {
        "seed": recipe.run.seed,
        "dtype": recipe.run.dtype,
        "chat_template": _template(recipe.model.chat_template),
        "pad_token": recipe.model.pad_token,
        "sources": [_source(source, recipe) for source in data.sources],
        "data": data.model_dump(include={"split", "eval_fraction", "long_rows", "bad_rows"}),
    }
    actor = _source(recipe.model.actor, recipe)
    answers = {"max_length": data.max_length}
    prompts = {"max_prompt_length": data.max_prompt_length}
    from_sft = not recipe.model.reward
    mixture = {"text": content_hash(recipe.ppo.mixture.source)} if recipe.ppo.mixture.source else {}
    return (
        Step(1, "sft", sft.run, (), {**shared, **answers, "actor": actor, "sft": recipe.sft.model_dump()}),
        Step(
            2,
            "reward",
            reward.run,
            ("sft",) if from_sft else (),
            {
                **shared,
                **answers,
                "start": "" if from_sft else content_hash(recipe.model.reward),
                "reward": recipe.reward.model_dump(),
            },
        ),
        Step(
            3,
            "ppo",
            ppo.run,
            ("sft", "reward"),
            {
                **shared,
                **prompts,
                **mixture,
                "ppo": recipe.ppo.model_dump(),
                "retokenise": recipe.model.retokenise_for_reward,
            },
        ),
    )


def _source(source: str, recipe: Recipe) -> Any:
    if source == "demo":
        return {"demo": recipe.data.demo.model_dump()}
    if source == EMBEDDED:
        return {"embedded": recipe.model.embedded.model_dump()}
    return content_hash(source)


def _template(template: str) -> str:
    return content_hash(template)


def step_keys(steps: tuple[Step, ...]) -> dict[str, str]:
    """Each step's key, from its settings and the keys of the steps before it."""
    keys: dict[str, str] = {}
    for step in steps:
        keys[step.name] = hash_of(
            {"format": FORMAT, "settings": step.settings, "inputs": {name: keys[name] for name in step.inputs}}
        )
    return keys


def run_pipeline(recipe: Recipe, steps: tuple[int, ...], output_dir: Path) -> None:
    """Run the chosen steps of a recipe in `output_dir`, skipping what is finished, and close with a table.

    Args:
        steps: any of 1, 2, 3.
        output_dir: a new directory, or one that an earlier run of this recipe (by run.name) left.

    Raises:
        CheckpointError: if the directory is another recipe's, or a step is wanted whose inputs are missing or out of
            date.
    """
    nodes = graph(recipe)
    keys = step_keys(nodes)
    pick_device(recipe.run.device)  # before anything is written
    _claim(output_dir, recipe)
    with locked(output_dir):
        _run_locked(nodes, keys, recipe, steps, output_dir)


def _run_locked(
    nodes: tuple[Step, ...], keys: Mapping[str, str], recipe: Recipe, steps: tuple[int, ...], output_dir: Path
) -> None:
    device = pick_device(recipe.run.device)
    dtype = pick_dtype(recipe.run.dtype, device)
    for node in nodes:
        recover(output_dir / node.name)
    log = RunLog(output_dir)
    try:
        _write_run(output_dir, recipe, keys)
        wanted = [node for node in nodes if node.number in steps]
        pending = [node.name for node in wanted if not _is_finished(output_dir, node.name, keys)]
        if pending:
            preflight.check(StageContext(recipe, output_dir, {}, log, device, dtype), pending)
        for node in wanted:
            _run_step(node, keys, recipe, output_dir, log, device, dtype)
        if 3 in steps:
            _evaluate(nodes[-1], keys, recipe, output_dir, log, device, dtype)
        closing_table(output_dir, recipe, keys, _finished_evaluation(output_dir, recipe, keys), log)
    finally:
        log.close()


def _claim(output_dir: Path, recipe: Recipe) -> None:
    """Make sure that the directory is new or this recipe's own."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir}: is a file; choose another --output-dir")
    record = read_record(output_dir / RUN_FILE, "name")
    if record is None:
        if output_dir.is_dir() and any(path.name != LOCK_FILE for path in output_dir.iterdir()):
            raise CheckpointError(f"{output_dir}: is not empty and holds no run; choose another --output-dir")
    elif record["name"] != recipe.run.name:
        raise CheckpointError(
            f"{output_dir}: holds the run of recipe {record['name']!r}, not {recipe.run.name!r}; "
            "choose another --output-dir, or set --run.name if it is meant to go on"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output_dir}: cannot be created ({error.strerror}); choose another --output-dir") from error


def _write_run(output_dir: Path, recipe: Recipe, keys: Mapping[str, str]) -> None:
    write_json(
        output_dir / RUN_FILE,
        {
            "name": recipe.run.name,
            "recipe": json.loads(recipe.model_dump_json()),
            "keys": dict(keys),
            "environment": {
                "threefold": __version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        },
    )


def _run_step(
    node: Step,
    keys: Mapping[str, str],
    recipe: Recipe,
    output_dir: Path,
    log: RunLog,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    directory = output_dir / node.name
    if _is_finished(output_dir, node.name, keys):
        log.note(f"step {node.number}, {node.name}: finished earlier, skipped")
        return
    inputs = {name: _finished(output_dir, name, keys, node) for name in node.inputs}
    make_repeatable(recipe.run)
    started = time.perf_counter()
    with log.stage(node.name, keys[node.name]), building(directory) as partial:
        summary = node.run(StageContext(recipe, partial, inputs, log, device, dtype))
        write_json(
            partial / STAGE_FILE,
            {
                "stage": node.name,
                "key": keys[node.name],
                "inputs": {name: keys[name] for name in node.inputs},
                "settings": node.settings,
                "seconds": round(time.perf_counter() - started, 2),
                "summary": dict(summary),
            },
        )


def _is_finished(output_dir: Path, name: str, keys: Mapping[str, str]) -> bool:
    record = stage_record(output_dir / name)
    return record is not None and record["key"] == keys[name]


def _finished(output_dir: Path, name: str, keys: Mapping[str, str], node: Step) -> Path:
    """Directory of a finished, up-to-date input."""
    number = {"sft": 1, "reward": 2}[name]
    record = stage_record(output_dir / name)
    if record is None:
        raise CheckpointError(
            f"{output_dir / name}: step {node.number} needs step {number}, which has not finished; "
            f"add it: --step {number} {node.number}"
        )
    if record["key"] != keys[name]:
        raise CheckpointError(
            f"{output_dir / name}: was made with other settings than the recipe has now; run it again "
            f"(--step {number} {node.number}) or go back to the settings in its stage.json"
        )
    return output_dir / name


def _evaluation_key(recipe: Recipe, keys: Mapping[str, str]) -> str:
    return hash_of({"format": FORMAT, "settings": recipe.evaluate.model_dump(), "ppo": keys["ppo"]})


def _finished_evaluation(output_dir: Path, recipe: Recipe, keys: Mapping[str, str]) -> dict[str, Any] | None:
    """The comparison on disk, if it is of these very models and settings."""
    record = read_record(output_dir / EVALUATION_FILE, "key", "models")
    return record if record is not None and record["key"] == _evaluation_key(recipe, keys) else None


def _evaluate(
    ppo_step: Step,
    keys: Mapping[str, str],
    recipe: Recipe,
    output_dir: Path,
    log: RunLog,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Compare the stages' models, unless that is done already for these very models and settings."""
    if _finished_evaluation(output_dir, recipe, keys) is not None:
        return
    inputs = {name: _finished(output_dir, name, keys, ppo_step) for name in ppo_step.inputs}
    inputs["ppo"] = output_dir / ppo_step.name
    key = _evaluation_key(recipe, keys)
    make_repeatable(recipe.run)
    started = time.perf_counter()
    with log.stage("evaluate", key):
        result, samples = evaluate.run(StageContext(recipe, output_dir, inputs, log, device, dtype))
    write_text(output_dir / SAMPLES_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    seconds = round(time.perf_counter() - started, 2)
    write_json(output_dir / EVALUATION_FILE, {"key": key, "seconds": seconds, **result})
