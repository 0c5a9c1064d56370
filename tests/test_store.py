"""Stores: what was written comes back, from memory and from disk; large files are read once and never held."""

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrank.data import DataError, RankingList, load_data, read_ranked_run, read_run, write_lists
from fastrank.data import store as store_module
from fastrank.data.runs import RankedRun
from fastrank.data.store import Store, open_store, write_store

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Every file counts as large."""
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "MAX_BYTES_IN_MEMORY", 0)
    return tmp_path / "cache"


def _in_memory(records):
    file = io.BytesIO()
    write_store(file, records)
    return Store(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(records=st.lists(st.tuples(NAMES, st.binary(max_size=20)), max_size=12), asked=st.lists(NAMES, max_size=4))
def test_records_come_back(tmp_path, records, asked):
    path = tmp_path / "file.store"
    with open(path, "wb") as file:
        write_store(file, records)
    names = [name for name, _ in records]
    for store in (_in_memory(records), Store(open(path, "rb"))):
        assert list(store) == records and len(store) == len(records)
        asked = asked + names
        expected = [names.index(name) if name in names else -1 for name in asked]
        assert store.find(asked).tolist() == expected
        assert store.may_have(asked).tolist() == [place >= 0 for place in expected]
        for name in asked:
            assert store.find_all(name) == [i for i, one in enumerate(names) if one == name]
        assert sorted(store.repeated()) == [i for i, name in enumerate(names) if name in names[:i]]


def test_names_of_one_hash(monkeypatch):
    monkeypatch.setattr(store_module, "_hash", lambda name: len(name))
    store = _in_memory([("ab", b"1"), ("cd", b"2"), ("ab", b"3")])
    assert store.find(["cd", "ab", "ef", "x"]).tolist() == [1, 0, -1, -1]
    assert store.may_have(["ef", "x"]).tolist() == [True, False]
    assert store.find_all("ab") == [0, 2] and store.repeated() == [2]


def test_the_digest_changes_with_every_byte():
    digests = {
        _in_memory(records).digest
        for records in ([], [("a", b"bc")], [("ab", b"c")], [("a", b"b"), ("c", b"")], [("a", b"bd")])
    }
    assert len(digests) == 5


def test_a_large_file_is_read_once(tmp_path, on_disk):
    path, calls = tmp_path / "a", []
    path.write_text("x")

    def records():
        calls.append(1)
        return [("a", path.read_bytes())]

    for _ in range(2):
        assert list(open_store(str(path), "text", records)) == [("a", b"x")]
    assert len(calls) == 1 and len(_stores(on_disk)) == 1
    open_store(str(path), "another", records)
    assert len(calls) == 2
    path.write_text("yy")
    assert list(open_store(str(path), "text", records)) == [("a", b"yy")] and len(calls) == 3
    assert len(_stores(on_disk)) == 2, "the older state is gone"
    time.sleep(0.01)
    path.write_text("zz")
    assert list(open_store(str(path), "text", records)) == [("a", b"zz")], "of the same size"
    path.write_text("xx")
    os.utime(path, (0, 0))
    open_store(str(path), "text", records)
    path.write_text("yy")
    os.utime(path, (0, 0))
    assert list(open_store(str(path), "text", records)) == [("a", b"yy")], "of the same size and time of modification"


def _stores(folder):
    return [name for name in os.listdir(folder) if not name.endswith(".lock")]


def test_several_builders_make_one_store(tmp_path, on_disk):
    path, calls = tmp_path / "a", []
    path.write_text("x")

    def records():
        calls.append(1)
        for number in range(2000):
            time.sleep(1e-4)
            yield str(number), bytes(50)

    def build(_):
        return len(list(open_store(str(path), "text", records)))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(build, range(3))) == [2000] * 3
    assert len(calls) == 1 and len(_stores(on_disk)) == 1


def test_what_a_kill_left_is_removed(tmp_path, on_disk):
    path = tmp_path / "a"
    path.write_text("x")
    open_store(str(path), "text", lambda: [("a", b"x")])
    (made,) = _stores(on_disk)
    (on_disk / made).rename((on_disk / made).with_suffix(".part"))
    open_store(str(path), "text", lambda: [("a", b"x")])
    assert _stores(on_disk) == [made]


def test_an_error_leaves_nothing_behind(tmp_path, on_disk):
    (tmp_path / "run").write_text("1 0 a 1 9 t\n1 0 b 2\n")
    for _ in range(2):
        with pytest.raises(DataError, match="run:2: expected 6 columns"):
            read_ranked_run(tmp_path / "run")
    assert _stores(on_disk) == []
    (tmp_path / "run").write_text("1 0 a 1 9 t\n")

    def records():
        raise ValueError("of the reader")
        yield

    with pytest.raises(ValueError, match="of the reader"):
        open_store(str(tmp_path / "run"), "text", records)


def test_a_cache_that_cannot_be_used(tmp_path, on_disk, monkeypatch):
    (tmp_path / "run").write_text("1 0 a 1 9 t\n")
    read_ranked_run(tmp_path / "run")
    (name,) = _stores(on_disk)
    for damaged in ((on_disk / name).read_bytes()[:-3], b"", b"x" * 56):
        (on_disk / name).write_bytes(damaged)
        assert read_run(tmp_path / "run") == {"1": {"a": 9.0}}, "a damaged store is made again"
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "run"))
    with pytest.raises(DataError, match="FASTRANK_CACHE name a folder"):
        read_ranked_run(tmp_path / "run")


@pytest.mark.parametrize("large", [False, True])
def test_a_query_whose_rows_do_not_stand_together(tmp_path, large, request):
    if large:
        request.getfixturevalue("on_disk")
    (tmp_path / "run").write_text("1 0 a 1 9 t\n2 0 a 1 9 t\n1 0 b 2 8 t\n3 0 c 1 1 t\n1 0 c 3 7 t\n")
    run = RankedRun(tmp_path / "run")
    assert list(run) == ["1", "2", "3"] and len(run) == 3 and "2" in run and "4" not in run
    assert run["1"].document_ids == ["a", "b", "c"] and list(run["1"].lines) == [1, 3, 5]
    with pytest.raises(KeyError):
        run["4"]
    (tmp_path / "twice").write_text("1 0 a 1 9 t\n2 0 a 1 9 t\n1 0 a 2 8 t\n")
    with pytest.raises(DataError, match=r"twice:3: document 'a' comes twice for query '1'; it was on line 1"):
        read_ranked_run(tmp_path / "twice")


def test_ids_with_a_line_end(tmp_path):
    for ids in (["a\nb"], ["a", "b\nc"], ["a\nb", '["a"]']):
        path = tmp_path / "scores.jsonl"
        path.write_text(json.dumps([7, *([name, -i] for i, name in enumerate(ids))]) + "\n")
        assert read_run(path) == {"7": {name: -i for i, name in enumerate(ids)}}


def test_lists_are_the_same_from_disk(tmp_path, monkeypatch):
    (tmp_path / "queries.tsv").write_text("1\tone\n2\ttwo\n3\tthree\n")
    (tmp_path / "documents.tsv").write_text("".join(f"{x}\t{x.upper()}é\n" for x in "abcdef"))
    (tmp_path / "run").write_text("1 0 c 3 9 t\n1 0 a 1 9 t\n1 0 b 2 10 t\n2 0 d 1 1 t\n3 0 f 1 1 t\n")
    (tmp_path / "qrels").write_text("1 0 b 2\n1 0 d 1\n2 0 d 0\n3 0 zz 1\n")
    write_lists(tmp_path / "rows.jsonl", [RankingList("q", ("a", "b"), (1.0, float("inf")), "7", ("x", "y"))])
    files = {name: str(tmp_path / name) for name in ("run", "qrels")}
    files |= {name: str(tmp_path / f"{name}.tsv") for name in ("queries", "documents")}
    sources = [
        files | {"depth": 2, "add_judged": True},
        files | {"targets": "rank", "sampling": "random", "sample_size": 2},
        files | {"run": "bm25"},
        str(tmp_path / "rows.jsonl"),
    ]
    small = load_data(sources, seed=1)
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "MAX_BYTES_IN_MEMORY", 0)
    for _ in range(2):
        large = load_data(sources, seed=1)
        assert list(large.candidates) == list(small.candidates) and large.candidates == small.candidates
        assert large.candidates[1:3] == list(small.candidates)[1:3] and large.candidates[-1] == small.candidates[-1]
        assert (large.keys, large.qrels, str(large.report)) == (small.keys, small.qrels, str(small.report))
        assert large.draw_all(epoch=3) == small.draw_all(epoch=3) and large.fingerprint == small.fingerprint
    (tmp_path / "documents.tsv").write_text("".join(f"{x}\t{x.upper()}e\n" for x in "abcdef"))
    assert load_data(sources, seed=1).fingerprint != small.fingerprint


def test_a_document_that_comes_twice(tmp_path):
    (tmp_path / "queries.tsv").write_text("1\tone\n")
    (tmp_path / "documents.tsv").write_text("a\tA\nb\tB\nb\tC\n")
    (tmp_path / "run").write_text("1 0 a 1 9 t\n")
    source = {"queries": tmp_path / "queries.tsv", "documents": tmp_path / "documents.tsv", "targets": "rank"}
    assert len(load_data(source | {"run": tmp_path / "run"}, seed=0)) == 1, "nobody wants it"
    (tmp_path / "run").write_text("1 0 b 1 9 t\n")
    with pytest.raises(DataError, match=r"documents\.tsv: the document id 'b' comes twice"):
        load_data(source | {"run": tmp_path / "run"}, seed=0)


PEAK = """
import resource, sys
from fastrank.data import load_data
folder = sys.argv[1]
source = {name: f"{folder}/{name}.tsv" for name in ("queries", "documents")}
data = load_data(source | {"run": f"{folder}/a.run", "targets": "rank", "sampling": "top", "sample_size": 5}, seed=0)
for index in range(0, len(data), 7):
    assert len(data.draw(index, epoch=0)) == 5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_run(tmp_path):
    """40 MB of run take at most 10 MB more than 0.4 MB (the bar of 200 MB for 2 GB, in small)."""
    rng, peaks = np.random.default_rng(0), []
    for num_queries in (100, 10_000):
        folder = tmp_path / str(num_queries)
        folder.mkdir()
        (folder / "documents.tsv").write_text("".join(f"{i}\tpassage {i}\n" for i in range(5000)))
        (folder / "queries.tsv").write_text("".join(f"{q}\tquery {q}\n" for q in range(num_queries)))
        with open(folder / "a.run", "w") as file:
            for query in range(num_queries):
                start = rng.integers(4000)
                file.writelines(
                    f"{query}\t0\t{start + i}\t{i + 1}\t{200 - i}.{'0' * 18}\tteacher\n" for i in range(100)
                )
        environment = os.environ | {"FASTRANK_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(float(done.stdout))
    assert os.path.getsize(folder / "a.run") > 40e6
    assert peaks[1] - peaks[0] < 10, peaks
