"""Mixture text: documents, their marks as the checkpoint was pretrained, chunks."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.data.formats_under_test import byte_level_tokenizer
from threefold.data.text import (
    DocumentMarks,
    chunk_documents,
    document_marks,
    document_sequences,
    read_documents,
    split_documents,
)
from threefold.errors import DataError


def test_read_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one\n<|endoftext|>\n two <|endoftext|><|endoftext|>", encoding="utf-8")
    assert read_documents(str(plain)) == ["one", "two"]
    rows = "\n".join(json.dumps({"text": text, "n": 1}) for text in ("one", " ", "2020-01-01"))
    lines = tmp_path / "a.jsonl"
    lines.write_text(rows, encoding="utf-8")
    assert read_documents(str(lines)) == ["one", "2020-01-01"]
    table = tmp_path / "a.csv"
    table.write_text('n,text\n1,"one\n"\n2,2020-01-01\n', encoding="utf-8")
    assert read_documents(str(table)) == ["one", "2020-01-01"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.encode()))
    assert read_documents(str(packed)) == ["one", "2020-01-01"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" <|endoftext|> ", "holds no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', "row 2: field 'text' is missing or is not a text"),
        ("a.jsonl", b'{"story": "x"}', "row 1: field 'text' is missing or is not a text"),
        ("a.csv", b"story\nx\n", "row 1: field 'text' is missing or is not a text"),
        ("a.xml", b"x", "cannot tell its format from its name"),
    ],
)
def test_bad_text_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(str(path))
    with pytest.raises(DataError, match="no such file"):
        read_documents(str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match="is a directory, and none of datasets"):
        read_documents(str(tmp_path))


def test_the_last_documents_are_held_out() -> None:
    assert split_documents(["a", "b", "c"], 2) == (["a"], ["b", "c"])
    assert split_documents(["a", "b"], 0) == (["a", "b"], [])
    with pytest.raises(DataError, match=r"2 documents, and ppo\.mixture\.eval_documents = 2"):
        split_documents(["a", "b"], 2)


def test_marks_and_chunks_by_hand() -> None:
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="<s>")
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    assert document_marks(tokenizer) == DocumentMarks(bos, eos)
    assert document_marks(tokenizer, [bos, eos]) == DocumentMarks(bos, bos)
    assert document_marks(byte_level_tokenizer(eos_token="</s>")) == DocumentMarks(None, eos)

    def chunks(length: int, **arguments) -> list[tuple[int, ...]]:
        sequences = chunk_documents(["a", "b", "c"], tokenizer, length, **arguments)
        assert all(all(sequence.trained) and sequence.prompt_length == 0 for sequence in sequences)
        return [sequence.ids for sequence in sequences]

    assert chunks(4) == [(bos, a, eos, bos), (b, eos, bos, c)]
    assert chunks(7, generation_stop_ids=[bos]) == [(bos, a, bos, b, bos, c, bos)]
    with pytest.raises(
        DataError, match=r"9 tokens to train on, less than one chunk of ppo\.mixture\.chunk_length = 10"
    ):
        chunks(10)
    whole = document_sequences(["a", "</s>"], tokenizer, 3)
    assert whole[0].ids == (bos, a, eos)
    assert whole[1].ids[0] == bos
    assert len(whole[1].ids) == 3
    assert eos not in whole[1].ids  # typed in a text, it is text


@pytest.mark.real
def test_tinystories_as_stories260k_was_pretrained(shared: Path) -> None:
    documents = read_documents(str(shared / "data/tinystories/val.txt"))
    assert len(documents) == 1911  # 1,912 separators' worth, the last one blank
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    train, held_out = split_documents(documents[:100], 10)
    chunks = chunk_documents(train, tokenizer, 256, generation_stop_ids=[1, 2])
    ids = [token_id for chunk in chunks for token_id in chunk.ids]
    assert {len(chunk.ids) for chunk in chunks} == {256}
    assert 2 not in ids
    assert not any(x == y == 1 for x, y in itertools.pairwise(ids))
    assert 85 <= ids.count(1) <= 91
    sequences = document_sequences(held_out, tokenizer, 512, generation_stop_ids=[1, 2])
    assert all(sequence.ids[0] == 1 for sequence in sequences)
    assert all(sequence.ids[-1] == 1 for sequence in sequences if len(sequence.ids) < 512)
