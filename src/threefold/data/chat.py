"""The one place that turns conversations into tokens.

A conversation is rendered by a chat template (jinja, the same that plain transformers applies) and cut at its
generation prompts: the text up to the first one, then from each to the next, then the rest. The pieces are encoded
separately, so the boundary between prompt and answer is exact, and training, scoring, sampling and chatting see the
same ids.

What a user or an assistant wrote is data. If it spells a control token ("</s>", "<|end|>"), that content is encoded
as plain text, so that it can neither end a turn nor open one.

The plural methods of `ChatFormat` do the same for many conversations at once, and much faster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from threefold.data.rendering import TextEncoder, control_ids_of, render
from threefold.data.templates import BUILT_IN_TEMPLATES, system_prompt_of, template_source, with_system_prompt
from threefold.data.text import document_marks
from threefold.errors import CheckpointError, ConfigError, DataError
from threefold.types import Message, Prompt, TokenSequence

__all__ = ["BUILT_IN_TEMPLATES", "ChatFormat", "build_chat_format", "ensure_pad_token"]

Item = TypeVar("Item")
Made = TypeVar("Made")

PROBE = (
    Message("user", "Which word?"),
    Message("assistant", "Probeword"),
    Message("user", "And now?"),
    Message("assistant", "Probeword"),
)


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text.

    Attributes:
        stretches: the text up to the first generation prompt, then from each to the next, then the rest.
        hidden: what stands in a stretch for a content that spells a control token -> the content.
    """

    stretches: list[str]
    hidden: dict[str, str]

    def parts(self, stretch: str) -> list[tuple[str, bool]]:
        """The stretch cut into template text (False) and contents to encode as plain text (True)."""
        if not self.hidden:
            return [(stretch, False)]
        cut = re.split(f"({'|'.join(map(re.escape, self.hidden))})", stretch)
        return [(self.hidden.get(part, part), bool(index % 2)) for index, part in enumerate(cut)]


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

    @property
    def system_prompt(self) -> str:
        """The system message that the template puts before a conversation that has none; "" if none."""
        return system_prompt_of(str(self.tokenizer.chat_template))

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to the place where the assistant's answer begins."""
        return _or_raise(self.prompts([messages])[0])

    def answer_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """Ids that follow `prompt_ids(messages)` when the assistant says `answer`; the last one is its stop token."""
        return _or_raise(self._answers([(*messages, Message("assistant", answer))])[0])

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
        return _or_raise(self.demonstrations([messages], loss_on)[0])

    def comparison(self, prompt: Prompt, answers: Sequence[str]) -> tuple[TokenSequence, ...]:
        """The prompt with each of the answers, in their order; the answer's tokens are the trained ones."""
        return _or_raise(self.comparisons([prompt], [answers])[0])

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...] | DataError]:
        """`prompt_ids` of each conversation, or what is wrong with it."""
        pieces = self._pieces(self._rendered(conversations, answered=False))
        return _each(pieces, lambda own: tuple(token_id for piece in own for token_id in piece))

    def demonstrations(
        self, conversations: Sequence[Sequence[Message]], loss_on: Literal["assistant", "all"] = "assistant"
    ) -> list[TokenSequence | DataError]:
        """`demonstration` of each conversation, or what is wrong with it."""
        pieces = self._pieces(self._rendered(conversations, answered=True))
        return _each(pieces, lambda own: self._demonstration(own, loss_on))

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[tuple[TokenSequence, ...] | DataError]:
        """`comparison` of each prompt with its own answers, or what is wrong with them."""
        flat = [
            (*prompt.messages, Message("assistant", answer))
            for prompt, own in zip(prompts, answers, strict=True)
            for answer in own
        ]
        answered = iter(self._answers(flat))
        prompt_ids = self.prompts([prompt.messages for prompt in prompts])
        pairs = [(ids, [next(answered) for _ in own]) for ids, own in zip(prompt_ids, answers, strict=True)]
        return _each(pairs, lambda pair: _compared(*pair))

    def text(self, documents: Sequence[str], max_length: int) -> list[list[TokenSequence] | DataError]:
        """Each document of plain text with its marks (see `data.text.document_marks`), cut into pieces.

        Every token is trained once. A piece after the first begins with the last token of the one before, as context
        for the next: without it that would be no target.

        Args:
            max_length: longest piece, tokens.

        Raises:
            ConfigError: max_length is 1, and one token has nothing to predict.
        """
        if max_length < 2:
            raise ConfigError(f"data.max_length = {max_length} leaves a piece of text nothing to predict: raise it")
        marks = document_marks(self.tokenizer, self.stop_ids)
        start = [] if marks.start_id is None else [marks.start_id]
        end = [] if marks.end_id is None else [marks.end_id]
        hidden = self._encoder.spelling_control_tokens(documents)
        encoded = self._encoder(document for document in documents if document not in hidden)

        def pieces(document: str) -> list[TokenSequence]:
            ids = self._encoder.as_plain_text(document) if document in hidden else encoded[document]
            return _cut([*start, *ids, *end], max_length)

        return _each(documents, pieces)

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
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Tokens that end an answer where a template writes them."""
        return self.stop_ids & self._encoder.control_ids

    def _demonstration(self, pieces: Sequence[Sequence[int]], loss_on: Literal["assistant", "all"]) -> TokenSequence:
        opening, *answered = pieces
        ids, trained, prompt_length = list(opening), [False] * len(opening), 0
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

    def _answers(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...] | DataError]:
        """Ids of the last answer of each conversation, stop token included."""
        rendered = self._rendered(conversations, answered=True)
        last = _each(rendered, lambda one: _Rendered(one.stretches[-1:], one.hidden))
        return _each(self._pieces(last), lambda own: tuple(own[0][: self._answer_length(own[0])]))

    def _answer_length(self, piece: Sequence[int]) -> int:
        """Tokens of the answer that a piece begins with, its stop token included; DataError if it has none."""
        positions = [piece.index(token_id) for token_id in self._ends if token_id in piece]
        if positions:
            return min(positions) + 1
        raise DataError(
            "model.chat_template: the template writes no stop token after one of the answers of this conversation; "
            "use another template, for example --model.chat_template dialogue"
        )

    def _rendered(self, conversations: Sequence[Sequence[Message]], answered: bool) -> list[_Rendered | DataError]:
        """Each conversation as text, cut at its generation prompts.

        Each stretch after the first begins with an answer. With `answered` the conversations end with one, else with
        a generation prompt.
        """
        spelling = self._encoder.spelling_control_tokens(
            message.content for messages in conversations for message in messages
        )
        edges = self._encoder.spelling_control_tokens(edge for content in spelling for edge in _edges(content))
        plain = [_hide(messages, spelling, edges) for messages in conversations]
        prompts, places = list[Sequence[Message]](), list[int]()
        for place, (messages, _) in enumerate(plain):
            for index, message in enumerate(messages):
                if message.role == "assistant" and index > 0:
                    prompts.append(messages[:index])
                    places.append(place)
        texts: list[list[str | DataError]] = [[] for _ in conversations]
        for place, text in zip(places, render(self.tokenizer, prompts, True), strict=True):
            texts[place].append(text)
        for place, text in enumerate(render(self.tokenizer, [messages for messages, _ in plain], not answered)):
            texts[place].append(text)
        return _each(zip(texts, plain, strict=True), lambda one: _stretches(one[0], one[1][1]))

    def _pieces(self, rendered: Sequence[_Rendered | DataError]) -> list[list[list[int]] | DataError]:
        """Ids of each stretch: the template's control tokens count, those that a message spells do not."""
        encoded = self._encoder(
            part
            for one in rendered
            if not isinstance(one, DataError)
            for stretch in one.stretches
            for part, is_content in one.parts(stretch)
            if not is_content
        )

        def ids(part: str, is_content: bool) -> list[int]:
            return self._encoder.as_plain_text(part) if is_content else encoded[part]

        return _each(
            rendered,
            lambda one: [[i for part in one.parts(stretch) for i in ids(*part)] for stretch in one.stretches],
        )


