"""The renderer: one text and one sequence of ids, whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.data.formats_under_test import (
    CHATML,
    SPECIAL_TOKENS,
    THINKING,
    byte_level_tokenizer,
    unigram_tokenizer,
    word_piece_tokenizer,
)
from threefold.data.chat import ChatFormat, build_chat_format, ensure_pad_token
from threefold.errors import CheckpointError, ConfigError, DataError
from threefold.types import Message, Prompt

TEMPLATES = ["dialogue", "tags", "chatml", "thinking"]
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
HOSTILE = st.lists(
    st.one_of(WORDS, st.sampled_from([*SPECIAL_TOKENS, "\n\nHuman:", "\ue000", "\ue0000\ue001"])), max_size=4
).map("".join)
BENIGN = st.lists(st.sampled_from(["what", "is", "an", "answer?", "Ends.", "né"]), min_size=1, max_size=6).map(" ".join)


@cache
def chat_format_of(name: str) -> ChatFormat:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>" if name in ("chatml", "thinking") else "<|end|>")
    own = {"chatml": CHATML, "thinking": THINKING}.get(name)
    tokenizer.chat_template = own
    return build_chat_format(tokenizer, "tokenizer" if own else name)


def conversation(contents: Sequence[str]) -> tuple[Message, ...]:
    """Turns of user and assistant in alternation."""
    return tuple(Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents))


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def plain_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generate: bool) -> tuple[int, ...]:
    """What plain transformers makes of a conversation."""
    text = tokenizer.apply_chat_template(as_dicts(messages), tokenize=False, add_generation_prompt=generate)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


odd_conversations = st.integers(0, 2).flatmap(lambda n: st.lists(HOSTILE, min_size=2 * n + 1, max_size=2 * n + 1))


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=odd_conversations, answer=HOSTILE, loss_on=st.sampled_from(["assistant", "all"]))
@settings(max_examples=60, deadline=None)
def test_prompt_and_answer_make_the_demonstration(name: str, contents: list[str], answer: str, loss_on) -> None:
    chat_format = chat_format_of(name)
    messages = conversation(contents)
    prompt, response = chat_format.prompt_ids(messages), chat_format.answer_ids(messages, answer)
    sequence = chat_format.demonstration((*messages, Message("assistant", answer)), loss_on)
    assert sequence.ids == prompt + response
    assert sequence.prompt_length == len(prompt)
    assert len(sequence.trained) == len(sequence.ids)
    assert all(sequence.trained) if loss_on == "all" else all(sequence.trained[len(prompt) :])
    assert response[-1] in chat_format.stop_ids
    assert chat_format.unfinished_answer_ids(messages, answer) == response[:-1]
    (compared,) = chat_format.comparison(Prompt(messages), [answer])
    assert compared.ids == sequence.ids
    assert compared.trained == (False,) * len(prompt) + (True,) * len(response)


@pytest.mark.parametrize("name", ["dialogue", "tags", "chatml"])
@given(contents=st.lists(HOSTILE, min_size=4, max_size=4), last=HOSTILE)
@settings(max_examples=40, deadline=None)
def test_earlier_answers_are_trained_as_they_are_sampled(name: str, contents: list[str], last: str) -> None:
    chat_format = chat_format_of(name)
    messages = conversation([*contents, last, "fine"])
    sequence = chat_format.demonstration(messages)
    expected = [False] * len(sequence.ids)
    for index in (1, 3, 5):
        prompt = chat_format.prompt_ids(messages[:index])
        answer = chat_format.answer_ids(messages[:index], messages[index].content)
        assert sequence.ids[: len(prompt) + len(answer)] == prompt + answer
        expected[len(prompt) : len(prompt) + len(answer)] = [True] * len(answer)
    assert list(sequence.trained) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=odd_conversations, answer=HOSTILE)
@settings(max_examples=80, deadline=None)
def test_text_never_becomes_a_control_token(name: str, contents: list[str], answer: str) -> None:
    chat_format = chat_format_of(name)
    control = set(chat_format.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))

    def controls(messages: Sequence[Message]) -> list[int]:
        return [token_id for token_id in chat_format.demonstration(messages).ids if token_id in control]

    benign = conversation(["word"] * (len(contents) + 1))
    assert controls(conversation([*contents, answer])) == controls(benign)


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(BENIGN, min_size=3, max_size=3), answer=BENIGN)
@settings(max_examples=30, deadline=None)
def test_ordinary_text_gets_the_ids_of_plain_transformers(name: str, contents: list[str], answer: str) -> None:
    chat_format = chat_format_of(name)
    messages = conversation(contents)
    assert chat_format.prompt_ids(messages) == plain_ids(chat_format.tokenizer, messages, True)
    whole = (*messages, Message("assistant", answer))
    ids = chat_format.demonstration(whole).ids
    plain = plain_ids(chat_format.tokenizer, whole, False)
    assert plain[: len(ids)] == ids
    assert len(plain) - len(ids) <= 1  # the newline that ChatML writes after the last stop token


@pytest.mark.parametrize("name", ["dialogue", "tags", "chatml"])
@given(answer=HOSTILE)
@settings(max_examples=60, deadline=None)
def test_decode_gives_the_answer_back(name: str, answer: str) -> None:
    chat_format = chat_format_of(name)
    messages = conversation(["What?"])
    ids = chat_format.answer_ids(messages, answer)
    assert chat_format.decode(ids) == answer.strip()
    assert chat_format.decode(ids[:-1]) == answer.strip()


def test_a_control_token_that_is_an_ordinary_piece_too() -> None:
    tokenizer = unigram_tokenizer()
    assert 2 in tokenizer.encode("a </s> b", add_special_tokens=False, split_special_tokens=True)
    chat_format = build_chat_format(tokenizer, "dialogue")
    ids = chat_format.answer_ids(conversation(["What?"]), "a </s> b")
    assert [position for position, token_id in enumerate(ids) if token_id == 2] == [len(ids) - 1]
    assert chat_format.decode(ids) == "a </s> b"


def test_one_token_for_bos_eos_and_unknown() -> None:
    """GPT-2's way: its unknown token never occurs in text, and is a control token all the same."""
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="</s>")
    tokenizer.unk_token = "</s>"
    chat_format = build_chat_format(tokenizer, "dialogue")
    stop = tokenizer.eos_token_id
    ids = chat_format.demonstration(conversation(["</s>", "a </s>"])).ids
    assert [position for position, token_id in enumerate(ids) if token_id == stop] == [0, len(ids) - 1]


