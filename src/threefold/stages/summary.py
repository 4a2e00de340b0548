"""The table that closes a run, read from what the stages left on disk."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threefold.checkpoint.files import stage_record
from threefold.config.recipe import Recipe
from threefold.metrics import RunLog


def closing_table(
    output_dir: Path, recipe: Recipe, keys: Mapping[str, str], evaluation: Mapping[str, Any] | None, log: RunLog
) -> None:
    """Print what each finished, up-to-date step achieved, and how to chat with the result.

    Args:
        evaluation: the comparison of these very models; None if it was not made.
    """
    records = {name: stage_record(output_dir / name) for name in keys}
    current = {name: record for name, record in records.items() if record is not None and record["key"] == keys[name]}
    rows = [_stage_row(name, record) for name, record in current.items()]
    if not rows:
        return
    log.table(f"{recipe.run.name}: the steps", ("step", "held-out result", "time"), rows)
    if evaluation is not None:
        _comparison(evaluation, recipe, log)
    best = "ppo/actor" if "ppo" in current else "sft" if "sft" in current else ""
    if best:
        log.note(f"Chat with it:  {_command()} chat {output_dir / best}")


def _command() -> str:
    """How the user can call threefold from here: by name if it is on the PATH, else by where this Python keeps it."""
    beside = Path(sys.executable).parent / "threefold"
    if shutil.which("threefold") or not beside.is_file():
        return "threefold"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _stage_row(name: str, record: Mapping[str, Any]) -> tuple[str, str, str]:
    summary = record["summary"]
    match name:
        case "sft":
            first, last = summary["initial/sft/eval_perplexity"], summary["sft/eval_perplexity"]
            result = f"perplexity {first:.4g} -> {last:.4g} (best of step {summary['best_step']})"
        case "reward":
            result = (
                f"accuracy {summary['reward/eval_accuracy']:.3f} "
                f"[{summary['reward/eval_accuracy_low']:.3f}, {summary['reward/eval_accuracy_high']:.3f}], "
                f"margin {summary['reward/eval_margin']:.2f}"
            )
        case _:
            result = (
                f"score {summary['initial/ppo/eval_score']:.3f} -> {summary['ppo/eval_score']:.3f} "
                f"(standard error {summary['ppo/eval_score_standard_error']:.3f}), "
                f"KL {summary['ppo/eval_kl']:.2f} nats per answer"
            )
            if "ppo/eval_text_perplexity" in summary:
                first, last = summary["initial/ppo/eval_text_perplexity"], summary["ppo/eval_text_perplexity"]
                result += f", text perplexity {first:.3f} -> {last:.3f}"
    return name, result, f"{record['seconds']:.0f} s"


def _comparison(evaluation: Mapping[str, Any], recipe: Recipe, log: RunLog) -> None:
    """One column per model and one row per metric, on the same held-out prompts; fits 80 columns."""
    models = evaluation["models"]
    measures = ("score", "gold") if any("gold" in model for model in models.values()) else ("score",)
    rows: list[list[str]] = []
    for measure in measures:
        wins = [None if name == "sft" else model[f"win_rate_by_{measure}"] for name, model in models.items()]
        rows.append([measure, *(f"{model[measure]['mean']:.3f}" for model in models.values())])
        rows.append([f"beats sft by {measure}", *("-" if win is None else f"{win['mean']:.3f}" for win in wins)])
        rows.append(
            ["  95 % interval", *("-" if win is None else f"{win['low']:.3f} to {win['high']:.3f}" for win in wins)]
        )
    if all("final_answer_accuracy" in model for model in models.values()):
        right = [model["final_answer_accuracy"] for model in models.values()]
        rows.append(["right final answers", *(f"{share['mean']:.3f}" for share in right)])
        rows.append(["  95 % interval", *(f"{share['low']:.3f} to {share['high']:.3f}" for share in right)])
    for label, key, shape in (
        ("KL per answer, nats", "kl_per_answer", ".2f"),
        ("distinct-2 per prompt", "distinct_2_per_prompt", ".3f"),
        ("distinct-2, all answers", "distinct_2", ".3f"),
        ("length, tokens", "mean_length_tokens", ".1f"),
        ("stopped by itself", "stopped", ".0%"),
    ):
        rows.append([label, *(format(model[key], f"z{shape}") for model in models.values())])
    title = f"{evaluation['num_prompts']} held-out prompts, {evaluation['answers_per_prompt']} sampled answers each"
    log.table(title, ("", *models), rows)
    target, largest = recipe.ppo.kl_target, max(model["kl_per_answer"] for model in models.values())
    verdict = "within" if largest <= target else "ABOVE"
    log.note(f"KL per answer, measured against step 1, is {verdict} the recipe's target of {target:g} nats.")
    if "reward_clean_accuracy" in evaluation:
        accuracy = _interval(evaluation["reward_clean_accuracy"])
        log.note(f"Reward model on held-out pairs without label noise: accuracy {accuracy}.")


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
