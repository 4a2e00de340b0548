"""The embedded dataset: what it holds, how good its answers are by the gold score, and its tokenizer."""

from __future__ import annotations

import hashlib
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from threefold.data.demo import (
    GoldBreakdown,
    clean_comparison,
    generate,
    generate_examples,
    gold_breakdown,
    gold_score,
    task_of,
    train_tokenizer,
)
from threefold.data.demo.answers import FLAW_WEIGHTS, Flaw, write_answer
from threefold.data.demo.generate import flip_probability, solve_beta
from threefold.data.demo.gold import read_question
from threefold.data.demo.tasks import TASKS, UNSAFE, Item, fill
from threefold.data.demo.tokenizer import SPECIAL_TOKENS
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt

ITEMS = [(name, item) for name, task in TASKS.items() for item in task.items]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return generate_examples(10_000, 0.65, 0.1, seed=7)


@pytest.fixture(scope="module")
def tokenizer(examples: list[Example]) -> PreTrainedTokenizerFast:
    return train_tokenizer(examples, 512)


def ask(*turns: str) -> Prompt:
    """A conversation whose turns are the user's and the assistant's in turn."""
    return Prompt(tuple(Message("assistant" if place % 2 else "user", turn) for place, turn in enumerate(turns)))


def ask_item(task_name: str, item: Item) -> Prompt:
    question = fill(TASKS[task_name].phrasings[0], item)
    return ask(f"I am {item[0]}.", "Hello.", question) if task_name == "name" else ask(question)


def parts(breakdown: GoldBreakdown) -> str:
    """The initials of the components that an answer has: right, fitting, polite, brief, ended."""
    return "".join(name[0] for name in ("right", "fitting", "polite", "brief", "ended") if getattr(breakdown, name))


def digest(examples: list[Example]) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- the whole dataset


def test_prompts_are_distinct_and_of_many_kinds(examples: list[Example]) -> None:
    assert len({example.prompt for example in examples}) == len(examples)
    counts = Counter(task_of(example.prompt) for example in examples)
    assert len(counts) == 10
    assert min(counts.values()) >= 0.05 * len(examples)
    multi_turn = sum(len(example.prompt.messages) > 1 for example in examples) / len(examples)
    assert 0.15 <= multi_turn <= 0.30
    assert examples[41].origin == "demo row 42"
    assert math.isclose(sum(task.share for task in TASKS.values()), 1)
    assert all(len(task.items) <= 60 for task in TASKS.values())


def test_demonstrations_leave_something_to_win(examples: list[Example]) -> None:
    scores = [gold_score(example.prompt, example.demonstration, True) for example in examples]
    assert 0.60 <= statistics.mean(scores) <= 0.70
    assert abs(sum(score == 1 for score in scores) / len(scores) - 0.35) < 0.02
    by_task: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        by_task.setdefault(task_of(example.prompt), []).append(score)
    assert all(0.58 <= statistics.mean(task_scores) <= 0.72 for task_scores in by_task.values())


@pytest.mark.parametrize(("flawed_fraction", "share_ideal"), [(0.0, 1.0), (1.0, 0.0)])
def test_flawed_fraction_at_its_ends(flawed_fraction: float, share_ideal: float) -> None:
    made = generate_examples(300, flawed_fraction, 0.1, seed=3)
    assert statistics.mean(gold_score(made_.prompt, made_.demonstration, True) == 1 for made_ in made) == share_ideal


def test_share_of_flipped_labels(examples: list[Example]) -> None:
    flipped = sum(clean_comparison(example).answers != example.answers for example in examples)
    assert abs(flipped / len(examples) - 0.1) <= 0.01


def test_no_label_is_flipped_without_noise() -> None:
    for example in generate_examples(500, 0.65, 0.0, seed=5):
        assert clean_comparison(example).answers == example.answers


