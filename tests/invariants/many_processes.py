"""One step of a tiny recipe on several processes, and how far its curves are from those of another run.

Each step starts from models that are made once, not from the step before: what differs in the last bits after one step
would otherwise be the next one's start. The learning rates are such that ten steps move the loss by far more than the
bound that two curves are held to, and no further: with much larger ones Adam, which divides by the gradient's size,
makes steps out of the rounding noise of gradients that are zero but for it (a key's bias moves no attention, a common
shift of all scores no comparison of two).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.models.families_under_test import tiny_causal_lm
from tests.ranks import run_on_ranks
from tests.tiny import tiny_recipe
from threefold.data.chat import BUILT_IN_TEMPLATES, ensure_pad_token
from threefold.data.demo import train_tokenizer
from threefold.data.library import open_library
from threefold.engine.device import make_repeatable
from threefold.engine.distributed import World
from threefold.metrics import RunLog, SilentLog
from threefold.models.loading import load_scalar_model, save_model, set_score_statistics
from threefold.stages import ppo, reward, sft
from threefold.stages.context import StageContext

STEPS = {"sft": sft.run, "reward": reward.run, "ppo": ppo.run}
CPU = torch.device("cpu")
BOUND = 1e-5
"""Two curves are alike: absolute, of what is below 1, and relative, of what is above."""

SMALL = (
    "--data.demo.num_prompts=150",
    "--sft.max_steps=10",
    "--sft.epochs=9",
    "--sft.batch_size=7",
    "--sft.eval_every=5",
    "--sft.learning_rate=1e-3",
    "--sft.max_eval_examples=9",
    "--reward.max_steps=10",
    "--reward.epochs=9",
    "--reward.batch_size=7",
    "--reward.eval_every=5",
    "--reward.learning_rate=1e-4",
    "--reward.max_eval_examples=9",
    "--ppo.iterations=10",
    "--ppo.prompts_per_iteration=5",
    "--ppo.answers_per_prompt=2",
    "--ppo.minibatches=2",
    "--ppo.ppo_epochs=1",
    "--ppo.actor_learning_rate=3e-4",
    "--ppo.critic_learning_rate=3e-4",
    "--ppo.num_eval_prompts=5",
    "--ppo.sampling.max_new_tokens=8",
    "--ppo.sampling.top_k=16",
)
"""Batches that no number of processes divides; rows of different lengths, so that shares have unlike counts.

A token is drawn where a uniform number falls among the cumulative probabilities. Where it falls within a rounding error
of one, two runs draw different tokens, and part. Of a whole vocabulary there are hundreds of places for that at each
token (among the answers of a pretrained model it was seen once in about a thousand tokens), of top_k few.
"""
STOPS = frozenset(range(110, 160))
"""Bytes that no text has, and so many that answers of random models end at different lengths."""


def make_models(family: str, directory: Path) -> Path:
    """Random checkpoints of a family with a tokenizer of the tiny recipe's data: see `write_models`."""
    recipe = tiny_recipe(*SMALL)
    tokenizer = train_tokenizer(open_library(recipe).of_source(0), recipe.model.embedded.vocab_size)
    tokenizer.chat_template = BUILT_IN_TEMPLATES["tags"]
    ensure_pad_token(tokenizer, "", "tokenizer", family)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = tiny_causal_lm(family, vocab_size=len(tokenizer), max_position_embeddings=288, **special)
    return write_models(model, tokenizer, directory, STOPS)


def write_models(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, stops: frozenset[int] = frozenset()
) -> Path:
    """What steps start from: directory/sft, directory/reward with a random head and, a little off the first,
    directory/ppo/actor."""
    rest = (stops | {tokenizer.eos_token_id}, tokenizer.pad_token_id)
    save_model(model, tokenizer, directory / "sft", *rest)
    scalar = load_scalar_model(str(directory / "sft"), new_head_seed=1)
    set_score_statistics(scalar, 0.1, 1.5)
    save_model(scalar, tokenizer, directory / "reward", *rest)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    save_model(model, tokenizer, directory / "ppo/actor", *rest)
    return directory


