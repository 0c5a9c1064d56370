"""Bytes by name in one file that is written once and never held in memory: texts by id, a run's rows by query.

A record is a name and its bytes; records lie one after the other in the order they came in, then the index: where each
begins, and the 64-bit hashes of the names in rising order. A name is found by bisection and checked in its record, and
may have several records. What is made from a small file stays in memory; what is made from a large one is kept in the
cache folder (FASTRANK_CACHE, else ~/.cache/fastrank) until that file is read with another size or time.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastrank.data.files import DataError

MAX_BYTES_IN_MEMORY = 32 << 20  # of the file that a store is made from
VERSION = 2  # of the layout and of what the readers write into records
_MAGIC = b"fastrank"
_FOOTER = struct.Struct("<8sQQ32s")  # magic, version, number of records, digest of all of them
_NAME_LENGTH = struct.Struct("<I")

Record = tuple[str, bytes]


class Store:
    """The records of a file that `write_store` wrote; may be read from several threads at once.

    digest: changes with any name or byte of the records.
    """

    def __init__(self, file: BinaryIO):
        self._file = file  # keeps the descriptor open
        size = file.seek(0, os.SEEK_END)
        if size < _FOOTER.size:
            raise ValueError("not a store")
        in_memory = isinstance(file, io.BytesIO)
        self._view = file.getbuffer() if in_memory else None
        self._descriptor = None if in_memory else file.fileno()
        magic, version, count, self.digest = _FOOTER.unpack(self._read(size - _FOOTER.size, _FOOTER.size))
        if magic != _MAGIC or version != VERSION:
            raise ValueError("not a store of this version")
        begins = size - _FOOTER.size - 8 * (3 * count + 1)
        if begins < 0:
            raise ValueError("not a whole store")
        # Not records: those are read, not mapped, since a mapped page counts as this process's memory.
        words = (
            np.frombuffer(self._view, np.int64, 3 * count + 1, begins)
            if in_memory
            else np.memmap(file, np.int64, "r", begins, (3 * count + 1,))
        )
        self._offsets, self._hashes, self._places = np.split(words, [count + 1, 2 * count + 1])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def find(self, names: Sequence[str]) -> np.ndarray:
        """The place of each name's first record, int64 (names,); -1 where there is none."""
        hashes = np.fromiter(map(_hash, names), np.int64, len(names))
        found = np.searchsorted(self._hashes, hashes)
        return np.array(
            [self._first(name, one, at) for name, one, at in zip(names, hashes.tolist(), found.tolist(), strict=True)],
            np.int64,
        )

    def may_have(self, names: Sequence[str]) -> np.ndarray:
        """Whether there is a record of each name, bool (names,), by its 64-bit hash alone and so much faster."""
        if not len(self):
            return np.zeros(len(names), bool)
        hashes = np.fromiter(map(_hash, names), np.int64, len(names))
        return self._hashes[np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)] == hashes

    def find_all(self, name: str) -> list[int]:
        """The places of all records of a name, in order."""
        wanted = _hash(name)
        at = int(np.searchsorted(self._hashes, wanted))
        return [place for place in self._with_hash(wanted, at) if self._is(place, name)]

    def repeated(self) -> list[int]:
        """The places of records whose name came before, in no order."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        found = []
        for hash_ in np.unique(self._hashes[same]).tolist():
            seen: set[str] = set()
            for place in self._with_hash(hash_, int(np.searchsorted(self._hashes, hash_))):
                name = self.record(place)[0]
                found += [place] * (name in seen)
                seen.add(name)
        return found

    def record(self, place: int) -> Record:
        """The name and the bytes at a place from 0, in the order in which the records came."""
        begin, end = int(self._offsets[place]), int(self._offsets[place + 1])
        raw = self._read(begin, end - begin)
        (length,) = _NAME_LENGTH.unpack_from(raw)
        start = _NAME_LENGTH.size + length
        return raw[_NAME_LENGTH.size : start].decode(), raw[start:]

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, range(len(self)))

    def _first(self, name: str, wanted: int, at: int) -> int:
        return next((place for place in self._with_hash(wanted, at) if self._is(place, name)), -1)

    def _is(self, place: int, name: str) -> bool:
        start = _start(name.encode())
        return self._read(int(self._offsets[place]), len(start)) == start

    def _with_hash(self, wanted: int, at: int) -> Iterator[int]:
        while at < len(self) and self._hashes[at] == wanted:
            yield int(self._places[at])
            at += 1

    def _read(self, begin: int, count: int) -> bytes:
        if self._view is not None:
            return bytes(self._view[begin : begin + count])
        raw = os.pread(self._descriptor, count, begin)
        while len(raw) < count:  # a large read may come in parts
            more = os.pread(self._descriptor, count - len(raw), begin + len(raw))
            if not more:
                raise OSError("the store was cut while it was read")
            raw += more
        return raw


def open_store(path: str, kind: str, records: Callable[[], Iterable[Record]], *, is_fixed: bool = False) -> Store:
    """The store of a file's records, from the cache where it was made before.

    path: the file they are read from. kind: what is read from it: another kind is another store.
    records: reads them; its errors pass through. is_fixed: the path is no file but a name whose records never change,
    and may be many. Raises DataError where the cache cannot be written.
    """
    try:
        status = os.stat(path)
    except OSError:
        status = None  # `records` says what is wrong
    if not is_fixed and (status is None or status.st_size <= MAX_BYTES_IN_MEMORY):
        file = io.BytesIO()
        write_store(file, records())
        return Store(file)
    # The time of change, too: a copied file may bring the time of its last modification along.
    state = "" if is_fixed else f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    source, state = (_short(text) for text in (f"{kind}\0{path if is_fixed else os.path.realpath(path)}", state))
    folder = cache_folder()
    target = folder / f"{source}-{state}-{VERSION}.store"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{source}.lock", "w") as lock:  # who comes second finds the store made
            fcntl.flock(lock, fcntl.LOCK_EX)
            store = _opened(target)
            if store is None:
                for old in folder.glob(f"{source}-*"):  # of an earlier state of the file, or left by a kill
                    old.unlink(missing_ok=True)
                aside = target.with_suffix(".part")
                try:
                    with open(aside, "wb") as file:
                        write_store(file, _read_by(records))
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(aside, target)
                finally:
                    aside.unlink(missing_ok=True)  # under the lock: afterwards it may be another builder's
                store = Store(open(target, "rb"))  # the store closes it
            return store
    except _ReaderError as error:
        raise error.__cause__ from None
    except OSError as error:
        message = f"the cache of {path} cannot be used ({error}); let FASTRANK_CACHE name a folder with enough space"
        raise DataError(message, target) from error


class _ReaderError(Exception):
    """Its cause came from the file that is read, not from the cache."""


def _read_by(records: Callable[[], Iterable[Record]]) -> Iterator[Record]:
    try:
        yield from records()
    except Exception as error:
        raise _ReaderError from error


def _opened(target: Path) -> Store | None:
    """The store of an earlier run; None where there is none, or a damaged one."""
    try:
        return Store(open(target, "rb"))
    except (FileNotFoundError, ValueError, struct.error):
        return None


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def cache_folder() -> Path:
    named = os.environ.get("FASTRANK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.expanduser(named or os.path.join(base, "fastrank")))


def write_store(file: BinaryIO, records: Iterable[Record]) -> None:
    """Writes records to an empty binary file; the index takes 40 bytes of memory for each."""
    digest = hashlib.blake2b(digest_size=32)
    offsets, hashes = array("q", [0]), array("q")
    for name, payload in records:
        record = _start(name.encode()) + payload
        file.write(record)
        digest.update(record)
        hashes.append(_hash(name))
        offsets.append(offsets[-1] + len(record))
    # Stable, so that the records of one name stay in their order.
    order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable") if hashes else np.zeros(0, np.int64)
    file.write(b"\0" * (-offsets[-1] % 8))
    file.write(offsets.tobytes())
    file.write(np.frombuffer(hashes, np.int64)[order].tobytes() if hashes else b"")
    file.write(order.astype(np.int64).tobytes())
    file.write(_FOOTER.pack(_MAGIC, VERSION, len(hashes), digest.digest()))


def _start(encoded: bytes) -> bytes:
    return _NAME_LENGTH.pack(len(encoded)) + encoded


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
