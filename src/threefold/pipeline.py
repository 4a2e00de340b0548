"""The three steps as a resumable graph: each step's key is a hash of all that it depends on.

A step whose directory carries its present key is finished and skipped; one whose key has changed runs again, and so
does whatever depends on it. Nothing finished is removed before its replacement is complete.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from threefold import __version__
from threefold.checkpoint.files import (
    EVALUATION_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    STAGE_FILE,
    building,
    content_hash,
    full_disk_named,
    hash_of,
    is_left_over,
    locked,
    read_record,
    recover,
    remove_directories,
    replacing,
    stage_record,
    write_json,
    write_text,
)
from threefold.checkpoint.training import Checkpointer
from threefold.config.data import SourceSection
from threefold.config.recipe import LoRASection, PPOSection, Recipe, SupervisedSection
from threefold.data.examples import source_fingerprint
from threefold.data.library import Library
from threefold.engine.device import make_repeatable, pick_device, pick_dtype
from threefold.engine.distributed import ALONE, World, start_world, stop_world
from threefold.errors import CheckpointError, ConfigError, DataError
from threefold.launch.shared_directory import check_shared
from threefold.metrics import RunLog, SilentLog
from threefold.stages import evaluate, ppo, preflight, reward, sft
from threefold.stages.context import EMBEDDED, StageContext, shared_library, stop_if_asked
from threefold.stages.ppo_progress import points_per_iteration
from threefold.stages.summary import closing_table

CHECKPOINT_DIRECTORY = "checkpoints"
DATA_FILE = "data.json"
PLACES_FILE = "data_places.parquet"
FORMAT = 2
"""Raised when a step's meaning changes so that directories of an older version must not be taken for finished."""


STEP_NUMBERS = {"sft": 1, "reward": 2, "ppo": 3}


@dataclass(frozen=True)
class Step:
    """One node of the graph: its number for --step, what it runs, which steps it starts from, which settings it
    reads."""

    number: int
    name: str
    run: Callable[[StageContext], Mapping[str, Any]]
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]


PASSES = {"micro_batch_size", "micro_batch_tokens"}
"""Fields that bound a forward pass, and without dropout change no result but its last bits."""


DATA_FIELDS = {"split", "eval_fraction", "long_rows", "truncate_side", "bad_rows", "weights", "temperature"}
"""Settings of the data, beside the sources and the lengths, that a step's result depends on."""


