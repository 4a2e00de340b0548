"""All checks over all sources: which rows each kind of check looks at, and what comes out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.doctor.findings import Finding, Report, errors_first, of_rows
from threefold.data.doctor.near import NearChecks
from threefold.data.doctor.ranking import RankingChecks
from threefold.data.doctor.rendered import RenderedChecks, template_findings
from threefold.data.doctor.repeats import RepeatChecks
from threefold.data.doctor.rows import Row, SourceRows, rows_of, spread_out
from threefold.data.doctor.rules import RuleCounts
from threefold.data.doctor.samples import TokenSample, samples_of
from threefold.data.split import STEPS, Step

MAX_BAD_ALLOWED = 0.01
"""Share of a source's rows above which bad rows are a warning where the recipe drops them."""

MAX_ONE_SOURCE = 0.99
MAX_SAMPLES_PER_SOURCE = 2


@dataclass(frozen=True)
class Depth:
    """How many rows of each source the checks look at; those that look at some take them evenly spread over it.

    Attributes:
        mode: its name.
        rows: read at all: for equal rows, leakage, rankings, labels; 0 is all.
        texts: looked through for faults of the text.
        near_duplicates: compared by MinHash.
        rendered: rendered and tokenised, for each step.
    """

    mode: Literal["fast", "full"]
    rows: int
    texts: int
    near_duplicates: int
    rendered: int


FAST = Depth("fast", rows=2_000, texts=2_000, near_duplicates=2_000, rendered=64)
FULL = Depth("full", rows=0, texts=100_000, near_duplicates=20_000, rendered=1_000)


@dataclass(frozen=True)
class Examined:
    """A report, and rows as tokens to look at."""

    report: Report
    samples: tuple[TokenSample, ...]


def examine(
    sources: Sequence[SourceRows],
    chats: Mapping[Step, ChatFormat],
    recipe: Recipe,
    depth: Depth,
    steps: Collection[Step] = STEPS,
) -> Examined:
    """Look at all sources.

    Args:
        sources: with their rows, and the place of each.
        chats: of the steps whose tokenizer is known; a step without one is not rendered.
        recipe: lengths, what the loss is on, seed.
        depth: how much is looked at.
        steps: those that are to be run; what only another one needs is no fault.
    """
    findings = list(_source_findings(sources))
    statistics: dict[str, Any] = {"sources": {}}
    extent: list[str] = []
    samples: list[TokenSample] = []
    repeats, uses = RepeatChecks(sources), StepUses()
    near = NearChecks([source.name for source in sources])
    rendered = {step: RenderedChecks(step, chat, recipe) for step, chat in chats.items() if step in steps}
    for number, source in enumerate(sources):
        rules, ranking = RuleCounts(source.name), RankingChecks(source)
        marks = _marks(source, depth, recipe.run.seed)
        shown = dict.fromkeys(STEPS, 0)
        for index, row in _looked_at(source, number, depth, recipe.run.seed):
            repeats.see(row, index)
            ranking.see(row, index)
            uses.see(row)
            if marks.texts[index]:
                rules.see(row)
            if marks.near[index]:
                near.see(row)
            step = STEPS[row.step] if row.step >= 0 else None
            if step is not None and marks.rendered[index] and step in rendered:
                rendered[step].see(row)
                if shown[step] < MAX_SAMPLES_PER_SOURCE:
                    made = list(samples_of(row, step, chats[step], recipe))
                    samples += made
                    shown[step] += bool(made)
        findings += [*rules.findings(), *ranking.findings()]
        statistics["sources"][source.name] = _statistics(source) | {"texts": rules.statistics()} | ranking.statistics()
        extent.append(marks.line(source.name))
    findings += [*repeats.findings(), *near.findings(), *_balance(sources), *uses.findings(depth, steps)]
    for checks in rendered.values():
        findings += checks.findings()
    findings += _templates(chats)
    statistics |= {"rows": repeats.statistics(), "near_duplicates": near.statistics()}
    statistics["rendered"] = {step: checks.statistics() for step, checks in rendered.items()}
    report = Report(depth.mode, errors_first(_once(findings)), statistics, tuple(extent))
    return Examined(report, tuple(sorted(samples, key=lambda sample: STEPS.index(sample.step))))


def _looked_at(source: SourceRows, number: int, depth: Depth, seed: int) -> Iterator[tuple[int, Row]]:
    """Rows with their places in the source."""
    indices = spread_out(len(source.examples), depth.rows, seed)
    yield from zip(indices.tolist(), rows_of(source, number, depth.rows, seed), strict=True)


