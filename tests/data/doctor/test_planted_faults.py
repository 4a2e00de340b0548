"""Each kind of fault is planted in clean rows and found; and where none is planted, none is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.doctor.planting import (
    BROUGHT,
    ROW_PLANTS,
    SET_PLANTS,
    Plant,
    Planted,
    Row,
    Words,
    plant,
    write_jsonl,
)
from threefold.config.data import DataSection, SourceSection
from threefold.config.recipe import Recipe
from threefold.data.doctor import Finding, Report, fast_report
from threefold.data.library import open_library
from threefold.doctor.command import diagnose

SEED = 20


def recipe_of(*paths: Path, **settings: object) -> Recipe:
    """A recipe that reads these files: preference rows for all steps, all else for step 1."""
    sources = [
        SourceSection(path=[str(path)], name=path.stem, sft_only="chosen" not in path.open(encoding="utf-8").readline())
        for path in paths
    ]
    data = {"max_length": 4000, "max_prompt_length": 4000} | settings
    return Recipe(data=DataSection(sources=sources, **data))  # type: ignore[arg-type]


def report_of(*paths: Path, full: bool = False, **settings: object) -> Report:
    """What the doctor says of these files."""
    return diagnose(recipe_of(*paths, **settings), full, lambda _: None).report


def checks_of(report: Report) -> set[str]:
    """Names of the checks that found something."""
    return {finding.check for finding in report.findings}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("full", [True, False])
def test_nothing_is_found_in_clean_rows(tmp_path: Path, seed: int, full: bool) -> None:
    report = report_of(write_jsonl(tmp_path / "clean.jsonl", Words(seed).clean()), full=full)
    assert report.findings == ()
    assert report.exit_code == 0


def found_of(report: Report, kind: Plant) -> list[Finding]:
    return [
        finding
        for finding in report.findings
        if finding.check == kind.check and kind.says.lower() in finding.message.lower()
    ]


@pytest.mark.parametrize("kind", ROW_PLANTS, ids=lambda kind: kind.name)
def test_a_fault_of_rows_is_found_alone(tmp_path: Path, kind: Plant) -> None:
    planted = plant((kind,), SEED)
    report = report_of(write_jsonl(tmp_path / "rows.jsonl", planted.rows))
    (finding,) = found_of(report, kind)
    expect_rows(finding, planted, kind)
    assert checks_of(report) - {kind.check} <= set(kind.brings)


def expect_rows(finding: Finding, planted: Planted, kind: Plant) -> None:
    """The finding counts the planted rows, and names the first of them by file and row."""
    numbers = planted.where[kind.name]
    assert finding.severity == kind.severity
    assert finding.count == kind.rows
    assert [int(origin.rpartition(" ")[2]) for origin in finding.examples] == numbers[:5]
    assert finding.origin.endswith(f".jsonl row {numbers[0]}")
    assert finding.origin in finding.message
    assert "\n" not in finding.message


@pytest.mark.parametrize("name", SET_PLANTS)
def test_a_fault_of_a_whole_set_is_found_alone(tmp_path: Path, name: str) -> None:
    report = report_of(write_jsonl(tmp_path / "rows.jsonl", SET_PLANTS[name](Words(SEED))))
    assert name in checks_of(report), report.findings
    assert checks_of(report) - {name} <= BROUGHT.get(name, set()), report.findings


def test_all_kinds_are_found_at_once(tmp_path: Path) -> None:
    """One run over all planted files, some of which cannot be read: more than 25 kinds, none missed."""
    planted = plant(ROW_PLANTS, SEED, num_rows=600)
    paths = [write_jsonl(tmp_path / "rows.jsonl", planted.rows)]
    for number, (name, make) in enumerate(SET_PLANTS.items()):
        paths.append(write_jsonl(tmp_path / f"{name}.jsonl", make(Words(100 + number))))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen"\n')
    unknown = write_jsonl(tmp_path / "unknown.jsonl", [{"one": "a", "two": "b"}])
    report = report_of(*paths, broken, unknown)
    for kind in ROW_PLANTS:
        own = [other.rows for other in ROW_PLANTS if other.check == kind.check and other.check != "bad_rows"]
        counts = [finding.count for finding in report.findings if finding.check == kind.check and of_rows_file(finding)]
        if kind.check == "bad_rows":
            assert len(found_of(report, kind)) == 1, kind.name
        else:
            assert len(counts) == 1, kind.name
            assert counts[0] >= sum(own), kind.name
    for name in SET_PLANTS:
        assert any(name in finding.message for finding in report.findings if finding.check == name), name
    assert {finding.origin for finding in report.findings if finding.check == "source"} == {"broken", "unknown"}
    assert len({kind.name for kind in ROW_PLANTS} | set(SET_PLANTS) | {"broken", "unknown"}) >= 25
    assert report.exit_code == 2


def of_rows_file(finding: Finding) -> bool:
    """Whether it is about the file with faults of single rows."""
    return "rows.jsonl row" in finding.origin


def some_rows(rows: list[Row], name: str, value: object) -> list[Row]:
    return [{**row, name: value} if number % 100 == 0 else row for number, row in enumerate(rows)]


def test_bad_rows_that_the_recipe_drops_are_a_warning_from_a_hundredth_on(tmp_path: Path) -> None:
    rows = some_rows(Words(SEED).clean(), "chosen", "")
    few = report_of(write_jsonl(tmp_path / "few.jsonl", rows), bad_rows="drop")
    assert few.findings == ()
    assert few.statistics["sources"]["few"]["bad_rows"] == {"with an empty answer": 5}
    many = report_of(write_jsonl(tmp_path / "many.jsonl", rows[:1] * 3 + rows), bad_rows="drop")
    (finding,) = many.findings
    assert (finding.severity, finding.check, finding.count) == ("warning", "bad_rows", 8)
    assert many.exit_code == 0


def test_an_empty_share_is_an_error(tmp_path: Path) -> None:
    report = report_of(write_jsonl(tmp_path / "one.jsonl", Words(SEED).clean(1)))
    assert "empty_share" in {finding.check for finding in report.errors}


def test_a_step_without_anything_of_use_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in Words(SEED).clean(400)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = Recipe(data=DataSection(sources=[SourceSection(path=[str(path)])], max_length=4000))
    report = diagnose(recipe, True, lambda _: None).report
    (finding,) = report.findings
    assert (finding.severity, finding.check) == ("error", "unused_share")
    assert "step 2 has ranked answers" in finding.message
    library = open_library(recipe)
    assert fast_report(library, {}, recipe).exit_code == 2
    assert fast_report(library, {}, recipe, ("sft", "ppo")).exit_code == 0, "step 2 is not to be run"


def test_a_source_that_drowns_another_is_found(tmp_path: Path) -> None:
    small = write_jsonl(tmp_path / "small.jsonl", Words(1).clean(10))
    large = write_jsonl(tmp_path / "large.jsonl", Words(2).clean(2500))
    assert checks_of(report_of(small, large, full=False)) == {"one_source"}


def test_too_long_rows_are_errors_or_counted_as_the_recipe_says(tmp_path: Path) -> None:
    rows = Words(SEED).clean(400)
    rows[7] = {**rows[7], "chosen": " ".join(Words(3).sentence() for _ in range(400))}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (finding,) = report_of(path, full=True, max_length=1000).findings
    assert (finding.severity, finding.check, finding.count) == ("error", "too_long", 1)
    assert finding.origin.endswith("row 8")
    assert report_of(path, full=True, max_length=1000, long_rows="drop").findings == ()
    (finding,) = report_of(path, max_length=40, long_rows="drop").findings[:1]
    assert (finding.severity, finding.check) == ("warning", "too_long")


@pytest.mark.parametrize(("share", "found"), [(0.3, {"written_objects"}), (1.0, set())])
def test_lists_are_a_fault_among_prose_and_none_where_most_answers_are_such(
    tmp_path: Path, share: float, found: set[str]
) -> None:
    words = Words(SEED)
    rows = [
        {"prompt": row["prompt"], "completion": json.dumps([words.word()]) if n < share * 200 else row["chosen"]}
        for n, row in enumerate(words.clean(200))
    ]
    assert checks_of(report_of(write_jsonl(tmp_path / "rows.jsonl", rows))) == found


def test_messages_are_a_fault_where_all_answers_are_such(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": repr({"role": "assistant", "content": row["chosen"]})}
        for row in Words(SEED).clean(200)
    ]
    assert checks_of(report_of(write_jsonl(tmp_path / "rows.jsonl", rows))) == {"written_messages"}


def test_one_opening_is_no_fault_up_to_half_of_the_conversations(tmp_path: Path) -> None:
    rows = SET_PLANTS["one_opening"](Words(SEED))
    rows = [row for number, row in enumerate(rows) if number % 5 != 0]
    assert checks_of(report_of(write_jsonl(tmp_path / "rows.jsonl", rows))) == set()


def test_one_prompt_for_most_rows_is_not_called_an_opening_too(tmp_path: Path) -> None:
    rows = Words(SEED).clean(400)
    rows = [{**row, "prompt": rows[0]["prompt"]} if number % 5 < 3 else row for number, row in enumerate(rows)]
    assert checks_of(report_of(write_jsonl(tmp_path / "rows.jsonl", rows))) == {"one_prompt"}
