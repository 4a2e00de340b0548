"""All sources together: no prompt in two places, nothing moves with the order of rows, everything is accounted for."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.data.formats_under_test import byte_level_tokenizer
from threefold.config.recipe import Recipe
from threefold.data.chat import build_chat_format
from threefold.data.library import CAPPED, IN_ANOTHER_PLACE, Library, open_library
from threefold.data.prepare import ppo_items, reward_items, sft_items
from threefold.data.split import LEFT_OUT, PARTS, STEPS
from threefold.errors import DataError
from threefold.types import Example

Row = dict[str, str]
Place = tuple[str, str]
EVERYWHERE = list(product(STEPS, PARTS))


def pairs(count: int, name: str = "about", first: int = 0) -> list[Row]:
    """Rows with different prompts, some of them in words that normalising changes."""
    return [
        {"prompt": f"Ｑuestion {n} {name}  this", "chosen": f"Yes, {n}.", "rejected": "No."}
        for n in range(first, first + count)
    ]


def written_otherwise(row: Row, number: int) -> Row:
    """A row whose prompt counts as the same, and whose answers are others."""
    prompt = row["prompt"].upper() if number % 2 else f" {row['prompt']}\n".replace(" ", "\t")
    return {"prompt": prompt, "chosen": f"Sure, {number}.", "rejected": "Never."}


def plain(prompt: str) -> str:
    """What two rows of `pairs` share exactly if they ask the same: written apart from the code under test."""
    return " ".join(prompt.replace("Ｑ", "q").lower().split())


def asked(example: Example) -> str:
    return plain(example.prompt.messages[0].content)


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def library_of(*sources: Any, seed: int = 1, **data: Any) -> Library:
    """Sources as texts or tables of the recipe."""
    fields = {"sources": list(sources), "eval_fraction": 0.25, **data}
    return open_library(Recipe.model_validate({"run": {"seed": seed}, "data": fields}))


def places_of_prompts(library: Library) -> dict[str, set[Place]]:
    found: dict[str, set[Place]] = {}
    for step, part in EVERYWHERE:
        for example in library.examples(step, part):
            found.setdefault(asked(example), set()).add((step, part))
    return found


def without_origin(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, origin="") for example in examples]


def two_overlapping(path: Path, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """600 and 400 rows; 30 % of all repeat a prompt of another row, in their own source or in the other."""
    chance = random.Random(seed)
    first, second = pairs(420), pairs(280, "beside")
    originals = first + second
    again = [written_otherwise(row, n) for n, row in enumerate(chance.choices(originals, k=300))]
    first, second = first + again[:180], second + again[180:]
    chance.shuffle(first)
    chance.shuffle(second)
    write(path / "first.jsonl", first)
    write(path / "second.jsonl", second)
    return first, second


def overlapping_library(path: Path, seed: int = 1) -> Library:
    second = {"path": str(path / "second.jsonl"), "split": [1, 5, 2]}
    return library_of(str(path / "first.jsonl"), second, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_in_two_places(tmp_path: Path, seed: int) -> None:
    """Of 1,000 rows in two sources of different splits, 300 ask what another asks."""
    first, second = two_overlapping(tmp_path, seed)
    prompts = [plain(row["prompt"]) for row in first + second]
    assert len(prompts) - len(set(prompts)) == 300
    across = {plain(row["prompt"]) for row in first} & {plain(row["prompt"]) for row in second}
    assert len(across) > 30
    found = places_of_prompts(overlapping_library(tmp_path, seed))
    assert {prompt: where for prompt, where in found.items() if len(where) > 1} == {}
    assert set().union(*found.values()) == set(EVERYWHERE)
    assert set(found) == set(prompts), "a row is left out only where another with its prompt stays"


def test_the_earlier_source_keeps_a_prompt_and_the_others_rows_are_counted(tmp_path: Path) -> None:
    """Against each source read alone, and the rule spelled out row by row."""
    first, second = two_overlapping(tmp_path)
    together = overlapping_library(tmp_path)
    alone = [
        library_of(str(tmp_path / "first.jsonl")),
        library_of({"path": str(tmp_path / "second.jsonl"), "split": [1, 5, 2]}),
    ]
    owner = {plain(row["prompt"]): place for row, place in zip(first, alone[0].places[0].tolist(), strict=True)}
    expected = [
        place if owner.get(plain(row["prompt"]), place) == place else LEFT_OUT
        for row, place in zip(second, alone[1].places[0].tolist(), strict=True)
    ]
    assert together.places[0].tolist() == alone[0].places[0].tolist()
    assert together.places[1].tolist() == expected
    lost = expected.count(LEFT_OUT)
    assert 0 < lost < len(second)
    assert together.left_out == ({}, {IN_ANOTHER_PLACE: lost})
    assert f"{tmp_path / 'second.jsonl'}: {lost} examples left out: {IN_ANOTHER_PLACE}" in together.notes


def test_sources_of_one_split_never_conflict(tmp_path: Path) -> None:
    two_overlapping(tmp_path)
    library = library_of(str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl"))
    assert library.left_out == ({}, {})
    assert all(len(where) == 1 for where in places_of_prompts(library).values())


def test_reasoning_does_not_move_a_prompt(tmp_path: Path) -> None:
    """A question that one source asks for step by step and another does not is the same question."""
    rows = [{"question": f"What is {n} plus 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(200)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows)
    with_steps = {"path": str(tmp_path / "b.jsonl"), "reasoning": "english", "few_shot": 1}
    library = library_of(str(tmp_path / "a.jsonl"), with_steps)
    assert library.of_source(0)[0].prompt != library.of_source(1)[0].prompt
    assert library.places[0].tolist() == library.places[1].tolist()


# --- what does not move a row ---------------------------------------------------------------------------------------


def where(library: Library, index: int, rows: Sequence[Row]) -> dict[str, int]:
    """Place of each row, by its content."""
    return {json.dumps(row): place for row, place in zip(rows, library.places[index].tolist(), strict=True)}


def test_neither_order_nor_more_rows_nor_other_sources_move_a_row(tmp_path: Path) -> None:
    rows, more = pairs(300), pairs(150, first=1000)
    before = where(library_of(write(tmp_path / "a.jsonl", rows)), 0, rows)
    shuffled = random.Random(3).sample(rows + more, len(rows) + len(more))
    grown = where(library_of(write(tmp_path / "b.jsonl", shuffled)), 0, shuffled)
    assert {row: grown[row] for row in before} == before
    other = write(tmp_path / "other.jsonl", pairs(200, "beside"))
    for sources, index in (((str(tmp_path / "a.jsonl"), other), 0), ((other, str(tmp_path / "a.jsonl")), 1)):
        assert where(library_of(*sources), index, rows) == before
    parted = [write(tmp_path / f"part-{n}.jsonl", part) for n, part in enumerate((rows[:100], rows[100:]))]
    assert where(library_of({"path": parted}), 0, rows) == before
    assert where(library_of(str(tmp_path / "a.jsonl"), seed=2), 0, rows) != before


def test_rows_in_another_order_give_the_same_items_in_the_same_order(tmp_path: Path) -> None:
    """With prompts that several rows have, and in two sources with weights: all that a step is trained on."""
    chat = build_chat_format(byte_level_tokenizer(), "tags")
    found = []
    for name, seed in (("one", 0), ("other", 5)):
        (tmp_path / name).mkdir()
        first, second = two_overlapping(tmp_path / name)
        for rows, file in ((first, "first.jsonl"), (second, "second.jsonl")):
            write(tmp_path / name / file, random.Random(seed).sample(rows, len(rows)))
        second_source = {"path": str(tmp_path / name / "second.jsonl"), "split": [1, 5, 2]}
        library = library_of(str(tmp_path / name / "first.jsonl"), second_source, weights=[1, 2])
        examples = [without_origin(library.examples(step, part)) for step, part in EVERYWHERE]
        recipe = library.recipe
        items = [sft_items(library, chat, recipe), reward_items(library, chat, recipe)]
        prompts = ppo_items(library, chat, recipe)
        asked_for = [[replace(each, origin="") for each in part] for part in (prompts.train, prompts.eval)]
        listed = [list(part) for each in items for part in (each.train, each.eval)]
        orders = [each.blend.order(epoch) for each in (*items, prompts) for epoch in range(2)]
        found.append((examples, listed, asked_for, orders))
    assert (tmp_path / "one/first.jsonl").read_bytes() != (tmp_path / "other/first.jsonl").read_bytes()
    assert found[0] == found[1]


# --- max_rows -------------------------------------------------------------------------------------------------------


def test_max_rows(tmp_path: Path) -> None:
    rows = pairs(300)
    path = write(tmp_path / "a.jsonl", rows)
    whole = where(library_of(path), 0, rows)
    library = library_of({"path": path, "max_rows": 120})
    capped = where(library, 0, rows)
    kept = {row for row, place in capped.items() if place != LEFT_OUT}
    assert len(kept) == 120
    assert {row: capped[row] for row in kept} == {row: whole[row] for row in kept}
    assert library.left_out == ({CAPPED: 180},)
    assert sum(len(library.examples(step, part)) for step, part in EVERYWHERE) == 120
    assert library.sources[0].num_rows == 300
    shuffled = random.Random(1).sample(rows, len(rows))
    again = where(library_of({"path": write(tmp_path / "b.jsonl", shuffled), "max_rows": 120}), 0, shuffled)
    assert again == capped
    fewer = where(library_of({"path": path, "max_rows": 50}), 0, rows)
    assert {row for row, place in fewer.items() if place != LEFT_OUT} < kept
    other_seed = where(library_of({"path": path, "max_rows": 120}, seed=2), 0, rows)
    assert {row for row, place in other_seed.items() if place != LEFT_OUT} != kept
    assert library_of({"path": path, "max_rows": 300}).left_out == ({},)


def test_a_row_that_max_rows_leaves_out_claims_no_place(tmp_path: Path) -> None:
    """The second source's rows stay, whatever place the first would have given their prompts."""
    rows = pairs(300)
    first = {"path": write(tmp_path / "a.jsonl", rows), "split": [1, 0, 0], "max_rows": 1}
    second = {"path": write(tmp_path / "b.jsonl", rows), "split": [0, 0, 1]}
    library = library_of(first, second)
    assert library.left_out == ({CAPPED: 299}, {IN_ANOTHER_PLACE: 1})


