"""`threefold bench` from end to end on tiny models, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from threefold import cli

ACTOR = "llama:hidden=32,layers=2,heads=4,kv_heads=2,ffn=48,vocab=200,positions=64"
CRITIC = "opt:hidden=16,layers=1,heads=2,ffn=32,vocab=200,positions=64"
SMALL = ["--actor", ACTOR, "--critic", CRITIC, "--batch", "3", "--threads", "1", "--device", "cpu"]


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *SMALL, *arguments, "--json", str(file)]) == 0
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return record


def test_a_run_with_fixed_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--prompt-length", "9", "--answer-length", "6"]
    record = bench(tmp_path, *lengths, "--iterations", "2", "--minibatches", "2")
    assert record["command"][:3] == ["threefold", "bench", "--actor"]
    assert [iteration["warmup"] for iteration in record["iterations"]] == [True, False, False]
    assert all(iteration["lengths"] == [[9, [6]]] * 3 for iteration in record["iterations"])
    median = record["median"]
    phases = ("generate", "score", "update")
    for iteration in record["iterations"]:
        metrics = iteration["metrics"]
        assert metrics["seconds/iteration"] == pytest.approx(sum(metrics[f"seconds/{phase}"] for phase in phases))
        assert metrics["sequences_per_second"] == pytest.approx(3 / metrics["seconds/iteration"])
        assert iteration["losses"]["parity/max_abs_logprob_diff"] < 1e-5
        assert iteration["losses"]["policy/grad_norm"] > 0
        assert all(metrics[f"flop/{phase}"] == median[f"flop/{phase}"] for phase in phases)
        assert all(metrics[f"peak_bytes/{phase}"] > 1e6 for phase in phases)
    assert 0 < median["matrix_rate_fraction/score_and_update"] < 1
    assert record["machine"]["flop_per_second"]["best"] > 1e8
    assert record["environment"]["threads"] == 1
    assert record["models"]["actor"]["num_parameters"] == record["models"]["actor"]["num_trained_parameters"]
    printed = capsys.readouterr().out
    for shown in ("As DeepSpeed-Chat reports it", "end-to-end", "Counted", "score, update", "tokens/s", "TFLOP/s"):
        assert shown in printed


def test_a_run_with_drawn_lengths_and_several_answers(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("5 1\n9 7\n3 4\n", encoding="utf-8")
    record = bench(tmp_path, "--lengths", str(lengths), "--answers-per-prompt", "4", "--iterations", "1")
    drawn = [pair for iteration in record["iterations"] for pair in iteration["lengths"]]
    assert {prompt for prompt, _ in drawn} <= {5, 9, 3}
    assert {answer for _, answers in drawn for answer in answers} == {1, 7, 4}
    assert all(len(answers) == 4 for _, answers in drawn)
    assert record["lengths"] == {"longest_prompt": 9, "longest_answer": 7}
    assert all(iteration["losses"]["parity/max_abs_logprob_diff"] < 1e-5 for iteration in record["iterations"])


def test_a_run_with_adapters(tmp_path: Path) -> None:
    lengths = ["--prompt-length", "5", "--answer-length", "4"]
    arguments = ["--lora-rank", "2", "--gradient-checkpointing", "--warmup", "0", "--iterations", "1"]
    record = bench(tmp_path, *lengths, *arguments)
    assert record["memory"]["needed_bytes"]["reference"] == 0
    assert record["models"]["actor"]["num_trained_parameters"] < record["models"]["actor"]["num_parameters"] / 4
    assert record["iterations"][0]["losses"]["parity/max_abs_logprob_diff"] < 1e-5


def test_the_same_seed_does_the_same_work(tmp_path: Path) -> None:
    arguments = ["--prompt-length", "5", "--answer-length", "4", "--warmup", "0", "--iterations", "1"]
    first, second = (bench(tmp_path, *arguments)["iterations"][0]["losses"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--actor", "opt-1.2b"], ["--actor opt-1.2b", "did you mean facebook/opt-1.3b?"]),
        (["--critic", "opt:hidden=8"], ["--critic opt:hidden=8", "layers is missing"]),
        (["--critics", "x"], ["unknown flag --critics", "did you mean --critic?"]),
        (["--batch", "0"], ["--batch 0 must be at least 1"]),
        (["--batch", "x"], ["--batch", "not a whole number: 'x'"]),
        (["--warmup", "-1"], ["--warmup -1 must be at least 0"]),
        (["--minibatches", "9"], ["--minibatches 9", "3 answers"]),
        (["--answer-length", "60", "--prompt-length", "5"], ["prompts of 5 and answers of 60", "actor", "64"]),
        (["--lengths", "nowhere.txt"], ["--lengths nowhere.txt", "No such file"]),
        (["--lengths", "x", "--answer-length", "4"], ["--answer-length 4", "--lengths gives them already"]),
        (["--json", "nowhere/bench.json"], ["--json nowhere/bench.json", "no directory nowhere"]),
        (["--json", "."], ["--json .", "is a directory"]),
        (["--dtype", "float16"], ["--dtype", "'float16'"]),
        (
            ["--actor", "opt-175b", "--answer-length", "8", "--prompt-length", "8"],
            ["facebook/opt-175b", "need at least", "GiB", "free", "--lora-rank"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert cli.main(["bench", *SMALL, *arguments]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), err[:11]) == (1, "threefold: ")
    assert all(part in err for part in parts), err
