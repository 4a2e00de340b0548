"""Plain text for mixture training and for perplexity: documents, their marks, chunks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from threefold.config.data import SourceSection
from threefold.data.sources.tables import read_rows
from threefold.errors import DataError
from threefold.types import TokenSequence


@dataclass(frozen=True)
class DocumentMarks:
    """Tokens around a document, as the checkpoint was pretrained.

    Attributes:
        start_id: stands before a document; None if nothing does.
        end_id: stands after it; None if nothing does. Where both are one token, one of them separates two documents.
    """

    start_id: int | None
    end_id: int | None


def read_documents(path: str) -> list[str]:
    """Documents of a source of plain text: those of a .txt file (separated by <|endoftext|>), or field `text` of each
    row of any other file; without whitespace around them, blank ones left out.

    Raises:
        DataError: the file is missing, damaged or empty, or has a row without text.
    """
    documents = []
    for row in read_rows(SourceSection(path=[path])):
        document = row.values.get("text")
        if not isinstance(document, str):
            raise DataError(f"{row.origin}: field 'text' is missing or is not a text")
        documents.append(document.strip())
    documents = [document for document in documents if document]
    if not documents:
        raise DataError(f"{path}: holds no text")
    return documents


def split_documents(documents: Sequence[str], eval_documents: int) -> tuple[list[str], list[str]]:
    """Training documents and the last `eval_documents`, which are held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(documents) <= eval_documents:
        raise DataError(
            f"ppo.mixture.source has {len(documents)} documents, and ppo.mixture.eval_documents = {eval_documents} "
            "holds all of them out: lower it, or give more text"
        )
    first_held_out = len(documents) - eval_documents
    return list(documents[:first_held_out]), list(documents[first_held_out:])


def document_marks(tokenizer: PreTrainedTokenizerBase, generation_stop_ids: Collection[int] = ()) -> DocumentMarks:
    """How a checkpoint's pretraining text was marked, as far as its files tell.

    A document begins with bos if the tokenizer has one, and ends with eos; but a checkpoint that lists bos among its
    stop tokens was trained on documents with nothing but bos between them (llama2.c's, say), so there bos ends it too.
    """
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos_id is not None and bos_id in generation_stop_ids:
        return DocumentMarks(bos_id, bos_id)
    return DocumentMarks(bos_id, eos_id)


def document_sequences(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    generation_stop_ids: Collection[int] = (),
) -> list[TokenSequence]:
    """One sequence per document with its marks, cut to `max_length` tokens; all tokens are trained or measured."""
    marks = document_marks(tokenizer, generation_stop_ids)
    return [_all_trained(_document_ids(document, tokenizer, marks)[:max_length]) for document in documents]


def chunk_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    chunk_length: int,
    generation_stop_ids: Collection[int] = (),
) -> list[TokenSequence]:
    """The documents with their marks as one stream, cut into full chunks; what is left at the end is not used.

    Raises:
        DataError: the text is shorter than one chunk.
    """
    marks = document_marks(tokenizer, generation_stop_ids)
    stream: list[int] = []
    for document in documents:
        ids = _document_ids(document, tokenizer, marks)
        if stream and marks.start_id is not None and marks.start_id == marks.end_id:
            ids = ids[1:]
        stream += ids
    starts = range(0, len(stream) - chunk_length + 1, chunk_length)
    if not starts:
        raise DataError(
            f"ppo.mixture.source has {len(stream)} tokens to train on, less than one chunk of "
            f"ppo.mixture.chunk_length = {chunk_length}: lower it, or give more text"
        )
    return [_all_trained(stream[start : start + chunk_length]) for start in starts]


def _document_ids(document: str, tokenizer: PreTrainedTokenizerBase, marks: DocumentMarks) -> list[int]:
    text_ids = tokenizer.encode(document, add_special_tokens=False, split_special_tokens=True, verbose=False)
    start = [] if marks.start_id is None else [marks.start_id]
    end = [] if marks.end_id is None else [marks.end_id]
    return [*start, *text_ids, *end]


def _all_trained(ids: Sequence[int]) -> TokenSequence:
    return TokenSequence(ids=tuple(ids), trained=(True,) * len(ids), prompt_length=0)
