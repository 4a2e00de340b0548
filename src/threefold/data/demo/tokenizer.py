"""A byte-level BPE tokenizer, trained on the spot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from threefold.errors import DataError
from threefold.types import Example

PAD_TOKEN = "<pad>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
SYSTEM_TOKEN = "<|system|>"
END_TOKEN = "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, SYSTEM_TOKEN, END_TOKEN)

WHOLE_WORD_FRACTION = 0.95
"""Share of the free places in the vocabulary for the most frequent words; merges learnt on the others get the rest."""

_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on all texts of the examples: prompts, demonstrations and answers.

    A text is cut into words, single digits, runs of other signs and runs of blanks, a word or digit with the one blank
    before it. The most frequent pieces are tokens as they are; the others are byte-pair encoded (Sennrich et al. 2016,
    on bytes as in GPT-2). Plain byte-pair encoding would spend half of so small a vocabulary on parts of those words.
    All 256 bytes are tokens, so any text is encoded without loss.

    Nothing is put before a text, so a word that opens a turn, right after a tag, is another token than the same word
    after a blank. That is the cheaper choice here: words that carry a fact stand after a blank in questions and answers
    alike, and those that open a turn are a few dozen, most of them tokens of their own.

    Ids 0 to 4 are "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>" (the stop token); there is no begin
    token, and no chat template is set. Few examples may give fewer than `vocab_size` tokens.

    Raises:
        DataError: vocab_size leaves no room for the bytes and special tokens, or there are no examples.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise DataError(
            f"model.embedded.vocab_size {vocab_size} is too small: set it to {smallest} or more (all bytes)"
        )
    if not examples:
        raise DataError("no examples to train the embedded tokenizer on: raise data.demo.num_prompts")
    num_free = vocab_size - smallest
    counts = _count_pieces(examples)
    words = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    words = words[: int(num_free * WHOLE_WORD_FRACTION)]
    # a word that is a token needs no merges: it counts once, for the sake of words that only a user will type
    learnt = _learn_merges({**counts, **dict.fromkeys(words, 1)}, num_free)
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    merges = []
    for left, right in learnt:
        if len(pieces) == vocab_size:
            break
        merges.append((left, right))
        pieces[left + right] = None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN, SYSTEM_TOKEN],
        clean_up_tokenization_spaces=False,
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _count_pieces(examples: Sequence[Example]) -> dict[str, int]:
    splitter = _pre_tokenizer()
    texts = Counter(_texts(examples))
    counts: Counter[str] = Counter()
    for text, count in texts.items():
        for piece, _ in splitter.pre_tokenize_str(text):
            counts[piece] += count
    return counts


def _learn_merges(counts: dict[str, int], num_merges: int) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding learns on pieces (in the byte alphabet) with their counts."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for piece, count in sorted(counts.items()) for _ in range(count)), trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    for example in examples:
        for message in example.prompt.messages:
            yield message.content
        if example.demonstration:
            yield example.demonstration
        yield from example.answers
