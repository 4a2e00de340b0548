"""Prompts and answer lengths of a benchmark's iterations: fixed, or drawn from a file of lengths."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from threefold.bench.options import DEFAULT_LENGTH, BenchOptions
from threefold.errors import DataError


@dataclass(frozen=True)
class Workload:
    """One iteration's work.

    Attributes:
        prompts: token ids of each prompt.
        answer_lengths: of each prompt, the tokens of each of its answers.
    """

    prompts: tuple[tuple[int, ...], ...]
    answer_lengths: tuple[tuple[int, ...], ...]

    def lengths(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of each prompt, its tokens and those of each answer."""
        return [(len(prompt), answers) for prompt, answers in zip(self.prompts, self.answer_lengths, strict=True)]

    def sequences(self) -> list[tuple[int, int]]:
        """(prompt tokens, answer tokens) of every answer."""
        return [(prompt, answer) for prompt, answers in self.lengths() for answer in answers]


@dataclass(frozen=True)
class LengthPairs:
    """Lengths to draw from.

    Attributes:
        pairs: (prompt tokens, answer tokens); a single one is a fixed setting.
    """

    pairs: tuple[tuple[int, int], ...]

    def longest(self) -> tuple[int, int]:
        """Longest prompt and longest answer."""
        return max(p for p, _ in self.pairs), max(a for _, a in self.pairs)


def length_pairs(options: BenchOptions) -> LengthPairs:
    """The lengths that the options fix, or those of their file.

    Raises:
        DataError: a row of the file is no length; the message names file and row.
    """
    prompt_length = options.prompt_length or DEFAULT_LENGTH
    if options.lengths is None:
        return LengthPairs(((prompt_length, options.answer_length or DEFAULT_LENGTH),))
    rows = _read_rows(options.lengths)
    if len(rows[0]) == 2 and options.prompt_length is not None:
        raise DataError(f"{options.lengths}: gives prompt lengths, and so does --prompt-length; leave the flag out")
    return LengthPairs(tuple((row[0], row[1]) if len(row) == 2 else (prompt_length, row[0]) for row in rows))


def draw_workloads(options: BenchOptions, pairs: LengthPairs, vocab_size: int, count: int) -> list[Workload]:
    """`count` iterations of random tokens; the same seed gives the same ones. Each prompt draws a pair, and each
    further answer to it the answer length of another."""
    generator = random.Random(options.seed)
    workloads = []
    for _ in range(count):
        drawn = [generator.choices(pairs.pairs, k=options.answers_per_prompt) for _ in range(options.batch)]
        prompts = [tuple(generator.choices(range(vocab_size), k=prompt[0][0])) for prompt in drawn]
        workloads.append(Workload(tuple(prompts), tuple(tuple(answer for _, answer in row) for row in drawn)))
    return workloads


def _read_rows(file: Path) -> list[tuple[int, ...]]:
    """A JSON list of lengths or [prompt, answer] pairs, or lines of one or two whole numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--lengths {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--lengths {file}: not UTF-8 text at byte {error.start}") from error
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"--lengths {file}: not valid JSON: {error}") from error
        named = [(f"item {number}", item if isinstance(item, list) else [item]) for number, item in enumerate(items, 1)]
    else:
        lines = [(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        named = [(where, [_number(part) for part in re.split(r"[\s,]+", line.strip())]) for where, line in lines]
    if not named:
        raise DataError(f"--lengths {file}: is empty; write one answer length (tokens) a line")
    width = len(named[0][1])
    return [_checked(file, where, values, width) for where, values in named]


def _number(text: str) -> object:
    return int(text) if re.fullmatch(r"[0-9]+", text) else text


def _checked(file: Path, where: str, values: Sequence[object], width: int) -> tuple[int, ...]:
    lengths = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 1]
    shown = " ".join(map(str, values))
    if len(lengths) != len(values) or len(values) not in (1, 2):
        raise DataError(
            f"--lengths {file} {where}: {shown!r} must be an answer length, or a prompt and an answer length, "
            "in tokens of 1 or more"
        )
    if len(values) != width:
        raise DataError(f"--lengths {file} {where}: {shown!r} has {len(values)} columns, the first row {width}")
    return tuple(lengths)
