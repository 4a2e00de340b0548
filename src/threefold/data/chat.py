"""The one place that turns conversations into tokens.

A conversation is rendered by a chat template (jinja, the same that plain transformers applies) and cut at its
generation prompts: the text up to the first one, then from each to the next, then the rest. The pieces are encoded
separately, so the boundary between prompt and answer is exact, and training, scoring, sampling and chatting see the
same ids.

What a user or an assistant wrote is data. If it spells a control token ("</s>", "<|end|>"), that content is encoded
as plain text, so that it can neither end a turn nor open one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from threefold.errors import CheckpointError, ConfigError, DataError
from threefold.types import Message, Prompt, TokenSequence

BUILT_IN_TEMPLATES: dict[str, str] = {
    "dialogue": (
        "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}{{ eos_token }}"
        "{% else %}{{ '\\n\\nSystem: ' + message['content'] }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
    "tags": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
}
"""Jinja sources of the templates that `model.chat_template` can name."""

PROBE = (
    Message("user", "Which word?"),
    Message("assistant", "Probeword"),
    Message("user", "And now?"),
    Message("assistant", "Probeword"),
)


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its chat template: renders conversations to ids, and ids back to an answer's text.

    Attributes:
        tokenizer: carries the template in `tokenizer.chat_template`, so that saving it saves the template.
        stop_ids: tokens that end an answer; sampling stops at any of them.
        pad_id: fills batches; it may be a real token too, so masks never come from it.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    pad_id: int

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to the place where the assistant's answer begins."""
        pieces = self._pieces(messages, answered=False)
        return tuple(token_id for piece in pieces for token_id in piece)

    def answer_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """Ids that follow `prompt_ids(messages)` when the assistant says `answer`; the last one is its stop token."""
        piece = self._pieces((*messages, Message("assistant", answer)), answered=True)[-1]
        return tuple(piece[: self._answer_length(piece)])

    def unfinished_answer_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """`answer_ids` without the stop token: an answer that was cut off."""
        return self.answer_ids(messages, answer)[:-1]

    def demonstration(
        self, messages: Sequence[Message], loss_on: Literal["assistant", "all"] = "assistant"
    ) -> TokenSequence:
        """A whole conversation that ends with an assistant's turn, and which of its tokens are trained.

        Args:
            messages: the last one is the assistant's.
            loss_on: "assistant" trains each assistant turn, stop token included; "all" trains every token.
                What the template writes after a stop token is context, and is left out after the last one.
        """
        ids: list[int] = []
        trained: list[bool] = []
        prompt_length = 0
        opening, *answered = self._pieces(messages, answered=True)
        ids += opening
        trained += [False] * len(opening)
        for number, piece in enumerate(answered, start=1):
            answer_length = self._answer_length(piece)
            if number == len(answered):
                prompt_length = len(ids)
                piece = piece[:answer_length]
            ids += piece
            trained += [True] * answer_length + [False] * (len(piece) - answer_length)
        if loss_on == "all":
            trained = [True] * len(ids)
        return TokenSequence(ids=tuple(ids), trained=tuple(trained), prompt_length=prompt_length)

    def comparison(self, prompt: Prompt, answers: Sequence[str]) -> tuple[TokenSequence, ...]:
        """The prompt with each of the answers, in their order; the answer's tokens are the trained ones."""
        prompt_ids = self.prompt_ids(prompt.messages)
        sequences = []
        for answer in answers:
            answer_ids = self.answer_ids(prompt.messages, answer)
            trained = (False,) * len(prompt_ids) + (True,) * len(answer_ids)
            sequences.append(TokenSequence(prompt_ids + answer_ids, trained, prompt_length=len(prompt_ids)))
        return tuple(sequences)

    def decode(self, response_ids: Sequence[int]) -> str:
        """Text of an answer, without stop tokens, other special tokens and surrounding whitespace."""
        shown = [token_id for token_id in map(int, response_ids) if token_id not in self.stop_ids]
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def decode_exactly(self, response_ids: Sequence[int]) -> str:
        """Text of an answer with every token but a final stop token shown, control tokens too: what a judge must
        see."""
        ids = [int(token_id) for token_id in response_ids]
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).strip()

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return _control_ids(self.tokenizer)

    def _answer_length(self, piece: Sequence[int]) -> int:
        """Tokens of the answer that a piece begins with, its stop token included."""
        for position, token_id in enumerate(piece):
            if token_id in self.stop_ids and token_id in self._control_ids:
                return position + 1
        raise ConfigError(
            "model.chat_template: the template writes no stop token after one of the answers of this conversation; "
            "use another template, for example --model.chat_template dialogue"
        )

    def _pieces(self, messages: Sequence[Message], answered: bool) -> list[list[int]]:
        """Ids of the text up to the first generation prompt, then of each stretch to the next one, then of the rest.

        Each stretch after the first begins with an answer. With `answered` the conversation ends with one, else with
        a generation prompt.
        """
        plain, placeholder = _hide_control_text(self.tokenizer, self._control_ids, messages)
        answer_positions = [i for i, message in enumerate(plain) if message.role == "assistant" and i > 0]
        texts = [_render(self.tokenizer, plain[:i], True) for i in answer_positions]
        texts.append(_render(self.tokenizer, plain, not answered))
        pieces = []
        before = ""
        for text in texts:
            if not text.startswith(before):
                raise ConfigError(
                    "model.chat_template: the template re-writes earlier turns when the conversation goes on, so a "
                    "prompt is not the beginning of its answer; use another, for example --model.chat_template dialogue"
                )
            pieces.append(self._encode(text[len(before) :], placeholder, messages))
            before = text
        return pieces

    def _encode(self, text: str, placeholder: re.Pattern[str], messages: Sequence[Message]) -> list[int]:
        """Encodes rendered text: the template's control tokens count, those in the place of a placeholder do not."""
        ids: list[int] = []
        for index, part in enumerate(placeholder.split(text)):
            if index % 2:
                ids += _encode_as_plain_text(self.tokenizer, self._control_ids, messages[int(part)].content.strip())
            elif part:
                ids += self.tokenizer.encode(part, add_special_tokens=False, verbose=False)
        return ids


