"""Bytes and text of files: unpacked as they are read; a byte that is no UTF-8, and a cut packing, are named."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest
import zstandard

from threefold.data.sources import streams
from threefold.data.sources.streams import guessed_encoding, text_chunks, text_lines
from threefold.errors import DataError

TEXT = "one\r\ntwo 漢字\n\nthree \u2028 four 😀"

WESTERN = "Où est passée la clé ? Elle a été égarée près de l’hôtel, à côté du café où Zoë déjeunait. "
CHINESE = "我们的目标是写一个可以使用的程序，他说这是最好的方法。你觉得怎么样？请用一句话回答下面的问题。"
JAPANESE = "私たちは毎日ここで本を読んでいます。あなたもいっしょに読みませんか。それはとてもいい考えだと思います。"


def packed(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content[:7]) + gzip.compress(content[7:])
    if ending == ".zst":
        return zstandard.compress(content[:7]) + zstandard.compress(content[7:])
    return content


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
def test_text_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """In lines and in chunks of any size, of one packing or of several one after the other."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed(b"\xef\xbb\xbf" + TEXT.encode(), ending.lower()))
    assert list(text_lines(path)) == ["one\r\n", "two 漢字\n", "\n", "three \u2028 four 😀"]
    for size in (1, 2, 3, 5, 1000):
        monkeypatch.setattr(streams, "CHUNK_BYTES", size)
        assert "".join(text_chunks(path)) == TEXT
    path.write_bytes(packed(b"", ending.lower()))
    assert list(text_lines(path)) == list(text_chunks(path)) == []


@pytest.mark.parametrize("reader", [text_lines, text_chunks])
def test_a_byte_that_is_no_utf8_is_named(tmp_path: Path, reader: object) -> None:
    assert callable(reader)
    path = tmp_path / "a.txt"
    for content, message in [
        (b"abc\n" * 1000 + b"d\xe9f\n", r"byte 4001: invalid continuation byte\); it looks like Latin-1"),
        (WESTERN.encode("cp1252"), r"byte 1: .*\); it looks like Latin-1 \(Windows-1252\): save it as UTF-8"),
        (CHINESE.encode("gbk"), "byte 0: .*it looks like GBK"),
        (b"a,b\n" + CHINESE.encode("gb18030") * 200, "byte 4: .*it looks like GBK"),
        (JAPANESE.encode("shift_jis"), "byte 0: .*it looks like Shift-JIS"),
        (JAPANESE.encode("euc_jp"), "byte 0: .*it looks like EUC-JP"),
        (TEXT.encode("utf-16"), "it looks like UTF-16"),
        (CHINESE.encode("utf-16"), "byte 0: .*it looks like UTF-16"),
        (b'{"prompt": "Hi"}\n'.decode().encode("utf-16-le"), r"byte 1 is zero, as are many\); it looks like UTF-16"),
        (b"x\n" * 10000 + "漢".encode()[:2], "byte 20000: unexpected end of data"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.txt: is not UTF-8 text .*{message}") as caught:
            list(reader(path))
        assert "\n" not in str(caught.value)


def test_no_guess_without_a_sign() -> None:
    assert guessed_encoding(b"plain") == ""
    assert guessed_encoding(bytes(range(128, 256)) * 4) == ""


@pytest.mark.parametrize("reader", [text_lines, text_chunks])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_or_damaged_packing_is_an_error(tmp_path: Path, reader: object, ending: str) -> None:
    """Also where the cut is in the middle of the data, so that what was read is good so far."""
    assert callable(reader)
    whole = b"".join(b"line %d\n" % (number * 7919 % 10007) for number in range(20000))
    packing = gzip.compress(whole) if ending == ".gz" else zstandard.compress(whole)
    path = tmp_path / f"a.txt{ending}"
    for content in (packing[:-1], packing[: len(packing) // 2], packing[:20], b"plain text", packing + b"more"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.txt{ending}: cannot be read: .*; is the file whole\?") as caught:
            list(reader(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_is_not_loaded_whole(tmp_path: Path, ending: str) -> None:
    """Lines are given before the end is seen: of a file without its end, most of them."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed(b"".join(b"%x\n" % (number * 7919 % 10007) for number in range(800_000)), ending)[:-100])
    lines = text_lines(path)
    assert sum(1 for _ in itertools.islice(lines, 400_000)) == 400_000
    with pytest.raises(DataError, match="is the file whole"):
        list(lines)
