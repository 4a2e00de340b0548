"""metrics.jsonl, TensorBoard and the console of a run, read back from what was really written."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from threefold.metrics import RunLog


def make_log(directory: Path) -> tuple[RunLog, io.StringIO]:
    output = io.StringIO()
    return RunLog(directory, Console(file=output, width=100, force_terminal=False)), output


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in text.splitlines()
    ]


def test_each_step_is_one_line_of_its_stage(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path / "run")
    with log.stage("sft", "0123456789abcdef"):
        log.log(1, {"sft/loss": 2.5, "sft/count": 3})
        assert len(lines(tmp_path / "run")) == 2  # written at once, not at the end
        log.log(2, {"sft/loss": 1.0})
    with log.stage("reward", "fedcba9876543210"):
        log.log(1, {"reward/loss": 0.5})
    log.close()
    assert lines(tmp_path / "run") == [
        {"stage": "sft", "event": "start", "key": "0123456789abcdef"},
        {"stage": "sft", "step": 1, "sft/loss": 2.5, "sft/count": 3.0},
        {"stage": "sft", "step": 2, "sft/loss": 1.0},
        {"stage": "reward", "event": "start", "key": "fedcba9876543210"},
        {"stage": "reward", "step": 1, "reward/loss": 0.5},
    ]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    with log.stage("sft", "k" * 16):
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()
    assert lines(tmp_path)[1] == {"stage": "sft", "step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_a_second_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for step in (1, 2):
        log, _ = make_log(tmp_path)
        with log.stage("sft", "k" * 16):
            log.log(step, {"a": step})
        log.close()
    assert [line.get("step", "start") for line in lines(tmp_path)] == ["start", 1, "start", 2]


def test_half_a_line_that_a_crash_left_spoils_only_itself(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n{"stage": "sf')
    for _ in range(2):
        log, _ = make_log(tmp_path)
        with log.stage("sft", "key"):
            log.log(1, {})
        log.close()
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert whole.pop(1) == '{"stage": "sf'
    assert [json.loads(line)["stage"] for line in whole] == ["sft"] * 5


def test_a_stage_that_fails_leaves_what_it_logged(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)

    def fail() -> None:
        with log.stage("ppo", "k" * 16):
            log.log(1, {"a": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with log.stage("ppo", "k" * 16):
        log.log(1, {"a": 2.0})
    log.close()
    assert [line.get("a", "start") for line in lines(tmp_path)] == ["start", 1.0, "start", 2.0]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path)
    with log.stage("sft", "0123456789"):
        log.log(1, {"sft/loss": 2.5})
        log.log(7, {"sft/loss": 1.25, "sft/grad_norm": math.nan})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft-01234567")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("sft/loss")] == [(1, 2.5), (7, 1.25)]


def test_notes_are_printed_as_they_are(tmp_path: Path) -> None:
    log, output = make_log(tmp_path)
    note = "[data.jsonl] row 3: [/b] :key: C:warning:" + " x" * 80
    log.note(note)
    assert output.getvalue() == note + "\n"  # one line, no markup, no emoji
    log.close()


def test_table_and_progress_show_what_they_are_given(tmp_path: Path) -> None:
    log, output = make_log(tmp_path)
    with log.progress("sft   ", 3) as bar:
        for step in range(3):
            bar.advance(loss=0.123456 * step, kl=1e-7)
    log.table("the run", ("step", "result", "time"), [("sft", "perplexity 3.1", "12 s"), ("ppo", "score 0.9", "80 s")])
    log.close()
    text = output.getvalue()
    for part in ("sft", "3/3", "loss 0.2469  kl 1e-07", "the run", "perplexity 3.1", "80 s"):
        assert part in text
