"""A run small enough for a test: the real three steps on embedded data, a second or two on one core."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from threefold import cli
from threefold.config.load import dump_recipe, load_recipe
from threefold.config.recipe import Recipe
from threefold.metrics import RunLog
from threefold.stages import ppo, reward, sft
from threefold.stages.context import StageContext

TINY = {
    "run.name": "tiny",
    "run.log_every": 1,
    "run.num_threads": 1,
    "run.device": "cpu",
    "model.embedded.vocab_size": 320,
    "model.embedded.hidden_size": 32,
    "model.embedded.num_layers": 2,
    "model.embedded.num_heads": 2,
    "model.embedded.ffn_dim": 64,
    "model.embedded.max_positions": 288,
    "data.max_length": 256,
    "data.max_prompt_length": 192,
    "data.long_rows": "drop",
    "data.demo.num_prompts": 300,
    "sft.max_steps": 4,
    "sft.batch_size": 16,
    "sft.learning_rate": 3e-3,
    "sft.eval_every": 2,
    "reward.max_steps": 4,
    "reward.batch_size": 16,
    "reward.learning_rate": 1e-3,
    "ppo.iterations": 2,
    "ppo.prompts_per_iteration": 6,
    "ppo.answers_per_prompt": 2,
    "ppo.ppo_epochs": 2,
    "ppo.minibatches": 2,
    "ppo.warmup_steps": 0,
    "ppo.actor_learning_rate": 1e-3,
    "ppo.critic_learning_rate": 1e-3,
    "ppo.num_eval_prompts": 8,
    "ppo.sampling.max_new_tokens": 12,
    "evaluate.num_prompts": 5,
    "evaluate.num_samples": 3,
}
"""What differs from the recipe's defaults."""

MODELS = {name: Path(name) for name in ("sft", "reward", "ppo/actor", "ppo/actor_ema", "ppo/critic")}
STAGES = {"sft": sft.run, "reward": reward.run, "ppo": ppo.run}
EXAMPLE_TEXTS = ("Good day!", "It is late, so we go home.", "One two three four five six", "Ah", "Why do you ask?")


def tiny_recipe(*overrides: str) -> Recipe:
    """The tiny recipe, and then overrides as on the command line."""
    return load_recipe(None, [*(f"--{name}={value}" for name, value in TINY.items()), *overrides])


def train(recipe_file: Path, output: Path, *arguments: str) -> int:
    """`threefold train`, in this process; returns the exit code."""
    return cli.main(["train", str(recipe_file), "--output-dir", str(output), *arguments])


def write_recipe(path: Path, *overrides: str) -> Path:
    path.write_text(dump_recipe(tiny_recipe(*overrides)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class StageRun:
    """One stage that was run alone: its directory, what it returned, what it logged."""

    directory: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    def series(self, name: str) -> list[float]:
        return [record[name] for record in self.metrics if name in record]


def stage_context(
    name: str, recipe: Recipe, directory: Path, inputs: dict[str, Path] | None = None, log: RunLog | None = None
) -> StageContext:
    output = directory / name
    output.mkdir(parents=True)
    log = log or RunLog(directory, Console(quiet=True))
    return StageContext(recipe, output, inputs or {}, log, torch.device("cpu"), torch.float32)


def run_stage(name: str, recipe: Recipe, directory: Path, inputs: dict[str, Path] | None = None) -> StageRun:
    """Run one stage on its own in a new directory, on the finished stages `inputs`."""
    torch.manual_seed(recipe.run.seed)
    context = stage_context(name, recipe, directory, inputs)
    try:
        with context.log.stage(name, "0" * 8):
            summary = dict(STAGES[name](context))
    finally:
        context.log.close()
    return StageRun(directory / name, summary, read_metrics(directory))


def finished(run: Path) -> dict[str, Path]:
    """The stages of a finished run, as inputs of step 3."""
    return {"sft": run / "sft", "reward": run / "reward"}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl that carry values."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "event" not in record]


def without_times(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same records without what a clock measured."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("timing_s/", "memory/", "perf/"))} for record in metrics
    ]


def weights(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def same_weights(first: Path, second: Path) -> bool:
    """Bit for bit."""
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def file_stamps(run: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a model was written again: inode and modification time of its weights."""
    files = {name: run / path / "model.safetensors" for name, path in MODELS.items()}
    return {name: (file.stat().st_ino, file.stat().st_mtime_ns) for name, file in files.items() if file.is_file()}


def rewritten(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> set[str]:
    """Stages of which a model is new."""
    return {name.split("/")[0] for name in after if before.get(name) != after[name]}


def copy_of(run: Path, target: Path) -> Path:
    """A run that a test may change."""
    shutil.copytree(run, target)
    return target


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Preference rows with different prompts."""
    return [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(count)]


def conversation_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns with answers of different lengths, one of them empty but for a letter."""
    rows = []
    for row in range(count):
        messages = []
        for turn in range(row % 3 + 1):
            text = EXAMPLE_TEXTS[(row + turn) % len(EXAMPLE_TEXTS)]
            messages.append({"role": "user", "content": f"{text} ({row})"})
            messages.append({"role": "assistant", "content": "a" if row % 4 == 0 else f"{text} " * (row % 4)})
        rows.append({"messages": messages})
    return rows
