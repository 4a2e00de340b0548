"""Equal and nearly equal rows, rankings and samples of rows: against naive loops over the very texts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.doctor.planting import Words
from threefold.data.doctor.findings import of_rows
from threefold.data.doctor.near import SIMILARITY, NearChecks, NearIndex, shingles, similarity
from threefold.data.doctor.ranking import RankingChecks, wilson
from threefold.data.doctor.repeats import RepeatChecks, in_another_place, repeated
from threefold.data.doctor.rows import Row, SourceRows, loose, rows_of, spread_out
from threefold.types import Example, Message, Prompt

KEYS = st.lists(st.integers(0, 6), max_size=40)


@given(KEYS)
def test_repeated(keys: list[int]) -> None:
    naive = [index for index, key in enumerate(keys) if key in keys[:index]]
    assert repeated(np.array(keys, np.uint64)).tolist() == naive


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 3)), max_size=40))
def test_in_another_place(rows: list[tuple[int, int]]) -> None:
    naive = []
    for index, (key, place) in enumerate(rows):
        first = next((p for k, p in rows[: index + 1] if k == key and p >= 0), place)
        naive.append(place >= 0 and first != place)
    keys, places = np.array([k for k, _ in rows], np.uint64), np.array([p for _, p in rows], np.int8)
    assert in_another_place(keys, places).tolist() == naive


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 10))
def test_spread_out(total: int, wanted: int, seed: int) -> None:
    chosen = spread_out(total, wanted, seed).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == (wanted if 0 < wanted < total else total)
    assert all(0 <= index < total for index in chosen)
    if 0 < wanted < total:
        gaps = np.diff([-1, *chosen, total])
        assert gaps.max() <= 2 * (total // wanted + 1)


def test_loose() -> None:
    assert loose("What's  “this”?") == loose("whats this")
    assert loose("请问，这是什么？") == loose("请问这是什么")
    assert loose("1.5 or 15") != loose("15 or 15")
    assert loose("2 + 3") != loose("2 - 3")


def test_similarity_is_jaccard_of_shingles() -> None:
    one, other = "the cat sat on the mat today", "the cat sat on the mat yesterday"
    sets = [{tuple(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)} for text in (one, other)]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert similarity(shingles(one), shingles(other)) == pytest.approx(expected)
    assert len(shingles("这个问题的答案")) == 3, "five characters each"


def test_near_duplicates_against_all_pairs() -> None:
    """MinHash misses few pairs well above the threshold, and reports none below it."""
    words = Words(3)
    texts = [words.sentence(40, 60) for _ in range(150)]
    for number in range(0, 100, 2):
        parts = texts[number].split()
        for _ in range(number // 20):
            parts[words.random.randrange(len(parts))] = words.word()
        texts.append(" ".join(parts))
    index = NearIndex()
    found = {(pair.earlier, pair.later): pair.similarity for text in texts for pair in index.add(text)}
    sets = [shingles(text) for text in texts]
    naive = {(a, b): similarity(sets[a], sets[b]) for a, b in combinations(range(len(texts)), 2)}
    near = {pair: value for pair, value in naive.items() if value >= SIMILARITY}
    assert found.items() <= near.items()
    clear = {pair for pair, value in near.items() if value >= 0.85}
    assert len(clear) > 15
    assert len(clear & found.keys()) >= 0.95 * len(clear)


@pytest.mark.parametrize(("places", "leaks"), [((0, 1), 1), ((1, 4), 1), ((0, 2), 0), ((2, 4), 0), ((-1, 1), 0)])
def test_near_leakage_needs_one_side_held_out(places: tuple[int, int], leaks: int) -> None:
    """Two steps may be trained on prompts that are nearly the same; a step may not be measured on one."""
    prompt = Words(4).sentence(40, 50, "?")
    checks = NearChecks(["rows"])
    for place, text in zip(places, (prompt, f"{prompt} Say"), strict=True):
        checks.see(Row(ranked(text, (Words(place + 9).sentence(), "x"), (), place), 0, place))
    assert len(checks.near_leaks) == leaks


@pytest.mark.parametrize(
    ("count", "total", "share"),
    [(3, 3, "100"), (300, 301, "100"), (1, 3, "33"), (1, 10, "10"), (3, 300, "1"), (1234, 100_000, "1.2"),
     (1, 1000, "0.1"), (1, 1_000_000, "under 0.01"), (0, 0, "0")],
)  # fmt: skip
def test_shares_are_never_written_as_powers_of_ten(count: int, total: int, share: str) -> None:
    assert of_rows(count, total) == f"{count:,} of {total:,} rows ({share} %)"


def source_of(examples: list[Example], name: str = "rows", format_name: str = "preference") -> SourceRows:
    return SourceRows(name, examples, np.zeros(len(examples), np.int8), len(examples), format_name=format_name)


def ranked(prompt: str, answers: tuple[str, ...], ranks: tuple[int, ...], number: int) -> Example:
    return Example(Prompt((Message("user", prompt),)), answers[0], answers, f"rows.jsonl row {number}", ranks)


def rankings(examples: list[Example]) -> RankingChecks:
    source = source_of(examples)
    checks = RankingChecks(source)
    for index, row in enumerate(rows_of(source, 0, 0, 0)):
        checks.see(row, index)
    return checks


def test_longer_is_better_counts_all_pairs_that_a_ranking_tells_apart() -> None:
    examples = [
        ranked("a", ("xxx", "xx", "x"), (), 1),  # 3 pairs, in all of them the longer one
        ranked("b", ("x", "yyy", "zz"), (0, 0, 1), 2),  # x above zz; yyy above zz
        ranked("c", ("aa", "bb"), (), 3),  # equal lengths decide nothing
    ]
    found = rankings(examples).statistics()
    assert (found["num_rankings"], found["num_pairs"]) == (3, 6)
    assert found["longer_is_better"]["num_pairs"] == 5
    assert found["longer_is_better"]["accuracy"] == 0.8


def test_wilson_of_textbook_numbers() -> None:
    """Brown, Cai and DasGupta's formula by hand: 8 of 10 is 0.49 to 0.943."""
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_contradictions_are_between_answers_to_one_prompt() -> None:
    same = [ranked("a", ("x", "y"), (), 1), ranked("a", ("x", "y"), (), 2), ranked("b", ("y", "x"), (), 3)]
    assert rankings(same).statistics()["num_contradictions"] == 0
    against = [*same, ranked("a", ("z", "y", "x"), (), 4), ranked("b", ("x", "y"), (), 5)]
    assert rankings(against).statistics()["num_contradictions"] == 2


