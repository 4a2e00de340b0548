"""Real files, read in place: what is clean must not be called faulty."""

from __future__ import annotations

from pathlib import Path

import pytest

from threefold.config.data import DataSection, SourceSection
from threefold.config.recipe import ModelSection, Recipe
from threefold.doctor.command import diagnose

ALL_STEPS = ("hh_rlhf/harmless_1600.jsonl.gz", "llama_factory/dpo_en_demo.json", "llama_factory/dpo_zh_demo.json",
             "llama_factory/oaast_rm_zh.json", "oasst/en_100_tree.jsonl")  # fmt: skip
STEP_1 = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "tinystories/val.txt", "llama_factory/alpaca_en_demo.json",
          "llama_factory/alpaca_zh_demo.json", "llama_factory/kto_en_demo.json",
          "llama_factory/c4_demo.jsonl")  # fmt: skip

FILES = (*ALL_STEPS, *STEP_1)

EXPECTED: dict[str, set[str]] = {
    "hh_rlhf/harmless_1600.jsonl.gz": {"turns_in_answers"},
    "llama_factory/dpo_zh_demo.json": {"replacement_characters"},
    "llama_factory/c4_demo.jsonl": {"replacement_characters"},
    "llama_factory/oaast_rm_zh.json": {"length_bias"},
}
"""All of it is really there: 23 answers with a further "Human:" in them, U+FFFD in 6 and in 4 rows, and an answer that
is the better one in 76 % of the pairs because it is the longer one, as a rule of thumb."""


@pytest.mark.real
@pytest.mark.parametrize(("name", "full"), [*((name, True) for name in FILES), *((name, False) for name in FILES[::4])])
def test_a_clean_file_has_at_most_one_finding(shared: Path, name: str, full: bool) -> None:
    source = SourceSection(path=[str(shared / "data" / name)], sft_only=name in STEP_1)
    recipe = Recipe(
        model=ModelSection(actor=str(shared / "models" / "stories260K"), chat_template="dialogue", pad_token="<|pad|>"),
        data=DataSection(sources=[source], max_length=100_000, max_prompt_length=100_000, bad_rows="drop"),
    )
    report = diagnose(recipe, full, lambda _: None).report
    assert {finding.check for finding in report.findings} == EXPECTED.get(name, set()), report.findings
    assert len(report.findings) <= 1
    assert report.exit_code == 0


@pytest.mark.real
def test_bad_rows_of_a_real_file_are_named(shared: Path) -> None:
    """harmless_1600 has four rows without an answer and one whose dialogues differ."""
    source = SourceSection(path=[str(shared / "data" / ALL_STEPS[0])])
    report = diagnose(Recipe(data=DataSection(sources=[source], long_rows="drop")), False, lambda _: None).report
    bad = [finding for finding in report.errors if finding.check == "bad_rows"]
    assert sorted(finding.count for finding in bad) == [1, 4]
    assert all("harmless_1600.jsonl.gz row " in finding.message for finding in bad)
