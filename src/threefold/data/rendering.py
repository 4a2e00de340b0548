"""Conversations to text and text to ids, many at once: what `data.chat` is made of.

A jinja template is rendered for a whole batch in one call, and all texts of a batch are encoded in one call of the
tokenizer's Rust backend, which spreads them over the cores (unless TOKENIZERS_PARALLELISM=false says otherwise). The
ids are those that encoding text by text gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import jinja2
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from threefold.errors import DataError
from threefold.types import Message

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PRINTABLE_ASCII = re.compile(r"[!-~]+")


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool
) -> list[str | DataError]:
    """Text of each conversation under the tokenizer's template; an error in the place of one that it refuses."""
    chats = [[{"role": message.role, "content": message.content} for message in messages] for messages in conversations]
    assert all(chats), "a conversation without messages has nothing to render"
    template, marks = tokenizer.get_chat_template(), tokenizer.special_tokens_map

    def rendered(part: list[list[dict[str, str]]]) -> list[str]:
        texts, _ = render_jinja_template(
            part, chat_template=template, add_generation_prompt=add_generation_prompt, **marks
        )
        return [str(text) for text in texts]

    try:
        return list(rendered(chats))
    except jinja2.TemplateError as error:
        if len(chats) == 1:
            return [DataError(f"the chat template refuses the conversation: {' '.join(str(error).split())}")]
    middle = len(chats) // 2
    return [
        *render(tokenizer, conversations[:middle], add_generation_prompt),
        *render(tokenizer, conversations[middle:], add_generation_prompt),
    ]


def control_ids_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens, which text must not be able to spell.

    The unknown token is none of them, as any text may contain it; unless it is the eos as well, as GPT-2 has it.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special.discard(tokenizer.unk_token_id)
    return frozenset(special)


class TextEncoder:
    """Encodes texts with a tokenizer, and knows which of them spell one of its control tokens.

    The tokenizer may not be changed afterwards.

    Attributes:
        control_ids: see `control_ids_of`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.control_ids = control_ids_of(tokenizer)
        self._tokenizer = tokenizer

    def __call__(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each different text, without the marks that a tokenizer puts around a text."""
        different = [text for text in dict.fromkeys(texts) if text]
        if not different:
            return {"": []}
        ids = [self._encoded(different[0])]  # this also sets the backend to cut nothing and to add nothing
        if self._has_plain_backend and len(different) > 1:
            rest = self._tokenizer.backend_tokenizer.encode_batch_fast(different[1:], add_special_tokens=False)
            ids += [encoding.ids for encoding in rest]
        else:
            ids += [self._encoded(text) for text in different[1:]]
        return {"": [], **dict(zip(different, ids, strict=True))}

    def spelling_control_tokens(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts that encoding makes a control token of, wholly or in part."""
        suspects, normalizer = set(texts), self._normalizer
        pattern = self._suspicion
        if pattern is not None:
            suspects = {
                text
                for text in suspects
                if pattern.search(text) or (normalizer is not None and pattern.search(normalizer.normalize_str(text)))
            }
        return {text for text, ids in self(suspects).items() if not self.control_ids.isdisjoint(ids)}

    def as_plain_text(self, text: str) -> list[int]:
        """Ids of a text none of which is a control token, whatever it spells.

        Raises:
            DataError: one character is a control token, so that no other ids spell it.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if self.control_ids.isdisjoint(ids):
            return list(ids)
        if len(text) <= 1:
            raise DataError(
                f"the character {text!r} is a control token of the tokenizer, so a message cannot contain it"
            )
        # A vocabulary may hold a control token's spelling as an ordinary word as well; cut, it cannot be found.
        middle = len(text) // 2
        return self.as_plain_text(text[:middle]) + self.as_plain_text(text[middle:])

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @cached_property
    def _has_plain_backend(self) -> bool:
        """Whether the Rust backend alone does what `tokenizer.encode` does."""
        kind = type(self._tokenizer)
        return isinstance(self._tokenizer, PreTrainedTokenizerFast) and all(
            getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("encode", "_encode_plus")
        )

    @cached_property
    def _normalizer(self) -> normalizers.Normalizer | None:
        return self._tokenizer.backend_tokenizer.normalizer if self._has_plain_backend else None

    @cached_property
    def _suspicion(self) -> re.Pattern[str] | None:
        """Matches every text, raw or normalised, that may hold a control token, and few others; None: any text may.

        Control tokens come from a text that spells an added token, before or after normalisation (any added token:
        what stands before and after it is normalised apart), or from the model, where its own vocabulary has the
        control token as a piece: then the printable ASCII of the piece stands in the text, as no pre-tokenizer changes
        that.
        """
        if not self._has_plain_backend:
            return None
        backend = self._tokenizer.backend_tokenizer
        model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=False)
        if self._unknown_is_control(model, vocabulary):
            return None
        spellings = set[str]()
        for token in self._tokenizer.added_tokens_decoder.values():
            spellings.add(token.content)
            if self._normalizer is not None and token.normalized:
                spellings.add(self._normalizer.normalize_str(token.content))
        for token_id in self.control_ids:
            piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
            if piece not in vocabulary:
                continue
            bare = piece.removeprefix(getattr(model, "continuing_subword_prefix", None) or "")
            bare = bare.removesuffix(getattr(model, "end_of_word_suffix", None) or "")
            runs = _PRINTABLE_ASCII.findall(bare)
            if _BYTE_PIECE.fullmatch(piece) or not runs:
                return None
            spellings.add(max(runs, key=len))
        spellings.discard("")
        return re.compile("|".join(map(re.escape, sorted(spellings, key=len)))) if spellings else re.compile("(?!)")

    def _unknown_is_control(self, model: object, vocabulary: dict[str, int]) -> bool:
        """Whether a character that the model does not know may become a control token."""
        if self._tokenizer.unk_token_id not in self.control_ids or getattr(model, "unk_token", "") is None:
            return False
        pre_tokenizer = self._tokenizer.backend_tokenizer.pre_tokenizer
        by_bytes = pre_tokenizer is not None and b'"ByteLevel"' in pre_tokenizer.__getstate__()
        return not (by_bytes and all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()))
