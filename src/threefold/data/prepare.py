"""From the library to what each step trains on: rendered, cut to the recipe's lengths, tokenised, and kept in a cache.

Rows are rendered in the order of their source, a batch at a time; the order in which they are used is a column of
numbers beside them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from numpy.typing import NDArray

from threefold.config.recipe import Recipe
from threefold.data.blend import make_blend
from threefold.data.cache import (
    TableReader,
    TableWriter,
    cached,
    code_version,
    key_hash,
    read_info,
    read_numbers,
    silent,
    write_numbers,
)
from threefold.data.chat import ChatFormat
from threefold.data.items import (
    LazyItems,
    LengthCounts,
    ReadRows,
    StepItems,
    read_prompt,
    read_ranking,
    read_sequence,
)
from threefold.data.library import Library, Tell
from threefold.data.split import PARTS, STEPS, Part, Step
from threefold.data.step_rows import Row, Tally, ppo_rows, reward_rows, sft_rows
from threefold.types import Example, Message, PreparedPrompt, RankedAnswers, TokenSequence

Item = TypeVar("Item")
Render = Callable[[Sequence[Example], Recipe, ChatFormat, Tally], Iterator[tuple[int, Row]]]
"""(examples, recipe, chat, tally) to the rows that they give, each after the place of its example."""

IDS = pa.list_(pa.int32())
INDEX = [("source", pa.int16()), ("digest", pa.uint64()), ("content", pa.uint64())]
SCHEMAS: dict[Step, pa.Schema] = {
    "sft": pa.schema([("ids", IDS), ("trained", pa.list_(pa.bool_())), ("prompt_length", pa.int32()), *INDEX]),
    "reward": pa.schema(
        [("answers", pa.list_(IDS)), ("prompt_length", pa.int32()), ("ranks", pa.list_(pa.int16())), *INDEX]
    ),
    "ppo": pa.schema(
        [
            ("ids", IDS),
            ("roles", pa.string()),
            ("contents", pa.list_(pa.string())),
            ("origin", pa.string()),
            ("reference", pa.string()),
            *INDEX,
        ]
    ),
}
PROGRESS_EVERY_ROWS = 100_000
NUM_THREADS = 2
Batch = tuple[NDArray[np.int64], list[Example]]


def sft_items(library: Library, chat: ChatFormat, recipe: Recipe, tell: Tell = silent) -> StepItems[TokenSequence]:
    """The demonstrations and plain texts of step 1.

    Raises:
        DataError: a row is too long (under "error"), no row has a demonstration, or all were dropped.
    """
    settings = {"loss_on": recipe.sft.loss_on}
    return _StepTables("sft", library, chat, recipe, sft_rows, settings, tell).items(read_sequence)


def reward_items(library: Library, chat: ChatFormat, recipe: Recipe, tell: Tell = silent) -> StepItems[RankedAnswers]:
    """The prompts of step 2, each with all rankings of its answers.

    Raises:
        DataError: an answer is too long (under "error"), no row has a comparison, or all were dropped.
    """
    return _StepTables("reward", library, chat, recipe, reward_rows, {}, tell).items(read_ranking)


def ppo_items(library: Library, chat: ChatFormat, recipe: Recipe, tell: Tell = silent) -> StepItems[PreparedPrompt]:
    """The different prompts of step 3; a prompt that has several rows, or sources, is taken once.

    Raises:
        DataError: a prompt is too long (under "error"), there is none, or all were dropped.
    """
    return _StepTables("ppo", library, chat, recipe, ppo_rows, {}, tell).items(read_prompt)


def tokenizer_fingerprint(chat: ChatFormat) -> str:
    """Hash of all that decides which ids a conversation becomes."""
    tokenizer = chat.tokenizer
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = str(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(vocabulary.encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = str(tokenizer.chat_template)
    settings = [type(tokenizer).__name__, special, template, sorted(chat.stop_ids), chat.pad_id]
    if "strftime_now" in template:  # it writes the day, which then is part of what was rendered
        settings.append(chat.prompt_ids([Message("user", "Which day is it?")]))
    digest.update(key_hash({"settings": settings}).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _StepTables:
    """The two tables of one step, train and eval."""

    step: Step
    library: Library
    chat: ChatFormat
    recipe: Recipe
    render: Render
    settings: dict[str, Any]
    tell: Tell

    def items(self, read: ReadRows[Item]) -> StepItems[Item]:
        """Both parts, from the cache or made now."""
        directory = cached(self.library.root, self.step, self._key(), self._build, self.tell)
        info = read_info(directory)
        train, sizes = self._part(directory, "train", read)
        held_out, _ = self._part(directory, "eval", read)
        data, seed = self.recipe.data, self.recipe.run.seed
        epochs = [section.epochs for section in data.sources]
        names = [section.label for section in data.sources]
        return StepItems(
            train=train,
            eval=held_out,
            blend=make_blend(sizes, data.weights, data.temperature, epochs, seed, names),
            counts=LengthCounts(**info["train"]),
            eval_counts=LengthCounts(**info["eval"]),
        )

    def _key(self) -> dict[str, Any]:
        data = self.recipe.data
        length = data.max_prompt_length if self.step == "ppo" else data.max_length
        return {
            "library": self.library.key,
            "bad_rows": data.bad_rows,
            "tokenizer": tokenizer_fingerprint(self.chat),
            "lengths": [length, data.long_rows, data.truncate_side],
            "settings": self.settings,
            "code": [code_version(), transformers.__version__, tokenizers.__version__, jinja2.__version__],
        }

    def _part(self, directory: Path, part: Part, read: ReadRows[Item]) -> tuple[LazyItems[Item], list[int]]:
        """Its items, and how many of them each source gave."""
        index = read_numbers(directory / f"{part}-index.arrow")
        order = read_numbers(directory / f"{part}-order.arrow")["order"]
        table = TableReader(directory / f"{part}.arrow")
        sizes = np.bincount(index["source"], minlength=len(self.library.tables)).tolist()
        return LazyItems(table, order, np.append(index["start"], len(order)), read), sizes

    def _build(self, directory: Path) -> dict[str, Any]:
        tallies = {part: Tally(self.step, self.recipe) for part in PARTS}
        with ExitStack() as stack:
            writers = {
                part: stack.enter_context(TableWriter(directory / f"{part}.arrow", SCHEMAS[self.step]))
                for part in PARTS
            }
            for source in range(len(self.library.tables)):
                self._write_source(source, tallies, writers)
        for part in PARTS:
            tallies[part].refuse_nothing(self.step, part, writers[part].num_rows)
            tallies[part].counts.update(self._write_order(directory, part))
        return {part: dict(tally.counts) for part, tally in tallies.items()}

    def _write_source(self, source: int, tallies: dict[Part, Tally], writers: dict[Part, TableWriter]) -> None:
        """Render the rows of one source, and write them in their order."""
        table = self.library.tables[source]
        in_step = self.library.places[source] // len(PARTS) == STEPS.index(self.step)
        done = 0
        for rendered in _in_order(partial(self._rendered, source), table.batches(in_step)):
            before, done = done, done + sum(tally.counts["examples"] for tally, _ in rendered.values())
            for part, (tally, rows) in rendered.items():
                tallies[part].add(tally)
                for number, row, num_bytes in rows:
                    index = (source, int(table.digests[number]), int(table.contents[number]))
                    writers[part].append(*row, *index, num_bytes=num_bytes)
            if done // PROGRESS_EVERY_ROWS > before // PROGRESS_EVERY_ROWS:
                self.tell(f"step {STEPS.index(self.step) + 1}, {self.step}: {done} rows of {table.info.name} tokenised")

    def _rendered(self, source: int, batch: Batch) -> dict[Part, tuple[Tally, list[tuple[int, Row, int]]]]:
        """The rows that some examples of a source give, by part: the example's number, the row, about its bytes."""
        numbers, examples = batch
        held_out = self.library.places[source][numbers] % len(PARTS)
        found: dict[Part, tuple[Tally, list[tuple[int, Row, int]]]] = {}
        for index, part in enumerate(PARTS):
            mine = np.flatnonzero(held_out == index)
            chosen = [examples[place] for place in mine]
            tally = Tally(self.step, self.recipe)
            tally.counts["examples"] = len(chosen)
            rows = []
            for place, row in self.render(chosen, self.recipe, self.chat, tally):
                rows.append((int(numbers[mine[place]]), row, _size(row)))
            found[part] = tally, rows
        return found

    def _write_order(self, directory: Path, part: Part) -> dict[str, int]:
        """Which rows make an item, in which order: by source and prompt to train on, by prompt to measure with.

        Returns:
            counts to add.
        """
        table = TableReader(directory / f"{part}.arrow")
        source, digest, content = (table.numbers(name) for name in ("source", "digest", "content"))
        keys = (content, digest, source) if part == "train" else (content, source, digest)
        order = np.lexsort(keys).astype(np.int64)
        starts, counts = np.arange(len(order)), {}
        if self.step == "ppo":
            order = _once_each(order, digest, _has_no_reference(table))
            starts = np.arange(len(order))
            lengths = pa.chunked_array([pc.list_value_length(batch.column("ids")) for _, batch in table.batches()])
            tokens = int(lengths.to_numpy()[order].sum()) if len(order) else 0
            counts = {"repeated": len(table) - len(order), "tokens": tokens}
        elif self.step == "reward" and len(order):
            one_source = part == "train"  # whose draws the blend counts; what is measured counts each prompt once
            starts = np.flatnonzero(_changes(digest[order]) | (one_source & _changes(source[order])))
        write_numbers(directory / f"{part}-order.arrow", {"order": order})
        write_numbers(
            directory / f"{part}-index.arrow", {"start": starts.astype(np.int64), "source": source[order][starts]}
        )
        return counts


def _has_no_reference(table: TableReader) -> NDArray[np.bool_]:
    columns = [pc.equal(batch.column("reference"), "").to_numpy(zero_copy_only=False) for _, batch in table.batches()]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.bool_)


def _once_each(order: NDArray[np.int64], digest: NDArray[np.uint64], worse: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The order with one row for each digest: the first of those that are not worse than the others."""
    by_choice = order[np.argsort(worse[order], kind="stable")]
    _, first = np.unique(digest[by_choice], return_index=True)
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[by_choice[first]] = True
    kept: NDArray[np.int64] = order[chosen[order]]
    return kept


def _size(row: Row) -> int:
    """About how many bytes the ids of a row have."""
    ids = row[0]
    return 4 * (sum(map(len, ids)) if ids and isinstance(ids[0], tuple) else len(ids))


def _in_order(work: Callable[[Batch], Item], batches: Iterator[Batch]) -> Iterator[Item]:
    """`work` on each batch, in their order, two at a time: while the texts of one are encoded, which needs no Python,
    the other is rendered."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting: deque[Future[Item]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > NUM_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _changes(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value differs from the one before; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])