def build_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    generation_stop_ids: Collection[int] = (),
    source: str = "",
    system_prompt: str = "",
) -> ChatFormat:
    """Sets the template on the tokenizer and checks that it can be trained with.

    Args:
        tokenizer: gets the template, and must have a pad token (see `ensure_pad_token`).
        template: "tokenizer" for the tokenizer's own, a name of `BUILT_IN_TEMPLATES`, or the path of a jinja file.
        generation_stop_ids: `generation_config.eos_token_id` of the checkpoint, as a collection.
        source: directory or name of the checkpoint, for messages.
        system_prompt: `model.system_prompt`: becomes part of the template, in the place of one that is there; "" leaves
            the template as it is.

    Returns:
        Its stop ids are those given, the tokenizer's eos, and the token that the template ends an answer with.

    Raises:
        ConfigError: the template is missing, fails, re-writes earlier turns, does not end answers with a stop token, or
            has no place for the system prompt.
        CheckpointError: the tokenizer has no template of its own, or no usable pad token.
    """
    answer_end_id = _set_template(tokenizer, template, source, system_prompt)
    _check_pad_token(tokenizer, answer_end_id, source)
    stop_ids = {int(token_id) for token_id in generation_stop_ids} | {answer_end_id}
    if tokenizer.eos_token_id is not None:
        stop_ids.add(int(tokenizer.eos_token_id))
    chat_format = ChatFormat(tokenizer, frozenset(stop_ids), int(tokenizer.pad_token_id))
    _check_probe(chat_format, template)
    return chat_format


