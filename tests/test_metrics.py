"""metrics.jsonl, TensorBoard and the console of a run, read back from what was really written."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from threefold.metrics import RunLog, SilentLog


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


# ------------------------------------------------------------------------------------------------------------- resume


def logged(directory: Path, stage: str, steps: range, resume_at: int | None = None) -> list[int]:
    """Log steps of a stage in a process of its own, so to speak; the position before each."""
    log, _ = make_log(directory)
    positions = []
    with log.stage(stage, "k" * 16, resume_at):
        for step in steps:
            positions.append(log.position())
            log.log(step, {"a": step / 3})
    log.close()
    return positions


def test_position_counts_what_is_on_disk(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path / "run")
    assert log.position() == 0
    with log.stage("sft", "key"):
        log.log(1, {"a": 1.0})
        assert log.position() == (tmp_path / "run" / "metrics.jsonl").stat().st_size > 50
    log.close()


def test_what_came_after_the_checkpoint_is_taken_back(tmp_path: Path) -> None:
    logged(tmp_path, "sft", range(1, 4))
    positions = logged(tmp_path, "ppo", range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "st')  # killed
    logged(tmp_path, "ppo", range(4, 8), resume_at=positions[3])
    of_ppo = [line for line in lines(tmp_path) if line["stage"] == "ppo"]
    assert [line.get("step", line.get("event")) for line in of_ppo] == ["start", 1, 2, 3, "resume", 4, 5, 6, 7]
    logged(tmp_path / "whole", "ppo", range(1, 8))
    steps = [line for line in of_ppo if "step" in line]
    assert steps == [line for line in lines(tmp_path / "whole") if "step" in line]
    assert [line.get("step") for line in lines(tmp_path)[:4]] == [None, 1, 2, 3]  # those of sft


def test_what_other_stages_wrote_since_stays(tmp_path: Path) -> None:
    positions = logged(tmp_path, "reward", range(1, 4))
    logged(tmp_path, "sft", range(1, 3))
    logged(tmp_path, "reward", range(2, 4), resume_at=positions[1])
    found = [(line["stage"], line.get("step", line.get("event"))) for line in lines(tmp_path)]
    assert found == [
        ("reward", "start"), ("reward", 1), ("sft", "start"), ("sft", 1), ("sft", 2),
        ("reward", "resume"), ("reward", 2), ("reward", 3),
    ]  # fmt: skip


def test_a_log_that_is_shorter_than_it_was_is_gone_on_with(tmp_path: Path) -> None:
    positions = logged(tmp_path, "sft", range(1, 5))
    os.truncate(tmp_path / "metrics.jsonl", positions[1])
    logged(tmp_path, "sft", range(4, 6), resume_at=positions[3])
    assert [line.get("step") for line in lines(tmp_path)] == [None, 1, None, 4, 5]
    (tmp_path / "metrics.jsonl").unlink()
    logged(tmp_path, "sft", range(4, 6), resume_at=positions[3])
    assert [line.get("step") for line in lines(tmp_path)] == [None, 4, 5]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    positions = logged(tmp_path, "sft", range(1, 8))
    logged(tmp_path, "sft", range(4, 10), resume_at=positions[3])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft-kkkkkkkk")).Reload()
    assert [event.step for event in events.Scalars("a")] == list(range(1, 10))


def test_progress_goes_on_where_it_was(tmp_path: Path) -> None:
    log, output = make_log(tmp_path)
    with log.progress("sft", 5, completed=3) as bar:
        bar.advance()
    assert "4/5" in output.getvalue()


def test_a_silent_log_writes_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = SilentLog(tmp_path / "run")
    with log.stage("sft", "key", resume_at=5), log.progress("sft", 2, completed=1) as bar:
        bar.advance(loss=1.0)
        log.log(1, {"a": 1.0})
        log.note("note")
        log.note_long_warmup("sft.warmup", 3, 2)
        log.table("title", ("a",), [("b",)])
        assert log.position() == 0
    log.close()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
