import hashlib
import json
import math
import os
import subprocess
import sys
import warnings

import pytest

from fastrank.data import demo

PARTS = ("train", "development", "test")

IN_A_NEW_PROCESS = """
import json, sys
from test_demo_corpus import demo, fingerprint

before = set(sys.modules)
corpus = demo.build_demo_corpus()
imported = set(sys.modules) - before
unwanted = {"torch", "antigravity", "this", "turtle", "tkinter", "webbrowser", "idlelib", "distutils", "pip"}
print(json.dumps({"fingerprint": fingerprint(corpus), "unwanted": sorted(unwanted & imported)}))
"""


def fingerprint(corpus):
    digest = hashlib.sha256()
    for name in PARTS:
        part = getattr(corpus, name)
        digest.update(repr((part.qrels, part.bm25, part.sources)).encode())
        for ranking in part.lists:
            digest.update(repr((ranking.query, ranking.labels, ranking.query_id, ranking.document_ids)).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def new_process(tmp_path_factory):
    """The build in a process whose sets are ordered differently; started first, it runs beside ours."""
    folder = tmp_path_factory.mktemp("build")
    # The folder of this file holds `fingerprint`.
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_NEW_PROCESS],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.path.dirname(__file__)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield folder, process


@pytest.fixture(scope="module")
def corpus(new_process):
    return demo.build_demo_corpus()


@pytest.fixture(scope="module")
def answer(corpus, new_process):
    folder, process = new_process
    output, errors = process.communicate(timeout=300)
    return folder, output, errors


def test_no_document_and_no_query_stands_in_two_parts(corpus):
    for texts in (
        lambda part: {text for ranking in part.lists for text in ranking.documents} | set(part.sources),
        lambda part: {name for ranking in part.lists for name in ranking.document_ids},
        lambda part: {ranking.query for ranking in part.lists},
    ):
        train, development, test = (texts(getattr(corpus, name)) for name in PARTS)
        assert train and development and test
        assert not (train & development or train & test or development & test)


def test_the_summary_is_nowhere_in_its_document(corpus):
    for name in PARTS:
        part = getattr(corpus, name)
        for ranking, source in zip(part.lists, part.sources, strict=True):
            assert ranking.query.lower() not in source.lower()


def test_labels_and_judgments_name_the_source_document(corpus):
    for name in PARTS:
        part = getattr(corpus, name)
        missed = 0
        for ranking, source in zip(part.lists, part.sources, strict=True):
            (judged,) = part.qrels[ranking.query_id]
            relevant = [i for i, label in enumerate(ranking.labels) if label > 0]
            assert [ranking.document_ids[i] for i in relevant] == [judged] * len(relevant)
            assert [ranking.documents[i] for i in relevant] == [source] * len(relevant)
            assert len(ranking) <= demo.CANDIDATES and len(relevant) <= 1
            assert tuple(part.bm25[ranking.query_id]) == ranking.document_ids
            missed += not relevant
        assert 0 < missed < len(part.lists) / 2
        assert len(part.qrels) == len(part.lists)


def test_bm25_finds_much_but_leaves_room(corpus):
    part = corpus.test
    gains = [
        next((1 / math.log2(i + 2) for i, label in enumerate(ranking.labels[:10]) if label > 0), 0.0)
        for ranking in part.lists
    ]
    assert 0.40 < sum(gains) / len(gains) < 0.70
    assert 0.65 < sum(1 in ranking.labels for ranking in part.lists) / len(part.lists) < 0.92
    assert len(corpus.train.lists) > 2000 and len(part.lists) > 1000


def test_a_sample_of_queries_is_searched_in_all_documents():
    entries = [(f"{i:012x}", f"query about word{i}", f"text word{i} word{i - 1} filler") for i in range(30)]
    part = demo._search(entries, 4, 50)
    assert [ranking.query_id for ranking in part.lists] == [f"q{i:012x}" for i in range(4)]
    # Document 4 is found for query 3, though its own query is not asked.
    assert part.lists[3].document_ids == (f"d{4:012x}", f"d{3:012x}")
    assert part.sources == tuple(document for _, _, document in entries[:4])
    assert len(demo._search(entries, None, 1).lists) == 30
    assert all(len(ranking) == 1 for ranking in demo._search(entries, None, 1).lists)