def ensure_pad_token(
    tokenizer: PreTrainedTokenizerBase, pad_token: str, template: str, source: str = "", system_prompt: str = ""
) -> bool:
    """Makes sure that padding has a token of its own, taking the recipe's `model.pad_token` where one is given.

    Args:
        tokenizer: changed in place.
        pad_token: `model.pad_token` of the recipe; "" keeps the tokenizer's.
        template: as for `build_chat_format`; it decides which token ends an answer.
        source: directory or name of the checkpoint, for messages.
        system_prompt: as for `build_chat_format`.

    Returns:
        True if a token was added to the vocabulary, so that the embeddings may have to grow to len(tokenizer).

    Raises:
        CheckpointError: there is no pad token, or it is the very token that ends an answer, and the recipe gives none.
        ConfigError: the recipe's pad token is an ordinary piece of text.
    """
    answer_end_id = _set_template(tokenizer, template, source, system_prompt)
    added = False
    if pad_token and pad_token != tokenizer.pad_token:
        known_id = tokenizer.get_vocab().get(pad_token)
        if known_id is not None and known_id not in control_ids_of(tokenizer) and known_id != tokenizer.unk_token_id:
            raise ConfigError(
                f"model.pad_token {pad_token!r} is an ordinary token of {source or 'the tokenizer'}, which text may "
                "contain: choose a special one or a new one, for example --model.pad_token '<|pad|>'"
            )
        tokenizer.add_special_tokens({"pad_token": pad_token})
        added = known_id is None
    _check_pad_token(tokenizer, answer_end_id, source)
    return added


def _set_template(tokenizer: PreTrainedTokenizerBase, template: str, source: str, system_prompt: str) -> int:
    """Gives the tokenizer the template; returns the id of the control token that the template ends an answer with."""
    tokenizer.chat_template = template_source(tokenizer, template, source)
    question, answer = PROBE[:2]
    _render_probe(tokenizer, template, [question], True)  # before the system prompt, which may be at fault
    if system_prompt:
        _set_system_prompt(tokenizer, template, system_prompt)
    prompt = _render_probe(tokenizer, template, [question], True)
    whole = _render_probe(tokenizer, template, [question, answer], False)
    answer_start = whole.rfind(answer.content)
    if not whole.startswith(prompt) or answer_start < len(prompt):
        raise ConfigError(
            f"model.chat_template {template!r}: what it writes before an answer is not what it writes to ask for one "
            "(add_generation_prompt), so a prompt is not the beginning of its answer; use another, for example "
            "--model.chat_template dialogue"
        )
    rest = tokenizer.encode(whole[answer_start + len(answer.content) :], add_special_tokens=False, verbose=False)
    control_ids = control_ids_of(tokenizer)
    for token_id in rest:
        if token_id in control_ids:
            return int(token_id)
    raise ConfigError(
        f"model.chat_template {template!r}: with the tokenizer of {source or 'this checkpoint'} its answers never end "
        "with a stop token, so a model could not learn to stop; use another, for example --model.chat_template dialogue"
    )


def _render_probe(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], generate: bool
) -> str:
    text = render(tokenizer, [messages], generate)[0]
    if isinstance(text, DataError):
        raise ConfigError(f"model.chat_template {template!r}: {text}") from text
    return text


def _set_system_prompt(tokenizer: PreTrainedTokenizerBase, template: str, system_prompt: str) -> None:
    """Puts the system prompt into the template, if that has a place for one."""
    if not control_ids_of(tokenizer).isdisjoint(tokenizer.encode(system_prompt, add_special_tokens=False)):
        raise ConfigError("model.system_prompt spells a control token of the tokenizer: write it without")
    tokenizer.chat_template = with_system_prompt(str(tokenizer.chat_template), system_prompt)
    text = render(tokenizer, [PROBE[:1]], True)[0]
    if isinstance(text, DataError):
        raise ConfigError(
            f"model.system_prompt: {text} (model.chat_template {template!r}); leave it empty, or use another template, "
            "for example --model.chat_template dialogue"
        ) from text
    if system_prompt.strip() not in text:
        raise ConfigError(
            f"model.system_prompt: model.chat_template {template!r} leaves the system message out; leave it empty, or "
            "use another template, for example --model.chat_template dialogue"
        )


