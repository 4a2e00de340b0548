"""`threefold doctor` from the command line: what it prints and writes, and its exit codes."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.data.doctor.planting import Row, Words, write_jsonl
from threefold import cli
from threefold.config.load import load_recipe
from threefold.config.recipe import Recipe
from threefold.data.doctor import FAST, fast_report
from threefold.data.library import open_library
from threefold.doctor.command import diagnose
from threefold.doctor.console import show
from threefold.doctor.page import page


def recipe_file(directory: Path, rows: list[Row], more: str = "") -> Path:
    data = write_jsonl(directory / "rows.jsonl", rows)
    path = directory / "recipe.toml"
    path.write_text(f'[data]\nsources = ["{data}"]\nmax_length = 2000\nmax_prompt_length = 2000\n{more}')
    return path


def silent(_: str) -> None:
    """Tell nobody."""


def test_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--json": tmp_path / "found.json", "--html": tmp_path / "page.html"}
    flags = [str(part) for pair in files.items() for part in pair]
    assert cli.main(["doctor", str(recipe_file(tmp_path, Words(1).clean())), *flags]) == 0
    shown = capsys.readouterr()
    assert "0 errors, 0 warnings (fast)" in shown.out
    assert "all 500 rows" in shown.out
    assert shown.err == ""
    found = json.loads(files["--json"].read_text())
    assert (found["exit_code"], found["findings"], found["mode"]) == (0, [], "fast")
    assert found["statistics"]["rows"]["num_different_rows"] == 500
    assert 0.4 < found["statistics"]["sources"][str(tmp_path / "rows.jsonl")]["longer_is_better"]["accuracy"] < 0.6


def test_errors_are_exit_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Words(1).clean()
    rows[6]["chosen"] = ""
    rows[9]["rejected"] = rows[9]["chosen"]
    report = tmp_path / "found.json"
    assert cli.main(["doctor", str(recipe_file(tmp_path, rows)), "--json", str(report), "--full"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("threefold: the data have 2 errors: ")
    assert shown.err.count("\n") == 1
    found = json.loads(report.read_text())
    assert (found["num_errors"], found["exit_code"], found["mode"]) == (2, 2, "full")
    assert {finding["origin"].rpartition("row ")[2] for finding in found["findings"]} == {"7", "10"}


def test_data_that_cannot_be_read_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\nsources = ["nowhere.jsonl"]\n')
    assert cli.main(["doctor", str(path)]) == 2
    shown = capsys.readouterr()
    assert "nowhere.jsonl" in shown.err
    assert "1 errors, 0 warnings" in shown.out


@pytest.mark.parametrize(
    ("setting", "check"),
    [
        ('[model]\nactor = "no-such-directory/at-all"\n', "chat_template"),
        ('[model]\nchat_template = "nowhere.jinja"\n', "chat_template"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_a_finding(tmp_path: Path, setting: str, check: str) -> None:
    recipe = load_recipe(recipe_file(tmp_path, Words(1).clean(), setting), {})
    report = diagnose(recipe, False, silent).report
    assert [(finding.severity, finding.check) for finding in report.findings] == [("error", check)]


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file(tmp_path, Words(1).clean()))
    assert cli.main(["doctor", path, "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "--html" in capsys.readouterr().err
    assert cli.main(["doctor", path, "--json=x", "--nonsense"]) == 2
    assert cli.main(["doctor"]) == 2
    assert cli.main(["doctor", path, "--data.max_length", "20"]) == 2
    assert "data.max_length = 20" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--help"])
    assert "--full" in capsys.readouterr().out


class Reader(HTMLParser):
    """Notes the classes of spans, all text, and every address that the page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.classes += [given["class"]] if tag == "span" and given.get("class") else []
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_tokens_and_lets_no_text_of_the_data_be_html(tmp_path: Path) -> None:
    words = Words(1)
    rows = [{**row, "prompt": "<script>alert(1)</script> " + row["prompt"]} for row in words.clean()]
    recipe = load_recipe(recipe_file(tmp_path, rows), {})
    reader = Reader()
    reader.feed(page("mine", diagnose(recipe, False, silent)))
    assert {"trained", "stop", "context", "control"} <= set(reader.classes)
    assert reader.addresses == []
    assert "script" not in reader.tags
    assert "<script>alert(1)</script>" in reader.text


def test_the_console_shows_findings_with_brackets_as_they_are(tmp_path: Path) -> None:
    rows = Words(1).clean()
    for row in rows[:10]:
        row["prompt"] = "[INST] " + row["prompt"]
    examined = diagnose(load_recipe(recipe_file(tmp_path, rows), {}), False, silent)
    out = io.StringIO()
    show(examined, Console(file=out, width=200))
    assert "[INST] in" in out.getvalue()
    assert "sft: demonstration of" in out.getvalue()


def test_the_fast_report_of_a_run_looks_at_some_rows(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, Words(1).clean(FAST.rows + 500)), {})
    report = fast_report(open_library(recipe), {}, recipe)
    assert report.findings == ()
    assert report.statistics["rows"]["num_rows"] == FAST.rows
    assert f"{FAST.rows:,} of {FAST.rows + 500:,} rows" in report.extent[0]
    assert fast_report(open_library(recipe), {}, recipe).as_dict() == report.as_dict(), "the same rows each time"


def test_the_demo_is_clean() -> None:
    assert diagnose(Recipe(), False, silent).report.findings == ()