def test_a_control_token_of_one_character() -> None:
    """Several bytes can spell it without being it; a vocabulary that has only the one piece for it cannot."""
    tokenizer = byte_level_tokenizer(eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["␜"]})
    chat_format = build_chat_format(tokenizer, "dialogue")
    assert chat_format.decode(chat_format.answer_ids(conversation(["What?"]), "a␜b")) == "a␜b"
    tokenizer = unigram_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["#"]})
    with pytest.raises(DataError, match="the character '#' is a control token of the tokenizer"):
        build_chat_format(tokenizer, "dialogue").prompt_ids(conversation(["a#b"]))


def test_rendered_text_by_hand() -> None:
    messages = [Message("system", "Be kind."), *conversation(["Hi", "Hello", "Bye"])]
    dialogue = chat_format_of("dialogue")
    text = dialogue.tokenizer.decode(dialogue.prompt_ids(messages))
    assert text == "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello<|end|>\n\nHuman: Bye\n\nAssistant:"
    assert dialogue.tokenizer.decode(dialogue.answer_ids(messages, "See you")) == " See you<|end|>"
    tags = chat_format_of("tags")
    text = tags.tokenizer.decode(tags.prompt_ids(messages))
    assert text == "<|system|>Be kind.<|user|>Hi<|assistant|>Hello<|end|><|user|>Bye<|assistant|>"
    assert tags.tokenizer.decode(tags.answer_ids(messages, "See you")) == "See you<|end|>"
    with_bos = build_chat_format(byte_level_tokenizer(eos_token="</s>", bos_token="<s>"), "dialogue")
    assert with_bos.tokenizer.decode(with_bos.prompt_ids(messages[1:2])) == "<s>\n\nHuman: Hi\n\nAssistant:"


