"""The graph of steps: what runs again, what is skipped, and that nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from tests.tiny import (
    MODELS,
    copy_of,
    file_stamps,
    pair_rows,
    read_metrics,
    rewritten,
    same_weights,
    tiny_recipe,
    train,
    write_recipe,
    write_rows,
)
from threefold import pipeline
from threefold.config.data import SourceSection
from threefold.config.fields import iterate_fields
from threefold.config.recipe import Recipe
from threefold.pipeline import graph, step_keys

ENDLESS = {
    "sft": ("--sft.max_steps=0", "--sft.epochs=1000000"),
    "reward": ("--reward.max_steps=0", "--reward.epochs=1000000"),
    "ppo": ("--ppo.iterations=1000000",),
}
ALL, AFTER_SFT, ONLY_PPO, NONE = {"sft", "reward", "ppo"}, {"reward", "ppo"}, {"ppo"}, set[str]()
EXPECTED_BY_PREFIX = {
    "run.seed": ALL, "run.": NONE,
    "model.reward": AFTER_SFT, "model.retokenise_for_reward": ONLY_PPO, "model.": ALL,
    "data.max_prompt_length": ONLY_PPO, "data.doctor": NONE, "data.cache_dir": NONE, "data.": ALL,
    "sft.lora.rank": ALL, "sft.lora.": NONE, "reward.lora.rank": AFTER_SFT, "reward.lora.": NONE,
    "ppo.actor_lora.rank": ONLY_PPO, "ppo.actor_lora.": NONE,
    "ppo.critic_lora.rank": ONLY_PPO, "ppo.critic_lora.": NONE,
    "sft.micro_batch_": NONE, "reward.micro_batch_": NONE, "ppo.micro_batch_": NONE, "generation.": NONE,
    "sft.gradient_checkpointing": NONE, "reward.gradient_checkpointing": NONE,
    "ppo.gradient_checkpointing": NONE, "ppo.offload_optimizer": NONE, "ppo.parity_bound": NONE,
    "ppo.kl_target": NONE, "ppo.kl_horizon": NONE,
    "ppo.ema.offload": NONE, "parallel.": NONE, "launch.": NONE, "checkpoint.": NONE,
    "sft.": ALL, "reward.": AFTER_SFT, "ppo.": ONLY_PPO, "evaluate.": NONE,
}  # fmt: skip
"""Steps that a change of a field must run again; the first prefix that fits counts."""


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return copy_of(tiny_run, tmp_path / "run")


def other_value(field: FieldInfo, value: Any) -> Any:
    """Some other value of a field, without regard to what it may be."""
    if get_origin(field.annotation) is Literal:
        return next(choice for choice in get_args(field.annotation) if choice != value)
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case []:
            return [1.0]
        case [SourceSection() as source]:
            return [source.model_copy(update={"sft_only": True})]
        case list():
            return [*value[:-1], other_value(field, value[-1])]
        case tuple():
            return (*value[:-1], other_value(field, value[-1]))
    raise AssertionError(value)


def with_value(recipe: Recipe, path: str, value: Any) -> Recipe:
    def build(part: Any, names: list[str]) -> Any:
        first, *rest = names
        return part.model_copy(update={first: build(getattr(part, first), rest) if rest else value})

    rebuilt: Recipe = build(recipe, path.split("."))
    return rebuilt


@pytest.mark.parametrize("path", [path for path, _ in iterate_fields()])
def test_every_field_runs_again_exactly_what_depends_on_it(path: str) -> None:
    recipe = tiny_recipe()
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    changed = with_value(recipe, path, other_value(dict(iterate_fields())[path], value))
    before, after = step_keys(graph(recipe)), step_keys(graph(changed))
    expected = next(steps for prefix, steps in EXPECTED_BY_PREFIX.items() if path.startswith(prefix))
    assert {name for name in before if before[name] != after[name]} == expected


def test_the_content_of_a_file_counts_and_not_its_place(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", pair_rows(20))
    second = write_rows(tmp_path / "second.jsonl", pair_rows(20))
    keys = [step_keys(graph(tiny_recipe(f"--data.sources={path}"))) for path in (first, second)]
    assert keys[0] == keys[1]
    write_rows(second, pair_rows(21))
    changed = step_keys(graph(tiny_recipe(f"--data.sources={second}")))
    assert all(changed[name] != keys[0][name] for name in changed)


def test_the_precision_that_is_computed_in_counts_and_not_its_name() -> None:
    auto, named, other = (step_keys(graph(tiny_recipe(f"--run.dtype={n}"))) for n in ("auto", "float32", "bfloat16"))
    assert auto == named, "on a CPU, auto is float32"
    assert all(auto[name] != other[name] for name in auto)


def test_the_target_of_the_adaptive_controller_counts() -> None:
    adaptive = ("--ppo.kl_controller=adaptive", "--ppo.kl_horizon=1000")
    one, two = (step_keys(graph(tiny_recipe(*adaptive, f"--ppo.kl_target={target}"))) for target in (3, 4))
    assert {name for name in one if one[name] != two[name]} == {"ppo"}


def test_the_place_of_the_mixture_text_does_not_count(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("the same")
    one, two = (
        step_keys(graph(tiny_recipe(f"--ppo.mixture.source={tmp_path / name}"))) for name in ("one.txt", "two.txt")
    )
    assert one == two


@pytest.mark.parametrize(("split", "step"), [("0,1,1", "1"), ("1,0,1", "2"), ("1,1,0", "3")])
def test_a_step_without_data_is_refused_and_leaves_the_run_as_it_was(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str], split: str, step: str
) -> None:
    before = (run / "run.json").read_text()
    assert train(tiny_recipe_file, run, f"--data.split={split}") == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), "data.split" in error, f"step {step}" in error) == (1, True, True)
    assert (run / "run.json").read_text() == before


def test_a_refused_first_run_claims_nothing(tmp_path: Path, tiny_recipe_file: Path) -> None:
    assert train(tiny_recipe_file, tmp_path / "new", "--data.split=1,0,1") == 2
    assert train(tiny_recipe_file, tmp_path / "new", "--step", "1") == 0


def test_the_text_of_mixture_training_counts_for_ppo_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    before = step_keys(graph(tiny_recipe(f"--ppo.mixture.source={text}")))
    text.write_text("two")
    after = step_keys(graph(tiny_recipe(f"--ppo.mixture.source={text}")))
    assert {name for name in before if before[name] != after[name]} == {"ppo"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), NONE),
        (("--run.log_every=3", "--evaluate.num_samples=2"), NONE),
        (("--ppo.kl_coef=0.2",), ONLY_PPO),
        (("--reward.learning_rate=2e-3",), AFTER_SFT),
        (("--sft.batch_size=8",), ALL),
    ],
)
def test_running_again_does_only_what_a_change_needs(
    run: Path, tiny_recipe_file: Path, overrides: tuple[str, ...], expected: set[str]
) -> None:
    before = file_stamps(run)
    assert train(tiny_recipe_file, run, *overrides) == 0
    assert rewritten(before, file_stamps(run)) == expected
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    started = [record["stage"] for record in events if record.get("event") == "start"]
    assert set(started[4:]) - {"evaluate"} == expected
    assert ("evaluate" in started[4:]) == (overrides != ()), "the comparison follows PPO and its own settings"
    assert train(tiny_recipe_file, run, *overrides) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(events), "and then all is finished"


def test_finished_steps_are_named_as_skipped_and_the_table_is_shown_again(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_recipe_file, run) == 0
    out = capsys.readouterr().out
    for line in ("step 1, sft: finished earlier, skipped", "step 3, ppo: finished earlier, skipped", "threefold chat"):
        assert line in out
    assert "beats sft by gold" in out


def test_going_back_to_earlier_settings_runs_again_and_gives_the_earlier_weights(
    run: Path, tiny_run: Path, tiny_recipe_file: Path
) -> None:
    assert train(tiny_recipe_file, run, "--ppo.kl_coef=0.5") == 0
    assert not same_weights(run / "ppo/actor", tiny_run / "ppo/actor")
    assert train(tiny_recipe_file, run) == 0
    assert same_weights(run / "ppo/actor", tiny_run / "ppo/actor")


def test_turning_the_average_off_removes_the_old_one(run: Path, tiny_recipe_file: Path) -> None:
    assert train(tiny_recipe_file, run, "--ppo.ema.enabled=false") == 0
    assert sorted(path.name for path in (run / "ppo").iterdir()) == ["actor", "critic", "data.json", "stage.json"]
    assert set(json.loads((run / "evaluation.json").read_text())["models"]) == {"sft", "ppo"}


def test_another_start_for_the_reward_model_makes_step_2_independent_of_step_1(
    run: Path, tiny_run: Path, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    start = f"--model.reward={tiny_run / 'sft'}"
    alone = tmp_path / "alone"
    assert train(tiny_recipe_file, alone, start, "--step", "2") == 0
    assert same_weights(alone / "reward", tiny_run / "reward"), "the same start, so the same model"
    assert not (alone / "sft").exists()
    assert train(tiny_recipe_file, alone, start) == 0
    before = file_stamps(alone)
    assert train(tiny_recipe_file, alone, start, "--sft.batch_size=8") == 0
    assert rewritten(before, file_stamps(alone)) == {"sft", "ppo"}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("steps", "named", "fix"), [("2", "sft", "--step 1 2"), ("3", "sft", "--step 1 3"), ("1 3", "reward", "--step 2 3")]
)
def test_a_step_without_what_it_starts_from_is_one_line(
    tiny_recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str, named: str, fix: str
) -> None:
    output = tmp_path / "new"
    assert train(tiny_recipe_file, output, "--step", *steps.split()) == 2
    line = one_line(capsys)
    assert str(output / named) in line
    assert fix in line


def test_a_step_whose_start_is_out_of_date_is_refused_and_nothing_is_lost(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_stamps(run)
    assert train(tiny_recipe_file, run, "--sft.batch_size=8", "--step", "2", "3") == 2
    line = one_line(capsys)
    assert str(run / "sft") in line
    assert "other settings" in line
    assert "--step 1 2" in line
    assert file_stamps(run) == before
    assert train(tiny_recipe_file, run) == 0
    assert file_stamps(run) == before


def test_a_finished_step_is_skipped_even_where_its_start_is_gone(run: Path, tiny_recipe_file: Path) -> None:
    before = file_stamps(run)
    shutil.rmtree(run / "sft")
    assert train(tiny_recipe_file, run, "--step", "3") == 0
    after = file_stamps(run)
    assert after == {name: stamp for name, stamp in before.items() if name != "sft"}


def test_models_are_not_compared_with_another_step_1_than_theirs(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """sft/ was made anew with other settings, then the recipe went back: ppo/ is current, sft/ is not."""
    assert train(tiny_recipe_file, run, "--sft.batch_size=8", "--step", "1") == 0
    capsys.readouterr()
    assert train(tiny_recipe_file, run, "--evaluate.num_prompts=4", "--step", "3") == 2
    assert str(run / "sft") in one_line(capsys)


def test_an_old_comparison_is_not_shown_as_that_of_new_models(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "other"
    assert train(tiny_recipe_file, copy_of(run, other), "--ppo.kl_coef=0.5") == 0
    shutil.copy(run / "evaluation.json", other / "evaluation.json")  # as if interrupted before the comparison
    capsys.readouterr()
    assert train(tiny_recipe_file, other, "--ppo.kl_coef=0.5", "--step", "1") == 0
    out = capsys.readouterr().out
    assert "beats sft by score" not in out
    assert "ppo" in out


def interrupt_when(metrics: Path, stage: str) -> threading.Thread:
    """Sends this process Ctrl-C once `stage` has logged a number after its start."""

    def wait() -> None:
        for _ in range(6000):
            if metrics.is_file() and any(
                line.startswith(f'{{"stage": "{stage}", "step": 1') for line in metrics.read_text().splitlines()
            ):
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_ctrl_c_in_each_stage_keeps_what_is_finished(
    tiny_recipe_file: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    output = tmp_path / "run"
    interrupter = interrupt_when(output / "metrics.jsonl", stage)
    assert train(tiny_recipe_file, output, *ENDLESS[stage]) == 130
    interrupter.join()
    assert "run the same command again" in one_line(capsys)
    done = ["sft", "reward", "ppo"][: ["sft", "reward", "ppo"].index(stage)]
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == sorted([*done, "tensorboard"])
    before = file_stamps(output)
    assert train(tiny_recipe_file, output) == 0
    assert rewritten(before, file_stamps(output)).isdisjoint(done)
    assert all(same_weights(output / name, tiny_run / name) for name in MODELS), "as if nothing had happened"


def test_ctrl_c_while_a_stage_runs_again_keeps_the_old_one(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_stamps(run)
    (run / "metrics.jsonl").unlink()  # of the finished run; the interrupter waits for the new numbers
    interrupter = interrupt_when(run / "metrics.jsonl", "ppo")
    assert train(tiny_recipe_file, run, *ENDLESS["ppo"]) == 130
    interrupter.join()
    assert file_stamps(run) == before
    assert train(tiny_recipe_file, run) == 0
    assert file_stamps(run) == before, "and it is still the finished one of the earlier settings"


def test_a_stage_that_fails_keeps_the_old_one(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_stamps(run)
    assert train(tiny_recipe_file, run, "--reward.learning_rate=1e30") == 2
    line = one_line(capsys)
    assert "step 2, reward" in line
    assert "learning" in line
    assert file_stamps(run) == before
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".lock"]


def test_scores_that_are_not_finite_at_the_last_step_are_refused(
    run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step itself was finite, so only the evaluation after it can see what it did."""
    assert train(tiny_recipe_file, run, "--reward.learning_rate=1e30", "--reward.max_steps=1") == 2
    assert "reward.learning_rate" in one_line(capsys)


