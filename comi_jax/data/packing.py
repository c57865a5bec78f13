"""The format of a data file, recognised by its first bytes: decompressed, or refused with advice on what to do."""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import Any

_CHUNK = 2**18


class Unreadable(ValueError):
    """An unsupported file: what it is and what to do; or why it cannot be read from ``line`` on."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


def unpacked(raw: io.BufferedReader) -> io.BufferedIOBase:
    """``raw`` as a decompressed stream of UTF-8 bytes without a byte order mark; gzip, bzip2, xz and Zstandard are
    recognised by content.

    Reading a damaged file, or one with trailing garbage, raises OSError, EOFError, zlib.error or lzma.LZMAError.
    Raises Unreadable.
    """
    head, stream = _head(raw), raw
    _refuse(head)
    if opened := next((opened for pattern, opened in _PACKED.items() if pattern.match(head)), None):
        stream = opened(raw)
        head = _head(stream)
        _refuse(head)
        if any(pattern.match(head) for pattern in (_PARQUET, *_PACKED)):
            raise Unreadable("is compressed twice; decompress it once")
    if mark := _BYTE_ORDER_MARK.match(head):
        stream.read(len(mark[0]))
    return stream


def is_parquet(raw: io.BufferedReader) -> bool:
    return bool(_PARQUET.match(_head(raw)))


class _Streams(io.RawIOBase):
    """The concatenated streams of a compressed file, each read by its own decompressor. Python's bzip2 and xz files end
    silently at a damaged later stream."""

    def __init__(self, raw: io.BufferedIOBase, new: Callable[[], Any]):
        self._raw, self._new, self._now, self._rest = raw, new, new(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._now.eof:
                rest = self._now.unused_data
                while not (rest := rest.lstrip(b"\0")):  # padding
                    if not (rest := self._raw.read(_CHUNK)):
                        return 0
                self._rest, self._now = rest, self._new()
            if self._now.needs_input:
                data, self._rest = self._rest or self._raw.read(_CHUNK), b""
                if not data:
                    raise EOFError("the last compressed stream is truncated")
            else:
                data = b""
            if out := self._now.decompress(data, len(buffer)):
                buffer[: len(out)] = out
                return len(out)


def _bzip2(raw: io.BufferedIOBase) -> io.BufferedIOBase:
    return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), _CHUNK)


def _xz(raw: io.BufferedIOBase) -> io.BufferedIOBase:
    return io.BufferedReader(_Streams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)), _CHUNK)


def _zstd(raw: io.BufferedIOBase) -> io.BufferedIOBase:
    import pyarrow  # the standard library has no Zstandard before Python 3.14

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _CHUNK)


# The first bytes of each format.
_PARQUET = re.compile(rb"PAR[1]")
_BYTE_ORDER_MARK = re.compile(rb"\xef\xbb\xbf")
_PACKED = {
    re.compile(rb"\x1f\x8b"): lambda raw: gzip.GzipFile(fileobj=raw),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): _bzip2,
    re.compile(rb"\xfd7zXZ\x00"): _xz,
    re.compile(rb"\x28\xb5\x2f\xfd"): _zstd,
}

# The first bytes of unsupported formats, with the name of each and what to do.
_UNPACK = "unpack it and name the files in it"
_UTF8 = "-t UTF-8 FILE > NEW"
_FOREIGN = {
    re.compile(pattern, re.DOTALL): what
    for pattern, what in {
        rb"PK(\x03\x04|\x05\x06)": f"is a zip archive; {_UNPACK}: unzip FILE",
        rb"7z\xbc\xaf\x27\x1c": f"is a 7z archive; {_UNPACK}",
        rb".{257}ustar": f"is a tar archive; {_UNPACK}: tar -xf FILE",
        rb"ARROW[1]": 'is an Arrow file; make it Parquet: Dataset.from_file("FILE").to_parquet("FILE.parquet")',
        rb"version https://git-lfs\.github\.com/": "is a Git LFS pointer, not the data; fetch it: git lfs pull",
        rb"<(!DOCTYPE|html)": "is a web page, not data; download the file itself",
        rb"(\xff\xfe|\x00\x00\xfe\xff)\x00\x00": f"is text in UTF-32; make it UTF-8: iconv -f UTF-32 {_UTF8}",
        rb"\xff\xfe([ -~]\x00){2}|\xfe\xff(\x00[ -~]){2}": f"is text in UTF-16; make it UTF-8: iconv -f UTF-16 {_UTF8}",
        rb"([ -~]\x00){4}": f"is text in UTF-16; make it UTF-8: iconv -f UTF-16LE {_UTF8}",
        rb"(\x00[ -~]){4}": f"is text in UTF-16; make it UTF-8: iconv -f UTF-16BE {_UTF8}",
    }.items()
}


def _head(stream: Any) -> bytes:
    return stream.peek(512)[:512]


def _refuse(head: bytes) -> None:
    for pattern, what in _FOREIGN.items():
        if pattern.match(head):
            raise Unreadable(what)