def test_a_prompt_in_two_places_is_an_error() -> None:
    """The split cannot make this; were it at fault, the doctor would say so."""
    examples = [ranked("the same", ("x", "y"), (), 1), ranked("the same", ("u", "v"), (), 2)]
    source = SourceRows("rows", examples, np.array([0, 1], np.int8), 2)
    checks = RepeatChecks([source])
    for index, row in enumerate(rows_of(source, 0, 0, 0)):
        checks.see(row, index)
    (finding,) = checks.findings()
    assert (finding.severity, finding.check, finding.origin) == ("error", "leakage", "rows.jsonl row 2")


def test_conversations_with_one_opening_in_two_places_are_an_error() -> None:
    """Their prompts differ, and yet an answer to the first question may be trained in one and measured in the other."""
    first = (Message("user", "Which city?"), Message("assistant", "What for?"))
    examples = [
        Example(Prompt((*before, *first, Message("user", then))), "An answer.", (), f"rows.jsonl row {number}")
        for number, (before, then) in enumerate([((), "To live."), ((Message("system", "Be kind."),), "To go."),
                                                 ((), "To see.")], 1)
    ]  # fmt: skip
    for places, origins in (([0, 1, 0], ["rows.jsonl row 2"]), ([0, 0, 0], []), ([-1, 1, 1], [])):
        checks = RepeatChecks([SourceRows("rows", examples, np.array(places, np.int8), 3)])
        for index, row in enumerate(rows_of(checks.sources[0], 0, 0, 0)):
            checks.see(row, index)
        assert [finding.origin for finding in checks.findings()] == origins


def test_system_messages_count_where_there_is_nothing_else() -> None:
    one, other = (Row(Example(Prompt((Message("system", text),)), "x", (), "row 1"), 0, 0) for text in "ab")
    assert one.prompt_key != other.prompt_key


def test_system_messages_are_no_part_of_a_prompt() -> None:
    user = Message("user", "Which?")
    plain, with_system = (
        Row(Example(Prompt(messages), "", (), "row 1"), 0, 0)
        for messages in ((user,), (Message("system", "Be brief."), user))
    )
    assert plain.prompt_key == with_system.prompt_key
    other = Row(Example(Prompt((Message("user", "a"), Message("assistant", "b"))), "", (), "row 1"), 0, 0)
    swapped = Row(Example(Prompt((Message("assistant", "a"), Message("user", "b"))), "", (), "row 1"), 0, 0)
    assert other.prompt_key != swapped.prompt_key
