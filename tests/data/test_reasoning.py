"""Asking for steps and a final answer, finding it, and comparing it."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold.config.data import DemoDataSection, SourceSection
from threefold.data.reasoning import (
    WORDINGS,
    Language,
    final_answer,
    read_worked_examples,
    same_answer,
    with_reasoning,
)
from threefold.data.sources import open_source
from threefold.errors import ConfigError, DataError
from threefold.types import Example, Message, Prompt

WORKED = "She sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = <<48+24=72>>72 clips.\n#### 72"
STEPS = "She sold 48/2 = 24 clips in May.\nTogether 48+24 = 72 clips."
EQUATION = re.compile(r"([\d.]+) ([-+*/×÷]) ([\d.]+) = (\d+(?:\.\d+)?)")
OPERATIONS = {"+": add, "-": sub, "*": mul, "×": mul, "/": truediv, "÷": truediv}
LANGUAGES: list[Language] = ["english", "chinese"]


def section(reasoning: str = "english", **fields: Any) -> SourceSection:
    return SourceSection.model_validate({"path": "rows.jsonl", "reasoning": reasoning, **fields})


def example(demonstration: str = WORKED, answers: tuple[str, ...] = (), reference: str = "72") -> Example:
    messages = (Message("system", "Be kind."), Message("user", " How many? "))
    return Example(Prompt(messages), demonstration, answers, "rows.jsonl row 1", (), reference)


# --------------------------------------------------------------------------------------------------- the final answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WORKED, "72"),
        ("It is so.\nFinal answer: 72.", "72"),
        ("**Final answer:** $1,000.50", "$1,000.50"),
        ("**Final Answer**: 7", "7"),
        ("Final answer:\n12", "12"),
        ("The final answer is 7, I think", "7, I think"),
        ("The final answer depends on x.", ""),
        ("所以一共 72 个。\n最终答案：72。", "72"),
        ("最终答案是 72 元", "72 元"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("so \\boxed{72", "72"),
        ("Final answer: \\boxed{72}", "72"),
        ("#### Final answer: 9", "9"),
        ("Final answer: 3\nNo, wait.\nFinal answer: 4", "4"),
        ("#### 3\n\\boxed{4}", "4"),
        ("First 12, then 3 - 5 = -2", "-2"),
        ("10-3", "3"),
        ("it costs $1,234.5.", "1,234.5"),
        ("one half is 1/2", "1/2"),
        ("it is .5", ".5"),
        ("共 １２ 个", "12"),
        ("so it is \N{MINUS SIGN}5.", "-5"),
        ("is -$5", "-5"),
        ("is -\\$1,234.50!", "-1,234.50"),
        ("it is **-5**", "-5"),
        ("so x = - 5", "-5"),
        ("it went down to minus 5 degrees", "-5"),
        ("气温是零下5度", "-5"),
        ("In total - $5", "5"),
        ("3\N{EN DASH}5", "5"),
        ("- 5 apples", "5"),
        ("10 minus 3", "3"),
        ("It is 3 million dollars.", "3 million"),
        ("It is **3** Million.", "3** Million"),
        ("3 and a half cups", "3 and a half"),
        ("共3万元", "3万元"),
        ("We have 5K", "5K"),
        ("I drink H2O", "H2O"),
        ("that is 2^n", "2^n"),
        ("it is 10²", "10^2"),
        ("it is 5 m².", "5"),
        ("it is 2½ cups", "2 1/2"),
        ("it is \\(-\\frac{1}{2}\\)", "-1/2"),
        ("Final answer: 72\nThis final answer is positive.", "72"),
        ("I say the final answer: 72\nIt is 5 less than the final answer is in the book.", "72"),
        ("So the final answer is 7.\nCheck: 8 - 1.", "7"),
        ("因此，最终答案为 7。\n8 - 1 也是。", "7"),
        ("#### The final answer is 9", "9"),
        ("Final answer: 72!", "72"),
        ("\\boxed{7!}", "7!"),
        ("\\boxed{a \\boxed{5}", "5"),
        ("\\boxed{1 \\boxed{} 2}", "1 \\boxed{} 2"),
        ("nothing", ""),
        ("####", ""),
        ("", ""),
    ],
)
def test_what_a_text_gives_as_its_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1000", "1,000.0"),
        ("1000", "$1000"),
        ("1000", "1000.00 "),
        ("1/2", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("½", "$.50"),
        ("1 1/2", "1.5"),
        ("50%", "50"),
        ("-5", "−5"),
        ("-$5", "-5.0"),
        ("+3", "3."),
        ("72 clips", "72"),
        ("72元", "72"),
        ("\\text{72 clips}", "72"),
        ("１２", "12"),
        ("007", "7"),
        ("109,200,000", "109200000"),
        ("Yes.", "yes"),
        ("10:30", "10:30"),
        ("x + 1", "X +  1"),
        ("\N{EN DASH}5", "-5"),
        ("\N{EN DASH} $5", "-5"),
        ("minus 5", "-5"),
        ("Negative $5", "-5"),
        ("负5", "-5"),
        ("零下5度", "-5"),
        ("x = - 5", "-5"),
        ("-5 degrees", "-5"),
        ("2½", "2.5"),
        ("-½", "-0.5"),
        ("3 1/2 cups", "3.5"),
        ("\\frac12", "1/2"),
        ("-2\\frac{1}{2}", "-2.5"),
        ("5 m²", "5"),
        ("5 m^2", "5"),
        ("5㎡", "5"),
        ("5 m^{2}", "5"),
        ("72\\text{ m}^2", "72"),
        ("90^\\circ", "90"),
        ("20 °C", "20"),
        ("72 元", "72元"),
        ("3千克", "3"),
        ("百分之5", "5"),
        ("5kg", "5"),
        ("5 m", "5"),
        ("US$72", "72"),
        ("1{,}000", "1000"),
        ("72 clips!", "72"),
    ],
)
def test_answers_that_are_the_same(first: str, second: str) -> None:
    assert same_answer(first, second)
    assert same_answer(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", ""),
        ("", "0"),
        ("50%", "0.5"),
        ("1/0", "0"),
        ("1/3", "0.333"),
        ("1,5", "15"),
        ("7 or 8", "8"),
        ("72", "-72"),
        ("yes", "no"),
        ("yes", "1"),
        ("1e3", "1000"),
        ("1e3", "1"),
        ("\N{EN DASH}5", "5"),
        ("负5", "5"),
        ("正负5", "5"),
        ("正负5", "-5"),
        ("零下5度", "5"),
        ("negative 5", "5"),
        ("minus -5", "-5"),
        ("±5", "5"),
        ("x = - 5", "5"),
        ("not 5", "5"),
        ("5 degrees below zero", "5"),
        ("3 million", "3"),
        ("3 Million dollars", "3"),
        ("one hundred and 5", "5"),
        ("1.2万", "1.2"),
        ("5K", "5"),
        ("5 k", "5"),
        ("3 dozen", "3"),
        ("3 and a half", "3"),
        ("2 thirds", "2"),
        ("3个半", "3"),
        ("5分之一", "5"),
        ("十5", "5"),
        ("七十二", "72"),
        ("10²", "102"),
        ("10²", "10"),
        ("10₂", "102"),
        ("5①", "51"),
        ("2½", "21/2"),
        ("2½", "2"),
        ("x²", "x³"),
        ("H2O", "2"),
        ("B2", "2"),
        ("5x", "5"),
        ("5x²", "5"),
        ("5\\pi", "5"),
        ("\\sqrt{5}", "5"),
        ("10/x", "10"),
        ("2*3", "23"),
        ("2**3", "23"),
        ("5$7", "57"),
        ("7!", "7"),
    ],
)
def test_answers_that_differ(first: str, second: str) -> None:
    assert not same_answer(first, second)
    assert not same_answer(second, first)


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_numbers_are_compared_by_value(one: Fraction, other: Fraction) -> None:
    assert same_answer(str(one), str(other)) == (one == other)
    assert same_answer(f"{one.numerator:,}", str(one.numerator))
    assert same_answer(f"{one.numerator:,}.00", f"${one.numerator}")
    assert final_answer(f"The last step gives {one.numerator:,}.") == f"{one.numerator:,}"


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_can_be_asked(first: str, second: str) -> None:
    """A model may say anything; comparing is symmetric, and an answer equals itself."""
    assert same_answer(first, second) == same_answer(second, first)
    answer = final_answer(first)
    assert answer == answer.strip()


def test_very_long_numbers_do_not_take_long() -> None:
    assert not same_answer("9" * 10_000_000, "9")
    assert final_answer("1," * 200_000) == "1"


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "\\boxed{ }", "{", "\\frac{", "\\text{", "final answer ", "final answer:\n", "最终答案", "so\n",
     "#### ", " ", "\n", "*", "$", "-", "- 5 ", "9", "1 ", "1/", "1*", ",000", "a1", "m^2", "1½", "²", "负", "minus ",
     "half ", "<<1="],
)  # fmt: skip
def test_long_answers_do_not_take_long(piece: str) -> None:
    """20,000 pieces and 200,000 characters; what takes the square of their number takes many seconds. 2 s: a machine
    may be busy."""
    for text in (piece * 20_000, (piece * 200_000)[:200_000]):
        start = time.process_time()
        final_answer(text)
        assert not same_answer(text, "5")
        with_reasoning(example(text), section())
        assert time.process_time() - start < 2
    nested = "\\boxed{" * 20_000 + "5" + "}" * 20_000
    assert final_answer(nested) == "5"


# -------------------------------------------------------------------------------------------------------- the prompt


def test_a_prompt_by_hand() -> None:
    asked = with_reasoning(example(), section())
    system, user = asked.prompt.messages
    assert system == Message("system", "Be kind.")
    assert user == Message("user", f"{WORDINGS['english'].instruction}\n\nQuestion: How many?")
    assert asked.demonstration == f"{STEPS}\nFinal answer: 72"
    assert (asked.reference, asked.origin, asked.answers) == ("72", "rows.jsonl row 1", ())
    chinese = with_reasoning(example(), section("chinese", few_shot=1))
    shown = WORDINGS["chinese"].worked[0]
    assert chinese.prompt.messages[1].content == (
        f"{WORDINGS['chinese'].instruction}\n\n问题：{shown.question}\n解答：\n{shown.steps}\n"
        f"最终答案：{shown.final_answer}\n\n问题：How many?"
    )
    assert chinese.demonstration == f"{STEPS}\n最终答案：72"


@pytest.mark.parametrize(
    ("demonstration", "expected"),
    [
        ("#### 72", "Final answer: 72"),
        ("Two steps.\nFinal answer: 72.", "Two steps.\nFinal answer: 72"),
        ("Two steps.\n**Final answer:** 72", "Two steps.\nFinal answer: 72"),
        ("最终答案：72", "Final answer: 72"),
        ("It is \\boxed{72}.", "It is \\boxed{72}.\nFinal answer: 72"),
        ("#### 72\nas I said", "#### 72\nas I said\nFinal answer: 72"),
        ("Only steps.", "Only steps.\nFinal answer: 72"),
        ("Two steps.\nThe final answer is 72.", "Two steps.\nFinal answer: 72"),
        ("2 * 36 = <<2 * 36 = 72>>72\n#### 72", "2 * 36 = 72\nFinal answer: 72"),
        ("int x = 3 << 2; y = x >> 1\n#### 72", "int x = 3 << 2; y = x >> 1\nFinal answer: 72"),
        ("1 << 2 >> 1\n#### 2", "1 << 2 >> 1\nFinal answer: 2"),
        ("", ""),
    ],
)
def test_a_demonstration_gives_its_answer_in_the_asked_form(demonstration: str, expected: str) -> None:
    assert with_reasoning(example(demonstration), section()).demonstration == expected


def test_ranked_answers_are_rewritten_where_they_state_one() -> None:
    asked = with_reasoning(example("", ("So.\n#### 72", "I cannot say.")), section("chinese"))
    assert asked.answers == ("So.\n最终答案：72", "I cannot say.")
    assert asked.demonstration == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_built_in_examples_are_right(language: Language) -> None:
    """Each final answer is the last number of its steps, and every equation in them holds."""
    assert len(WORDINGS[language].worked) == 4
    num_equations = 0
    for worked in WORDINGS[language].worked:
        assert same_answer(final_answer(worked.steps), worked.final_answer)
        for left, operation, right, result in EQUATION.findall(worked.steps):
            assert OPERATIONS[operation](Fraction(left), Fraction(right)) == Fraction(result), worked.steps
            num_equations += 1
    assert num_equations >= 9


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (example("No number.", reference=""), 'reasoning = "english" needs answers with a final answer'),
        (Example(Prompt(()), "A story.", (), "row 1"), 'reasoning = "english" is for questions'),
        (Example(Prompt((Message("system", "x"),)), "", (), "row 1"), 'reasoning = "english" is for questions'),
    ],
)
def test_rows_that_cannot_be_asked(row: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_reasoning(row, section())


def test_more_examples_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"few_shot = 5: there are 4 built-in worked examples in chinese"):
        with_reasoning(example(), section("chinese", few_shot=5))


# ------------------------------------------------------------------------------------------------------ from a source


def rows_in(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_source_that_reasons(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "sums.jsonl", {"question": "How many?", "answer": WORKED})
    shots = rows_in(tmp_path / "shots.jsonl", *({"question": f"{n}?", "answer": f"So.\n#### {n}"} for n in range(3)))
    source = section(path=[path], few_shot=2, few_shot_file=shots)
    (asked,) = open_source(source, DemoDataSection(), 1)
    instruction, first, second, question = asked.prompt.messages[0].content.split("\n\n")
    assert instruction == WORDINGS["english"].instruction
    assert first == "Question: 0?\nAnswer:\nSo.\nFinal answer: 0"
    assert second == "Question: 1?\nAnswer:\nSo.\nFinal answer: 1"
    assert question == "Question: How many?"
    assert (asked.demonstration, asked.reference) == (f"{STEPS}\nFinal answer: 72", "72")


def test_rows_without_a_final_answer_are_bad_rows(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": WORKED}, {"question": "Why?", "answer": "Because."}]
    source = section(path=[rows_in(tmp_path / "sums.jsonl", *rows)])
    with pytest.raises(DataError, match=r'sums\.jsonl row 2: reasoning = "english" needs answers with a final answer'):
        list(open_source(source, DemoDataSection(), 1))
    reading = open_source(source, DemoDataSection(), 1, "drop")
    assert len(list(reading)) == 1
    assert reading.dropped == {"without a question or a final answer": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "row 1: a worked example needs the texts `question` and `answer`"),
        ([{"question": "a", "answer": "b"}], "row 1: its answer states no final answer"),
        ([{"question": "a", "answer": "#### 1"}], "has 1 worked examples, and few_shot = 2"),
    ],
)
def test_worked_examples_that_cannot_be_used(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=rf"^shots\.jsonl:? ?{message}"):
        read_worked_examples(section(few_shot=2, few_shot_file="shots.jsonl"), rows)


@pytest.mark.real
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_every_answer_of_gsm8k(shared: Path, name: str, count: int) -> None:
    """The reference is what follows ####; found in the rewritten answer too, and equal to it as a number."""
    rows = [json.loads(line) for line in (shared / f"data/gsm8k/{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == count
    for row in rows:
        reference = row["answer"].split("####")[1].strip()
        assert final_answer(row["answer"]) == reference
        for language in LANGUAGES:
            asked = with_reasoning(example(row["answer"], reference=reference), section(language))
            assert final_answer(asked.demonstration) == reference
            assert "<<" not in asked.demonstration
            assert "####" not in asked.demonstration
        assert same_answer(reference, reference.replace(",", "") + ".0")
        assert not same_answer(reference, str(int(reference.replace(",", "")) + 1))
