"""Files are read line by line with exact numbers, and written whole or not at all."""

import gzip
import io
import os
import threading
from pathlib import Path

import pytest

from fastrank.data import DataError, read_lists
from fastrank.data.files import clean_text, decode, expand_path, read_lines, write_aside


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n \t\ntwo\x0b\x0c\x1c\xe2\x80\xa8\xc2\x85 still two\nthree")
    assert list(read_lines(path, "x")) == [
        (1, b"one"),
        (4, b"two\x0b\x0c\x1c\xe2\x80\xa8\xc2\x85 still two"),
        (5, b"three"),
    ]


def test_gzip_is_told_by_content(tmp_path):
    (tmp_path / "named_plain.txt").write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
    (tmp_path / "named_gzip.gz").write_bytes(b"a\nb\n")
    for name in ("named_plain.txt", "named_gzip.gz"):
        assert [raw for _, raw in read_lines(tmp_path / name, "x")] == [b"a", b"b"]


def test_damaged_gzip_names_file_and_line(tmp_path):
    whole = gzip.compress("".join(f"line {i} {os.urandom(30).hex()}\n" for i in range(2000)).encode())
    path = tmp_path / "cut.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="the gzip file ends early after this line; fetch it again") as caught:
        list(read_lines(path, "x"))
    assert str(caught.value).startswith(f"{path}:{caught.value.line}: ") and 500 < caught.value.line < 1500
    for damaged in (whole[: len(whole) // 2] + b"\0" * 40 + whole[len(whole) // 2 + 40 :], whole[:-6] + b"wrong!"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut\.gz:\d+: the gzip file is damaged"):
            list(read_lines(path, "x"))


def test_missing_empty_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"no_such: no such file$"):
        list(read_lines(tmp_path / "no_such", "x"))
    with pytest.raises(DataError, match="is a folder; a file was expected"):
        list(read_lines(tmp_path, "x"))
    (tmp_path / "blank").write_text("\n \n")
    with pytest.raises(DataError, match=r"blank: the file is empty; expected lines of this and that$"):
        list(read_lines(tmp_path / "blank", "this and that"))
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"empty\.gz: the file is empty"):
        list(read_lines(tmp_path / "empty.gz", "x"))


def test_standard_input(monkeypatch):
    content = b'{"query": "q", "documents": ["d"]}\n{"query": "q"}\n'
    for data in (content, gzip.compress(content)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
        with pytest.raises(DataError, match=r"^<stdin>:2: the key 'documents' is missing; found 'query'$"):
            read_lists("-")


def test_pipes_are_read_from_their_first_byte(tmp_path):
    for data in (b"one\n" * 5000, gzip.compress(b"one\n" * 5000)):
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
        writer.start()
        assert len(list(read_lines(tmp_path / "pipe", "x"))) == 5000
        writer.join()
        (tmp_path / "pipe").unlink()


def test_invalid_utf8_names_the_byte():
    with pytest.raises(DataError, match=r"^f:3: byte 4 of the line \(0xff\) is not valid UTF-8"):
        decode(b"abc\xff", "f", 3)


def test_lone_surrogates_become_replacement_characters():
    assert clean_text("a\ud800b\udfff😀") == "a\ufffdb\ufffd😀"


def test_expand_path(monkeypatch):
    monkeypatch.setenv("FASTRANK_DATA", "/there")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("$FASTRANK_DATA/a") == expand_path("${FASTRANK_DATA}/a") == "/there/a"
    assert expand_path(Path("~/b")) == "/home/me/b"
    monkeypatch.delenv("FASTRANK_DATA")
    for path in ("$FASTRANK_DATA/a", "${FASTRANK_DATA}/a"):
        with pytest.raises(DataError, match="the environment variable FASTRANK_DATA is not set"):
            expand_path(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "out.txt"
    with write_aside(path) as file:
        file.write("first\n")
    with pytest.raises(RuntimeError), write_aside(path) as file:
        file.write("second\n")
        file.flush()
        raise RuntimeError
    assert path.read_text() == "first\n" and list(path.parent.iterdir()) == [path]
    # Whoever has the old file open keeps it whole: the new one takes its name, not its bytes.
    with open(path) as old:
        with write_aside(path) as file:
            file.write("third\n")
        assert old.read() == "first\n" and path.read_text() == "third\n"
    assert list(path.parent.iterdir()) == [path]


def test_gzip_output_is_the_same_every_time(tmp_path):
    for name in ("a.gz", "b.gz"):
        with write_aside(tmp_path / name) as file:
            file.write("text\n")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"text\n"
    # The header's time is left empty: two writes in one second would be equal all the same.
    assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4)
