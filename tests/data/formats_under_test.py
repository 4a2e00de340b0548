"""Tokenizers and templates that the tests of tests/data share."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<|pad|>",
    "<s>",
    "</s>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Writes a newline after the stop token: context between turns, never trained."""

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""An empty thought before the last answer only, as Qwen3's template has it."""


def byte_level_tokenizer(eos_token: str = "<|end|>", bos_token: str | None = None) -> PreTrainedTokenizerBase:
    """A byte-level BPE with a few merges: any text can be encoded, and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Human: what is a good answer? Assistant: this is an answer, and it ends."] * 8, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=eos_token, bos_token=bos_token
    )


def unigram_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose model knows its control token as an ordinary piece too, as SentencePiece vocabularies do."""
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), *((chr(code), -3.0) for code in range(10, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


TEMPLATES_FOLDER = Path(__file__).parent / "templates"
"""Templates in the manner of well-known models, written for these tests."""

STOPS = {
    "dialogue": "</s>",
    "tags": "<|end|>",
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot|>",
    "mistral": "</s>",
}
"""What each template ends an answer with."""

TRAINING_TEXT = [
    "Human: What is a good answer? Assistant: This is an answer, and it ends.",
    "The little girl and the dog went to the park to see the big tree. She said: it is 12 years old!",
    "<|im_end|> <|end|> </s> [INST] [/INST] #1",
    "请问这只小狗叫什么名字？它叫小白。",
]


def template_named(name: str) -> str:
    """What `model.chat_template` is to be for this template."""
    path = TEMPLATES_FOLDER / f"{name}.jinja"
    return str(path) if path.is_file() else name


def trained_unigram_tokenizer() -> PreTrainedTokenizerBase:
    """A Unigram model in SentencePiece's manner: spaces are letters, and each text begins with one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece_tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece model in BERT's manner: no spaces, and parts of words begin with ##."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


def with_stop_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the control tokens of all templates."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*SPECIAL_TOKENS[3:], "<|start|>", "<|stop|>", "<|eot|>"]}
    )
    return tokenizer