@dataclass(frozen=True)
class Outcome:
    """What a step left behind: the lines of its metrics but for times and memory, and the directory of its models."""

    metrics: list[dict[str, Any]]
    directory: Path

    def curve(self, name: str) -> list[float]:
        return [record[name] for record in self.metrics if name in record]

    def digests(self) -> dict[str, str]:
        """Of every file."""
        files = sorted(file for file in self.directory.rglob("*") if file.is_file())
        return {str(f.relative_to(self.directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run_step(world: World, step: str, overrides: tuple[str, ...], models: Path, directory: Path) -> None:
    """A step on this process of several; its models are in directory/STEP."""
    recipe = tiny_recipe(*SMALL, f"--model.actor={models / 'sft'}", *overrides)
    make_repeatable(recipe.run, world.rank)
    log = RunLog(directory, Console(quiet=True)) if world.is_first else SilentLog(directory)
    if world.is_first:
        (directory / step).mkdir(parents=True)
    world.barrier()
    inputs = {name: models / name for name in ("sft", "reward")}
    with log.stage(step, "0" * 8):
        STEPS[step](StageContext(recipe, directory / step, inputs, log, CPU, torch.float32, world))
    world.barrier()
    log.close()


def outcome(size: int, step: str, overrides: Sequence[str], models: Path, directory: Path) -> Outcome:
    """A step on `size` processes."""
    run_on_ranks(run_step, size, step, tuple(overrides), models, directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    unsteady = ("timing_s/", "memory/", "perf/")
    metrics = [{k: v for k, v in line.items() if not k.startswith(unsteady)} for line in lines if "event" not in line]
    return Outcome(metrics, directory / step)


@dataclass
class Runs:
    """Runs of single steps, each made once."""

    directory: Path
    _outcomes: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)
    _models: dict[str, Path] = field(default_factory=dict)

    def models(self, family: str) -> Path:
        """The models that a family's steps start from."""
        if family not in self._models:
            self._models[family] = make_models(family, self.directory / family)
        return self._models[family]

    def __call__(self, family: str, step: str, size: int = 1, overrides: Sequence[str] = ()) -> Outcome:
        key = (family, step, size, *overrides)
        if key not in self._outcomes:
            directory = self.directory / f"run-{len(self._outcomes)}"
            self._outcomes[key] = outcome(size, step, overrides, self.models(family), directory)
        return self._outcomes[key]


def spread(stage: int) -> tuple[str, ...]:
    """Every trained model in a ZeRO stage; the frozen ones sharded in stage 3."""
    trained = [f"--parallel.{model}.zero_stage={stage}" for model in ("actor", "reward", "critic")]
    frozen = [f"--parallel.{model}.zero_stage={3 if stage == 3 else 0}" for model in ("reference", "scorer")]
    return (*trained, *frozen)


def bound_of(metric: str) -> float:
    """How far two curves of a metric may be from each other.

    Losses, rewards, log-probabilities and divergences: BOUND. Looser are a gradient's norm, which jumps where an
    activation or a clipped ratio passes its kink, and what is divided by a variance; fractions of tokens jump, too. The
    mean of raw scores is free: comparisons of two answers do not say what it should be.
    """
    if "clipfrac" in metric or "accuracy" in metric or metric == "reward/score_mean":
        return math.inf
    return 10 * BOUND if metric.endswith(("grad_norm", "explained_variance")) else BOUND


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """The largest difference of each metric, relative to what is above 1."""
    worst: dict[str, float] = {}
    for first, second in zip(ours.metrics, theirs.metrics, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if isinstance(first[name], float):
                difference = abs(first[name] - second[name]) / max(1.0, abs(first[name]))
                worst[name] = max(worst.get(name, 0.0), difference)
    return worst


def beyond_bounds(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """The metrics that differ by more than they may."""
    assert ours.metrics, "a run without metrics is like any other"
    return {name: worst for name, worst in differences(ours, theirs).items() if not worst <= bound_of(name)}


def identical(ours: Outcome, theirs: Outcome) -> bool:
    """Every metric and every file of the models, bit for bit."""
    return ours.metrics == theirs.metrics and ours.digests() == theirs.digests()