def build_chat_format(
    tokenizer: PreTrainedTokenizerBase, template: str, generation_stop_ids: Collection[int] = (), source: str = ""
) -> ChatFormat:
    """Sets the template on the tokenizer and checks that it can be trained with.

    Args:
        tokenizer: gets the template, and must have a pad token (see `ensure_pad_token`).
        template: "tokenizer" for the tokenizer's own, a name of `BUILT_IN_TEMPLATES`, or the path of a jinja file.
        generation_stop_ids: `generation_config.eos_token_id` of the checkpoint, as a collection.
        source: directory or name of the checkpoint, for messages.

    Returns:
        Its stop ids are those given, the tokenizer's eos, and the token that the template ends an answer with.

    Raises:
        ConfigError: the template is missing, fails, re-writes earlier turns, or does not end answers with a stop token.
        CheckpointError: the tokenizer has no template of its own, or no usable pad token.
    """
    answer_end_id = _set_template(tokenizer, template, source)
    _check_pad_token(tokenizer, answer_end_id, source)
    stop_ids = {int(token_id) for token_id in generation_stop_ids} | {answer_end_id}
    if tokenizer.eos_token_id is not None:
        stop_ids.add(int(tokenizer.eos_token_id))
    chat_format = ChatFormat(tokenizer, frozenset(stop_ids), int(tokenizer.pad_token_id))
    _check_probe(chat_format, template)
    return chat_format


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str, template: str, source: str = "") -> bool:
    """Makes sure that padding has a token of its own, taking the recipe's `model.pad_token` where one is given.

    Args:
        tokenizer: changed in place.
        pad_token: `model.pad_token` of the recipe; "" keeps the tokenizer's.
        template: as for `build_chat_format`; it decides which token ends an answer.
        source: directory or name of the checkpoint, for messages.

    Returns:
        True if a token was added to the vocabulary, so that the embeddings may have to grow to len(tokenizer).

    Raises:
        CheckpointError: there is no pad token, or it is the very token that ends an answer, and the recipe gives none.
        ConfigError: the recipe's pad token is an ordinary piece of text.
    """
    answer_end_id = _set_template(tokenizer, template, source)
    added = False
    if pad_token and pad_token != tokenizer.pad_token:
        known_id = tokenizer.get_vocab().get(pad_token)
        if known_id is not None and known_id not in _control_ids(tokenizer) and known_id != tokenizer.unk_token_id:
            raise ConfigError(
                f"model.pad_token {pad_token!r} is an ordinary token of {source or 'the tokenizer'}, which text may "
                "contain: choose a special one or a new one, for example --model.pad_token '<|pad|>'"
            )
        tokenizer.add_special_tokens({"pad_token": pad_token})
        added = known_id is None
    _check_pad_token(tokenizer, answer_end_id, source)
    return added


def truncate_history(
    chat_format: ChatFormat, messages: Sequence[Message], max_prompt_tokens: int
) -> tuple[Message, ...]:
    """Drops the oldest turns (a user's message with what answers it) until the prompt fits; keeps a system message.

    Args:
        chat_format: renders the prompt to count its tokens.
        messages: a conversation that ends with the user's message.
        max_prompt_tokens: the most tokens that the prompt may have.

    Raises:
        DataError: the last message alone does not fit.
    """
    system = tuple(messages[:1]) if messages and messages[0].role == "system" else ()
    turns = list(messages[len(system) :])
    while True:
        kept = (*system, *turns)
        length = len(chat_format.prompt_ids(kept))
        if length <= max_prompt_tokens:
            return kept
        next_turn = next((i for i, message in enumerate(turns) if i > 0 and message.role == "user"), None)
        if next_turn is None:
            raise DataError(
                f"the last message makes a prompt of {length} tokens, and the model has room for {max_prompt_tokens}: "
                "write a shorter one"
            )
        turns = turns[next_turn:]


