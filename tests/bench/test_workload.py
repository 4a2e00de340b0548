"""Lengths: fixed, from files of both forms, drawn with a seed; rows that are no lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from threefold.bench.options import BenchOptions
from threefold.bench.workload import LengthPairs, draw_workloads, length_pairs
from threefold.errors import DataError


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "lengths.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_fixed_lengths_are_256_unless_set() -> None:
    assert length_pairs(BenchOptions()).pairs == ((256, 256),)
    assert length_pairs(BenchOptions(prompt_length=7, answer_length=9)).pairs == ((7, 9),)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("3\n\n12\n 5 \n", ((256, 3), (256, 12), (256, 5))),
        ("\ufeff[3, 12]", ((256, 3), (256, 12))),
        ("8 3\n9\t12\n10,5", ((8, 3), (9, 12), (10, 5))),
        ("[[8, 3], [9, 12]]", ((8, 3), (9, 12))),
        ("[[3], [12]]", ((256, 3), (256, 12))),
    ],
)
def test_a_file_of_lengths(tmp_path: Path, text: str, pairs: tuple[tuple[int, int], ...]) -> None:
    assert length_pairs(BenchOptions(lengths=written(tmp_path, text))).pairs == pairs


def test_the_prompt_length_goes_with_answer_lengths(tmp_path: Path) -> None:
    options = BenchOptions(lengths=written(tmp_path, "3\n4"), prompt_length=16)
    assert length_pairs(options).pairs == ((16, 3), (16, 4))


def test_longest_prompt_and_answer_need_not_belong_together() -> None:
    assert LengthPairs(((3, 9), (8, 2))).longest() == (8, 9)


def test_workloads_have_the_pairs_of_the_file_and_depend_on_the_seed_only() -> None:
    pairs = LengthPairs(((3, 9), (8, 2), (5, 5)))
    options = BenchOptions(batch=20, answers_per_prompt=2, seed=3)
    workloads = draw_workloads(options, pairs, vocab_size=11, count=2)
    assert workloads == draw_workloads(options, pairs, vocab_size=11, count=2)
    assert workloads[0] != workloads[1]
    assert workloads != draw_workloads(BenchOptions(batch=20, answers_per_prompt=2, seed=4), pairs, 11, 2)
    for work in workloads:
        assert all(0 <= token < 11 for prompt in work.prompts for token in prompt)
        assert len(work.prompts) == 20
        assert all((prompt, answers[0]) in pairs.pairs for prompt, answers in work.lengths())
        assert {answer for _, answer in work.sequences()} == {9, 2, 5}
        assert len(work.sequences()) == 40


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("[]", ["is empty"]),
        ("3\nlong\n", ["line 2", "'long' must be an answer length"]),
        ("3\n0\n", ["line 2", "'0' must be"]),
        ("3\n-4", ["line 2", "'-4'"]),
        ("1 2 3", ["line 1", "'1 2 3'"]),
        ("3\n4 5", ["line 2", "2 columns, the first row 1"]),
        ("[3, 4.5]", ["item 2", "'4.5'"]),
        ("[3, true]", ["item 2", "'True'"]),
        ("[3, []]", ["item 2"]),
        ("[3,", ["not valid JSON"]),
    ],
)
def test_a_bad_row_is_one_line_with_file_and_row(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = written(tmp_path, text)
    with pytest.raises(DataError) as refused:
        length_pairs(BenchOptions(lengths=file))
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in [str(file), *parts]), message


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        length_pairs(BenchOptions(lengths=tmp_path / "absent"))
    file = tmp_path / "bytes"
    file.write_bytes(b"3\n\xff")
    with pytest.raises(DataError, match="not UTF-8 text at byte 2"):
        length_pairs(BenchOptions(lengths=file))


def test_prompt_lengths_from_two_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave the flag out"):
        length_pairs(BenchOptions(lengths=written(tmp_path, "8 3"), prompt_length=16))