def graph(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe in order, each with exactly the settings that its result depends on."""
    data = recipe.data
    shared = {
        "seed": recipe.run.seed,
        "dtype": str(pick_dtype(recipe.run.dtype, pick_device(recipe.run.device))),
        "chat_template": content_hash(recipe.model.chat_template),
        "system_prompt": recipe.model.system_prompt,
        "pad_token": recipe.model.pad_token,
        "sources": [_source(source, recipe) for source in data.sources],
        "data": data.model_dump(include=DATA_FIELDS),
    }
    actor = _model(recipe.model.actor, recipe)
    answers = {"max_length": data.max_length}
    prompts = {"max_prompt_length": data.max_prompt_length}
    from_sft = not recipe.model.reward
    text = recipe.ppo.mixture.source
    mixture = {"text": content_hash(text)} if text else {}
    return (
        Step(
            1,
            "sft",
            sft.run,
            (),
            {**shared, **answers, "actor": actor, "sft": _supervised(recipe.sft)},
        ),
        Step(
            2,
            "reward",
            reward.run,
            ("sft",) if from_sft else (),
            {
                **shared,
                **answers,
                "start": "" if from_sft else content_hash(recipe.model.reward),
                "reward": _supervised(recipe.reward),
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
                "ppo": _ppo(recipe.ppo),
                "retokenise": recipe.model.retokenise_for_reward,
            },
        ),
    )


def _ppo(section: PPOSection) -> dict[str, Any]:
    """What step 3's result depends on: not what only bounds memory, checks or reports, nor where the text lies (its
    content does)."""
    unread: dict[str, Any] = {
        **dict.fromkeys([*PASSES, "gradient_checkpointing", "offload_optimizer", "parity_bound"], True),
        "mixture": {"source": True},
        "ema": {"offload": True},
        "actor_lora": True,
        "critic_lora": True,
    }
    if section.kl_controller == "fixed":
        unread |= {"kl_target": True, "kl_horizon": True}
    adapters = {name: _lora(getattr(section, name)) for name in ("actor_lora", "critic_lora")}
    return section.model_dump(exclude=unread) | adapters


def _lora(section: LoRASection) -> dict[str, Any]:
    """What adapters are: nothing where there are none, and a default like the value that it stands for."""
    return section.model_dump() | {"alpha": section.effective_alpha()} if section.rank else {}


def _supervised(section: SupervisedSection) -> dict[str, Any]:
    """What the result of step 1 or 2 depends on: with dropout, also how a batch is cut into passes, for each draws its
    own."""
    random_passes = section.dropout > 0 or (section.lora.rank > 0 and section.lora.dropout > 0)
    exclude = {"lora", "gradient_checkpointing", *(() if random_passes else PASSES)}
    return section.model_dump(exclude=exclude) | {"lora": _lora(section.lora)}


def _source(source: SourceSection, recipe: Recipe) -> Any:
    """What stands for a dataset: its content, how it is read, and its part in the whole; not where it lies."""
    settings = source.model_dump(exclude={"path", "name", "few_shot_file", "split", "sft_only"})
    settings["shares"] = source.shares(recipe.data.split)
    return {"content": source_fingerprint(source, recipe), "settings": settings}


def _model(source: str, recipe: Recipe) -> Any:
    if source == EMBEDDED:
        return {"embedded": recipe.model.embedded.model_dump()}
    return content_hash(source)


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
        CheckpointError: if the directory is another recipe's or in use, or a step is wanted whose inputs are missing or
            out of date.
    """
    device = pick_device(recipe.run.device)
    world = start_world(device, recipe.launch.collective_timeout_seconds)
    run_steps(recipe, steps, output_dir, device, world)
    stop_world(world)


def run_steps(recipe: Recipe, steps: tuple[int, ...], output_dir: Path, device: torch.device, world: World) -> None:
    """`run_pipeline` among processes that have met."""
    nodes = graph(recipe)
    with full_disk_named(output_dir), ExitStack() as stack:
        world.from_first(lambda: _take(output_dir, recipe, stack))
        check_shared(output_dir, world)
        log = RunLog(output_dir) if world.is_first else SilentLog(output_dir)
        stack.callback(log.close)
        keys = world.from_first(lambda: step_keys(nodes))
        fingerprints = [source["content"] for source in nodes[0].settings["sources"]]
        run = Run(recipe, keys, fingerprints, output_dir, log, device, pick_dtype(recipe.run.dtype, device), world)
        wanted = [node for node in nodes if node.number in steps]
        pending = [node.name for node in wanted if not run.is_finished(node.name)]
        if pending:
            preflight.check(run.context(output_dir, ()), pending)
        if world.is_first:
            write_json(output_dir / RUN_FILE, run.description())
            if pending:
                run.write_manifest()
        for node in wanted:
            run.step(node)
        if 3 in steps:
            run.evaluate()
        if world.is_first:
            closing_table(output_dir, recipe, run.keys, run.finished_evaluation(), log)


def _take(output_dir: Path, recipe: Recipe, stack: ExitStack) -> None:
    """Make the directory this run's, for the time of the stack; what a crash has left between two names is put
    right."""
    _claim(output_dir, recipe)
    stack.enter_context(locked(output_dir))
    for name in STEP_NUMBERS:
        recover(output_dir / name)


