"""All sources of a recipe, read and split over the three steps.

Reading goes through a cache of one Arrow table per source; the split is computed anew, from the prompts' digests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from threefold.config.recipe import Recipe
from threefold.data.cache import cache_root, key_hash, silent
from threefold.data.examples import ExampleList, SourceInfo, SourceTable, open_table
from threefold.data.split import (
    LEFT_OUT,
    PARTS,
    STEPS,
    Part,
    Step,
    capped,
    check_enough,
    leave_no_part_empty,
    num_prompts_of_places,
    place_of,
    places,
    without_conflicts,
)

CAPPED, IN_ANOTHER_PLACE = "over max_rows", "prompt is in another place through an earlier source"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Library:
    """Examples of all sources, with the place of each.

    Attributes:
        recipe: whose sources these are.
        tables: the sources.
        places: of each source's examples [N] int8: 2 * step + (1 if held out), -1 where left out.
        left_out: of each source, counts of the left-out examples by reason.
        filled: parts that had no prompt and were given the one that was nearest; only where there are few.
        root: of the cache.
    """

    recipe: Recipe
    tables: tuple[SourceTable, ...]
    places: tuple[NDArray[np.int8], ...]
    left_out: tuple[dict[str, int], ...]
    filled: tuple[tuple[Step, Part], ...]
    root: Path

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """What each source gave."""
        return tuple(table.info for table in self.tables)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the console: each source, and what was left out of it."""
        lines = []
        for table, reasons in zip(self.tables, self.left_out, strict=True):
            lines.append(table.info.note())
            lines += [f"{table.info.name}: {count} examples left out: {reason}" for reason, count in reasons.items()]
        for step, part in self.filled:
            what = "held out" if part == "eval" else "to train on"
            lines.append(f"step {STEPS.index(step) + 1}, {step}: so few prompts that one was put where none was {what}")
        return tuple(lines)

    @cached_property
    def key(self) -> str:
        """Hash of all that the places of all examples depend on."""
        data, seed = self.recipe.data, self.recipe.run.seed
        sources = [
            [table.info.key, table.info.section.shares(data.split), table.info.section.max_rows]
            for table in self.tables
        ]
        return key_hash({"sources": sources, "eval_fraction": data.eval_fraction, "seed": seed})

    def chosen(self, index: int, step: Step, part: Part) -> NDArray[np.bool_]:
        """[N] bool: which examples of a source a part of a step has."""
        chosen: NDArray[np.bool_] = self.places[index] == place_of(step, part)
        return chosen

    def examples(self, step: Step, part: Part) -> ExampleList:
        """The examples of a part of a step: by source, and in it by prompt, whatever the order of the rows."""
        rows = []
        for index, table in enumerate(self.tables):
            numbers = np.flatnonzero(self.chosen(index, step, part))
            rows.append(numbers[np.lexsort((table.contents[numbers], table.digests[numbers]))])
        return ExampleList(self.tables, rows)

    def of_source(self, index: int) -> ExampleList:
        """All examples of a source, in the order of its rows."""
        return ExampleList(self.tables[index : index + 1], [np.arange(len(self.tables[index]))])

    def check_enough(self) -> None:
        """Refuse sources that leave a step without a prompt to train on or to hold out, though it is to have some.

        Raises:
            DataError: with what to do.
        """
        data = self.recipe.data
        counts = num_prompts_of_places([table.openings for table in self.tables], self.places)
        check_enough(counts, [section.shares(data.split) for section in data.sources], data.eval_fraction)

    def manifest(self) -> dict[str, Any]:
        """What went where, as JSON."""
        sources = []
        for index, (table, reasons) in enumerate(zip(self.tables, self.left_out, strict=True)):
            info = table.info
            went: dict[str, Any] = {}
            for step, part in product(STEPS, PARTS):
                chosen = self.chosen(index, step, part)
                prompts = len(np.unique(table.digests[chosen]))
                went.setdefault(step, {})[part] = {"examples": int(chosen.sum()), "prompts": prompts}
            sources.append(
                {
                    "name": info.name,
                    "path": info.section.path,
                    "fingerprint": info.fingerprint,
                    "format": info.format_name,
                    "columns": list(info.columns),
                    "rows": info.num_rows,
                    "examples": info.num_examples,
                    "dropped": dict(info.dropped),
                    "left_out": reasons,
                    "split": info.section.shares(self.recipe.data.split),
                    "steps": went,
                }
            )
        return {"seed": self.recipe.run.seed, "eval_fraction": self.recipe.data.eval_fraction, "sources": sources}

    def write_places(self, path: Path) -> None:
        """Write where each example went, one row each, as a parquet file: source, origin, step, part."""
        names = [f"{step} {part}" for step, part in product(STEPS, PARTS)]
        schema = pa.schema([(name, pa.string()) for name in ("source", "origin", "step", "part")])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table, where in zip(self.tables, self.places, strict=True):
                for first, origins in table.origins():
                    here = where[first : first + len(origins)]
                    went = [names[place].split() if place != LEFT_OUT else ["", ""] for place in here]
                    columns = [pa.array([table.info.name] * len(origins)), origins]
                    columns += [pa.array(column, pa.string()) for column in zip(*went, strict=True)]
                    writer.write_batch(pa.record_batch(columns, schema=schema))


def open_library(recipe: Recipe, tell: Tell = silent) -> Library:
    """Read all sources, or take them from the cache, and place their examples.

    Args:
        tell: is called with a line now and then, while a large source is read.

    Raises:
        DataError: a source cannot be read.
        ConfigError: the cache cannot be written.
    """
    data, seed = recipe.data, recipe.run.seed
    root = cache_root(data.cache_dir)
    tables = tuple(open_table(section, recipe, root, tell) for section in data.sources)
    placed, reasons = [], []
    for table in tables:
        section = table.info.section
        where = places(table.openings, seed, section.shares(data.split), data.eval_fraction)
        left_out = {}
        if section.max_rows and len(table) > section.max_rows and not section.streaming:
            keep = capped(table.digests, table.contents, section.max_rows, seed)
            where[~keep] = LEFT_OUT
            left_out[CAPPED] = int((~keep).sum())
        placed.append(where)
        reasons.append(left_out)
    for where, left_out, keep in zip(
        placed, reasons, without_conflicts([table.openings for table in tables], placed), strict=True
    ):
        lost = ~keep & (where != LEFT_OUT)
        if lost.any():
            where[lost] = LEFT_OUT
            left_out[IN_ANOTHER_PLACE] = int(lost.sum())
    filled = leave_no_part_empty([table.openings for table in tables], placed, seed)
    return Library(recipe, tables, tuple(placed), tuple(reasons), tuple(filled), root)