def test_a_thought_before_the_last_answer_only_is_rendered_and_trained() -> None:
    thinking = chat_format_of("thinking")
    sequence = thinking.demonstration(conversation(["a", "b", "c", "d"]))
    text = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert thinking.tokenizer.decode(sequence.ids[: sequence.prompt_length]) == text
    assert thinking.tokenizer.decode(sequence.ids[sequence.prompt_length :]) == "<think>\n\n</think>\n\nd<|im_end|>"
    trained = [token_id for token_id, flag in zip(sequence.ids, sequence.trained, strict=True) if flag]
    assert thinking.tokenizer.decode(trained) == "b<|im_end|><think>\n\n</think>\n\nd<|im_end|>"


def test_stop_ids_are_the_union_of_checkpoint_tokenizer_and_template() -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>")
    tokenizer.chat_template = CHATML
    chat_format = build_chat_format(tokenizer, "tokenizer", [tokenizer.convert_tokens_to_ids("<s>")])
    assert sorted(tokenizer.convert_ids_to_tokens(list(chat_format.stop_ids))) == ["</s>", "<s>", "<|im_end|>"]
    assert chat_format.pad_id == tokenizer.convert_tokens_to_ids("<|pad|>")


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    for name in ("dialogue", "tags"):
        chat_format = chat_format_of(name)
        chat_format.tokenizer.save_pretrained(tmp_path / name)
        reloaded = AutoTokenizer.from_pretrained(tmp_path / name)
        messages = conversation(["Hi", "Hello", "Bye"])
        assert plain_ids(reloaded, messages, True) == chat_format.prompt_ids(messages)
        assert build_chat_format(reloaded, "tokenizer").stop_ids == chat_format.stop_ids


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    chat_format = build_chat_format(byte_level_tokenizer(), str(path))
    assert chat_format.tokenizer.chat_template == CHATML
    with pytest.raises(
        ConfigError, match=r"model\.chat_template '.*other\.jinja' is no file and none of tokenizer, dialogue"
    ):
        build_chat_format(byte_level_tokenizer(), str(tmp_path / "other.jinja"))


def test_trimming_templates_keep_the_invariants() -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.replace("message['content'] +", "message['content'] | trim +")
    chat_format = build_chat_format(tokenizer, "tokenizer")
    messages = conversation(["  spaced  "])
    assert chat_format.prompt_ids(messages) == chat_format.prompt_ids(conversation(["spaced"]))
    assert chat_format.prompt_ids(conversation([" </s> "])) == chat_format.prompt_ids(conversation(["</s>"]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", "never end with a stop token"),
        ("{% if true %}", "unexpected|Unexpected"),
        ("{{ raise_exception('no chat here') }}", "no chat here"),
        ("{{ messages[0]['content'] }}</s>", "a prompt is not the beginning of its answer"),
        (
            "{% for m in messages %}{{ loop.revindex0 }}{{ m['content'] }}{% endfor %}<|end|>",
            "a prompt is not the beginning of its answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if messages[-1]['role'] == 'assistant' %}<|end|>{% endif %}",
            "no stop token after one of the answers",
        ),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_with(template: str, message: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message) as caught:
        build_chat_format(tokenizer, "tokenizer")
    assert "model.chat_template" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "<|user|>{{ m['content'] if loop.index0 >= messages|length - 2 else '' }}<|assistant|>"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="re-writes earlier turns"):
        build_chat_format(tokenizer, "tokenizer")


def test_a_conversation_that_the_template_refuses_is_a_data_error() -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    )
    chat_format = build_chat_format(tokenizer, "tokenizer")
    with pytest.raises(DataError, match="the chat template refuses the conversation: no system turn"):
        chat_format.prompt_ids([Message("system", "Be kind."), Message("user", "Hi")])


def test_a_tokenizer_without_template_names_the_fix() -> None:
    with pytest.raises(
        CheckpointError, match=r"^some/dir: its tokenizer has no chat template.*--model\.chat_template dialogue"
    ):
        build_chat_format(byte_level_tokenizer(), "tokenizer", source="some/dir")


def test_a_stop_tag_that_the_tokenizer_does_not_know_is_refused() -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|stop|>{% endfor %}"
    with pytest.raises(ConfigError, match="never end with a stop token"):
        build_chat_format(tokenizer, "tokenizer")