def _claim(output_dir: Path, recipe: Recipe) -> None:
    """Make sure that the directory is new or this recipe's own."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir}: is a file; choose another --output-dir")
    record = read_record(output_dir / RUN_FILE, "name")
    if record is None:
        if output_dir.is_dir() and not all(is_left_over(path) for path in output_dir.iterdir()):
            raise CheckpointError(f"{output_dir}: is not empty and holds no run; choose another --output-dir")
    elif record["name"] != recipe.run.name:
        raise CheckpointError(
            f"{output_dir}: holds the run of recipe {record['name']!r}, not {recipe.run.name!r}; "
            "choose another --output-dir, or set --run.name if it is meant to go on"
        )
    elif _is_another(record.get("recipe"), recipe):
        raise CheckpointError(
            f"{output_dir}: holds a run of the same name, {recipe.run.name!r}, with another model.actor and other "
            "data.sources; choose another --output-dir, or another --run.name"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output_dir}: cannot be created ({error.strerror}); choose another --output-dir") from error


def _is_another(recorded: Any, recipe: Recipe) -> bool:
    """Whether a recorded recipe has neither its model nor its data in common with this one."""
    try:
        before = recorded["model"]["actor"], recorded["data"]["sources"]
    except (TypeError, KeyError):  # an older or damaged record: its name has to do
        return False
    return before[0] != recipe.model.actor and before[1] != json.loads(recipe.model_dump_json())["data"]["sources"]


@dataclass(frozen=True)
class Run:
    """A recipe at work in its directory.

    Attributes:
        keys: the key that each step has under this recipe.
        fingerprints: of the data sources, as the keys have them.
        device, dtype: where, and in which precision, to compute.
        world: the processes of the run; what reads or writes the directory is the first one's decision.
    """

    recipe: Recipe
    keys: Mapping[str, str]
    fingerprints: Sequence[str]
    directory: Path
    log: RunLog
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE

    def description(self) -> dict[str, Any]:
        """What run.json records."""
        return {
            "name": self.recipe.run.name,
            "recipe": json.loads(self.recipe.model_dump_json()),
            "keys": dict(self.keys),
            "environment": {
                "threefold": __version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "platform": platform.platform(),
                "threads": self.recipe.run.num_threads or torch.get_num_threads(),
                "processes": self.world.size,
            },
        }

    def context(self, output: Path, inputs: Sequence[str]) -> StageContext:
        """What a stage is given: where to write, and the directories of these finished steps."""
        directories = {name: self.directory / name for name in inputs}
        surroundings = (self.log, self.device, self.dtype, self.world)
        return StageContext(self.recipe, output, directories, *surroundings, known_library=self.library)

    @cached_property
    def library(self) -> Library:
        """The data, opened once: what the steps' keys stand for. Collective when first asked for."""
        library = shared_library(self.recipe, self.world, self.log.note)
        if [source.fingerprint for source in library.sources] != list(self.fingerprints):
            raise DataError("data.sources: changed while the run was starting; run again when nothing writes to them")
        return library

    def write_manifest(self) -> None:
        """Write down where the data go."""
        write_json(self.directory / DATA_FILE, self.library.manifest())
        with replacing(self.directory / PLACES_FILE) as path:
            self.library.write_places(path)

    def is_finished(self, name: str) -> bool:
        """Whether a step's directory holds its result under this recipe. Collective."""

        def found() -> bool:
            record = stage_record(self.directory / name)
            return record is not None and record["key"] == self.keys[name]

        return self.world.from_first(found)

    def step(self, node: Step) -> None:
        """Run a step into its directory, unless it is finished."""
        if self.is_finished(node.name):
            self.log.note(f"step {node.number}, {node.name}: finished earlier, skipped")
            self._remove_checkpoints(node)  # of which a crash at the very end may have left some
            return
        self._demand_inputs(node.number, node.inputs)
        stop_if_asked(self.world)
        make_repeatable(self.recipe.run, self.world.rank)
        key, started = self.keys[node.name], time.perf_counter()
        checkpoints = self._checkpoints(node)
        saved = checkpoints.load()
        before = {} if saved is None else saved.values["stage"]
        if saved is not None:
            self.log.note(f"step {node.number}, {node.name}: goes on from {saved.directory}")
        elif self._checkpoints_of_other_settings(node):
            self.log.note(f"step {node.number}, {node.name}: from its beginning; its checkpoints are of other settings")

        def seconds() -> float:
            return float(before.get("seconds", 0.0)) + time.perf_counter() - started

        with (
            self.log.stage(node.name, key, before.get("log_position")),
            building(self.directory / node.name, self.world) as partial,
        ):
            context = self.context(partial, node.inputs)
            summary = node.run(replace(context, checkpoints=checkpoints, saved=saved, seconds=seconds))
            record = {
                "stage": node.name,
                "key": key,
                "inputs": {name: self.keys[name] for name in node.inputs},
                "settings": node.settings,
                "seconds": round(seconds(), 2),
                "summary": dict(summary),
            }
            if self.world.is_first:
                write_json(partial / STAGE_FILE, record)
        checkpoints.clear()
        self._remove_checkpoints(node)

    def _remove_checkpoints(self, node: Step) -> None:
        if self.world.is_first:
            remove_directories(self.directory / CHECKPOINT_DIRECTORY, f"{node.name}-*")

    def _checkpoints_of_other_settings(self, node: Step) -> bool:
        own = self._checkpoint_directory(node)
        return any(path.name != own.name for path in own.parent.glob(f"{node.name}-*"))

    def _checkpoint_directory(self, node: Step) -> Path:
        return self.directory / CHECKPOINT_DIRECTORY / f"{node.name}-{self.keys[node.name][:12]}"

    def _checkpoints(self, node: Step) -> Checkpointer:
        """Those of a step under its present settings; with others, it begins anew."""
        settings = self.recipe.checkpoint
        if node.name == "ppo":  # counts iterations, and the stage counts the moments in them, too
            every = settings.every_steps * points_per_iteration(self.recipe.ppo)
            settings = settings.model_copy(update={"every_steps": every})
        return Checkpointer(self._checkpoint_directory(node), self.keys[node.name], settings, self.world, self.log.note)

    def _demand_inputs(self, number: int, inputs: Sequence[str]) -> None:
        """Refuse to start step `number` from a step that is missing or was made with other settings."""
        for name in inputs:
            wanted = STEP_NUMBERS[name]
            if self.world.from_first(lambda name=name: stage_record(self.directory / name) is None):  # type: ignore[misc]
                raise CheckpointError(
                    f"{self.directory / name}: step {number} needs step {wanted}, which has not finished; "
                    f"add it: --step {wanted} {number}"
                )
            if not self.is_finished(name):
                raise CheckpointError(
                    f"{self.directory / name}: was made with other settings than the recipe has now; run it again "
                    f"(--step {wanted} {number}) or go back to the settings in its stage.json"
                )

    def evaluate(self) -> None:
        """Compare the steps' models, unless that is done already for these very models and settings."""
        if self.world.from_first(lambda: self.finished_evaluation() is not None):
            return
        self._demand_inputs(3, ("sft", "reward"))
        make_repeatable(self.recipe.run, self.world.rank)
        key, started = self._evaluation_key(), time.perf_counter()
        with self.log.stage("evaluate", key):
            result, samples = evaluate.run(self.context(self.directory, ("sft", "reward", "ppo")))
        if not self.world.is_first:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        write_text(self.directory / SAMPLES_FILE, lines)
        seconds = round(time.perf_counter() - started, 2)
        write_json(self.directory / EVALUATION_FILE, {"key": key, "seconds": seconds, **result})

    def finished_evaluation(self) -> dict[str, Any] | None:
        """The comparison on disk, if it is of these very models and settings."""
        record = read_record(self.directory / EVALUATION_FILE, "key", "models")
        return record if record is not None and record["key"] == self._evaluation_key() else None

    def _evaluation_key(self) -> str:
        settings = self.recipe.evaluate.model_dump()
        return hash_of({"format": FORMAT, "settings": settings, "inputs": dict(self.keys)})
