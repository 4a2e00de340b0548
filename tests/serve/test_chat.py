"""The terminal chat, as a person and as a pipe use it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from threefold import cli
from threefold.serve.options import ChatOptions
from threefold.serve.session import ChatSession


def talk(
    path: Path, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, str]:
    """`threefold chat` in this process with `typed` as its input; exit code and what the screen shows."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = cli.main(["chat", str(path), "--max-new-tokens", "8", *flags])
    printed = capsys.readouterr()
    assert printed.err == ""
    return code, printed.out


def test_quit_clear_an_empty_line_and_the_end_of_the_input(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = talk(tiny_run, "Hello\n\n  \nclear\nAgain\nquit\nnever read\n", monkeypatch, capsys)
    assert code == 0
    assert f"Talking with {tiny_run / 'ppo/actor'}" in out
    assert out.count("model> ") == 2
    assert out.count("(say something, or `quit`)") == 2
    assert out.count("(forgotten)") == 1
    assert out.count("you> ") == 6, "nothing is asked after quit"
    code, out = talk(tiny_run, "Hello", monkeypatch, capsys)
    assert code == 0, "the end of the input ends the chat"
    assert out.endswith("\n")


@pytest.mark.parametrize("word", ["quit", " QUIT ", "Quit"])
def test_quit_however_it_is_written(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    code, out = talk(tiny_run / "sft", f"{word}\nHello\n", monkeypatch, capsys)
    assert (code, out.count("model> ")) == (0, 0)


def test_a_message_that_is_too_long_is_answered_by_a_line_and_the_chat_goes_on(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = talk(tiny_run, "word " * 300 + "\nHello\n", monkeypatch, capsys)
    assert code == 0
    assert "write a shorter one" in out
    assert out.count("model> ") == 1


def test_the_screen_shows_the_answer_as_it_is(
    fox: Path, fox_answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like markup or an emoji's name is text; blanks and ends of lines between pieces are kept."""
    _, out = talk(fox, "Say 3\n", monkeypatch, capsys, "--greedy", "--max-new-tokens", "60")
    assert f"model> {fox_answer}\n" in out


def test_a_name_that_looks_like_an_emojis_is_left_alone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ":cat:").symlink_to(tiny_run / "sft", target_is_directory=True)
    _, out = talk(tmp_path / ":cat:", "quit\n", monkeypatch, capsys)
    assert f"Talking with {tmp_path / ':cat:'}." in out


def test_the_answers_are_the_sessions(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession.load(ChatOptions(tiny_run, max_new_tokens=8, temperature=0.0))
    answers = ["".join(session.reply(question)) for question in ("Hello", "Why?")]
    _, out = talk(tiny_run, "  Hello \nWhy?\n", monkeypatch, capsys, "--greedy")
    assert [part.split("\n\nyou> ")[0] for part in out.split("model> ")[1:]] == answers


class Impatient(io.StringIO):
    """Someone who presses Ctrl-C instead of typing."""

    def readline(self, size: int | None = -1, /) -> str:
        signal.raise_signal(signal.SIGINT)
        return super().readline(size)


def test_ctrl_c_is_one_line_and_130(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Impatient("Hello\n"))
    assert cli.main(["chat", str(tiny_run)]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_directory_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert str(tmp_path) in line
    assert "config.json" in line


@pytest.mark.real
def test_a_pretrained_checkpoint_without_a_template(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = talk(shared / "models/stories260K", "Once upon a time\nquit\n", monkeypatch, capsys)
    assert code == 0
    assert "no chat template" in out
    assert out.count("model> ") == 1


def test_through_a_pipe_with_bytes_that_are_no_text(tiny_run: Path) -> None:
    """As `printf ... | threefold chat DIR`; a stray byte neither ends the chat nor shows a traceback."""
    command = [sys.executable, "-c", "import sys; from threefold.cli import main; sys.exit(main())"]
    finished = subprocess.run(
        [*command, "chat", str(tiny_run), "--max-new-tokens", "4"],
        input=b"Hello \xff\xfe there\n\nclear\nquit\n",
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
        timeout=120,
    )
    assert finished.returncode == 0
    assert finished.stderr == b""
    shown = finished.stdout.decode()
    assert shown.count("model> ") == 1
    assert "(say something" in shown
    assert "(forgotten)" in shown
