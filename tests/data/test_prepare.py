"""What each step gets from its share: rendered, within the limits, counted, the same from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.data.formats_under_test import CHATML, byte_level_tokenizer
from threefold.config.recipe import Recipe
from threefold.data import prepare
from threefold.data.chat import ChatFormat, build_chat_format
from threefold.data.items import StepItems
from threefold.data.library import open_library
from threefold.data.prepare import ppo_items, reward_items, sft_items
from threefold.errors import DataError
from threefold.types import Message, TokenSequence

Row = dict[str, Any]
MAKERS: dict[str, Callable[..., StepItems[Any]]] = {"sft": sft_items, "reward": reward_items, "ppo": ppo_items}
ALL_TO = {"sft": [1, 0, 0], "reward": [0, 1, 0], "ppo": [0, 0, 1]}


@cache
def tags() -> ChatFormat:
    return build_chat_format(byte_level_tokenizer(), "tags")


def pair(question: str, chosen: str = "yes", rejected: str = "no") -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(*sources: Any, **data: Any) -> Recipe:
    return Recipe.model_validate({"data": {"sources": list(sources), "eval_fraction": 0.5, **data}})


def items_of(step: str, recipe: Recipe, chat: ChatFormat | None = None) -> StepItems[Any]:
    return MAKERS[step](open_library(recipe), chat or tags(), recipe)


def everything(step: str, path: Path, rows: Sequence[Row], **data: Any) -> list[Any]:
    """All items of a step that gets all rows, training and held out."""
    recipe = recipe_of(write(path / "f.jsonl", rows), split=ALL_TO[step], **data)
    items = items_of(step, recipe)
    return [*items.train, *items.eval]


def answer_of(sequence: TokenSequence) -> str:
    return tags().decode(sequence.ids[sequence.prompt_length :])


QUESTIONS = [f"question number {n}" for n in range(12)]


def test_demonstrations_are_rendered_as_the_chat_format_does(tmp_path: Path) -> None:
    found = everything("sft", tmp_path, [pair(question, f"answer to {question}") for question in QUESTIONS])
    expected = [
        tags().demonstration([Message("user", question), Message("assistant", f"answer to {question}")])
        for question in QUESTIONS
    ]
    assert sorted(found, key=lambda s: s.ids) == sorted(expected, key=lambda s: s.ids)


def test_loss_on_all_is_prepared_apart(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path / "f.jsonl", [pair(question) for question in QUESTIONS]), split=[1, 0, 0])
    assert not any(all(sequence.trained) for sequence in items_of("sft", recipe).train)
    on_all = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"loss_on": "all"})})
    assert all(all(sequence.trained) for sequence in items_of("sft", on_all).train)


def test_every_pair_of_a_ranking_and_all_rankings_of_a_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": question, "input": "", "output": ["a", "b", "c"]} for question in QUESTIONS]
    for ranked in everything("reward", tmp_path, rows):
        texts = [answer_of(sequence) for sequence in ranked.sequences]
        assert [(texts[better], texts[worse]) for better, worse in ranked.pairs()] == [
            ("a", "b"),
            ("a", "c"),
            ("b", "c"),
        ]


def test_rows_of_one_prompt_are_one_item(tmp_path: Path) -> None:
    """Three rows, one of them written otherwise; their four different answers are there once, their pairs all."""
    rows = [
        pair("Hi", "a", "b"),
        pair("hi  ", "b", "c"),
        pair("Hi", "a", "d"),
        pair("Bye", "x", "y"),
        pair("So", "1", "2"),
    ]
    found = everything("reward", tmp_path, rows, eval_fraction=0.4)
    together = next(ranked for ranked in found if len(ranked.rankings) > 1)
    pairs = {tuple(answer_of(together.sequences[place]) for place in each) for each in together.pairs()}
    assert pairs == {("a", "b"), ("b", "c"), ("a", "d")}
    rendered = [(sequence.ids[: sequence.prompt_length], answer_of(sequence)) for sequence in together.sequences]
    assert len(rendered) == len(set(rendered))


def test_a_prompt_with_several_rows_is_taken_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [pair(question) for question in QUESTIONS])
    again = write(
        tmp_path / "b.jsonl", [pair(question.upper()) for question in QUESTIONS[:5]] + [pair("new"), pair("n2")]
    )
    items = items_of("ppo", recipe_of(first, again, split=[0, 0, 1]))
    prompts = [*items.train, *items.eval]
    assert sorted(each.prompt.messages[0].content for each in prompts) == sorted([*QUESTIONS, "new", "n2"])
    assert all(each.ids == tags().prompt_ids(each.prompt.messages) for each in prompts)
    for each in prompts:
        file, row = each.origin.rsplit(" row ", 1)
        assert (
            json.loads(Path(file).read_text().splitlines()[int(row) - 1])["prompt"] == each.prompt.messages[0].content
        )
    assert sum(items.blend.sizes) == len(items.train)


@pytest.mark.parametrize("step", list(MAKERS))
def test_long_rows(tmp_path: Path, step: str) -> None:
    field = "data.max_prompt_length" if step == "ppo" else "data.max_length"
    rows = [pair(question, "x", "y") for question in QUESTIONS] + [
        pair("a long " + "question " * 9 + str(n)) for n in range(9)
    ]
    limits = {"max_length": 40, "max_prompt_length": 40}
    assert len(everything(step, tmp_path, rows, long_rows="drop", **limits)) == len(QUESTIONS)
    with pytest.raises(
        DataError,
        match=rf"f\.jsonl row (1[3-9]|2[01]): has \d+ tokens, more than {field} = 40: raise {field}, "
        r'or set data\.long_rows = "drop" to leave out such rows, or "truncate"',
    ):
        everything(step, tmp_path, rows, **limits)
    limits = {"max_length": 5, "max_prompt_length": 5}
    with pytest.raises(
        DataError, match=rf"all \d+ rows of step \d's share are longer than {field} = 5 \(the shortest has \d+"
    ):
        everything(step, tmp_path, rows, long_rows="drop", **limits)


def test_a_limit_that_is_just_met(tmp_path: Path) -> None:
    longest = max(map(len, everything("sft", tmp_path, [pair(question) for question in QUESTIONS])))
    rows = [pair(question) for question in QUESTIONS]
    assert len(everything("sft", tmp_path, rows, max_length=longest)) == len(rows)
    with pytest.raises(DataError, match=f"more than data.max_length = {longest - 1}"):
        everything("sft", tmp_path, rows, max_length=longest - 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_turns_are_left_out_and_counted(tmp_path: Path, side: str) -> None:
    def turns(question: str, numbers: Sequence[int]) -> list[Row]:
        said = [(f"{question} part {n}", f"answer {n}") for n in numbers]
        return [{"role": role, "content": c} for u, a in said for role, c in (("user", u), ("assistant", a))]

    rows = [{"messages": turns(question, range(4))} for question in QUESTIONS]
    whole = {tuple(sequence.ids): sequence for sequence in everything("sft", tmp_path, rows)}
    limit = max(map(len, whole)) // 2 + 2
    recipe = recipe_of(
        str(tmp_path / "f.jsonl"), split=[1, 0, 0], max_length=limit, long_rows="truncate", truncate_side=side
    )
    items = items_of("sft", recipe)
    kept = range(2, 4) if side == "left" else range(2)
    expected = {
        tags().demonstration([Message(m["role"], m["content"]) for m in turns(question, kept)]).ids
        for question in QUESTIONS
    }
    assert {sequence.ids for sequence in (*items.train, *items.eval)} == expected
    assert items.counts.truncated + items.eval_counts.truncated == len(rows)
    assert f"{len(rows)} too long and shortened" in items.note()


def test_answers_that_are_too_long_leave_their_ranking(tmp_path: Path) -> None:
    rows = [{"instruction": q, "input": "", "output": ["best", "long " * 30, "worst"]} for q in QUESTIONS]
    recipe = recipe_of(write(tmp_path / "f.jsonl", rows), split=[0, 1, 0], max_length=60, long_rows="drop")
    items = items_of("reward", recipe)
    assert [answer_of(each) for each in items.train[0].sequences] == ["best", "worst"]
    assert items.counts.answers_dropped == len(items.train)
    rows = [{"instruction": q, "input": "", "output": ["best", "long " * 30]} for q in QUESTIONS] + rows
    recipe = recipe_of(write(tmp_path / "g.jsonl", rows), split=[0, 1, 0], max_length=60, long_rows="drop")
    items = items_of("reward", recipe)
    assert items.counts.dropped + items.eval_counts.dropped == len(QUESTIONS)


def test_plain_text_loses_no_token(tmp_path: Path) -> None:
    texts = [f"story {n}: " + " ".join(str(k) for k in range(20 + n)) for n in range(8)]
    recipe = recipe_of(write(tmp_path / "f.jsonl", [{"text": t} for t in texts]), split=[1, 0, 0], max_length=32)
    items = items_of("sft", recipe)
    targets = sum(sum(sequence.trained[1:]) for sequence in (*items.train, *items.eval))
    ids = [tags().tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(sequence) <= 32 for sequence in items.train)
    # each document ends with its mark; its first token is no target, as nothing stands before it
    assert targets == sum(len(each) + 1 - 1 for each in ids)
    assert items.counts.pieces == len(items.train) > len(texts) / 2


@pytest.mark.parametrize(
    ("step", "rows", "message"),
    [
        (
            "sft",
            [{"prompt": f"q{n}", "completion": "bad", "label": False} for n in range(9)],
            "no row of step 1's share",
        ),
        (
            "reward",
            [{"question": f"q{n}", "answer": "x"} for n in range(9)],
            "no row of step 2's share has a comparison",
        ),
        ("ppo", [{"text": f"text {n}"} for n in range(9)], "no row of step 3's share has a prompt"),
    ],
)
def test_nothing_for_the_step(tmp_path: Path, step: str, rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message):
        everything(step, tmp_path, rows)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", list(MAKERS))
def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, step: str) -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    )
    chat = build_chat_format(tokenizer, "tokenizer")
    recipe = recipe_of(write(tmp_path / "f.jsonl", [pair("good"), pair("bad")]), split=ALL_TO[step])
    with pytest.raises(DataError, match=r"f\.jsonl row 2: the chat template refuses the conversation: not that"):
        items_of(step, recipe, chat)


@pytest.mark.parametrize("step", list(MAKERS))
def test_a_row_that_the_template_refuses_is_dropped_and_counted(tmp_path: Path, step: str) -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    )
    chat = build_chat_format(tokenizer, "tokenizer")
    rows = [pair(question) for question in QUESTIONS] + [pair(f"bad {n}") for n in range(3)]
    recipe = recipe_of(write(tmp_path / "f.jsonl", rows), split=ALL_TO[step], bad_rows="drop")
    items = items_of(step, recipe, chat)
    assert len(items.train) + len(items.eval) == len(QUESTIONS)
    assert items.counts.refused + items.eval_counts.refused == 3
    assert "3 refused by the chat template and dropped" in items.note()


@pytest.mark.parametrize("step", list(MAKERS))
def test_the_second_start_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    recipe = recipe_of(write(tmp_path / "f.jsonl", [pair(question) for question in QUESTIONS]), split=ALL_TO[step])
    first = items_of(step, recipe)
    for name in ("demonstrations", "comparisons", "prompts", "text"):
        monkeypatch.setattr(ChatFormat, name, None)
    second = items_of(step, recipe)
    assert (list(second.train), list(second.eval)) == (list(first.train), list(first.eval))
    assert second.description() == first.description()


def test_what_the_key_depends_on(tmp_path: Path) -> None:
    """Content, template, tokenizer, options, code: each gives another table; where the file lies and its rows' order in
    another source do not change the items."""
    rows = [pair(question) for question in QUESTIONS]
    path = write(tmp_path / "f.jsonl", rows)
    base = recipe_of(path, split=[1, 0, 0])

    def key(recipe: Recipe, chat: ChatFormat = tags()) -> str:  # noqa: B008
        tables = prepare._StepTables("sft", open_library(recipe), chat, recipe, prepare.sft_rows, {}, print)
        return prepare.key_hash(tables._key())

    keys = [key(base)]
    keys.append(key(recipe_of(path, split=[1, 0, 0], max_length=300)))
    keys.append(key(recipe_of(path, split=[1, 1, 0])))
    keys.append(key(recipe_of(path, split=[1, 0, 0], long_rows="drop")))
    keys.append(key(base.model_copy(update={"run": base.run.model_copy(update={"seed": 3})})))
    keys.append(key(base, build_chat_format(byte_level_tokenizer(), "dialogue")))
    write(tmp_path / "f.jsonl", [*rows, pair("one more")])
    keys.append(key(base))
    assert len(set(keys)) == len(keys)
    write(tmp_path / "f.jsonl", rows)
    assert key(base) == keys[0]


@pytest.mark.real
def test_hh_rlhf_for_stories260k(shared: Path) -> None:
    """The real run's data, rendered for all steps."""
    source = str(shared / "data/hh_rlhf/harmless_1600.jsonl.gz")
    recipe = Recipe.model_validate({"data": {"sources": [source], "bad_rows": "drop", "long_rows": "drop"}})
    library = open_library(recipe)
    chat = build_chat_format(AutoTokenizer.from_pretrained(shared / "models/stories260K"), "dialogue", [1, 2])
    items = sft_items(library, chat, recipe)
    sequences = [*items.train, *items.eval]
    counts = [items.counts, items.eval_counts]
    assert sum(each.examples for each in counts) == len(sequences) + sum(each.dropped for each in counts)
    assert len(sequences) > sum(each.dropped for each in counts)
    assert all(sequence.ids[0] == 1 and sequence.ids[-1] == 2 for sequence in sequences)
    for ranked in reward_items(library, chat, recipe).eval:
        for better, worse in [(ranked.sequences[b], ranked.sequences[w]) for b, w in ranked.pairs()]:
            assert better.prompt_length == worse.prompt_length
            assert better.ids[: better.prompt_length] == worse.ids[: worse.prompt_length]
            assert better.ids != worse.ids
    assert all(len(prompt.ids) <= 256 for prompt in ppo_items(library, chat, recipe).eval)