# --- records --------------------------------------------------------------------------------------------------------


def mixed_library(path: Path) -> Library:
    """Overlapping sources, the first with unusable rows, the second capped."""
    first, _ = two_overlapping(path)
    write(path / "first.jsonl", [{"prompt": "p", "chosen": "same", "rejected": "same"}, *first])
    second = {"path": str(path / "second.jsonl"), "split": [1, 5, 2], "max_rows": 333, "name": "second"}
    return library_of(str(path / "first.jsonl"), second, bad_rows="drop")


def test_the_totals_of_the_manifest_add_up(tmp_path: Path) -> None:
    library = mixed_library(tmp_path)
    manifest = json.loads(json.dumps(library.manifest()))
    assert (manifest["seed"], manifest["eval_fraction"]) == (1, 0.25)
    assert [source["rows"] for source in manifest["sources"]] == [601, 400]
    for index, source in enumerate(manifest["sources"]):
        parts = [source["steps"][step][part] for step, part in EVERYWHERE]
        assert sum(part["examples"] for part in parts) + sum(source["left_out"].values()) == source["examples"]
        assert source["examples"] + sum(source["dropped"].values()) == source["rows"]
        stayed = [
            example
            for example, place in zip(library.of_source(index), library.places[index], strict=True)
            if place != LEFT_OUT
        ]
        assert sum(part["prompts"] for part in parts) == len({asked(example) for example in stayed})
    first, second = manifest["sources"]
    assert (sum(first["dropped"].values()), first["left_out"]) == (1, {})
    assert (second["dropped"], second["left_out"][CAPPED]) == ({}, 67)
    assert second["left_out"][IN_ANOTHER_PLACE] > 0
    assert (second["name"], second["split"], first["split"]) == ("second", [1, 5, 2], [2, 4, 4])
    for step, part in EVERYWHERE:
        total = sum(source["steps"][step][part]["examples"] for source in manifest["sources"])
        assert total == len(library.examples(step, part))