@dataclass(frozen=True)
class _Marks:
    """Which of the rows of a source that are read each costly kind of check looks at, by place in the source."""

    total: int
    read: int
    texts: np.ndarray
    near: np.ndarray
    rendered: np.ndarray

    def line(self, name: str) -> str:
        """For the user."""
        read, texts, near = f"{self.read:,}", f"{int(self.texts.sum()):,}", f"{int(self.near.sum()):,}"
        rendered = f"{int(self.rendered.sum()):,}"
        if self.read == self.total and len({read, texts, near}) == 1:
            return f"{name}: all {read} rows; {rendered} rendered"
        return (
            f"{name}: {read} of {self.total:,} rows for equal rows, leakage and rankings; {texts} for faults of text; "
            f"{near} for near duplicates; {rendered} rendered (evenly spread)"
        )


def _marks(source: SourceRows, depth: Depth, seed: int) -> _Marks:
    total = len(source.examples)
    read = spread_out(total, depth.rows, seed)

    def some(wanted: int, salt: int, among: np.ndarray) -> np.ndarray:
        marked = np.zeros(total, np.bool_)
        marked[among[spread_out(len(among), wanted, seed + salt)]] = True
        return marked

    steps = np.asarray(source.places)[read] // 2
    by_step = [some(depth.rendered, 3 + step, read[steps == step]) for step in range(len(STEPS))]
    return _Marks(
        total, len(read), some(depth.texts, 1, read), some(depth.near_duplicates, 2, read),
        np.logical_or.reduce(by_step),
    )  # fmt: skip


def _source_findings(sources: Sequence[SourceRows]) -> Iterator[Finding]:
    """Rows that the format cannot read."""
    for source in sources:
        for bad in source.bad_rows:
            if source.allow_bad and bad.count <= MAX_BAD_ALLOWED * source.num_rows:
                continue
            counted = f"{of_rows(bad.count, source.num_rows)} of {source.name} {bad.reason}"
            if source.allow_bad:
                message = f"{counted} are dropped, as data.bad_rows says (first: {bad.message})"
            else:
                message = f'{counted}; {bad.message}: mend them, or set data.bad_rows = "drop" to leave them out'
            severity: Literal["error", "warning"] = "warning" if source.allow_bad else "error"
            origin = bad.origins[0] if bad.origins else ""
            yield Finding(severity, "bad_rows", message, origin, bad.count, source.num_rows, bad.origins)


class StepUses:
    """Counts, for each step, the rows that it has and those that it can use."""

    def __init__(self) -> None:
        self.has, self.usable = [0] * len(STEPS), [0] * len(STEPS)

    def see(self, row: Row) -> None:
        """Count a row."""
        if row.step >= 0:
            example = row.example
            ranked = len(example.answers) > 1 and len(set(example.ranks or range(2))) > 1
            usable = (bool(example.demonstration), ranked, not row.is_text)
            self.has[row.step] += 1
            self.usable[row.step] += usable[row.step]

    def findings(self, depth: Depth, steps: Collection[Step]) -> Iterator[Finding]:
        """Steps none of whose rows are of use; certain only where all rows were looked at."""
        needs = ("an answer to imitate", "ranked answers", "a prompt")
        for step, (has, usable) in enumerate(zip(self.has, self.usable, strict=True)):
            if has and not usable and STEPS[step] in steps:
                severity: Literal["error", "warning"] = "error" if depth.rows == 0 or has < depth.rows else "warning"
                yield Finding(
                    severity, "unused_share",
                    f"none of {has:,} rows of step {step + 1} has {needs[step]}: give these sources a split that "
                    "leaves the step out, or add a source that has them", "", has, has,
                )  # fmt: skip


def _balance(sources: Sequence[SourceRows]) -> Iterator[Finding]:
    """A source that drowns the others."""
    sizes = [int((np.asarray(source.places) >= 0).sum()) for source in sources]
    total = sum(sizes)
    for source, size in zip(sources, sizes, strict=True):
        if len(sources) > 1 and total and size > MAX_ONE_SOURCE * total:
            yield Finding(
                "warning", "one_source",
                f"{source.name} has {size:,} of all {total:,} examples: the others hardly count, unless data.weights, "
                "data.temperature or a source's epochs give them more", "", size, total,
            )  # fmt: skip


def _templates(chats: Mapping[Step, ChatFormat]) -> Iterator[Finding]:
    looked_at: list[ChatFormat] = []
    for step, chat in chats.items():
        if not any(chat is other for other in looked_at):
            looked_at.append(chat)
            yield from template_findings(chat, f"of step {STEPS.index(step) + 1}")


def _statistics(source: SourceRows) -> dict[str, Any]:
    return {
        "format": source.format_name,
        "num_rows": source.num_rows,
        "num_examples": len(source.examples),
        "bad_rows": {bad.reason: bad.count for bad in source.bad_rows},
    }


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """Without those that say the very same."""
    return list({(finding.check, finding.message): finding for finding in findings}.values())
