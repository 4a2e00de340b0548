"""Checks of what a step is really given: rows rendered by the chat template, cut to the recipe's lengths, as tokens."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from threefold.config.recipe import Recipe
from threefold.data.chat import PROBE, ChatFormat
from threefold.data.doctor.findings import Finding, Severity, Tally, of_rows
from threefold.data.doctor.patterns import control_text
from threefold.data.doctor.ranking import percentiles
from threefold.data.doctor.rows import Row
from threefold.data.lengths import shortened
from threefold.data.split import STEPS, Step
from threefold.errors import DataError
from threefold.types import Message, TokenSequence

Messages = tuple[Message, ...]

MAX_LOST = 0.1
MAX_SHORTENED = 0.5
MAX_UNKNOWN = 0.02
MAX_CHANGED = 0.02
MIN_TRAINED = 0.005

_FAULTS: dict[str, tuple[Severity, float, str, str]] = {
    "template_refuses": (
        "error", 0.0, "are refused by the chat template",
        "mend them, or choose another model.chat_template",
    ),
    "nothing_trained": (
        "error", 0.0, "have no trained token but the stop token",
        "leave them out; after truncation, raise data.max_length",
    ),
    "missing_stop": (
        "error", 0.0, "end without a stop token, so a model would not learn to stop",
        "choose another model.chat_template",
    ),
    "stop_within_answer": (
        "error", 0.0, "have a stop token within an answer",
        "choose another model.chat_template",
    ),
    "prompt_mismatch": (
        "error", 0.0, "render to another prompt in training than in generation",
        "choose another model.chat_template",
    ),
    "equal_after_rendering": (
        "error", 0.0, "have ranked answers that become the same tokens",
        "leave them out, or use a tokenizer that tells them apart",
    ),
    "unknown_tokens": (
        "warning", MAX_UNKNOWN, "hold characters that the tokenizer does not know",
        "use a tokenizer of this language, or take such characters out",
    ),
    "round_trip": (
        "warning", MAX_CHANGED, "come back as another text when their tokens are decoded",
        "the tokenizer or the template changes what is written: look at the page of samples",
    ),
    "own_control_tokens": (
        "warning", 0.01, "spell a control token of the tokenizer, which is then trained as plain text",
        "take it out: the template adds its own",
    ),
}  # fmt: skip
"""By check: severity, share of the rows from which on it is a finding, what, what to do."""


class RenderedChecks:
    """Renders rows of one step as that step would, and looks at the tokens.

    Attributes:
        lengths: tokens of each row, whole.
    """

    def __init__(self, step: Step, chat: ChatFormat, recipe: Recipe) -> None:
        self.step = step
        self.chat = chat
        self.recipe = recipe
        self.limit = recipe.data.max_prompt_length if step == "ppo" else recipe.data.max_length
        self.num_rows = 0
        self.lengths: list[int] = []
        self.num_trained = self.num_tokens = 0
        self.faults = {check: Tally() for check in _FAULTS}
        self.too_long, self.dropped, self.short = Tally(), Tally(), Tally()
        self._bos = chat.tokenizer.bos_token_id
        self._unknown = chat.tokenizer.unk_token_id
        self._starts: Counter[str] = Counter()
        self._control = _control_spellings(chat)

    def see(self, row: Row) -> None:
        """Render a row, if the step uses it."""
        example = row.example
        if self.step == "sft" and example.demonstration:
            self._see_demonstration(row)
        elif self.step == "reward" and len(example.answers) > 1:
            self._see_comparison(row)
        elif self.step == "ppo" and example.prompt.messages:
            self._see_prompt(row)

    def _see_demonstration(self, row: Row) -> None:
        example = row.example
        if row.is_text:
            pieces = self.chat.text([example.demonstration], max(self.limit, 2))[0]
            if isinstance(pieces, DataError):
                self._fault("template_refuses", row, str(pieces))
                return
            self._count(row, sum(map(len, pieces)))
            self.num_trained += sum(map(sum, (piece.trained for piece in pieces)))
            self.num_tokens += sum(map(len, pieces))
            return
        messages = (*example.prompt.messages, Message("assistant", example.demonstration))
        rendered = self.chat.demonstrations([messages], self.recipe.sft.loss_on)[0]
        if isinstance(rendered, DataError):
            self._fault("template_refuses", row, str(rendered))
            return
        self._count(row, len(rendered))
        fitted = self._fitted(row, rendered, messages)
        self._look_at_text(row, messages, rendered.ids)
        if fitted is not None:
            self.num_trained += sum(fitted.trained)
            self.num_tokens += len(fitted)
            self._look_at_mask(row, fitted)
        prompt = self.chat.prompts([example.prompt.messages])[0]
        if isinstance(prompt, tuple) and prompt != rendered.ids[: rendered.prompt_length]:
            self._fault("prompt_mismatch", row)

    def _see_comparison(self, row: Row) -> None:
        example = row.example
        rendered = self.chat.comparisons([example.prompt], [example.answers])[0]
        if isinstance(rendered, DataError):
            self._fault("template_refuses", row, str(rendered))
            return
        longest = max(map(len, rendered))
        self._count(row, longest)
        if longest > self.limit:
            self.too_long.add(row.origin, f"{longest} tokens")
        ranks = example.ranks or tuple(range(len(rendered)))
        first: dict[tuple[int, ...], int] = {}
        for sequence, answer, rank in zip(rendered, example.answers, ranks, strict=True):
            place = first.setdefault(sequence.ids, rank)
            if place != rank and answer not in example.answers[: example.answers.index(answer)]:
                self._fault("equal_after_rendering", row)
                break
        for sequence in rendered:
            self._look_at_mask(row, sequence)
        self._look_at_text(row, (*example.prompt.messages, Message("assistant", example.answers[0])), rendered[0].ids)

    def _see_prompt(self, row: Row) -> None:
        messages = row.example.prompt.messages
        ids = self.chat.prompts([messages])[0]
        if isinstance(ids, DataError):
            self._fault("template_refuses", row, str(ids))
            return
        self._count(row, len(ids))
        if len(ids) > self.limit:
            self.too_long.add(row.origin, f"{len(ids)} tokens")
        self._look_at_start(ids)

    def _count(self, row: Row, length: int) -> None:
        self.num_rows += 1
        self.lengths.append(length)
        texts = (row.prompt, *row.answers)
        spelled = next((token for token in self._control for text in texts if token in text), "")
        if spelled:
            self._fault("own_control_tokens", row, repr(spelled))

    def _fault(self, check: str, row: Row, shown: str = "") -> None:
        tally = self.faults[check]
        if not tally.origins or tally.origins[-1] != row.origin:
            tally.add(row.origin, shown)

    def _fitted(self, row: Row, rendered: TokenSequence, messages: Messages) -> TokenSequence | None:
        """What the step is given of the row: shortened by whole turns where the recipe says so, None if dropped."""
        if len(rendered) <= self.limit:
            return rendered
        self.too_long.add(row.origin, f"{len(rendered)} tokens")
        rest: Messages | None = messages
        while self.recipe.data.long_rows == "truncate" and rest is not None:
            rest = shortened(rest, self.recipe.data.truncate_side)
            again = self.chat.demonstrations([rest], self.recipe.sft.loss_on)[0] if rest is not None else None
            if isinstance(again, TokenSequence) and len(again) <= self.limit:
                self.short.add(row.origin)
                return again
        self.dropped.add(row.origin)
        return None

    def _look_at_mask(self, row: Row, sequence: TokenSequence) -> None:
        """Trained tokens, stop tokens, and what the sequence begins with."""
        stop_ids = self.chat.stop_ids
        self._look_at_start(sequence.ids)
        if not any(t and i not in stop_ids for i, t in zip(sequence.ids, sequence.trained, strict=True)):
            self._fault("nothing_trained", row)
        elif sequence.ids[-1] not in stop_ids or not sequence.trained[-1]:
            self._fault("missing_stop", row)
        elif any(i in stop_ids for i in sequence.ids[sequence.prompt_length : -1]):
            self._fault("stop_within_answer", row)

    def _look_at_start(self, ids: Sequence[int]) -> None:
        if self._bos is not None:
            count = 0
            while count < len(ids) and ids[count] == self._bos:
                count += 1
            self._starts["none" if count == 0 else "one" if count == 1 else "several"] += 1

    def _look_at_text(self, row: Row, messages: Messages, ids: Sequence[int]) -> None:
        """Each message must stand in the decoded text, but for spaces; a row with unknown tokens cannot."""
        if self._unknown is not None and self._unknown not in self.chat.stop_ids and self._unknown in ids:
            self._fault("unknown_tokens", row, _first_unknown(self.chat, messages))
            return
        tokenizer = self.chat.tokenizer
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        decoded = "".join(text.split())
        position = 0
        for message in messages:
            content = "".join(message.content.split())
            found = decoded.find(content, position)
            if found < 0:
                self._fault("round_trip", row, _difference(content, decoded[position:]))
                return
            position = found + len(content)

    def findings(self) -> Iterator[Finding]:
        """What is wrong with enough of the rows."""
        where = f"of step {STEPS.index(self.step) + 1}"
        for check, (severity, share, what, fix) in _FAULTS.items():
            tally = self.faults[check]
            if tally.count and tally.count >= share * self.num_rows and (severity == "error" or tally.count >= 3):
                yield tally.finding(severity, check, max(self.num_rows, tally.count), f"{where} {what}", fix)
        yield from self._lengths(where)
        yield from self._starts_of_sequences(where)
        if self.step == "sft" and self.num_tokens and self.num_trained < MIN_TRAINED * self.num_tokens:
            yield Finding(
                "warning", "few_trained",
                f"{self.num_trained:,} of {self.num_tokens:,} tokens of step 1 are trained: its prompts are long and "
                "its answers short; look whether the columns are the right ones", "", self.num_trained, self.num_tokens,
            )  # fmt: skip

    def _lengths(self, where: str) -> Iterator[Finding]:
        if not self.too_long.count:
            return
        field = "data.max_prompt_length" if self.step == "ppo" else "data.max_length"
        what = f"{where} are longer than {field} = {self.limit}"
        policy = self.recipe.data.long_rows
        if policy == "error":
            fix = f'raise it, or set data.long_rows = "drop" or "truncate" (the longest has {max(self.lengths)})'
            yield self.too_long.finding("error", "too_long", self.num_rows, what, fix)
        elif policy == "drop" and self.too_long.count > MAX_LOST * self.num_rows:
            yield self.too_long.finding("warning", "too_long", self.num_rows, what + " and are dropped", "raise it")
        elif self.dropped.count > MAX_LOST * self.num_rows:
            fix = "raise it"
            yield self.dropped.finding("warning", "too_long", self.num_rows, what + " in their last turn alone", fix)
        elif self.short.count > MAX_SHORTENED * self.num_rows:
            yield self.short.finding("warning", "too_long", self.num_rows, what + " and are shortened", "raise it")

    def _starts_of_sequences(self, where: str) -> Iterator[Finding]:
        several, none = self._starts["several"], self._starts["none"]
        total = self._starts.total()
        if several:
            yield Finding(
                "error", "double_bos",
                f"{of_rows(several, total, 'sequences')} {where} begin with more than one "
                f"{self.chat.tokenizer.bos_token!r}: take all but one out of the chat template", "", several, total,
            )  # fmt: skip
        if none and _adds_bos(self.chat):
            yield Finding(
                "warning", "missing_bos",
                f"{of_rows(none, total, 'sequences')} {where} do not begin with {self.chat.tokenizer.bos_token!r}, "
                "which the tokenizer puts before every text: let the chat template begin with {{ bos_token }}",
                "", none, total,
            )  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        """Lengths, and counts of all faults."""
        counts = {check: tally.count for check, tally in self.faults.items() if tally.count}
        return {
            "num_rows": self.num_rows,
            "tokens": percentiles(self.lengths),
            "limit": self.limit,
            "num_too_long": self.too_long.count,
            "trained_share": round(self.num_trained / self.num_tokens, 4) if self.num_tokens else None,
            **counts,
        }


def template_findings(chat: ChatFormat, where: str) -> Iterator[Finding]:
    """What a template does wrong with any conversation: here two questions and two answers."""
    sequence = chat.demonstration(PROBE)
    doubled = [
        position
        for position, (before, after) in enumerate(zip(sequence.ids, sequence.ids[1:], strict=False))
        if before in chat.stop_ids and after == before and sequence.trained[position]
    ]
    if doubled:
        token = chat.tokenizer.convert_ids_to_tokens(sequence.ids[doubled[0]])
        yield Finding(
            "error", "double_eos",
            f"the chat template {where} writes {token!r} twice after an answer: take one out", "", len(doubled), 1,
        )  # fmt: skip


def _adds_bos(chat: ChatFormat) -> bool:
    """Whether the tokenizer by itself puts its bos before a text."""
    ids = chat.tokenizer.encode("a", verbose=False)
    return bool(ids) and ids[0] == chat.tokenizer.bos_token_id


def _control_spellings(chat: ChatFormat) -> tuple[str, ...]:
    """Spellings of the tokenizer's own control tokens, other than those that are known of other templates."""
    tokenizer = chat.tokenizer
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spellings = dict.fromkeys([*tokenizer.all_special_tokens, *added])
    return tuple(token for token in spellings if len(token) > 2 and not control_text(token))


def _first_unknown(chat: ChatFormat, messages: Messages) -> str:
    """A character of the messages that the tokenizer does not know."""
    unknown = chat.tokenizer.unk_token_id
    for character in dict.fromkeys(character for message in messages for character in message.content):
        if unknown in chat.tokenizer.encode(character, add_special_tokens=False, verbose=False):
            return repr(character)
    return ""


def _difference(wanted: str, found: str) -> str:
    """Where a text stops being the beginning of any part of another: what it says there."""
    match = difflib.SequenceMatcher(None, wanted[:500], found[:1000], autojunk=False).find_longest_match()
    at = match.a + match.size if match.a == 0 else 0
    return repr(wanted[max(at - 5, 0) : at + 15])