def test_the_file_of_places_says_what_the_parts_hold(tmp_path: Path) -> None:
    library = mixed_library(tmp_path)
    library.write_places(tmp_path / "places.parquet")
    rows = pq.read_table(tmp_path / "places.parquet").to_pylist()
    assert [row["source"] for row in rows] == [str(tmp_path / "first.jsonl")] * 600 + ["second"] * 400
    for step, part in EVERYWHERE:
        written = Counter(row["origin"] for row in rows if (row["step"], row["part"]) == (step, part))
        assert written == Counter(example.origin for example in library.examples(step, part))
        assert written.total() > 0
    nowhere = [row["origin"] for row in rows if (row["step"], row["part"]) == ("", "")]
    assert len(nowhere) == sum(sum(reasons.values()) for reasons in library.left_out)
    lines = {name: (tmp_path / name).read_text("utf-8").splitlines() for name in ("first.jsonl", "second.jsonl")}
    placed: dict[str, set[Place]] = {}
    for row in rows:
        file, number = row["origin"].rsplit(" row ", 1)
        prompt = json.loads(lines[Path(file).name][int(number) - 1])["prompt"]
        if row["step"]:
            placed.setdefault(plain(prompt), set()).add((row["step"], row["part"]))
    assert all(len(places) == 1 for places in placed.values())
    assert placed == places_of_prompts(library)


def test_too_few_prompts_are_refused_with_how_many_would_do(tmp_path: Path) -> None:
    library = library_of(write(tmp_path / "few.jsonl", pairs(3)))
    with pytest.raises(DataError, match=r"3 different prompts are too few .* give about \d+ prompts"):
        library.check_enough()
    library_of(write(tmp_path / "enough.jsonl", pairs(300))).check_enough()