def _check_probe(chat_format: ChatFormat, template: str) -> None:
    """Renders a conversation of two turns, so that a template which cannot be trained with fails now."""
    try:
        sequence = chat_format.demonstration(PROBE)
    except DataError as error:
        raise ConfigError(f"{error} (model.chat_template {template!r})") from error
    # As the tokenizer gives it back, which may know other letters, or no capitals, or no spaces.
    word, answer = (
        "".join(chat_format.decode(ids).split())
        for ids in (
            chat_format.tokenizer.encode(PROBE[3].content, add_special_tokens=False),
            sequence.ids[sequence.prompt_length :],
        )
    )
    if sequence.ids[: sequence.prompt_length] != chat_format.prompt_ids(PROBE[:3]) or word not in answer:
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


def _edges(content: str) -> tuple[str, str]:
    """The whitespace that a content begins with, and that it ends with; what is all whitespace only begins."""
    inner = content.lstrip()
    return content[: len(content) - len(inner)], inner[len(inner.rstrip()) :]


def _hide(
    messages: Sequence[Message], spelling: Collection[str], edges: Collection[str]
) -> tuple[Sequence[Message], dict[str, str]]:
    """Puts a mark for each content that spells a control token, and says which stands for what; others go through the
    template as they are.

    Only such contents are encoded apart from their template; ordinary ones get the ids that plain transformers gives.
    The whitespace around one stays outside its mark, for the template to keep or to trim, unless it is one of `edges`:
    those spell a control token themselves.
    """
    if not any(message.content in spelling for message in messages):
        return messages, {}
    mark = "\ue000"
    while any(mark in message.content for message in messages):
        mark += "\ue000"
    plain, hidden = list[Message](), dict[str, str]()
    for index, message in enumerate(messages):
        if message.content not in spelling:
            plain.append(message)
            continue
        before, after = ("" if edge in edges else edge for edge in _edges(message.content))
        own = f"{mark}{index}\ue001"
        plain.append(Message(message.role, f"{before}{own}{after}"))
        hidden[own] = message.content[len(before) : len(message.content) - len(after)]
    return plain, hidden


def _stretches(texts: Sequence[str | DataError], hidden: dict[str, str]) -> _Rendered:
    """From the text up to each generation prompt, and the whole, to what each adds to the one before; DataError where
    the template refuses the conversation or re-writes its earlier turns."""
    stretches, before = list[str](), ""
    for text in map(_or_raise, texts):
        if not text.startswith(before):
            raise DataError(
                "model.chat_template: the template re-writes earlier turns when the conversation goes on, so a "
                "prompt is not the beginning of its answer; use another, for example --model.chat_template dialogue"
            )
        stretches.append(text[len(before) :])
        before = text
    return _Rendered(stretches, hidden)


def _compared(
    prompt_ids: tuple[int, ...] | DataError, answers_ids: Sequence[tuple[int, ...] | DataError]
) -> tuple[TokenSequence, ...]:
    """A prompt with each of its answers; see `ChatFormat.comparison`."""
    prompt = _or_raise(prompt_ids)
    context = (False,) * len(prompt)
    return tuple(
        TokenSequence(prompt + ids, context + (True,) * len(ids), prompt_length=len(prompt))
        for ids in map(_or_raise, answers_ids)
    )


def _cut(ids: list[int], max_length: int) -> list[TokenSequence]:
    """Pieces of a document; see `ChatFormat.text`."""
    pieces = [TokenSequence(tuple(ids[:max_length]), (True,) * len(ids[:max_length]), prompt_length=0)]
    for start in range(max_length - 1, len(ids) - 1, max_length - 1):
        piece = tuple(ids[start : start + max_length])
        pieces.append(TokenSequence(piece, (False,) + (True,) * (len(piece) - 1), prompt_length=1))
    return pieces


def _or_raise(item: Item | DataError) -> Item:
    if isinstance(item, DataError):
        raise item
    return item


def _each(items: Iterable[Item | DataError], make: Callable[[Item], Made]) -> list[Made | DataError]:
    """What is made of each item, or what is wrong with it."""
    made = list[Made | DataError]()
    for item in items:
        try:
            made.append(make(_or_raise(item)))
        except DataError as error:
            made.append(error)
    return made