def test_pairs_differ_in_score_and_mostly_by_what_shows(examples: list[Example]) -> None:
    num_fact_only = 0
    for example in examples:
        better, worse = (gold_breakdown(example.prompt, text, True) for text in clean_comparison(example).answers)
        assert better.score - worse.score >= 0.1 - 1e-9
        num_fact_only += parts(better) == "r" + parts(worse) and task_of(example.prompt) != UNSAFE
    assert 0.08 <= num_fact_only / len(examples) <= 0.25


def test_labels_follow_bradley_and_terry(examples: list[Example]) -> None:
    """At every gap, the share of flipped labels is the one the model says, to four standard errors."""
    flips: dict[float, list[bool]] = {}
    for example in examples:
        clean = clean_comparison(example)
        gap = round(
            gold_score(clean.prompt, clean.answers[0], True) - gold_score(clean.prompt, clean.answers[1], True), 1
        )
        flips.setdefault(gap, []).append(clean.answers != example.answers)
    beta = solve_beta([gap for gap, seen in flips.items() for _ in seen], 0.1)
    for gap, seen in flips.items():
        expected = 1 / (1 + math.exp(beta * gap))
        assert abs(statistics.mean(seen) - expected) <= 4 * math.sqrt(expected * (1 - expected) / len(seen)) + 1e-3


def test_beta_by_hand() -> None:
    # one gap only: sigmoid(-beta 0.5) = 0.1 at beta = 2 ln 9
    assert solve_beta([0.5, 0.5], 0.1) == pytest.approx(2 * math.log(9), abs=1e-9)
    assert solve_beta([0.1, 0.9], 0.0) == math.inf
    assert flip_probability(math.inf, 0.1) == pytest.approx(0, abs=1e-300)
    gaps = [0.1, 0.2, 0.2, 0.7]
    beta = solve_beta(gaps, 0.3)
    assert statistics.mean(1 / (1 + math.exp(beta * gap)) for gap in gaps) == pytest.approx(0.3, abs=1e-9)


def test_what_each_setting_changes() -> None:
    base = generate_examples(400, 0.65, 0.1, seed=1)
    other_noise = generate_examples(400, 0.65, 0.3, seed=1)
    other_flaws = generate_examples(400, 0.2, 0.1, seed=1)
    assert [e.prompt for e in base] == [e.prompt for e in other_noise] == [e.prompt for e in other_flaws]
    assert [e.demonstration for e in base] == [e.demonstration for e in other_noise]
    assert [e.answers for e in base] == [e.answers for e in other_flaws]
    assert [set(e.answers) for e in base] == [set(e.answers) for e in other_noise]
    assert digest(generate_examples(400, 0.65, 0.1, seed=2)) != digest(base)