def test_another_process_builds_the_same_corpus(answer, corpus):
    _, output, errors = answer
    assert output, errors
    assert json.loads(output)["fingerprint"] == fingerprint(corpus)


def test_the_build_prints_writes_and_imports_nothing(answer):
    folder, output, errors = answer
    assert errors == ""
    assert output.count("\n") == 1 and json.loads(output)["unwanted"] == []
    assert list(folder.iterdir()) == []


def test_summaries_are_cut_out_of_documentation():
    body = " ".join(f"word{i}" for i in range(20))
    summarise = demo._summarise
    assert summarise(f"Return the sum of two\nlong numbers. Fast.\n\n{body}") == (
        "Return the sum of two long numbers",
        f"Fast. {body}",
    )
    # A signature opens the document, also where it takes several lines.
    assert summarise(f"add(input,\n    other) -> Tensor\n\nAdds other to input.\n\n{body}") == (
        "Adds other to input",
        f"add(input, other) -> Tensor {body}",
    )
    # The summary goes wherever it stands, in any case, and also where its removal joins a new copy.
    query, document = summarise(f"Adds two numbers.\n\n{body} adds adds two numbers two numbers end")
    assert (query, document) == ("Adds two numbers", f"{body} end")
    # Markup of cross references is no text; an abbreviation ends no sentence.
    query, document = summarise(f"Like :func:`~torch.add`, e.g. for ints, i.e. whole.\n----\n\n{body} ``x``")
    assert query == "Like torch.add, e.g. for ints, i.e. whole" and document == f"{body} x"
    assert summarise(f"Too short.\n\n{body}") is None
    assert summarise("A summary of enough words.\n\nbut no document") is None
    assert summarise("") is None
    query, document = summarise(f"A lone \ud800 is not text.\n\n{body} \udfff")
    assert (query, document) == ("A lone \ufffd is not text", f"{body} \ufffd")


def test_sources_that_cannot_be_read_are_skipped_in_silence(tmp_path):
    hostile = {
        "syntax.py": b'"""Fine words here."""\ndef (:\n',
        "encoding.py": b'"""\xff\xfe broken"""\n',
        "nul.py": b'"""a\0b"""\n',
        "deep.py": b"x = " + b"(" * 5000 + b")" * 5000,
    }
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "print.py").write_text('"""Prints."""\nprint(1 / 0)\nx = "\\d"\n')
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [text for path in demo._python_files(tmp_path) for text in demo._strings_in_source(path)]
    assert texts == ["Prints."]
    assert list(demo._python_files(tmp_path / "nowhere")) == []


def test_public_members_and_attached_documentation_are_read(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""module"""\n'
        "class Open:\n    '''open'''\n    def method(self):\n        '''method'''\n"
        "    def _hidden(self):\n        '''hidden'''\n    def __call__(self):\n        '''call'''\n"
        "class _Closed:\n    '''closed'''\n"
        "if True:\n    async def inner():\n        '''inner'''\n"
        "add_docstr(abs, r'''abs({input}) {{x}}'''.format(**common))\n"
        "conv = _add_docstr(conv, 'conv ' + 'text')\n"
        "add_newdoc('place', 'name', ('attribute', 'newdoc'))\n"
    )
    texts = [text for text in demo._strings_in_source(path) if text]
    assert texts == ["module", "open", "method", "call", "inner", "abs() {x}", "conv text", "name", "newdoc"]


def test_near_copies_are_kept_once():
    words = [f"word{i}" for i in range(60)]
    document = " ".join(words)
    near_copy = " ".join([*words[:30], "changed", *words[31:]])
    other = " ".join(reversed(words))
    entries = [
        ("how to add numbers", document),
        None,
        ("how to add other numbers", near_copy),
        ("Numbers: how to add?", other),
        ("something else", other),
    ]
    assert demo._deduplicate(entries) == [entries[0], entries[4]]
