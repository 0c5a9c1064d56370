"""Lines out of a file, each with its number, and files that appear whole or not at all.

In: a path, plain or gzip. Out: decoded lines, or a DataError that names file and line. Lines end at \\n alone: U+2028,
NEL and form feeds belong to the text. Writing goes to a neighbour file that is renamed once it is complete.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

_GZIP_MAGIC = b"\x1f\x8b"
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Input that cannot be used; str() is "path:line: sentence", without the parts that are unknown.

    sentence: what is wrong, what was expected. path: the file. line: 1-based line number.
    """

    def __init__(self, sentence: str, path: object = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + sentence)
        self.sentence = sentence
        self.path = None if path is None else str(path)
        self.line = line


def expand_path(path: str | os.PathLike[str]) -> str:
    """The path with ~ and environment variables such as $FASTRANK_DATA filled in.

    Raises DataError where the path needs FASTRANK_DATA and the variable is not set.
    """
    text = os.path.expandvars(os.path.expanduser(os.fspath(path)))
    if re.search(r"\$(FASTRANK_DATA\b|\{FASTRANK_DATA\})", text):
        raise DataError(
            "the environment variable FASTRANK_DATA is not set; let it name the folder that holds the data", path
        )
    return text


def read_lines(path: str | os.PathLike[str], expected: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a plain or gzip file, blank lines left out.

    path: the file, told by its first bytes and not by its name whether it is gzip; "-" = standard input.
    expected: what a line should hold, for the error of an empty file.
    Raises DataError for a file that is missing, unreadable, damaged or without a single line that is not blank.
    """
    name = name_of(path)
    number = 0
    empty = True
    try:
        with _open_binary(path) as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                line = line.rstrip(b"\r\n")
                if line.strip():
                    empty = False
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        kind = "ends early" if isinstance(error, EOFError) else "is damaged"
        where = "after this line" if number else "before its first line ends"
        raise DataError(f"the gzip file {kind} {where}; fetch it again", name, number or None) from None
    except FileNotFoundError:
        raise DataError("no such file", name) from None
    except IsADirectoryError:
        raise DataError("is a folder; a file was expected", name) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", name) from None
    if empty:
        raise DataError(f"the file is empty; expected lines of {expected}", name)


def name_of(path: str | os.PathLike[str]) -> str:
    """The path as errors name it."""
    return "<stdin>" if path == "-" else os.fspath(path)


def decode(raw: bytes, path: object, line: int) -> str:
    """The UTF-8 text of `raw`; raises DataError with the offending byte's place in the line."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not valid UTF-8; save the file as UTF-8",
            path,
            line,
        ) from None


def clean_text(text: str) -> str:
    """The text with every lone surrogate turned into U+FFFD, so that it can be encoded and written."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A UTF-8 text stream whose content becomes `path` when the block ends well, and vanishes when it raises.

    path: gzip-compressed where its name ends in .gz; its folder is made if need be. A pipe or a device cannot be
    replaced and is written to as it is.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        with open(target, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            # No name and no time in the gzip header: equal content gives equal bytes.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) if target.suffix == ".gz" else file
            text = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
            yield text
            text.detach()
            if packed is not file:
                packed.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_binary(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    # Looked into and read through one buffer: a pipe cannot be opened a second time.
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        if file.peek(2)[:2] == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        else:
            yield file
