"""Read UTF-8 text files line by line, plain or compressed by gzip or zstd. Every error names the file and the line.

    read_lines(path)    (line number, text); a line ends with "\\n" or "\\r\\n" only
    read_jsonl(path)    (line number, value); blank lines are skipped
    read_tsv(path)      (line number, fields)

A byte order mark is removed. The length of a line and the size of a decompressed file are limited.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any

from negmine.mining.regular_file import cause, open_regular, parse_json
from negmine.ops.checks import describe

MAX_LINE_BYTES = 1 << 26
MAX_RATIO = 500  # limit for decompressed size / compressed size
FREE_BYTES = 1 << 26  # MAX_RATIO applies only to files that decompress to more bytes than this
ZSTD_PIECE = 1 << 10  # compressed bytes read at a time; they decompress to at most 32 MiB
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
GZIP_MAGIC = b"\x1f\x8b"


class _Frames(io.RawIOBase):
    """The decompressed content of a zstd file.

    zstandard's own reader does not notice when a file was cut short; this one raises EOFError.
    """

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None  # the decompressor of the current frame
        self._ahead, self._made = b"", memoryview(b"")  # compressed and decompressed bytes not yet used

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            piece = self._ahead or self._file.read(ZSTD_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._made = memoryview(self._frame.decompress(piece))
            self._ahead = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._made))
        buffer[:size], self._made = self._made[:size], self._made[size:]
        return size


def _decompressed(path: str | os.PathLike, file: IO[bytes]) -> IO[bytes]:
    """The content of a file, decompressed if its first bytes are those of a gzip or zstd file."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if start == ZSTD_MAGIC:
        try:
            import zstandard
        except ImportError as error:
            wanted = "pip install zstandard"
            raise ImportError(f"{describe(str(path))} is compressed by zstd, and reading it needs {wanted}") from error
        return io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor(max_window_size=1 << 27)))
    return file


def _byte_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without the end of the line)."""
    with open_regular(path) as file:
        size, where, number, inflated = os.fstat(file.fileno()).st_size, describe(str(path)), 0, 0
        content = _decompressed(path, file)
        is_compressed = content is not file
        while True:
            try:
                line = content.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:  # raised by gzip
                raise ValueError(f"{where} is damaged after line {number} ({cause(error)})") from error
            except Exception as error:  # ZstdError is a plain Exception
                if not is_compressed:
                    raise
                raise ValueError(f"{where} is damaged after line {number} ({cause(error)})") from error
            if not line:
                return
            number += 1
            inflated += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} of {where} is longer than {MAX_LINE_BYTES:,} bytes")
            if is_compressed and inflated > FREE_BYTES and inflated > MAX_RATIO * size:
                raise ValueError(f"{where} decompresses to more than {MAX_RATIO} times its {size:,} bytes")
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line of a text file in UTF-8."""
    where = describe(str(path))
    for number, line in _byte_lines(path):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{where} must be in UTF-8, but begins with a UTF-16 byte order mark")
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            came = f"byte {line[error.start]:#04x} at {error.start}"
            raise ValueError(f"line {number} of {where} must be in UTF-8, got {came}") from error


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a .jsonl file; blank lines are skipped."""
    where = describe(str(path))
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_json(line, f"line {number} of {where}")


def read_tsv(path: str | os.PathLike, columns: int) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line of a tab-separated file. Blank lines are skipped; the last field may contain tabs."""
    where = describe(str(path))
    for number, line in read_lines(path):
        if line.strip():
            fields = line.split("\t", columns - 1)
            if len(fields) != columns:
                raise ValueError(
                    f"line {number} of {where} must have {columns} fields separated by tabs, got {len(fields)}"
                )
            yield number, fields