def _template_source(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> str:
    if template == "tokenizer":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise CheckpointError(
                f"{source or 'the checkpoint'}: its tokenizer has no chat template; choose one, for example "
                "--model.chat_template dialogue"
            )
        return str(own)
    if template in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[template]
    path = Path(template)
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template {template!r} is no file and none of tokenizer, {', '.join(BUILT_IN_TEMPLATES)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template {template!r} cannot be read: {error}") from error


def _set_template(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> int:
    """Gives the tokenizer the template; returns the id of the control token that the template ends an answer with."""
    tokenizer.chat_template = _template_source(tokenizer, template, source)
    question, answer = PROBE[:2]
    try:
        prompt = _render(tokenizer, [question], True)
        whole = _render(tokenizer, [question, answer], False)
    except DataError as error:
        raise ConfigError(f"model.chat_template {template!r}: {error}") from error
    answer_start = whole.rfind(answer.content)
    if not whole.startswith(prompt) or answer_start < len(prompt):
        raise ConfigError(
            f"model.chat_template {template!r}: what it writes before an answer is not what it writes to ask for one "
            "(add_generation_prompt), so a prompt is not the beginning of its answer; use another, for example "
            "--model.chat_template dialogue"
        )
    rest = tokenizer.encode(whole[answer_start + len(answer.content) :], add_special_tokens=False, verbose=False)
    control_ids = _control_ids(tokenizer)
    for token_id in rest:
        if token_id in control_ids:
            return int(token_id)
    raise ConfigError(
        f"model.chat_template {template!r}: with the tokenizer of {source or 'this checkpoint'} its answers never end "
        "with a stop token, so a model could not learn to stop; use another, for example --model.chat_template dialogue"
    )


def _check_probe(chat_format: ChatFormat, template: str) -> None:
    """Renders a conversation of two turns, so that a template which cannot be trained with fails now."""
    try:
        sequence = chat_format.demonstration(PROBE)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{error} (model.chat_template {template!r})") from error
    prompt = chat_format.prompt_ids(PROBE[:3])
    if sequence.ids[: sequence.prompt_length] != prompt or PROBE[3].content not in chat_format.decode(
        sequence.ids[sequence.prompt_length :]
    ):
        raise ConfigError(
            f"model.chat_template {template!r}: a stop token stands before the answer's text; use another template"
        )


def _check_pad_token(tokenizer: PreTrainedTokenizerBase, answer_end_id: int, source: str) -> None:
    fix = "set model.pad_token, for example --model.pad_token '<|pad|>'"
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{source or 'the checkpoint'}: its tokenizer has no pad token; {fix}")
    if tokenizer.pad_token_id == answer_end_id:
        raise CheckpointError(
            f"{source or 'the checkpoint'}: its tokenizer pads with {tokenizer.pad_token!r}, the token that ends an "
            f"answer; {fix}"
        )


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens, which text must not be able to spell.

    The unknown token is none of them, as any text may contain it; unless it is the eos as well, as GPT-2 has it.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special.discard(tokenizer.unk_token_id)
    return frozenset(special)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from error
    return str(text)


def _hide_control_text(
    tokenizer: PreTrainedTokenizerBase, control_ids: frozenset[int], messages: Sequence[Message]
) -> tuple[list[Message], re.Pattern[str]]:
    """Puts a placeholder for each content that spells a control token; others go through the template as they are.

    Only such contents are encoded apart from their template; ordinary ones get the ids that plain transformers gives.
    """
    marker = "\ue000"
    while any(marker in message.content for message in messages):
        marker += "\ue000"
    hidden = []
    for index, message in enumerate(messages):
        ids = tokenizer.encode(message.content, add_special_tokens=False, verbose=False)
        spells_control_token = not control_ids.isdisjoint(ids)
        hidden.append(Message(message.role, f"{marker}{index}\ue001") if spells_control_token else message)
    return hidden, re.compile(f"{marker}([0-9]+)\ue001")


def _encode_as_plain_text(tokenizer: PreTrainedTokenizerBase, control_ids: frozenset[int], text: str) -> list[int]:
    """Ids of a text none of which is a control token, whatever it spells."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    if control_ids.isdisjoint(ids):
        return list(ids)
    if len(text) <= 1:
        raise DataError(f"the character {text!r} is a control token of the tokenizer, so a message cannot contain it")
    # A vocabulary may hold a control token's spelling as an ordinary word as well; cut, it cannot be found.
    middle = len(text) // 2
    return _encode_as_plain_text(tokenizer, control_ids, text[:middle]) + _encode_as_plain_text(
        tokenizer, control_ids, text[middle:]
    )