def test_an_answer_that_can_never_fit_costs_the_others_no_context(tmp_path: Path) -> None:
    """The short answers fit with the whole conversation, so they keep it."""

    def turns(question: str) -> list[Row]:
        said = [(f"{question} part {n}", "yes") for n in range(2)]
        talk = [{"role": role, "content": c} for u, a in said for role, c in (("user", u), ("assistant", a))]
        return [*talk, {"role": "user", "content": "And so?"}]

    rows = [{"prompt": turns(q), "answers": ["good", "long " * 60, "bad"], "scores": [3, 2, 1]} for q in QUESTIONS]
    recipe = recipe_of(write(tmp_path / "f.jsonl", rows), split=[0, 1, 0], max_length=90, long_rows="truncate")
    items = items_of("reward", recipe)
    for ranked in (*items.train, *items.eval):
        assert [answer_of(each) for each in ranked.sequences] == ["good", "bad"]
        assert "part 0" in tags().tokenizer.decode(ranked.sequences[0].ids)
    assert (items.counts.truncated, items.counts.answers_dropped) == (0, len(items.train))
    shorter = items_of(
        "reward", recipe_of(str(tmp_path / "f.jsonl"), split=[0, 1, 0], max_length=45, long_rows="truncate")
    )
    assert shorter.counts.truncated == len(shorter.train) == len(items.train)
    assert "part 0" not in tags().tokenizer.decode(shorter.train[0].sequences[0].ids)