# ------------------------------------------------------------------------------------------------------------- batches

ONE_OF_A_KIND = st.lists(odd_conversations, min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    contents=ONE_OF_A_KIND,
    answers=st.lists(HOSTILE, min_size=1, max_size=3),
    loss_on=st.sampled_from(["assistant", "all"]),
)
@settings(max_examples=40, deadline=None)
def test_many_at_once_are_as_one_by_one(name: str, contents: list[list[str]], answers: list[str], loss_on) -> None:
    chat_format = chat_format_of(name)
    prompts = [conversation(each) for each in contents]
    whole = [(*messages, Message("assistant", answers[0])) for messages in prompts]
    assert chat_format.prompts(prompts) == [chat_format.prompt_ids(messages) for messages in prompts]
    assert chat_format.demonstrations(whole, loss_on) == [chat_format.demonstration(each, loss_on) for each in whole]
    some = [answers[: 1 + index % len(answers)] for index in range(len(prompts))]
    compared = chat_format.comparisons([Prompt(messages) for messages in prompts], some)
    assert compared == [chat_format.comparison(Prompt(each), own) for each, own in zip(prompts, some, strict=True)]


def test_what_is_wrong_with_one_is_said_of_that_one() -> None:
    tokenizer = unigram_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["#"]})
    chat_format = build_chat_format(tokenizer, "dialogue")
    prompts = [conversation(["one"]), conversation(["a#b"]), conversation(["three"])]
    whole = [(*prompt, Message("assistant", "fine")) for prompt in prompts]
    for found in (
        chat_format.prompts(prompts),
        chat_format.demonstrations(whole),
        chat_format.comparisons([Prompt(prompt) for prompt in prompts], [["yes", "no"]] * 3),
    ):
        assert [isinstance(each, DataError) for each in found] == [False, True, False]
    found = chat_format.comparisons([Prompt(prompts[0])] * 3, [["yes", "no"], ["yes", "#"], ["no"]])
    assert [isinstance(each, DataError) for each in found] == [False, True, False]
    assert [isinstance(each, DataError) for each in chat_format.text(["one", "#", "two"], 9)] == [False, True, False]
    assert (chat_format.prompts([]), chat_format.demonstrations([]), chat_format.text([], 9)) == ([], [], [])


# ---------------------------------------------------------------------------------------------------------- plain text


@given(documents=st.lists(HOSTILE.filter(bool), min_size=1, max_size=4), max_length=st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_every_token_of_a_text_is_trained_once(documents: list[str], max_length: int) -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="<s>")
    chat_format = build_chat_format(tokenizer, "dialogue")
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for document, pieces in zip(documents, chat_format.text(documents, max_length), strict=True):
        assert isinstance(pieces, list)
        joined = [*pieces[0].ids, *(token_id for piece in pieces[1:] for token_id in piece.ids[1:])]
        assert (joined[0], joined[-1]) == marks
        assert tokenizer.decode(joined[1:-1]) == document
        assert not set(joined[1:-1]) & set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
        assert all(pieces[0].trained)
        for before, piece in pairwise(pieces):
            assert piece.ids[0] == before.ids[-1]
            assert piece.trained == (False,) + (True,) * (len(piece) - 1)
        assert all(len(piece) == max_length for piece in pieces[:-1])
        assert 2 <= len(pieces[-1]) <= max_length


def test_a_text_by_hand() -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>")
    chat_format = build_chat_format(tokenizer, "dialogue")
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "XYZ!")
    ((first, second), (third,)) = chat_format.text(["XYZ!", "XY"], 3)
    assert (first.ids, second.ids, third.ids) == ((a, b, c), (c, d, 2), (a, b, 2))
    assert (first.trained, second.trained, third.trained) == ((True,) * 3, (False, True, True), (True,) * 3)
    with pytest.raises(ConfigError, match=r"data\.max_length = 1 "):
        chat_format.text(["XYZ!"], 1)


def test_a_tokenizer_that_writes_the_words_of_the_probe_otherwise() -> None:
    """It knows no capitals, no spaces and few letters; the template can be trained with all the same."""
    assert build_chat_format(word_piece_tokenizer(), "dialogue").stop_ids == {3}


