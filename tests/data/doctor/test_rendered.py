"""Faults of templates and tokenizers, each planted in a real tokenizer, and found in what it renders."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.data.doctor.planting import Words
from tests.data.formats_under_test import byte_level_tokenizer, word_piece_tokenizer
from threefold.config.data import DataSection
from threefold.config.recipe import Recipe, SFTSection
from threefold.data.chat import BUILT_IN_TEMPLATES, ChatFormat, build_chat_format
from threefold.data.doctor.findings import Finding
from threefold.data.doctor.rendered import RenderedChecks, template_findings
from threefold.data.doctor.rows import Row
from threefold.data.doctor.samples import runs, samples_of, token_texts
from threefold.data.split import STEPS, Step
from threefold.types import Example, Message, Prompt

DIALOGUE = BUILT_IN_TEMPLATES["dialogue"]
RECIPE = Recipe(data=DataSection(max_length=2000, max_prompt_length=2000))


def example(prompt: str = "Which?", answer: str = "This one.", number: int = 1) -> Example:
    return Example(Prompt((Message("user", prompt),)), answer, (answer, "Not this."), f"rows.jsonl row {number}")


def clean(count: int = 20) -> list[Example]:
    words = Words(5)
    return [example(words.sentence(end="?"), words.sentence(), number) for number in range(1, count + 1)]


def chat_of(template: str, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> ChatFormat:
    """A chat format with a jinja template given as text; BOS is <s>, and a story ends with </s>."""
    path = directory / "template.jinja"
    path.write_text(template)
    tokenizer = tokenizer or byte_level_tokenizer(eos_token="</s>", bos_token="<s>")
    return build_chat_format(tokenizer, str(path))


def findings_of(
    examples: list[Example], chat: ChatFormat, step: Step = "sft", recipe: Recipe = RECIPE
) -> dict[str, Finding]:
    checks = RenderedChecks(step, chat, recipe)
    for one in examples:
        checks.see(Row(one, 0, 2 * STEPS.index(step)))
    return {finding.check: finding for finding in (*checks.findings(), *template_findings(chat, "of step 1"))}


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_found_where_all_is_well(tmp_path: Path, step: Step) -> None:
    assert findings_of(clean(), chat_of(DIALOGUE, tmp_path), step) == {}


def test_double_bos(tmp_path: Path) -> None:
    found = findings_of(clean(), chat_of("{{ bos_token }}" + DIALOGUE, tmp_path))
    assert found.keys() == {"double_bos"}
    assert found["double_bos"].severity == "error"
    assert "'<s>'" in found["double_bos"].message


def test_missing_bos_where_the_tokenizer_itself_adds_it(tmp_path: Path) -> None:
    template = DIALOGUE.replace("{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}", "")
    assert findings_of(clean(), chat_of(template, tmp_path)) == {}, "it adds none"
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="<s>")
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    chat = chat_of(template, tmp_path, tokenizer)
    assert chat.tokenizer.encode("a")[0] == chat.tokenizer.bos_token_id
    assert findings_of(clean(), chat).keys() == {"missing_bos"}
    assert findings_of(clean(), chat, "ppo").keys() == {"missing_bos"}


def test_double_eos(tmp_path: Path) -> None:
    found = findings_of(clean(), chat_of(DIALOGUE.replace("{{ eos_token }}", "{{ eos_token + eos_token }}"), tmp_path))
    assert found.keys() == {"double_eos"}
    assert found["double_eos"].severity == "error"


def test_a_template_that_leaves_the_system_message_out(tmp_path: Path) -> None:
    template = DIALOGUE.replace("{% else %}{{ '\\n\\nSystem: ' + message['content'] }}", "")
    assert template != DIALOGUE
    system = Message("system", "Be brief.")
    rows = [Example(Prompt((system, *one.prompt.messages)), one.demonstration, (), one.origin) for one in clean()]
    found = findings_of(rows, chat_of(template, tmp_path))
    assert found.keys() == {"round_trip"}
    assert "'Bebrief.'" in found["round_trip"].message
    assert findings_of(rows, chat_of(DIALOGUE, tmp_path)) == {}


def test_a_template_that_refuses_rows(tmp_path: Path) -> None:
    refusing = (
        "{% for m in messages if 'forbidden' in m['content'] %}{{ raise_exception('no!') }}{% endfor %}" + DIALOGUE
    )
    rows = [*clean(), example("A forbidden thing", number=21)]
    for step in STEPS:
        found = findings_of(rows, chat_of(refusing, tmp_path), step)
        assert found.keys() == {"template_refuses"}
        assert (found["template_refuses"].count, found["template_refuses"].origin) == (1, "rows.jsonl row 21")
        assert "no!" in found["template_refuses"].message


def test_unknown_characters(tmp_path: Path) -> None:
    chat = chat_of(DIALOGUE, tmp_path, word_piece_tokenizer())
    found = findings_of([*clean(5), *(example("What is ÿ?", number=n) for n in range(6, 10))], chat)
    assert "unknown_tokens" in found
    assert found["unknown_tokens"].severity == "warning"


def test_spelled_control_tokens_of_this_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<<turn>>"]})
    rows = [*clean(), *(example(f"What does <<turn>> mean, {n}?", number=n) for n in range(21, 25))]
    found = findings_of(rows, chat_of(DIALOGUE, tmp_path, tokenizer))
    assert found.keys() == {"own_control_tokens"}
    assert (found["own_control_tokens"].count, found["own_control_tokens"].origin) == (4, "rows.jsonl row 21")


def test_an_answer_of_nothing_but_its_stop_token(tmp_path: Path) -> None:
    template = DIALOGUE.replace(
        "'\\n\\nAssistant: ' + message['content']", "'\\n\\nAssistant:' + message['content'] | trim"
    )
    assert template != DIALOGUE
    rows = [*clean(), Example(Prompt((Message("user", "Which?"),)), " ", (), "rows.jsonl row 21")]
    found = findings_of(rows, chat_of(template, tmp_path))
    assert found.keys() == {"nothing_trained"}
    assert (found["nothing_trained"].count, found["nothing_trained"].origin) == (1, "rows.jsonl row 21")


def test_answers_that_become_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = word_piece_tokenizer()
    pair = Example(Prompt((Message("user", "Which?"),)), "this  one", ("this  one", "this one"), "rows.jsonl row 1")
    found = findings_of([pair], chat_of(DIALOGUE, tmp_path, tokenizer), "reward")
    assert "equal_after_rendering" in found
    assert findings_of([pair], chat_of(DIALOGUE, tmp_path), "reward") == {}


@pytest.mark.parametrize(("policy", "severity"), [("error", "error"), ("drop", "warning"), ("truncate", "warning")])
def test_too_long_rows(tmp_path: Path, policy: str, severity: str) -> None:
    recipe = Recipe(data=DataSection(max_length=60, max_prompt_length=30, long_rows=policy))  # type: ignore[arg-type]
    rows = [
        *(example(number=n) for n in range(1, 11)),
        *(example(Words(1).sentence(60, 60), number=n) for n in (11, 12)),
    ]
    chat = chat_of(DIALOGUE, tmp_path)
    for step in ("sft", "reward"):
        found = findings_of(rows, chat, step, recipe)  # type: ignore[arg-type]
        if step == "reward" and policy == "truncate":
            continue
        assert found.keys() == {"too_long"}
        assert (found["too_long"].severity, found["too_long"].count) == (severity, 2)
        assert found["too_long"].origin == "rows.jsonl row 11"


def test_rows_that_are_shortened_are_looked_at_as_they_are_trained_on(tmp_path: Path) -> None:
    chat = chat_of(DIALOGUE, tmp_path)
    long = Words(1).sentence(30, 30)
    turns = (Message("user", long), Message("assistant", long), Message("user", "And?"))
    row = Example(Prompt(turns), "So.", (), "rows.jsonl row 1")
    recipe = Recipe(data=DataSection(max_length=60, long_rows="truncate"))
    checks = RenderedChecks("sft", chat, recipe)
    checks.see(Row(row, 0, 0))
    assert checks.short.count == 1
    assert checks.num_tokens == len(chat.demonstration((turns[2], Message("assistant", "So."))))


def test_few_trained_tokens(tmp_path: Path) -> None:
    rows = [example(Words(n).sentence(800, 800), "a", n) for n in range(1, 3)]
    recipe = Recipe(data=DataSection(max_length=20_000))
    assert findings_of(rows, chat_of(DIALOGUE, tmp_path), "sft", recipe).keys() == {"few_trained"}
    everything = Recipe(data=DataSection(max_length=20_000), sft=SFTSection(loss_on="all"))
    assert findings_of(rows, chat_of(DIALOGUE, tmp_path), "sft", everything) == {}


@pytest.mark.parametrize(
    "text", ["A plain answer.", "这只小狗叫小白。", "naïve café 🎉👩‍👩‍👧 — so", "two\n\nlines\tand  blanks"]
)
@pytest.mark.parametrize("make", [byte_level_tokenizer, word_piece_tokenizer])
def test_the_texts_of_tokens_make_the_whole_text(tmp_path: Path, text: str, make: type) -> None:
    tokenizer = make()
    chat = build_chat_format(tokenizer, "tags" if make is byte_level_tokenizer else "dialogue")
    ids = tokenizer.encode(text * 4, add_special_tokens=False)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(token_texts(chat, ids)).split() == whole.split()


def test_a_sample_shows_what_is_trained(tmp_path: Path) -> None:
    chat = chat_of(DIALOGUE, tmp_path)
    (sample,) = samples_of(Row(example(), 0, 0), "sft", chat, RECIPE)
    kinds = {piece.kind: piece.text for piece in runs(sample.pieces)}
    assert kinds["trained"] == " This one."
    assert kinds["stop"] == "</s>"
    assert kinds["control"] == "<s>"
    assert kinds["context"] == "\n\nHuman: Which?\n\nAssistant:"
    short = Recipe(data=DataSection(max_length=10))
    (sample,) = samples_of(Row(example(), 0, 0), "sft", chat, short)
    assert sum(piece.kind == "cut" for piece in sample.pieces) == sample.num_tokens - 10
    assert [one.title for one in samples_of(Row(example(), 0, 2), "reward", chat, RECIPE)] == [
        "better answer", "worse answer",
    ]  # fmt: skip
    (prompt,) = samples_of(Row(example(), 0, 4), "ppo", chat, RECIPE)
    assert (prompt.title, prompt.num_trained) == ("prompt", 0)