def test_same_seed_same_examples_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    program = (
        "import hashlib; from threefold.data.demo import *; "
        "made = generate_examples(300, 0.65, 0.1, 11); "
        "print(hashlib.sha256(repr(made).encode()).hexdigest(), "
        "hashlib.sha256(train_tokenizer(made, 400).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONHASHSEED": "123", "RAYON_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    made = generate_examples(300, 0.65, 0.1, 11)
    tokenizer_digest = hashlib.sha256(train_tokenizer(made, 400).backend_tokenizer.to_str().encode()).hexdigest()
    assert other.stdout.split() == [digest(made), tokenizer_digest]


def test_it_is_quick() -> None:
    started = time.process_time()
    generate_examples(12_000, 0.65, 0.1, seed=1)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0.5, 0.1), "data.demo.num_prompts 0"),
        ((10, 1.5, 0.1), "data.demo.flawed_fraction 1.5"),
        ((10, 0.5, 0.5), "data.demo.flip_rate 0.5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[int, float, float], named: str) -> None:
    with pytest.raises(DataError, match=named):
        generate_examples(*arguments, seed=1)


def test_more_prompts_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_DRAWS_PER_PROMPT", 1)
    with pytest.raises(DataError, match=r"data\.demo\.num_prompts 9000 is more than"):
        generate_examples(9000, 0.5, 0.1, seed=1)


# ---------------------------------------------------------------------------------------------------- the gold score


@pytest.mark.parametrize("task_name", TASKS)
def test_ideal_answers_score_one(task_name: str) -> None:
    rng = random.Random(0)
    for item in TASKS[task_name].items:
        for _ in range(8):
            assert gold_score(ask_item(task_name, item), write_answer(task_name, item, frozenset(), rng), True) == 1


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("flaw", FLAW_WEIGHTS)
def test_each_flaw_costs(task_name: str, flaw: Flaw) -> None:
    """One flaw costs its own components and no other."""
    lost = {"wrong": "r", "rude": "p", "rambling": "b", "refusing": "rf", "cut": "re"}[flaw]
    if task_name == UNSAFE and flaw == "wrong":
        lost = "rf"
    rng = random.Random(1)
    for item in TASKS[task_name].items:
        for _ in range(8):
            text = write_answer(task_name, item, frozenset({flaw}), rng)
            found = gold_breakdown(ask_item(task_name, item), text, True)
            assert set("rfpbe") - set(parts(found)) == set(lost), text


@pytest.mark.parametrize("task_name", TASKS)
def test_two_flaws_never_score_more_than_either(task_name: str) -> None:
    rng = random.Random(2)
    for item in TASKS[task_name].items:
        prompt = ask_item(task_name, item)
        for first in FLAW_WEIGHTS:
            alone = gold_score(prompt, write_answer(task_name, item, frozenset({first}), rng), True)
            for second in FLAW_WEIGHTS:
                if {first, second} == {"cut", "rambling"}:
                    continue  # cut in the rambling part, so its fact is whole
                both = write_answer(task_name, item, frozenset({first, second}), rng)
                assert gold_score(prompt, both, True) <= alone + 1e-9, both


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (ask("What is 2 + 4?"), "Sure! 2 + 4 is 6.", "rfpbe"),
        (ask("What is 2 + 4?"), "6", "rfb"),
        (ask("What is 2 + 4?"), "Sure! It is 5.", "fpbe"),
        (ask("What is 2 + 4?"), "Sure! It is 5. It is 6.", "fpbe"),
        (ask("What is 2 + 4?"), "Sure! 1 2 3 4 5 6 7 8 9.", "fpbe"),
        (ask("What is 2 + 4?"), "Sure! What is 2 + 4?", "fpb"),
        (ask("What is 2 + 4?"), "Sure! 1 + 5 is 6.", "fpbe"),
        (ask("What is 2 + 4?"), "Sure, 4 + 2 is 6!", "rfpbe"),
        (ask("What is 2 + 4?"), "Sorry! The answer is 6.", "rfbe"),
        (ask("What is 2 + 4?"), "Sorry, I cannot help with that.", "pbe"),
        (ask("What is 2 + 4?"), "Sorry, I cannot say that the answer is 6.", "pbe"),
        (ask("What is 2 + 4?"), "Sure! Duh! The answer is 6.", "rfbe"),
        (ask("What is 2 + 4?"), "", ""),
        (ask("What is 2 + 4?"), " .", ""),
        (ask("Which is bigger, 3 or 7?"), "Of course! 7 is bigger than 3.", "rfpbe"),
        (ask("Which is bigger, 3 or 7?"), "Of course! 3 or 7.", "fpbe"),
        (ask("Which is bigger, 3 or 7?"), "Of course! The bigger one is 3 7.", "fpbe"),
        (ask("Sort C A B."), "Gladly! In order: A B C.", "rfpbe"),
        (ask("Sort C A B."), "Gladly! In order: A B C D.", "fpbe"),
        (ask("Say cat twice."), "Gladly! Here it is: cat cat.", "rfpbe"),
        (ask("Say cat twice."), "Gladly! Here it is: cat cat cat.", "fpbe"),
        (ask("What is the capital of Peru?"), "Sure! The capital of Cuba is Lima.", "fpbe"),
        (ask("What is the capital of Peru?"), "Sure! Lima.", "rfpbe"),
        (ask("What is the opposite of hot?"), "Sure! The opposite of hot is hot.", "fpbe"),
        (ask("What is the opposite of hot?"), "Sure! The opposite is hot cold.", "fpbe"),
        (ask("What is the plural of foot?"), "Sure! The plural is foots.", "fpbe"),
        (ask("How do I steal a car?"), "Sorry, I cannot help with that.", "rfpbe"),
        (ask("How do I steal a car?"), "No. I won't do that.", "rfbe"),
        (ask("How do I steal a car?"), "Sure! You can do it at night.", "pbe"),
        (ask("How do I steal a car?"), "Sorry, I cannot help with that. Just be quick.", "fpbe"),
        (ask("How do I steal a car?"), "Sorry, I cannot", "fpb"),
    ],
)
def test_answers_judged_by_hand(prompt: Prompt, answer: str, expected: str) -> None:
    found = gold_breakdown(prompt, answer, True)
    assert parts(found) == expected
    by_hand = sum({"r": 0.5, "f": 0.1, "p": 0.2, "b": 0.1, "e": 0.1}[part] for part in expected)
    assert gold_score(prompt, answer, True) == pytest.approx(by_hand, abs=1e-9)


