"""The command line: exit codes, one-line mistakes, help that lists every field."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from threefold import __version__
from threefold import cli as command_line
from threefold.config.fields import recipe_markdown, recipe_paths
from threefold.config.recipe import Recipe
from threefold.config.scale import LaunchSection
from threefold.errors import ConfigError, Preempted
from threefold.launch.failures import RunFailed
from threefold.serve.options import ChatOptions


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command_line.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, tuple[int, ...], Path]]:
    """What was handed to the pipeline, in place of hours of training."""
    calls: list[tuple[Recipe, tuple[int, ...], Path]] = []
    monkeypatch.setattr(command_line, "run_pipeline", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["zzz"], ["unknown command 'zzz'", "threefold --help"]),
        (["train"], ["needs a recipe", "recipes/demo.toml"]),
        (["train", "nowhere.toml"], ["there is no recipe nowhere.toml"]),
        (["train", "--ppo.klcoef", "1"], ["command line", "unknown field ppo.klcoef", "did you mean ppo.kl_coef?"]),
        (["train", "--ppo.kl_coef"], ["--ppo.kl_coef has no value"]),
        (["train", "--steps", "1", "2"], ["unknown flag --steps", "did you mean --step?"]),
        (["train", "--outputdir", "x"], ["unknown flag --outputdir", "did you mean --output-dir?"]),
        (["train", "--out", "x"], ["unknown field out"]),
        (["train", "--nnode", "2"], ["unknown flag --nnode", "did you mean --nnodes?"]),
        (["train", "--nnodes", "0"], ['launch.nodes = "0"', "greater than or equal to 1"]),
        (["train", "--node-rank", "x"], ['launch.node_rank = "x"', "a whole number"]),
        (["train", "recipes/demo.toml", "--nnodes", "2"], ['launch.rdzv_endpoint = ""', "HOST:PORT"]),
        (["train", "recipes/demo.toml", "--nproc-per-node", "2"], ["launch.processes_per_node = 2", "single_node"]),
        (["deepspeed-chat", "--actor-modle", "x"], ["did you mean --actor-model?"]),
        (["train", "--step", "4"], ["--step", "'4' is no step"]),
        (["train", "--step", "1", "x.toml"], ["'x.toml' is no step"]),
        (["train", "--output-dir"], ["--output-dir", "expected one argument"]),
        (["train", "a.toml", "b.toml"], ["unexpected 'b.toml'"]),
        (["plan"], ["RECIPE.toml", "threefold plan --help"]),
        (["plan", "nowhere.toml"], ["there is no recipe nowhere.toml"]),
        (["chat"], ["DIR", "threefold chat --help"]),
        (["chat", "x", "--temprature", "1"], ["unknown flag --temprature", "did you mean --temperature?"]),
        (["chat", "x", "--zzz", "1"], ["unknown flag --zzz"]),
        (["chat", "x", "--top-k", "a"], ["--top-k", "not a whole number: 'a'"]),
        (["chat", "x", "--temperature", "-1"], ["temperature -1.0", "0 (greedy) or above"]),
        (["chat", "x", "--top-p", "0"], ["top_p 0.0", "at most 1"]),
        (["chat", "x", "--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["recipe", "--sft.epochs", "0"], ['sft.epochs = "0"', "greater than or equal to 1"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("threefold: ")
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert all(command in out for command in ("train", "deepspeed-chat", "plan", "chat", "recipe", "--version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"threefold {__version__}\n", "")


def test_help_of_train_lists_every_field_within_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{path} " in out for path in recipe_paths())
    assert "Weight of the per-token KL penalty in the reward." in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_recipe_prints_toml_and_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipe", "--ppo.kl_coef", "0.25")
    assert code == 0
    assert tomllib.loads(out)["ppo"]["kl_coef"] == 0.25
    assert run(capsys, "recipe", "--markdown") == (0, recipe_markdown(), "")


def test_train_hands_over_recipe_steps_and_directory(
    capsys: pytest.CaptureFixture[str], started: list[tuple[Recipe, tuple[int, ...], Path]], tmp_path: Path
) -> None:
    recipe_file = tmp_path / "small.toml"
    recipe_file.write_text('[run]\nname = "small"\n[sft]\nepochs = 3\n')
    command = ["train", str(recipe_file), "--ppo.kl_coef", "0.05", "--step", "3", "1", "3", "--sft.epochs=4"]
    assert run(capsys, *command) == (0, "", "")
    assert run(capsys, *command, "--run.output_dir", "elsewhere")[0] == 0
    assert run(capsys, *command, "--run.output_dir", "elsewhere", "--output_dir", "here")[0] == 0
    recipe, steps, _ = started[0]
    assert (recipe.run.name, recipe.sft.epochs, recipe.ppo.kl_coef, steps) == ("small", 4, 0.05, (1, 3))
    assert [directory for _, _, directory in started] == [
        Path("runs/small"),
        Path("elsewhere"),
        Path("here"),
    ]


def test_torchruns_flags_stand_for_fields_and_fields_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launches: list[LaunchSection] = []
    handed_on: list[list[str]] = []

    def started(recipe: Recipe, work: object, arguments: list[str]) -> None:
        launches.append(recipe.launch)
        handed_on.append(arguments)

    monkeypatch.setattr(command_line, "start", started)
    recipe_file = str(tmp_path / "small.toml")
    Path(recipe_file).write_text("")
    flags = ["--nnodes", "2", "--node_rank=1", "--rdzv-endpoint", "a:1", "--nproc-per-node", "4"]
    assert command_line.main(["train", recipe_file, *flags]) == 0
    assert launches[0] == LaunchSection(
        deployment="multi_node", nodes=2, node_rank=1, rdzv_endpoint="a:1", processes_per_node=4
    )
    assert handed_on[0] == ["train", recipe_file, *flags]
    assert command_line.main(["train", recipe_file, "--nnodes", "1", "--nproc-per-node", "2"]) == 0
    assert launches[1] == LaunchSection(deployment="single_node", processes_per_node=2)
    assert command_line.main(["train", recipe_file, "--hostfile", "hosts", "--launch.hostfile=", "--nnodes", "2"]) == 0
    assert launches[2] == LaunchSection(deployment="multi_node", nodes=2)


def test_an_override_before_the_recipe_does_not_swallow_it(
    started: list[tuple[Recipe, tuple[int, ...], Path]], tmp_path: Path
) -> None:
    recipe_file = tmp_path / "small.toml"
    recipe_file.write_text('[run]\nname = "small"\n')
    assert command_line.main(["train", "--ppo.kl_coef", "0.5", str(recipe_file)]) == 0
    assert (started[0][0].run.name, started[0][0].ppo.kl_coef) == ("small", 0.5)


def test_plan_prints_the_memory_of_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "recipes/demo.toml", "--nnodes", "1", "--nproc-per-node", "2")
    assert code == 0
    assert out.startswith("plan of demo: 2 processes")


def test_chat_hands_over_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    chats: list[ChatOptions] = []
    monkeypatch.setattr(command_line, "run_chat", chats.append)
    assert command_line.main(["chat", "some/dir"]) == 0
    assert command_line.main(["chat", "some/dir", "--greedy", "--max_new_tokens=5", "--system", "Be kind."]) == 0
    assert chats[0] == ChatOptions(path="some/dir")
    assert chats[1] == ChatOptions(path="some/dir", temperature=0.0, max_new_tokens=5, system="Be kind.")


def test_what_is_raised_decides_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def command(arguments: Sequence[str]) -> None:
            raise error

        return command_line.run_guarded(command, [], command_line.TRAINING_INTERRUPTED)

    assert raising(ConfigError("two\n  lines")) == 2
    assert capsys.readouterr().err == "threefold: two lines\n"
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == command_line.TRAINING_INTERRUPTED
    assert raising(Preempted("stopped, saved")) == 143
    assert capsys.readouterr().err == "stopped, saved\n"
    assert raising(RunFailed("rank 1 was killed")) == 1
    assert capsys.readouterr().err == "threefold: rank 1 was killed\n"
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from threefold.cli import main; sys.exit(main(['recipe']))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        finished = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)
    assert (finished.returncode, finished.stderr) == (command_line.EXIT_BROKEN_PIPE, "")


def test_ctrl_c_while_the_libraries_load_is_one_line() -> None:
    """The interrupt is sent by the import of torch itself, so it always falls into the loading."""
    code = (
        "import os, signal, sys, runpy\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['threefold', '--version']\n"
        "runpy.run_module('threefold', run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr.strip()) == (130, "", "interrupted")