def test_a_prompt_of_two_sources_is_measured_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [pair(q, "a", "b") for q in QUESTIONS])
    second = write(tmp_path / "b.jsonl", [pair(q, "a", "c") for q in QUESTIONS])
    items = items_of("reward", recipe_of(first, second, split=[0, 1, 0]))
    assert sum(len(ranked.rankings) for ranked in items.eval) == 2 * len(items.eval)
    assert len(items.train) == 2 * (len(QUESTIONS) - len(items.eval)), "each source's own, as the blend draws them"


def test_of_equal_prompts_the_one_with_a_reference_stays(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "?"}]} for q in QUESTIONS])  # fmt: skip # noqa: E501
    second = write(tmp_path / "b.jsonl", [{"question": q, "answer": f"#### {n}"} for n, q in enumerate(QUESTIONS)])
    items = items_of("ppo", recipe_of(first, second, split=[0, 0, 1]))
    prompts = [*items.train, *items.eval]
    assert sorted(prompt.reference for prompt in prompts) == sorted(str(n) for n in range(len(QUESTIONS)))
    assert items.counts.repeated + items.eval_counts.repeated == len(QUESTIONS)
    assert items.counts.tokens == sum(len(prompt.ids) for prompt in items.train)


def test_a_template_that_writes_the_day_is_rendered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(template: str, day: int) -> str:
        class Fixed(datetime):
            @classmethod
            def now(cls, _: Any = None) -> datetime:
                return datetime(2026, 11, day, tzinfo=UTC)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
        tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
        tokenizer.chat_template = template
        return prepare.tokenizer_fingerprint(build_chat_format(tokenizer, "tokenizer"))

    dated = "{{ strftime_now('%d %m %Y') }} " + CHATML
    assert fingerprint(dated, 1) == fingerprint(dated, 1) != fingerprint(dated, 2)
    assert fingerprint(CHATML, 1) == fingerprint(CHATML, 2)


def test_a_held_out_part_without_use_is_named_as_such(tmp_path: Path) -> None:
    rows: list[Row] = [{"question": f"q{n}", "answer": "x"} for n in range(40)]
    path = write(tmp_path / "f.jsonl", rows)
    held_out = {example.prompt.messages[0].content for example in open_library(recipe_of(path, split=[0, 1, 0])).examples("reward", "eval")}  # fmt: skip # noqa: E501
    mixed = write(tmp_path / "g.jsonl", [pair(row["question"]) for row in rows if row["question"] not in held_out])
    recipe = recipe_of(path, mixed, split=[0, 1, 0])
    with pytest.raises(DataError, match=r"no row of the held-out part of step 2's share .*data\.eval_fraction"):
        items_of("reward", recipe)