def test_a_swap_that_was_cut_between_its_two_renames_is_undone(run: Path, tiny_recipe_file: Path) -> None:
    before = file_stamps(run)
    (run / "ppo").rename(run / ".ppo.old")
    (run / ".ppo.building").mkdir()
    assert train(tiny_recipe_file, run) == 0
    assert file_stamps(run) == before


def test_ctrl_c_in_another_process_is_one_line_and_130(tmp_path: Path) -> None:
    recipe, output = write_recipe(tmp_path / "tiny.toml", *ENDLESS["ppo"]), tmp_path / "run"
    command = [sys.executable, "-c", "import sys; from threefold.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "train", str(recipe), "--output-dir", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(1200):
            if (output / "metrics.jsonl").is_file() and any("objective/kl" in line for line in read_metrics(output)):
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line.strip()] == [
        "interrupted; finished steps are kept, run the same command again to go on"
    ]
    assert "Traceback" not in out
    before = file_stamps(output)
    assert set(before) == {"sft", "reward"}
    assert train(recipe, output, "--ppo.iterations=1") == 0
    assert {name: stamp for name, stamp in file_stamps(output).items() if name in before} == before


def test_adapters_and_dropout_count_as_what_they_do() -> None:
    """Adapters of rank 0 are none, a default alpha is the value it stands for, and with dropout the passes matter."""

    def keys(*overrides: str) -> dict[str, str]:
        return step_keys(graph(tiny_recipe(*overrides)))

    assert keys("--sft.lora.rank=4") != keys()
    assert keys("--sft.lora.rank=4", "--sft.lora.alpha=8") == keys("--sft.lora.rank=4")
    assert keys("--sft.lora.rank=4", "--sft.lora.alpha=4") != keys("--sft.lora.rank=4")
    assert keys("--sft.dropout=0.1", "--sft.micro_batch_size=2") != keys("--sft.dropout=0.1")
    dropped = ("--sft.lora.rank=4", "--sft.lora.dropout=0.1")
    assert keys(*dropped, "--sft.micro_batch_tokens=99") != keys(*dropped)


