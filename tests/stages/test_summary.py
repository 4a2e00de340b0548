"""The closing table: readable at 80 columns, no number cut."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny import tiny_recipe
from threefold.metrics import RunLog
from threefold.pipeline import graph, step_keys
from threefold.stages.summary import closing_table

NAMES = ("sft", "ppo", "ema")


def estimate(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "count": 300}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    """Numbers as wide as they come."""
    model = {
        "score": estimate(-123.456, -130.0, -110.0),
        "gold": estimate(0.987, 0.9, 1.0),
        "win_rate_by_score": estimate(0.123, -0.456, 0.789),
        "win_rate_by_gold": estimate(0.321, -0.654, 0.987),
        "kl_per_answer": -1234.56,
        "distinct_2": 0.246,
        "distinct_2_per_prompt": 0.346,
        "mean_length_tokens": 1357.9,
        "stopped": 0.99,
    }
    accuracy = estimate(0.911, 0.811, 0.955)
    models = {name: dict(model) for name in NAMES}
    return {"num_prompts": 300, "answers_per_prompt": 2, "models": models, "reward_clean_accuracy": accuracy}


def printed(run: Path, evaluation: dict[str, Any] | None, width: int, directory: Path) -> list[str]:
    file = io.StringIO()
    log = RunLog(directory, Console(file=file, width=width, highlight=False))
    recipe = tiny_recipe()
    closing_table(run, recipe, step_keys(graph(recipe)), evaluation, log)
    log.close()
    return file.getvalue().splitlines()


def test_no_number_is_cut_at_80_columns(tiny_run: Path, evaluation: dict[str, Any], tmp_path: Path) -> None:
    lines = printed(tiny_run, evaluation, 80, tmp_path)
    text = "\n".join(lines)
    tables = [line for line in lines if line.startswith(("│", "┃", "┏", "└", "┡"))]
    assert max(map(len, tables)) <= 80
    assert "…" not in text
    for number in ("-123.456", "0.987", "-0.456 to 0.789", "-0.654 to 0.987", "-1234.56", "0.246", "1357.9", "99%"):
        assert text.count(number) >= 2, number
    assert "0.911 [0.811, 0.955]" in text
    rows = [line for line in lines if line.startswith("│") and "-1234.56" in line]
    assert len(rows) == 1, "one row per metric, not folded"
    assert rows[0].count("-1234.56") == 3


def test_a_narrow_terminal_folds_and_still_cuts_nothing(
    tiny_run: Path, evaluation: dict[str, Any], tmp_path: Path
) -> None:
    assert "…" not in "\n".join(printed(tiny_run, evaluation, 40, tmp_path))


def test_the_steps_show_the_numbers_of_their_summaries(tiny_run: Path, tmp_path: Path) -> None:
    lines = printed(tiny_run, None, 160, tmp_path)
    text = "\n".join(lines)
    summaries = {name: json.loads((tiny_run / name / "stage.json").read_text())["summary"] for name in NAMES[:1]}
    assert f"{summaries['sft']['sft/eval_perplexity']:.4g}" in text
    assert all(any(line.startswith(f"│ {name} ") for line in lines) for name in ("sft", "reward", "ppo"))
    assert "beats sft" not in text, "nothing was compared"
    assert f"threefold chat {tiny_run / 'ppo/actor'}" in text


def test_without_gold_there_are_no_gold_rows(tiny_run: Path, evaluation: dict[str, Any], tmp_path: Path) -> None:
    for model in evaluation["models"].values():
        del model["gold"], model["win_rate_by_gold"]
    del evaluation["reward_clean_accuracy"]
    text = "\n".join(printed(tiny_run, evaluation, 80, tmp_path))
    assert "gold" not in text
    assert "beats sft by score" in text


def test_steps_of_other_settings_are_not_shown(tiny_run: Path, tmp_path: Path) -> None:
    file = io.StringIO()
    log = RunLog(tmp_path, Console(file=file, width=120))
    recipe = tiny_recipe("--reward.learning_rate=0.5")
    closing_table(tiny_run, recipe, step_keys(graph(recipe)), None, log)
    log.close()
    assert "sft" in file.getvalue()
    assert "accuracy" not in file.getvalue()
    assert f"threefold chat {tiny_run / 'sft'}" in file.getvalue()