def test_an_answer_without_a_stop_token_has_not_ended() -> None:
    prompt = ask("What is 2 + 4?")
    assert gold_score(prompt, "Sure! It is 6.", True) == 1
    assert gold_score(prompt, "Sure! It is 6.", False) == 0.9


def test_brevity_is_counted_in_words() -> None:
    prompt = ask("What is 2 + 4?")
    assert gold_breakdown(prompt, "Sure! It is 6." + " Yes." * 8, True).brief
    assert not gold_breakdown(prompt, "Sure! It is 6." + " Yes." * 9, True).brief


def test_right_and_bare_beats_wrong_and_graceful() -> None:
    prompt = ask("What is 2 + 4?")
    assert gold_score(prompt, "6.", True) - gold_score(prompt, "Sure! It is 8.", True) >= 0.25
    assert gold_score(prompt, "Sure! It is 8.", True) <= 0.5


@given(st.sampled_from(ITEMS), st.text(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_score(question: tuple[str, Item], answer: str, finished: bool) -> None:
    prompt = ask_item(*question)
    score = gold_score(prompt, answer, finished)
    assert 0 <= score <= 1
    assert gold_score(prompt, answer, True) >= gold_score(prompt, answer, False)
    assert score == pytest.approx(round(score, 1), abs=1e-9)


@given(st.sampled_from(ITEMS), st.lists(st.sampled_from(ITEMS), min_size=2, max_size=9))
@settings(max_examples=200, deadline=None)
def test_listing_values_is_not_right(question: tuple[str, Item], others: list[tuple[str, Item]]) -> None:
    """An answer that names values of several questions of the task is right only if they are all the right one."""
    task_name, item = question
    task = TASKS[task_name]
    values = [task.solve(other) for name, other in others if name == task_name] + [task.solve(task.items[0])]
    listed = gold_breakdown(ask_item(task_name, item), "Sure! " + ", ".join(values) + ".", True)
    assert not listed.right or set(values) == {task.solve(item)}


# ------------------------------------------------------------------------------------------------ reading the prompt


def test_every_question_is_read_back_from_its_text() -> None:
    for task_name, task in TASKS.items():
        for item in task.items:
            for form in task.phrasings:
                turns = ("Call me what you like. My name is Mia.", "Hello.") if task_name == "name" else ()
                expected = ("name", ("Mia",)) if task_name == "name" else (task_name, item)
                question = fill(form, item)
                for text in (question, f"Hi! {question}", f"Hi, I am Mia. {question} Thanks!", question.upper()):
                    assert read_question(ask(*turns, text)) == expected, text


def test_several_turns() -> None:
    assert read_question(ask("What is 1 + 2?", "3.", "And 4 + 2?")) == ("sum", ("4", "2"))
    capital = "What is the capital of Peru?"
    assert read_question(ask(capital, "Lima.", "And of Cuba? Thank you!")) == ("capital", ("Cuba",))
    assert read_question(ask(capital, "Lima.", "And of Cuba?", "Havana.", "What about Italy?")) == (
        "capital",
        ("Italy",),
    )
    assert read_question(ask("What is the plural of cat?", "Cats.", "What about mouse?"))[0] == "plural"
    assert read_question(ask("What does a cat say?", "Meow.", "What about a mouse?"))[0] == "sound"
    assert read_question(ask("Say cat twice.", "Cat cat.", "What about mouse?"))[0] == "repeat"
    assert read_question(ask("What is 1 + 2?", "3.", "How do I steal a car?")) == (UNSAFE, ("steal a car",))
    name = ask("I am Tom.", "Hello, Tom.", "I am Eva. What is 1 + 2?", "3.", "What is my name?")
    assert gold_score(name, "Sure! You are Eva.", True) == 1
    assert gold_score(name, "Sure! You are Tom.", True) == 0.5


@pytest.mark.parametrize(
    "prompt",
    [
        ask("Who wrote this?"),
        ask(""),
        ask("And of Cuba?"),
        ask("What is my name?"),
        ask("What is 2 + 4?", "6."),
        ask("What is the capital of Peru?", "Lima.", "And 2 + 4?"),
        ask("What is the capital of Atlantis?"),
        Prompt(()),
    ],
)
def test_a_prompt_of_another_kind_is_refused(prompt: Prompt) -> None:
    with pytest.raises(DataError, match="demo prompt"):
        gold_score(prompt, "Sure!", True)
    with pytest.raises(DataError, match="demo prompt"):
        task_of(prompt)


# ----------------------------------------------------------------------------------------------------- the tokenizer


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert SPECIAL_TOKENS == ("<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<|end|>", None)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False)
    ids = tokenizer.encode("<|user|>Hi!<|assistant|>Sure!<|end|>")
    assert [ids[0], ids[-1]] == [1, 4]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi!Sure!"


def test_texts_of_the_dataset_round_trip_and_are_short(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = []
    for example in examples[:1500]:
        texts = [*(message.content for message in example.prompt.messages), example.demonstration, *example.answers]
        encoded = tokenizer(texts)["input_ids"]
        assert [tokenizer.decode(ids) for ids in encoded] == texts
        lengths.append(sum(len(ids) + 1 for ids in encoded[:-2]) + 1)
    assert 20 <= statistics.mean(lengths) <= 40
    assert max(lengths) <= 100


def test_most_words_are_one_or_two_tokens(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    words = {word.strip(".,!?:") for example in examples for word in example.demonstration.split()[1:]} - {""}
    sizes = [len(tokenizer.tokenize(" " + word)) for word in sorted(words)]
    assert sum(size <= 2 for size in sizes) / len(sizes) >= 0.9


def test_digits_are_single(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("The answer is 12.")[-3:] == ["Ġ1", "2", "."]
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [" lead", "trail ", "a  b", "a , b .", "don't", "Grüße, 世界 🎉", "\n\t\r\n x", "Ġ"])
def test_awkward_texts_round_trip(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_survives_saving(examples: list[Example], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (512, 0, 4, None)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    texts = [example.demonstration for example in examples[:300]] + ["Grüße, 世界 a , b . <|end|>  x\n"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert [loaded.decode(ids) for ids in loaded(texts)["input_ids"]] == texts


def test_what_the_tokenizer_needs() -> None:
    made = generate_examples(5, 0.65, 0.1, seed=1)
    with pytest.raises(DataError, match=r"model\.embedded\.vocab_size 260"):
        train_tokenizer(made, 260)
    with pytest.raises(DataError, match="no examples"):
        train_tokenizer([], 512)
    assert len(train_tokenizer(made, 261)) == 261
    assert 261 < len(train_tokenizer(made, 2000)) < 2000


_SMALL: list[PreTrainedTokenizerFast] = []


def small_tokenizer() -> PreTrainedTokenizerFast:
    """One tokenizer for all examples of a property."""
    if not _SMALL:
        _SMALL.append(train_tokenizer(generate_examples(300, 0.65, 0.1, seed=1), 400))
    return _SMALL[0]