@pytest.mark.parametrize("every_step", [False, True])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tiny_recipe_file: Path, tmp_path: Path, every_step: bool
) -> None:
    """Files may be no longer than a model's: what a full disk raises, through the same ways."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "threefold", "train", str(tiny_recipe_file), "--output-dir", str(output)]
    command += ["--step", "1", *(["--checkpoint.every_steps", "2"] if every_step else [])]
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command]
    failed = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "too large" in failed.stderr.lower()
    assert not (output / "sft").exists()
    subprocess.run(command, capture_output=True, check=True)
    assert (output / "sft" / "stage.json").is_file()
    assert not (output / "checkpoints").exists()


def test_checkpoints_of_other_settings_are_said_not_to_be_used_and_removed_in_the_end(
    tiny_recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "run" / "checkpoints" / "sft-000000000000" / "step-00000001"
    assert train(tiny_recipe_file, tmp_path / "run", "--step", "1") == 0
    left.mkdir(parents=True)
    assert train(tiny_recipe_file, tmp_path / "run", "--step", "1", "--sft.learning_rate", "2e-3") == 0
    assert "its checkpoints are of other settings" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_steps_of_a_run_use_the_data_that_their_keys_stand_for(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe_file: Path
) -> None:
    """A file that is rewritten while step 1 runs: step 2 goes on with what was read, and the next run makes it anew."""
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(400))
    data = (f"--data.sources={rows}", "--data.split=1,1,0", f"--model.actor={tiny_run / 'sft'}")
    original = pipeline.sft.run

    def then_rewritten(context: Any) -> Any:
        result = original(context)
        write_rows(rows, pair_rows(200))
        return result

    monkeypatch.setattr(pipeline.sft, "run", then_rewritten)
    output = tmp_path / "run"
    assert train(tiny_recipe_file, output, *data, "--step", "1", "2") == 0
    monkeypatch.undo()
    manifest = json.loads((output / "data.json").read_text())["sources"][0]
    record = json.loads((output / "reward" / "stage.json").read_text())
    assert record["settings"]["sources"][0]["content"] == manifest["fingerprint"]
    assert manifest["rows"] == 400
    items = json.loads((output / "reward" / "data.json").read_text())
    assert items["train"]["examples"] == manifest["steps"]["reward"]["train"]["examples"]
    before = file_stamps(output)
    assert train(tiny_recipe_file, output, *data, "--step", "1", "2") == 0
    assert {"sft", "reward"} <= rewritten(before, file_stamps(output))
    assert json.loads((output / "data.json").read_text())["sources"][0]["rows"] == 200


def test_a_crash_before_the_first_step_leaves_a_directory_that_can_go_on(
    tmp_path: Path, tiny_recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("threefold.data.library.Library.write_places", crash)
    assert train(tiny_recipe_file, tmp_path / "run", "--step", "1") == 130
    monkeypatch.undo()
    assert train(tiny_recipe_file, tmp_path / "run", "--step", "1") == 0