# --------------------------------------------------------------------------------------------------------------- pad


def test_pad_token_of_its_own_is_kept() -> None:
    tokenizer = byte_level_tokenizer()
    assert ensure_pad_token(tokenizer, "", "dialogue") is False
    assert tokenizer.pad_token == "<|pad|>"


@pytest.mark.parametrize("pad_token", [None, "</s>"])
def test_missing_or_stopping_pad_token(pad_token: str | None) -> None:
    def fresh() -> PreTrainedTokenizerBase:
        tokenizer = byte_level_tokenizer(eos_token="</s>")
        tokenizer.pad_token = pad_token
        return tokenizer

    for build in (
        lambda: ensure_pad_token(fresh(), "", "dialogue", "some/dir"),
        lambda: build_chat_format(fresh(), "dialogue", source="some/dir"),
    ):
        with pytest.raises(
            CheckpointError, match=r"^some/dir: .* set model\.pad_token, for example --model\.pad_token '<\|pad\|>'"
        ):
            build()
    tokenizer = fresh()
    size = len(tokenizer)
    assert ensure_pad_token(tokenizer, "<|filler|>", "dialogue") is True
    assert len(tokenizer) == size + 1
    assert build_chat_format(tokenizer, "dialogue").pad_id == size
    tokenizer = fresh()
    assert ensure_pad_token(tokenizer, "<|pad|>", "dialogue") is False
    assert len(tokenizer) == size
    with pytest.raises(CheckpointError, match="the token that ends an answer"):
        ensure_pad_token(fresh(), "</s>", "dialogue")
    with pytest.raises(ConfigError, match=r"model\.pad_token '!' is an ordinary token"):
        ensure_pad_token(fresh(), "!", "dialogue")


def test_pad_that_is_only_listed_among_the_stops_is_fine() -> None:
    tokenizer = byte_level_tokenizer()
    pad_id = tokenizer.pad_token_id
    chat_format = build_chat_format(tokenizer, "dialogue", [pad_id])
    assert pad_id in chat_format.stop_ids
    assert chat_format.pad_id == pad_id


# ------------------------------------------------------------------------------------------------------ real models


@pytest.mark.real
@pytest.mark.parametrize("model", ["stories260K", "babyllama-char-1M"])
def test_real_tokenizers(shared: Path, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    with pytest.raises(CheckpointError, match="no chat template"):
        build_chat_format(tokenizer, "tokenizer", [1, 2], model)
    assert ensure_pad_token(tokenizer, "", "dialogue", model) is False
    chat_format = build_chat_format(tokenizer, "dialogue", [1, 2], model)
    assert chat_format.stop_ids == {1, 2}
    assert chat_format.pad_id == tokenizer.unk_token_id == 0
    messages = conversation(["Who is Lily?", "A girl.", "And Tim?"])
    answer = "Tim is her friend. They play </s> together!"
    ids = chat_format.answer_ids(messages, answer)
    assert ids[-1] == 2
    assert not {1, 2} & set(ids[:-1])
    assert chat_format.decode(ids) == answer
    assert chat_format.prompt_ids(messages)[0] == tokenizer.bos_token_id
    sequence = chat_format.demonstration((*messages, Message("assistant", answer)))
    assert sequence.ids == chat_format.prompt_ids(messages) + ids
    earlier = chat_format.prompt_ids(messages[:1]) + chat_format.answer_ids(messages[:1], "A girl.")
    assert sequence.ids[: len(earlier)] == earlier


@pytest.mark.real
def test_an_unknown_character_is_a_target_like_any_other(shared: Path) -> None:
    """babyllama-char knows no newline: its unk has the pad's id, and is a real token all the same."""
    chat_format = build_chat_format(AutoTokenizer.from_pretrained(shared / "models" / "babyllama-char-1M"), "dialogue")
    sequence = chat_format.demonstration(conversation(["Hi", "one\ntwo"]))
    answer = sequence.ids[sequence.prompt_length :]
    assert answer.count(chat_format.pad_id) == 1
    assert sequence.trained == (False,) * sequence.prompt_length + (True,) * len(answer)
