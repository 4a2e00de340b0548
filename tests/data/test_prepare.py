"""What each step gets from its share: rendered, within the limits, counted."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.data.formats_under_test import CHATML, byte_level_tokenizer
from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat, build_chat_format
from threefold.data.prepare import load_examples, ppo_prompts, reward_pairs, sft_sequences
from threefold.data.split import split_examples
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt


@cache
def tags() -> ChatFormat:
    return build_chat_format(byte_level_tokenizer(), "tags")


def example(question: str, *answers: str, row: int = 1) -> Example:
    return Example(Prompt((Message("user", question),)), answers[0] if answers else "", answers, f"f.jsonl row {row}")


def write_pairs(path: Path, num_rows: int) -> str:
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(num_rows)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_sources_are_joined_and_drops_are_told(tmp_path: Path) -> None:
    first, second = write_pairs(tmp_path / "a.jsonl", 3), write_pairs(tmp_path / "b.jsonl", 2)
    recipe = Recipe.model_validate({"data": {"sources": [first, second], "bad_rows": "drop"}})
    loaded = load_examples(recipe)
    assert [each.origin for each in loaded.examples] == [f"{first} row 2", f"{first} row 3", f"{second} row 2"]
    assert loaded.num_dropped == 2
    assert loaded.notes == (
        f"{first}: 2 examples",
        f"{first}: 1 of 3 rows dropped (1 with chosen equal to rejected)",
        f"{second}: 1 examples",
        f"{second}: 1 of 2 rows dropped (1 with chosen equal to rejected)",
    )
    with pytest.raises(DataError, match=r"a\.jsonl row 1: .*the same answer"):
        load_examples(Recipe.model_validate({"data": {"sources": [first]}}))


def test_demonstrations() -> None:
    rows = [example("Hi", "Hello", "Go"), example("no answer"), example("Bye", "See you")]
    sequences, num_dropped = sft_sequences(rows, tags(), 100)
    assert num_dropped == 0
    assert [tags().decode(sequence.ids[sequence.prompt_length :]) for sequence in sequences] == ["Hello", "See you"]
    everything, _ = sft_sequences(rows, tags(), 100, loss_on="all")
    assert all(all(sequence.trained) for sequence in everything)
    with pytest.raises(DataError, match="no row of step 1's share has a demonstration"):
        sft_sequences([example("no answer")], tags(), 100)
    assert sft_sequences([], tags(), 100) == ([], 0)


def test_every_pair_of_a_ranking_best_first() -> None:
    pairs = reward_pairs([example("Hi", "a", "b", "c"), example("one answer", "x")], tags(), 100)
    texts = [tuple(tags().decode(each.ids[each.prompt_length :]) for each in pair) for pair in pairs]
    assert texts == [("a", "b"), ("a", "c"), ("b", "c")]
    with pytest.raises(DataError, match=r"no row of step 2's share has a comparison: .*prompt \+ chosen \+ rejected"):
        reward_pairs([example("one answer", "x")], tags(), 100)


def test_a_prompt_with_several_rows_is_taken_once() -> None:
    rows = [example("Hi", "a", row=1), example("Bye", "b", row=2), example("Hi", "c", row=3)]
    prompts = ppo_prompts(rows, tags(), 100)
    assert [(each.prompt, each.origin) for each in prompts] == [
        (rows[0].prompt, "f.jsonl row 1"),
        (rows[1].prompt, "f.jsonl row 2"),
    ]
    assert all(each.ids == tags().prompt_ids(each.prompt.messages) for each in prompts)


def test_long_rows() -> None:
    rows = [example("Hi", "a", "b", row=1), example("Hi there", "x" * 60, "y", row=2)]
    limit = 20
    told: list[str] = []
    calls = {
        "data.max_length": [
            lambda limit, mode: sft_sequences(rows, tags(), limit, long_rows=mode),
            lambda limit, mode: reward_pairs(rows, tags(), limit, mode, told.append),
        ],
        "data.max_prompt_length": [
            lambda limit, mode: ppo_prompts(
                [example("x" * 60, row=2), example("Hi")], tags(), limit, mode, told.append
            )
        ],
    }  # fmt: skip
    for field, functions in calls.items():
        for function in functions:
            with pytest.raises(
                DataError,
                match=rf"^f\.jsonl row 2: has \d+ tokens, more than {field} = 20: raise {field}, "
                r'or set data\.long_rows = "drop"',
            ):
                function(limit, "error")
            with pytest.raises(
                DataError, match=rf"all 2 rows of the share are longer than {field} = 2 .*: raise {field}"
            ):
                function(2, "drop")
            function(limit, "drop")
    assert sft_sequences(rows, tags(), limit, long_rows="drop") == (sft_sequences(rows[:1], tags(), limit)[0], 1)
    assert reward_pairs(rows, tags(), limit, "drop") == reward_pairs(rows[:1], tags(), limit)
    assert told == [
        "1 of 2 pairs dropped: longer than data.max_length = 20 tokens",
        "1 of 2 prompts dropped: longer than data.max_prompt_length = 20 tokens",
    ]


def test_a_limit_that_is_just_met() -> None:
    length = len(sft_sequences([example("Hi", "a")], tags(), 100)[0][0].ids)
    assert sft_sequences([example("Hi", "a")], tags(), length)[1] == 0


def test_a_row_that_the_template_refuses_is_named() -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    )
    chat_format = build_chat_format(tokenizer, "tokenizer")
    rows = [example("good", "a", "b"), example("bad", "a", "b", row=2)]
    for function in (sft_sequences, reward_pairs, ppo_prompts):
        with pytest.raises(DataError, match=r"^f\.jsonl row 2: the chat template refuses the conversation: not that"):
            function(rows, chat_format, 100)


@pytest.mark.real
def test_hh_rlhf_for_stories260k(shared: Path) -> None:
    """The real run's data: the three shares of one split, rendered for all steps."""
    source = str(shared / "data/hh_rlhf/harmless_1600.jsonl.gz")
    recipe = Recipe.model_validate({"data": {"sources": [source], "bad_rows": "drop"}})
    shares = split_examples(load_examples(recipe).examples, recipe.data.split, 0.1, seed=1)
    assert [len(share.train) + len(share.eval) for share in shares.values()] == [319, 639, 637]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    chat_format = build_chat_format(tokenizer, "dialogue", [1, 2])
    sequences, num_dropped = sft_sequences(shares["sft"].train, chat_format, 512, long_rows="drop")
    assert len(sequences) + num_dropped == len(shares["sft"].train)
    assert len(sequences) > num_dropped
    assert all(sequence.ids[0] == 1 and sequence.ids[-1] == 2 for sequence in sequences)
    pairs = reward_pairs(shares["reward"].eval, chat_format, 512, "drop")
    for better, worse in pairs:
        assert better.prompt_length == worse.prompt_length
        assert better.ids[: better.prompt_length] == worse.ids[: worse.prompt_length]
        assert better.ids != worse.ids
    prompts = ppo_prompts(shares["ppo"].eval, chat_format, 256, "drop")
    assert all(len(prompt.ids) <= 256 for prompt in prompts)
