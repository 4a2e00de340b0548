"""Bytes and text of local files, unpacked on the way and never held whole; what cannot be read names the file and the
byte."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow

from threefold.errors import DataError

CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = "\ufeff"
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
FIRST_BYTES = {
    b"PAR1\x15": "a parquet file: give it the ending .parquet",
    b"\x1f\x8b": "packed by gzip: give it the further ending .gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd: give it the further ending .zst",
    b"PK\x03\x04": "a zip archive (as .xlsx is): unpack it, or save the sheet as csv in UTF-8",
    b"ARROW1\0": "an Arrow file: name the directory of datasets.save_to_disk that it is in, or save it as parquet",
    b"%PDF-1.": "a PDF: save its text as UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file that it stands for (git lfs pull)",
}
"""Files that do not hold what their ending says, by how they begin: what they are, and what to do."""
SAMPLE_BYTES = 4096
COMMON_CHINESE = "的一是不了在人有我他这中大来上个国们为到说和你地出时要以就会可也对生能而子那得于着下自之年"


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked where its name ends in .gz or .zst.

    Raises:
        DataError: it cannot be read, or its packing is damaged or cut, then or in the middle of reading.
    """
    try:
        with _stream(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; is the file whole?") from error


def _stream(path: Path) -> io.BufferedReader:
    ending = path.suffix.lower()
    if ending == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"), CHUNK_BYTES)
    if ending == ".zst":
        # This reader says so where a file is cut; that of the package zstandard takes the cut for the end.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), CHUNK_BYTES)
    return io.BufferedReader(path.open("rb", 0), CHUNK_BYTES)


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends ("\\n" ends a line, nothing else does), without a byte order mark.

    Raises:
        DataError: as `opened`; or a byte is not UTF-8.
    """
    with opened(path) as stream:
        _refuse_no_text(path, stream)
        offset = 0
        for line in stream:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset, error) from error
            yield text.removeprefix(BYTE_ORDER_MARK) if not offset else text
            offset += len(line)


def text_chunks(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces of about CHUNK_BYTES, none of them empty, without a byte order mark.

    Raises:
        DataError: as `text_lines`.
    """
    with opened(path) as stream:
        _refuse_no_text(path, stream)
        offset = 0
        pending = b""
        while True:
            read = stream.read(CHUNK_BYTES)
            pending += read
            try:
                text, used = codecs.utf_8_decode(pending, "strict", not read)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset, error) from error
            if not offset:
                text = text.removeprefix(BYTE_ORDER_MARK)
            offset += used
            pending = pending[used:]
            if text:
                yield text
            if not read:
                return


def guessed_encoding(sample: bytes) -> str:
    """Name of the encoding that bytes which are no UTF-8 are most likely in; "" where nothing speaks for one.

    A byte order mark or many zero bytes tell UTF-16. Else what remains is a choice of the old national encodings:
    Western texts have single high bytes among ASCII, Chinese and Japanese ones have runs of them, which then decode to
    characters that such texts really use.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return name
    if sample.count(0) > len(sample) / 10:
        return "UTF-16"
    high = [byte >= 0x80 for byte in sample]
    num_high = sum(high)
    alone = sum(
        here and not (index and high[index - 1]) and not (index + 1 < len(high) and high[index + 1])
        for index, here in enumerate(high)
    )
    if not num_high:
        return ""
    if alone > num_high / 2:
        return "Latin-1 (Windows-1252)"
    shares = {
        "GBK": _share(sample, "gb18030", lambda character: character in COMMON_CHINESE) * 3,
        "Shift-JIS": _share(sample, "shift_jis", lambda character: "\u3041" <= character <= "\u30f6"),
        "EUC-JP": _share(sample, "euc_jp", lambda character: "\u3041" <= character <= "\u30f6"),
    }
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.1 else ""


def _share(sample: bytes, encoding: str, usual: Callable[[str], bool]) -> float:
    """Share of usual characters among those beyond ASCII."""
    characters = [character for character in sample.decode(encoding, "replace") if character >= "\u0080"]
    return sum(usual(character) for character in characters) / max(1, len(characters))


def refuse_other_kind(path: Path, sample: bytes) -> None:
    """Refuse a file whose first bytes are those of another kind than its ending says.

    Raises:
        DataError: says what it is.
    """
    for first, what in FIRST_BYTES.items():
        if sample.startswith(first):
            raise DataError(f"{path}: is not what its ending says, but {what}")


def _refuse_no_text(path: Path, stream: io.BufferedReader) -> None:
    """English in UTF-16 is UTF-8 as well, with zeros between the letters."""
    sample = stream.peek(SAMPLE_BYTES)[:SAMPLE_BYTES]
    refuse_other_kind(path, sample)
    if sample.count(0) > len(sample) / 10:
        raise DataError(
            f"{path}: is not UTF-8 text (byte {sample.index(0)} is zero, as are many); it looks like "
            f"{guessed_encoding(sample)}: save it as UTF-8"
        )


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    around = error.object if not offset else error.object[max(0, error.start - SAMPLE_BYTES // 2) :]
    guess = guessed_encoding(around[:SAMPLE_BYTES])
    looks = f"it looks like {guess}: " if guess else ""
    return DataError(
        f"{path}: is not UTF-8 text (byte {offset + error.start}: {error.reason}); {looks}save it as UTF-8"
    )
